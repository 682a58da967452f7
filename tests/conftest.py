"""What every test stands on: one thread per process, no W&B account, no environment of an outer run."""

import os

# Before torch is imported: a process that has started OpenMP threads cannot fork ranks that compute.
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith(("WANDB_", "TORCHELASTIC_", "SLURM_"))]:
    del os.environ[name]

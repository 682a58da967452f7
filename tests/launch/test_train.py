"""`python train.py` as a newcomer uses it: help, one run, a sweep, a sweep resumed, under torchrun, from anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.command import REPOSITORY, TINY, train, user_environment
from tracking.record import RunRecord
from tracking.status import read_status

HEAVY = ("torch", "lightning", "wandb", "sklearn", "tokenizers")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['train.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code in (0, None), end.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=user_environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "ddp, fsdp, hsdp, model_parallel, pipeline, single" in run.stdout
    assert "HEAVY []" in run.stdout


def test_config_error_imports_nothing_heavy(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.max_steps=-1", PYTHONVERBOSE="1")
    assert run.returncode == 2
    assert "import 'pydantic' #" in run.stderr
    assert not [name for name in HEAVY if f"import '{name}' #" in run.stderr]


def test_shell_completion_offers_presets_and_keys(tmp_path: Path) -> None:
    for typed, offered in (("strategy=", "strategy=ddp"), ("trainer.max", "trainer.max_steps=")):
        line = f"train.py {typed}"
        run = train(tmp_path, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
        assert offered in run.stdout.split(), run.stdout + run.stderr


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A sweep of three jobs, from a folder of its own, the second of which fails."""
    folder = tmp_path_factory.mktemp("sweep")
    models = "models.language.LanguageModel,tests.launch.failing.HoldsNoReset"
    run = train(
        folder, "-m", *TINY, "strategy=single,ddp", f"model._target_={models}", "hydra.sweep.dir=jobs", timeout_s=300
    )
    return folder / "jobs", run


def states(sweep_dir: Path) -> list[str | None]:
    found = [read_status(sweep_dir / str(job)) for job in range(4)]
    return [status.state if status else None for status in found]


def test_failing_jobs_do_not_stop_a_sweep(sweep: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, run = sweep
    assert run.returncode == 1
    assert states(folder) == ["completed", "failed", "completed", "failed"]
    assert run.stdout.count("reset_parameters") >= 2  # the table's two failed rows say why
    single, ddp = (RunRecord.read(folder / job / "record.json") for job in ("0", "2"))
    assert (single.strategy, single.world_size) == ("single", 1)
    assert (ddp.strategy, ddp.world_size) == ("ddp", 2)
    assert single.results.val_loss == pytest.approx(ddp.results.val_loss, abs=1e-3)
    assert single.group == ddp.group is not None


@pytest.mark.full
def test_resumed_sweep_runs_only_what_is_missing(sweep: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = sweep
    kept = (folder / "0/record.json").stat().st_mtime_ns
    run = train(folder.parent, "resume_sweep=jobs", timeout_s=300)
    assert run.returncode == 1  # the broken model is still broken
    assert (folder / "0/record.json").stat().st_mtime_ns == kept
    assert states(folder) == ["completed", "failed", "completed", "failed"]
    assert sorted(path.parent.name for path in folder.glob("*/attempts")) == ["1", "3"]
    assert states(folder / "1" / "attempts")[1] == "failed"  # the first attempt is number 1


@pytest.mark.full
def test_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(REPOSITORY / "train.py"), "strategy=ddp", *TINY, "run_dir=run"],
        cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    record = RunRecord.read(tmp_path / "run/record.json")
    assert record.world_size == 2
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "completed"
    assert json.loads(status.model_dump_json())["exit_code"] == 0


@pytest.mark.full
def test_slurm_variables_make_train_py_a_rank(tmp_path: Path) -> None:
    # The border that cannot be crossed without a cluster: two processes started with srun's variables.
    ranks = [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), "strategy=ddp", *TINY],
            cwd=tmp_path,
            env=user_environment()
            | {
                "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "4", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train",
                "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_JOB_NODELIST": "elsewhere[1-4]", "SLURM_TASKS_PER_NODE": "2(x4)",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert RunRecord.read(tmp_path / "runs/slurm-4711.0/record.json").world_size == 2

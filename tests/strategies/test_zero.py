"""The ZeRO spec: what it refuses before a process starts, and what it makes of a model's size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.job import Job, resolve, run_of
from launch.schema import ConfigError, validate
from strategies.zero import PlusPlus, Zero
from tests.composing import compose_fast


def job_of(*words: str) -> Job:
    return Job.of(resolve(validate(compose_fast(["model=gpt_tiny", "launcher.accelerator=cpu", *words]))))


def config_of(sizes: list[int], *words: str, on_gpu: bool = False) -> dict[str, Any]:
    job = job_of(*words)
    assert isinstance(job.strategy, Zero)
    return job.strategy.deepspeed_config(
        sizes,
        precision=job.config.precision,
        accumulation=job.accumulation,
        micro_batch_size=job.data.micro_batch_size,
        clip_norm=job.config.trainer.clip_norm,
        blocks=["net.blocks.0"],
        nvme=Path("nvme"),
        on_gpu=on_gpu,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy=zero1", "+strategy.mesh.tensor=2"], ["strategy.mesh.tensor=2", "strategy=zero1", "set it to 1"]),
        (["strategy=zero2", "precision=fp64"], ["precision=fp64", "float64", "precision=fp32"]),
        (["strategy=zero3_offload", "precision=bf16_pure"], ["precision=bf16_pure", "precision=bf16_master"]),
        (["strategy=zero1", "strategy.communication_dtype=float64"], ["communication_dtype=float64", "bfloat16"]),
        (["strategy=zero2", "strategy.offload.parameters=cpu"], ["offload.parameters=cpu", "zero3_offload"]),
        (["strategy=zero1", "strategy.offload.optimizer=nvme"], ["offload.optimizer=nvme", "zero3_nvme"]),
        (["strategy=zero3_nvme", "strategy.offload.nvme_path=/no/such"], ["nvme_path=/no/such", "no folder"]),
        (["strategy=zero2", "strategy.plus_plus.quantized_weights=true"], ["quantized_weights=True", "strategy=zero3"]),
        (["strategy=zero3", "strategy.plus_plus.quantized_weights=true"], ["quantized_weights=True", "GPUs only"]),
        (["strategy=zero3", "strategy.plus_plus.quantized_gradients=true"], ["quantized_gradients", "GPUs only"]),
        (["strategy=zero3", "strategy.plus_plus.secondary_ranks=2"], ["secondary_ranks=2", "GPUs only"]),
        (["strategy=zero3", "strategy.reduce_to_owner=true"], ["reduce_to_owner=True", "stage 3"]),
        (["strategy=zero1", "strategy.whole_below=7"], ["whole_below=7", "strategy=zero3"]),
        (["strategy=zero1", "strategy.unit=module"], ["unit=module", "stage 1"]),
        (["strategy=zero2", "strategy.prefetch_mb=1"], ["prefetch_mb=1", "stage 2"]),
        (["strategy=zero3", "strategy.offload.nvme_path=/tmp"], ["nvme_path=/tmp", "zero3_nvme"]),
        (["strategy=zero1", "precision=bf16_master", "precision.reduce=float32"], ["bfloat16, bfloat16, float32"]),
        (["strategy=zero2", "strategy.bucket_mb=0"], ["strategy.bucket_mb", "greater than 0"]),
        (["strategy=zero2", "strategy.stage=4"], ["strategy.stage"]),
        (["strategy=zero2", "+strategy.offload.optimiser=cpu"], ["optimiser"]),
    ],
    ids=lambda part: part[-1] if isinstance(part, list) else str(part),
)
def test_what_cannot_run_is_refused_in_one_line(words: list[str], said: list[str]) -> None:
    with pytest.raises((ConfigError, ValueError)) as refusal:
        job_of(*words)
    line = str(refusal.value)
    assert "\n" not in line
    assert all(word in line for word in said), line


def test_secondary_shards_must_divide_the_ranks() -> None:
    job = job_of("strategy=zero3", "launcher.devices=4", "precision=bf16_master")
    assert isinstance(job.strategy, Zero)
    odd = replace(job.strategy, plus_plus=PlusPlus(secondary_ranks=3))
    with pytest.raises(ValueError, match="secondary_ranks=3 does not divide"):
        odd.check(run_of(job.config, job.data, "gpu"))


TINY = [128 * 256, *[128] * 8, *[128 * 128] * 24, 256 * 128]
HUGE = [8192 * 128256, *[8192] * 161, *[8192 * 28672] * 240, 8192 * 128256]  # of the order of 7e10


def test_constants_follow_the_models_size() -> None:
    tiny, huge = (config_of(sizes, "strategy=zero3", on_gpu=True)["zero_optimization"] for sizes in (TINY, HUGE))
    assert tiny["reduce_bucket_size"] < sum(TINY) / 8  # or a small model's gradients are all in the bucket
    assert huge["reduce_bucket_size"] == 50_000_000
    assert 128 <= tiny["stage3_param_persistence_threshold"] < 128 * 128  # vectors whole, matrices sharded
    assert 8192 <= huge["stage3_param_persistence_threshold"] < 8192 * 8192
    for section in (tiny, huge):
        assert section["stage3_max_live_parameters"] >= max(TINY if section is tiny else HUGE)
        assert section["stage3_max_reuse_distance"] == 0
        assert section["leaf_module"] == {"names": ["net.blocks.0"]}
    assert tiny["stage3_max_live_parameters"] < sum(TINY) / 2


def test_nothing_is_prefetched_where_nothing_runs_beside() -> None:
    assert config_of(TINY, "strategy=zero3")["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
    assert config_of(TINY, "strategy=zero3", on_gpu=True)["zero_optimization"]["stage3_prefetch_bucket_size"] > 0


def test_users_numbers_are_taken() -> None:
    words = ["strategy=zero3", "strategy.bucket_mb=1", "strategy.whole_below=0", "strategy.unit=module"]
    section = config_of(TINY, *words)["zero_optimization"]
    assert section["reduce_bucket_size"] == 2**20 / 4
    assert section["stage3_param_persistence_threshold"] == 0
    assert section["leaf_module"] == {"names": []}


def test_zero_plus_plus_reaches_deepspeed() -> None:
    job = job_of("strategy=zero3", "precision=bf16_master", "launcher.devices=4")
    assert isinstance(job.strategy, Zero)
    options = PlusPlus(secondary_ranks=2, quantized_weights=True, quantized_gradients=True)
    strategy = replace(job.strategy, plus_plus=options)
    strategy.check(run_of(job.config, job.data, "gpu"))
    section = strategy.deepspeed_config(
        TINY,
        precision=job.config.precision,
        accumulation=1,
        micro_batch_size=1,
        clip_norm=None,
        blocks=[],
        nvme=Path("nvme"),
        on_gpu=True,
    )["zero_optimization"]
    assert section["zero_hpz_partition_size"] == 2
    assert section["zero_quantized_weights"] is section["zero_quantized_gradients"] is True


def test_extensions_are_asked_for_only_where_they_are_used() -> None:
    assert job_of("strategy=zero3_offload").extensions == ()
    assert job_of("strategy=zero3_nvme").extensions == ("async_io",)
    assert job_of("strategy=zero3_nvme", "optimizer=cpu_adamw").extensions == ("async_io", "cpu_adam")
    assert job_of("strategy=single", "optimizer=cpu_adamw").extensions == ("cpu_adam",)

"""ZeRO: data parallelism that shards what DDP replicates (Rajbhandari et al. 2020), run by DeepSpeed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from strategies import zero_costs
from strategies.spec import (
    BYTES,
    STRICT,
    Dtype,
    Memory,
    Precision,
    Run,
    Strategy,
    Traffic,
    Workload,
    only_data_axis,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy as Engine

    from models.stats import ModelStats

SHORT: dict[Dtype, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # DeepSpeed's words
# Parameters, products, reductions, master weights: what an engine here really does.
FORMATS = {
    ("float32", "float32", "float32", "float32"),
    ("float32", "bfloat16", "float32", "float32"),
    ("float32", "float16", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
}
STAGES_OF = {"reduce_to_owner": (1, 2), "unit": (3,), "whole_below": (3,), "prefetch_mb": (3,)}
NVME_BUFFERS = 8  # shards on their way from the disk at a time: a layer's weight and bias, and what comes after
Device = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Offload:
    """Where what the device need not hold between uses lies instead."""

    optimizer: Device = "none"  # master weights, moments and the gradients that update them
    parameters: Device = "none"  # stage 3 only: the shards of the weights
    nvme_path: str | None = None  # a folder on the disk that is meant; null where nothing goes to nvme
    pin_memory: bool = True  # page-locked host memory on GPUs: faster copies, and nothing else can use it


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlusPlus:
    """ZeRO++ (Wang et al. 2023): less traffic between nodes for stage 3, at the price of memory and exactness."""

    secondary_ranks: PositiveInt = 1  # hpZ: ranks (of a node) that keep a second copy of the shards; 1 = off
    quantized_weights: bool = False  # qwZ: weights are gathered as int8
    quantized_gradients: bool = False  # qgZ: gradients are reduced as int4

    @property
    def chosen(self) -> list[str]:
        """The options that are on, as keys."""
        defaults = PlusPlus()
        return [key for key, value in vars(self).items() if value != getattr(defaults, key)]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes in elements that DeepSpeed wants as constants, fitted to one model."""

    bucket: int  # gradients reduced at a time
    whole_below: int  # stage 3: parameters of at most so many elements stay whole
    prefetch: int  # stage 3: parameters gathered ahead of use
    live: int  # stage 3: parameters gathered at a time, beyond which nothing is prefetched
    sub_group: int  # stage 3: parameters of a rank that are updated at a time


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Zero(Strategy):
    """Data parallelism whose ranks each own 1/N of the optimizer state (stage 1), gradients (2) and weights (3)."""

    stage: Literal[1, 2, 3]
    bucket_mb: PositiveFloat | Literal["auto"] = "auto"  # gradients reduced at a time
    overlap_comm: bool = True  # reduce while backward still runs; stages 1 and 2 take a second bucket for it
    reduce_to_owner: bool = False  # stages 1, 2: each slice to its owner alone, half the volume in N times the calls
    communication_dtype: Dtype | None = None  # gradients are reduced in it; null = the precision's own
    unit: Literal["block", "module"] = "block"  # stage 3: what is gathered at once, where the model's plan says blocks
    whole_below: NonNegativeInt | Literal["auto"] = "auto"  # stage 3: up to so many elements, it is not sharded
    prefetch_mb: NonNegativeFloat | Literal["auto"] = "auto"  # stage 3: parameters gathered ahead of use
    offload: Offload = Field(default_factory=Offload)
    plus_plus: PlusPlus = Field(default_factory=PlusPlus)

    @property
    def gathers_blocks(self) -> bool:
        """Whether a block is gathered at once; what is read from nvme comes layer by layer, through a few buffers."""
        return self.unit == "block" and self.offload.parameters != "nvme"

    @property
    def gathers_layers_again(self) -> bool:
        """Whether forwards that run again in backward gather weights by themselves; a block's are there by then."""
        return self.activation_checkpointing != "none" and not self.gathers_blocks

    @property
    def keeps_whole(self) -> bool:
        return self.stage < 3

    @property
    def unsaved(self) -> str | None:
        if self.extensions:
            return "what it keeps on an NVMe disk"
        return f"strategy.plus_plus.{self.plus_plus.chosen[0]}" if self.plus_plus.chosen else None

    @property
    def extensions(self) -> tuple[str, ...]:
        return ("async_io",) if "nvme" in (self.offload.optimizer, self.offload.parameters) else ()

    def check(self, run: Run) -> None:
        only_data_axis(self)
        self.check_stage()
        self.check_precision(run.precision)
        self.check_offload()
        self.check_plus_plus(run)
        self.check_compile(run)

    def check_stage(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(Zero)}
        for key, stages in STAGES_OF.items():
            value = getattr(self, key)
            if self.stage not in stages and value != defaults[key]:
                raise ValueError(
                    f"strategy.{key}={value}: stage {self.stage} has no use for it; leave it out, or choose "
                    f"strategy=zero{stages[-1]}."
                )

    def check_precision(self, precision: Precision) -> None:
        formats = (precision.parameter, precision.compute, precision.reduce, precision.master)
        if formats not in FORMATS:
            raise ValueError(
                f"precision={precision.name}: DeepSpeed does not train with parameters, products, reductions and "
                f"master weights in {', '.join(formats)}; choose precision=fp32, bf16, bf16_master, bf16_pure or fp16."
            )
        if precision.master == "bfloat16" and self.offload.optimizer != "none":
            raise ValueError(
                f"precision={precision.name}: DeepSpeed offloads no optimizer state in bfloat16; choose "
                f"precision=bf16_master, or strategy.offload.optimizer=none."
            )
        if self.communication_dtype not in (None, *SHORT):
            raise ValueError(
                f"strategy.communication_dtype={self.communication_dtype}: DeepSpeed reduces in "
                f"{', '.join(SHORT)}; choose one of them, or null."
            )

    def check_offload(self) -> None:
        offload = self.offload
        if self.stage < 3 and offload.parameters != "none":
            raise ValueError(
                f"strategy.offload.parameters={offload.parameters}: stage {self.stage} keeps the weights whole on "
                f"the device; set it to none, or choose strategy=zero3_offload."
            )
        if self.stage < 3 and offload.optimizer == "nvme":
            raise ValueError(
                f"strategy.offload.optimizer=nvme: stage {self.stage} offloads to the host's memory only; set it to "
                f"cpu, or choose strategy=zero3_nvme."
            )
        if offload.nvme_path is not None and not self.extensions:
            raise ValueError(
                f"strategy.offload.nvme_path={offload.nvme_path}: nothing is offloaded to nvme; leave it out, or "
                f"choose strategy=zero3_nvme."
            )
        if offload.nvme_path is not None and not Path(offload.nvme_path).is_dir():
            raise ValueError(
                f"strategy.offload.nvme_path={offload.nvme_path} is no folder; make it, or set it to null to use the "
                f"run folder's disk."
            )

    def check_plus_plus(self, run: Run) -> None:
        for key in self.plus_plus.chosen:
            word = f"strategy.plus_plus.{key}={getattr(self.plus_plus, key)}"
            if self.stage < 3:
                raise ValueError(f"{word}: ZeRO++ extends stage 3; leave it out, or choose strategy=zero3.")
            if not run.on_gpu:
                raise ValueError(f"{word}: ZeRO++ has kernels for GPUs only; leave it out on CPU.")
            if key.startswith("quantized") and run.precision.parameter != "bfloat16":
                raise ValueError(
                    f"{word}: only 16-bit weights and gradients are quantized; choose precision=bf16_master."
                )
        if self.mesh.data != "auto" and self.mesh.data % self.plus_plus.secondary_ranks:
            raise ValueError(
                f"strategy.plus_plus.secondary_ranks={self.plus_plus.secondary_ranks} does not divide the data axis of "
                f"{self.mesh.data} ranks; choose a divisor, such as the GPUs of a node."
            )

    def check_compile(self, run: Run) -> None:
        if run.compile and self.stage == 3 and not self.gathers_blocks:
            layerwise, blockwise = (
                ("unit=module", "unit=block")
                if self.unit == "module"
                else ("offload.parameters=nvme", "offload.parameters=cpu")
            )
            raise ValueError(
                f"compile=true: strategy.{layerwise} gathers weights layer by layer, which breaks a compiled block in "
                f"pieces; set strategy.{blockwise}, or compile=false."
            )

    def check_module(self, module: LightningModule, run: Run) -> None:
        from strategies.engines.deepspeed import check_compiled, check_module

        check_module(module, self.name, self.stage)
        if run.compile and self.stage == 3:
            check_compiled(module, self.name)

    def tune(self, sizes: Sequence[int], precision: Precision, *, on_gpu: bool) -> Tuning:
        """DeepSpeed's sizes for a model whose parameters have `sizes` elements.

        DeepSpeed's own constants suit models of some billions of parameters: a bucket of 5e8 elements holds all of a
        smaller model, so that stage 2 saves nothing, and with a reuse distance of 1e9 stage 3 never shards it.
        """
        total, largest = sum(sizes), max(sizes)
        mb = 2**20 / BYTES[precision.parameter]
        # 16 messages of a small model, of 100 MB and more of a large one: enough for any network.
        message = min(math.ceil(total / 16), 50_000_000)
        # Ahead of use only where copies run beside products.
        ahead = message if on_gpu else 0
        prefetch = ahead if self.prefetch_mb == "auto" else int(self.prefetch_mb * mb)
        return Tuning(
            bucket=message if self.bucket_mb == "auto" else math.ceil(self.bucket_mb * mb),
            # Vectors are many and small: gathering each twice costs more time than it saves memory.
            whole_below=min(total // 1000, 100_000) if self.whole_below == "auto" else self.whole_below,
            prefetch=prefetch,
            # Prefetching alone knows no bound: it would gather all of the model.
            live=2 * prefetch + largest,
            sub_group=max(math.ceil(total / self.mesh.data_ranks / 8), largest, 10_000_000),
        )

    def deepspeed_config(
        self,
        sizes: Sequence[int],
        *,
        precision: Precision,
        accumulation: int,
        micro_batch_size: int,
        clip_norm: float | None,
        blocks: Sequence[str],
        nvme: Path,
        on_gpu: bool,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """DeepSpeed's configuration of a run (https://www.deepspeed.ai/docs/config-json).

        sizes: elements of each parameter. blocks: FQNs of the plan's blocks. nvme: folder for what is offloaded to
        disk, this run's own.
        """
        tuning = self.tune(sizes, precision, on_gpu=on_gpu)
        section = self.base_section(tuning)
        if self.stage == 3:
            section |= self.sharding_section(tuning, blocks, lean=precision.autocasts or not compiled)
        section |= self.offload_section(max(sizes), nvme, on_gpu)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,  # any of torch's, as everywhere else
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": SHORT[self.communication_dtype or precision.reduce],
            "data_types": {"grad_accum_dtype": SHORT[precision.reduce]},
            "zero_optimization": section,
        }
        if precision.parameter == "bfloat16":
            pure = not precision.copies_master
            config["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": pure,
                "bf16_optimizer_states": pure,
                "check_grad_overflow": True,  # so that every stage and format notices NaN
            }
        return config

    def base_section(self, tuning: Tuning) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": self.overlap_comm,
            "reduce_bucket_size": tuning.bucket,
            "use_multi_rank_bucket_allreduce": not self.reduce_to_owner,
        }

    def sharding_section(self, tuning: Tuning, blocks: Sequence[str], *, lean: bool) -> dict[str, Any]:
        return {
            "sub_group_size": tuning.sub_group,
            "leaf_module": {"names": list(blocks) if self.gathers_blocks else []},
            "stage3_param_persistence_threshold": tuning.whole_below,
            "stage3_prefetch_bucket_size": tuning.prefetch,
            "stage3_max_live_parameters": tuning.live,
            "stage3_max_reuse_distance": 0,  # else nothing is released in a model of fewer elements
            # Else autograd keeps what was gathered of every Linear's weight until backward; compiled code does not.
            "memory_efficient_linear": lean,
            "zero_hpz_partition_size": self.plus_plus.secondary_ranks,
            "zero_quantized_weights": self.plus_plus.quantized_weights,
            "zero_quantized_gradients": self.plus_plus.quantized_gradients,
        }

    def offload_section(self, largest: int, nvme: Path, on_gpu: bool) -> dict[str, Any]:
        section: dict[str, Any] = {}
        for key, device in (("offload_optimizer", self.offload.optimizer), ("offload_param", self.offload.parameters)):
            if device != "none":
                section[key] = {"device": device, "pin_memory": self.offload.pin_memory and on_gpu}
            if device == "nvme":
                section[key]["nvme_path"] = str(nvme)
        if self.offload.parameters == "nvme":
            # What nvme is asked for goes there: by its own measure DeepSpeed would keep 1e9 elements in memory.
            shard = math.ceil(largest / self.mesh.data_ranks)
            section["offload_param"] |= {"max_in_cpu": 0, "buffer_size": shard, "buffer_count": NVME_BUFFERS}
        return section

    def memory(self, stats: ModelStats, workload: Workload) -> Memory:
        described = zero_costs.sharded_memory if self.stage == 3 else zero_costs.flat_memory
        return described(self, stats, workload)

    def traffic(self, stats: ModelStats, workload: Workload) -> Traffic:
        """The most that can be, where some weights are still there in backward, or not all blocks run forward again.

        The one is so with `prefetch_mb` above 0, the other with `unit=module` and activation checkpointing.
        """
        return zero_costs.traffic(self, stats, workload)

    def build(self, run: Run) -> Engine:
        from strategies.engines.deepspeed import ZeroEngine

        return ZeroEngine(self, run)

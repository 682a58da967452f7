"""The cases that agreement is proved and refuted on: small models on real text and images, each switch both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training set-up; strategy, `world_size` and `accumulation` are the candidate's, the rest everybody's."""

    strategy: str = "ddp"
    model: Literal["gpt", "vit"] = "gpt"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: bool = True
    tied: bool = False
    accumulation: int = 1
    world_size: int = 2
    precision: str = "fp32"
    checkpointing: str = "none"
    compile: bool = False
    unit: str = "block"  # what ZeRO-3 gathers at once
    words: tuple[str, ...] = ()  # further overrides of the candidate alone
    global_batch: int = 16
    steps: int = STEPS  # optimizer steps
    reference: Literal["plain", "true"] = "plain"  # what one process is: plain Lightning, or Concord's engine

    @property
    def shared(self) -> list[str]:
        """Overrides that the candidate has in common with its references."""
        return [
            *self.net,
            f"optimizer={self.optimizer}",
            f"optimizer.lr={0.003 if self.optimizer == 'adamw' else 0.1}",
            "scheduler.warmup_steps=2",
            f"trainer.clip_norm={0.3 if self.clip else 'null'}",
            f"trainer.max_steps={self.steps}",
            "trainer.val_every_steps=null",
            f"data.global_batch_size={self.global_batch}",
            # Ragged at every world size; compiled blocks would be compiled anew for it, which takes as long again.
            f"data.max_val_samples={16 if self.compile else 19}",
            "logger=none",
            "evidence=true",
            "launcher.accelerator=cpu",
        ]

    @property
    def net(self) -> list[str]:
        if self.model == "vit":
            return VIT
        return [
            "model=gpt_tiny",
            "model.net.num_layers=2",
            "model.net.num_heads=4",
            "model.net.num_kv_heads=2",
            "model.net.hidden_size=32",
            "model.net.mlp_size=64",
            f"model.net.tie_embeddings={str(self.tied).lower()}",
            "data=text",
            "data.sequence_length=32",
        ]

    @property
    def overrides(self) -> list[str]:
        choices = [f"precision={self.precision}", f"strategy={self.strategy}", f"launcher.devices={self.world_size}"]
        return [*self.shared, f"data.micro_batch_size={self.micro_batch_size}", *choices, *self.extras]

    @property
    def micro_batch_size(self) -> int:
        return self.global_batch // self.data_ranks // self.accumulation

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        on_other_axes = {"tensor": 0, "pipeline": 0, "model_parallel": 0, "2d": 2, "2d_pipeline": 2, "3d": 4}
        others = on_other_axes.get(self.strategy, 1)
        return self.world_size // others if others else 1

    @property
    def extras(self) -> list[str]:
        """Overrides of the candidate alone, beyond its strategy; empty where nothing but defaults is asked for."""
        words = {
            f"strategy.activation_checkpointing={self.checkpointing}": self.checkpointing != "none",
            f"strategy.unit={self.unit}": self.unit != "block",
            "compile=true": self.compile,
        }
        return [*(word for word, asked in words.items() if asked), *self.words]

    @property
    def reference_overrides(self) -> list[str]:
        # Lightning has nothing that steps a wider copy of the weights.
        way = "true" if self.precision == "bf16_master" else self.reference
        return [*self.shared, self.whole_batch, f"precision={self.precision}", "strategy=single", f"evidence={way}"]

    @property
    def exact_overrides(self) -> list[str]:
        return [*self.shared, self.whole_batch, "precision=fp64", "strategy=single", f"evidence={self.reference}"]

    @property
    def formats(self) -> dict[str, str]:
        """In which the candidate holds what its optimizer steps, and its weights before the first step."""
        master = "bfloat16" if self.precision == "bf16_pure" else "float32"
        return {"master": master, "parameter": "bfloat16" if self.precision == "bf16_master" else master}

    @property
    def whole_batch(self) -> str:
        """One process takes a global batch at once."""
        return f"data.micro_batch_size={self.global_batch}"

    def __str__(self) -> str:
        switches = [self.model, self.optimizer, "clip" if self.clip else "no-clip", "tied" if self.tied else "untied"]
        return "-".join(
            [
                self.strategy,
                *switches,
                f"accumulate{self.accumulation}",
                f"x{self.world_size}",
                self.precision,
                *(word.removeprefix("strategy.") for word in self.extras),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class OwnCase(Case):
    """A case whose model is a test's own."""

    own: str  # its class, from tests.strategies on

    @property
    def shared(self) -> list[str]:
        kept = [word for word in super().shared if not word.startswith(("model.net", "scheduler"))]
        return [*kept, f"model._target_=tests.strategies.{self.own}"]


def own(name: str, **case: Any) -> Case:
    """A case of a model in tests/strategies/own_models.py, or of `another_file.Model`."""
    return OwnCase(model="vit", own=name if "." in name else f"own_models.{name}", **case)


VIT = [
    "model=vit_tiny",
    "model.net.num_layers=2",
    "model.net.num_heads=2",
    "model.net.hidden_size=32",
    "model.net.mlp_size=64",
    "data=digits",
]

# Of each family, every pair of values of two switches occurs in some case (covering arrays of strength 2; a test
# counts them).
DDP_CASES = [
    Case(model="gpt", optimizer="adamw", clip=True, tied=False, accumulation=1, world_size=2),
    Case(model="gpt", optimizer="adamw", clip=False, tied=True, accumulation=4, world_size=4),
    Case(model="gpt", optimizer="sgd", clip=True, tied=True, accumulation=1, world_size=4),
    Case(model="gpt", optimizer="sgd", clip=False, tied=False, accumulation=4, world_size=2),
    Case(model="gpt", optimizer="sgd", clip=True, tied=False, accumulation=4, world_size=1),
    Case(model="gpt", optimizer="adamw", clip=False, tied=True, accumulation=1, world_size=1),
    Case(model="vit", optimizer="adamw", clip=True, accumulation=4, world_size=2),
    Case(model="vit", optimizer="sgd", clip=False, accumulation=1, world_size=4),
    Case(model="vit", optimizer="sgd", clip=True, accumulation=1, world_size=2),
    Case(model="vit", optimizer="adamw", clip=False, accumulation=4, world_size=4),
    Case(model="gpt", optimizer="adamw", clip=True, tied=True, accumulation=4, world_size=2, precision="bf16"),
    Case(model="vit", optimizer="adamw", clip=True, accumulation=1, world_size=1),
]

ZERO_CASES = [
    Case(strategy="zero1", model="gpt", optimizer="adamw", clip=False, tied=True, accumulation=4, world_size=4),
    Case(strategy="zero1", model="vit", optimizer="sgd", clip=True, tied=False, accumulation=1, world_size=2),
    Case(strategy="zero2", model="gpt", optimizer="adamw", clip=True, tied=True, accumulation=1, world_size=4),
    Case(strategy="zero2", model="vit", optimizer="sgd", clip=False, tied=False, accumulation=4, world_size=2),
    Case(strategy="zero3", model="gpt", optimizer="adamw", clip=False, tied=True, accumulation=4, world_size=4),
    Case(strategy="zero3", model="gpt", optimizer="sgd", clip=False, tied=False, accumulation=1, world_size=4),
    Case(strategy="zero3", model="vit", optimizer="adamw", clip=True, tied=False, accumulation=1, world_size=2),
    Case(strategy="zero3_offload", model="gpt", optimizer="sgd", clip=True, tied=True, accumulation=4, world_size=2),
    Case(strategy="zero3_offload", model="vit", optimizer="adamw", clip=False, accumulation=1, world_size=4),
]

# In the other formats, references round as coarsely, so agreement is a wider band by itself.
PRECISION_CASES = [
    Case(strategy="ddp", tied=True, accumulation=2, precision="bf16_master"),
    Case(strategy="ddp", precision="bf16_pure"),
    Case(strategy="zero1", accumulation=2, precision="bf16"),
    Case(strategy="zero1", accumulation=2, precision="bf16_master"),
    Case(strategy="zero1", precision="bf16_pure"),
    Case(strategy="zero2", accumulation=2, precision="bf16_master"),
    Case(strategy="zero3", tied=True, accumulation=2, precision="bf16"),
    Case(strategy="zero3", optimizer="sgd", clip=False, precision="bf16_master"),
    Case(strategy="zero2", precision="bf16_pure"),
    Case(strategy="zero3", precision="bf16_pure"),
    Case(strategy="zero3_offload", model="vit", precision="bf16_master"),
]

# Forward runs again in backward, by blocks that are gathered at once and by layers that are not.
CHECKPOINTING_CASES = [
    Case(strategy="single", world_size=1, checkpointing="full"),
    Case(strategy="ddp", tied=True, accumulation=2, checkpointing="every_2"),
    Case(strategy="ddp", precision="bf16", checkpointing="full"),
    Case(strategy="zero1", tied=True, accumulation=2, checkpointing="full"),
    Case(strategy="zero2", model="vit", precision="bf16_master", checkpointing="every_2"),
    Case(strategy="zero3", tied=True, accumulation=2, checkpointing="full"),
    Case(strategy="zero3", tied=True, accumulation=2, checkpointing="full", unit="module"),
    Case(strategy="zero3", precision="bf16", checkpointing="every_2", unit="module"),
    Case(strategy="zero3_offload", model="vit", checkpointing="full"),
]

COMPILE_CASES = [
    Case(strategy="ddp", compile=True, precision="bf16", checkpointing="full"),
    Case(strategy="zero3", compile=True, tied=True, accumulation=2),
]

# What stands for each of these strategies in the everyday tests; between them each switch is set either way.
EVERYDAY = {
    case.strategy: case
    for case in (
        CHECKPOINTING_CASES[0],  # single
        Case(strategy="ddp", model="vit", accumulation=4),
        Case(strategy="zero1", model="vit", optimizer="sgd"),
        Case(strategy="zero2", model="vit", optimizer="sgd", clip=False, accumulation=4),
        Case(strategy="zero3", tied=True, accumulation=2, checkpointing="full"),
        Case(
            strategy="zero3_offload", model="gpt", optimizer="sgd", clip=True, tied=True, accumulation=4, world_size=2
        ),
    )
}

"""The cases that agreement is proved and refuted on: small models on real text and images, each switch both ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STEPS = 4
GLOBAL_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training set-up; `world_size` and `accumulation` belong to the candidate, the rest to its references too."""

    model: Literal["gpt", "vit"] = "gpt"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    clip: bool = True
    tied: bool = False
    accumulation: int = 1
    world_size: int = 2
    precision: str = "fp32"

    @property
    def shared(self) -> list[str]:
        """Overrides that the candidate has in common with its references."""
        return [
            *{"gpt": self.gpt, "vit": VIT}[self.model],
            f"optimizer={self.optimizer}",
            f"optimizer.lr={0.003 if self.optimizer == 'adamw' else 0.1}",
            "scheduler.warmup_steps=2",
            f"trainer.clip_norm={0.3 if self.clip else 'null'}",
            f"trainer.max_steps={STEPS}",
            "trainer.val_every_steps=null",
            f"data.global_batch_size={GLOBAL_BATCH}",
            f"data.micro_batch_size={GLOBAL_BATCH // self.world_size // self.accumulation}",
            "data.max_val_samples=19",  # ragged at every world size
            "logger=none",
            "evidence=true",
            "launcher.accelerator=cpu",
        ]

    @property
    def gpt(self) -> list[str]:
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
        return [*self.shared, f"precision={self.precision}", "strategy=ddp", f"launcher.devices={self.world_size}"]

    @property
    def reference_overrides(self) -> list[str]:
        return [*self.shared, f"precision={self.precision}", "strategy=single"]

    @property
    def exact_overrides(self) -> list[str]:
        return [*self.shared, "precision=fp64", "strategy=single"]

    def __str__(self) -> str:
        switches = [self.model, self.optimizer, "clip" if self.clip else "no-clip", "tied" if self.tied else "untied"]
        return "-".join([*switches, f"accumulate{self.accumulation}", f"x{self.world_size}", self.precision])


VIT = [
    "model=vit_tiny",
    "model.net.num_layers=2",
    "model.net.num_heads=2",
    "model.net.hidden_size=32",
    "model.net.mlp_size=64",
    "data=digits",
]

# Every pair of values of two switches occurs in some case (a covering array of strength 2; a test counts them).
CASES = [
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

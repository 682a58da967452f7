"""A LightningDataModule of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from pydantic import PositiveInt, field_validator
from pydantic.dataclasses import dataclass

from datamodules.spec import FORBID_EXTRA, Data

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class OwnData(Data):
    """Settings of the user's module: `module` is its `_target_` and arguments, `tokens_per_sample` what it counts for.

    The order of samples is the module's business. For its runs to agree under every strategy, its loaders yield
    `micro_batch_size` samples at a time, and what rank `r` of `n` gets follows from
    `trainer.strategy.distributed_sampler_kwargs`, not from the global rank.
    """

    module: dict[str, Any]
    tokens_per_sample: PositiveInt = 1

    @field_validator("module")
    @classmethod
    def _has_target(cls, module: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(module.get("_target_"), str):
            raise ValueError("data.module has no _target_; give data.module._target_=package.YourDataModule.")
        return module

    def prepare(self) -> None:
        """Nothing: to ask the module would import torch before launch; Lightning calls its `prepare_data` in rank 0."""

    def build(self) -> LightningDataModule:
        module: LightningDataModule = instantiate(self.module)
        return module

"""A LightningDataModule of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass

from datamodules.refused import RefusedError
from datamodules.spec import FORBID_EXTRA, Data

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


@dataclass(frozen=True, kw_only=True, config=FORBID_EXTRA)
class OwnData(Data):
    """Settings of the user's module: `module` is its `_target_` and arguments, `tokens_per_sample` what it counts for.

    The samples of a data set with `__getitem__` come in the order of the module's own sampler, which is cut into
    global batches, and these into ranks and micro-batches, as those of any other data. What can only be iterated is
    read as it is by one data rank; `splits_itself` says that its own code gives each of several its share.
    `loader_batch_size` is what the training loader has, where that is not `micro_batch_size`.
    """

    module: dict[str, Any]
    tokens_per_sample: PositiveInt = 1
    seed: int = Field(default=0, ge=0, lt=2**32)
    max_val_samples: PositiveInt | None = None
    val_batch_size: PositiveInt | None = None  # of a rank, in validation; None is the validation loader's own
    loader_batch_size: PositiveInt | None = None
    splits_itself: bool = False

    @field_validator("module")
    @classmethod
    def _has_target(cls, module: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(module.get("_target_"), str):
            raise RefusedError("data.module has no _target_; give data.module._target_=package.YourDataModule.")
        return module

    def prepare(self) -> None:
        """Nothing: to ask the module would import torch before launch; Lightning calls its `prepare_data` in rank 0."""

    def build(self) -> LightningDataModule:
        """The user's module, whose loaders give samples in Concord's order; ValueError if it is none."""
        from lightning.pytorch import LightningDataModule

        from datamodules.own_loading import arrange

        try:
            module = instantiate(self.module)
        except InstantiationException as error:
            cause: BaseException = error
            while isinstance(cause, InstantiationException | ImportError) and cause.__cause__ is not None:
                cause = cause.__cause__
            absent = isinstance(cause, ModuleNotFoundError) and str(self.module["_target_"]).startswith(
                cause.name or ""
            )
            if isinstance(cause, InstantiationException) or absent:
                raise RefusedError(f"data.module: {self.module['_target_']}: {str(cause).splitlines()[0]}") from None
            raise cause from None  # of the user's own code: its type and line are told
        if not isinstance(module, LightningDataModule):
            raise RefusedError(f"data.module._target_={self.module['_target_']} is not a LightningDataModule.")
        return arrange(module, self)

"""Lightning's precision plugins for our own number formats."""

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from strategies import spec


class Autocast(MixedPrecision):
    """Products in bfloat16 by autocast; nothing is scaled, so any optimizer's gradients can be clipped."""

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        # MixedPrecision refuses fused optimizers, which unscale by themselves, also where there is no scaler.
        Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)


def precision_plugin(precision: spec.Precision, device_type: str) -> Precision:
    """The plugin that computes as `precision` says, on devices of one type (cpu, cuda)."""
    match precision.lightning:
        case "32-true":
            return Precision()
        case "64-true":
            return DoublePrecision()
        case "bf16-true":
            return HalfPrecision("bf16-true")
        case "bf16-mixed":
            return Autocast("bf16-mixed", device_type)
        case "16-mixed":
            return MixedPrecision("16-mixed", device_type)
    raise ValueError(
        f"precision={precision.name}: parameters in {precision.parameter} cannot be computed with in "
        f"{precision.compute}; choose one of conf/precision."
    )

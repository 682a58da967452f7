"""Lightning's precision plugins for our own number formats."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from models.plan import ParallelPlan, matches
from strategies import spec
from strategies.checkpoint import LossScale
from strategies.engines.probing import check_modes


class BuildsInItsOwnFormat(Precision):
    """Mixed into plugins that hold weights in another format than float32.

    Lightning's have a net built in that format, so that it draws other numbers than in float32, and not only rounded
    ones; here it is built as its own code has it, and converted.
    """

    def tensor_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()


class KeepsBuffers(BuildsInItsOwnFormat):
    """Mixed into plugins that narrow weights: what the net's plan says keeps its format."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        kept = list(buffers_to_keep(module))
        module = super().convert_module(module)
        for owner, key, buffer in kept:
            owner._buffers[key] = buffer
        return module


def buffers_to_keep(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Those that `ParallelPlan.keep_dtype` names: owner, name there, and the buffer; ValueError if it names none."""
    plan = getattr(module, "plan", None)
    if not isinstance(plan, ParallelPlan) or not plan.keep_dtype:
        return
    net = module.get_submodule(plan.net)
    named = dict(net.named_buffers())
    for pattern in plan.keep_dtype:
        found = [fqn for fqn in named if matches(pattern, fqn)]
        if not found:
            raise ValueError(f"plan.keep_dtype: {pattern!r} matches no buffer of the net; correct the FQN or the glob.")
        for fqn in found:
            owner, _, key = fqn.rpartition(".")
            yield net.get_submodule(owner), key, named[fqn]


class Double(BuildsInItsOwnFormat, DoublePrecision):
    """All in float64."""


class Half(KeepsBuffers, HalfPrecision):
    """All in one format of 16 bits, but for buffers that are to keep theirs."""


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


class MasterWeights(Half):
    """Weights, products and gradients in bfloat16; the optimizer works on a copy of the weights in float32.

    Micikevicius et al. 2018, section 3.1, with bfloat16's range, so without loss scaling. Gradients are widened before
    they are clipped.
    """

    def __init__(self) -> None:
        super().__init__("bf16-true")
        self.masters: list[tuple[nn.Parameter, Tensor]] = []

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        for optimizer in optimizers:
            check_modes(optimizer, "precision=bf16_master")
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            masters = [parameter.detach().float().requires_grad_() for parameter in group["params"]]
            self.masters += zip(group["params"], masters, strict=True)
            group["params"] = masters
        return model, optimizers, lr_schedulers

    def optimizer_step(  # type: ignore[override]  # as Lightning's own plugins do
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = closure()
        for parameter, master in self.masters:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self._after_closure(model, optimizer)
        optimizer.step(**kwargs)
        self.narrow()
        for parameter, master in self.masters:
            parameter.grad = master.grad = None  # Lightning zeroes what the optimizer has: the masters' alone
        return result

    def narrow(self) -> None:
        """Let the weights be the masters', rounded."""
        with torch.no_grad():
            for parameter, master in self.masters:
                parameter.copy_(master)


def masters_of(plugin: Precision) -> dict[Tensor, Tensor]:
    """The copy that is stepped in place of each parameter; empty where parameters are stepped themselves."""
    return dict(plugin.masters) if isinstance(plugin, MasterWeights) else {}


def narrow(plugin: Precision) -> None:
    """Round what has been loaded into the copies that are stepped, if there are any, into the parameters."""
    if isinstance(plugin, MasterWeights):
        plugin.narrow()


class LossScaler:
    """Dynamic loss scaling as torch.amp.GradScaler does it; DeepSpeed's own only goes with weights in float16.

    DeepSpeed scales the loss, unscales before it clips, finds overflow over all ranks and leaves the step out.
    """

    GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000  # torch's defaults, so that strategies agree

    def __init__(self) -> None:
        self.value = 2.0**16
        self.good_steps = 0

    def after(self, *, overflow: bool) -> float:
        """The scale for the next step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value *= self.BACKOFF
        elif self.good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= self.GROWTH
        return self.value

    @property
    def state(self) -> LossScale:
        return LossScale(value=self.value, good_steps=self.good_steps % self.GROWTH_INTERVAL)

    @state.setter
    def state(self, saved: LossScale) -> None:
        self.value, self.good_steps = saved.value, saved.good_steps


def loss_scale_of(plugin: Precision) -> LossScale | None:
    """Where torch's own loss scaling stands; None without float16."""
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
        return None
    state = plugin.scaler.state_dict()
    return LossScale(value=state["scale"], good_steps=state["_growth_tracker"])


def set_loss_scale(plugin: Precision, saved: LossScale) -> None:
    assert isinstance(plugin, MixedPrecision)
    assert plugin.scaler is not None
    state = {"scale": saved.value, "_growth_tracker": saved.good_steps}
    plugin.scaler.load_state_dict({**plugin.scaler.state_dict(), **state})


def autocast_inside(module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Every forward of `module` runs under autocast.

    From inside, because DeepSpeed's engine switches off what it finds outside; and not by DeepSpeed's own section
    `torch_autocast`, which also reduces gradients in `dtype`, and with float16 clips them before they are unscaled.
    """
    running: list[torch.autocast] = []

    def enter(*_: Any) -> None:
        running.append(torch.autocast(device_type, dtype))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def precision_plugin(precision: spec.Precision, device_type: str) -> Precision:
    """The plugin that computes as `precision` says, on devices of one type (cpu, cuda)."""
    if precision.copies_master:
        if (precision.parameter, precision.compute, precision.master) == ("bfloat16", "bfloat16", "float32"):
            return MasterWeights()
        raise unknown(precision)
    match precision.lightning:
        case "32-true":
            return Precision()
        case "64-true":
            return Double()
        case "bf16-true":
            return Half("bf16-true")
        case "bf16-mixed":
            return Autocast("bf16-mixed", device_type)
        case "16-mixed":
            return MixedPrecision("16-mixed", device_type)
    raise unknown(precision)


def unknown(precision: spec.Precision) -> ValueError:
    return ValueError(
        f"precision={precision.name}: parameters in {precision.parameter} cannot be computed with in "
        f"{precision.compute} and optimized in {precision.master}; choose one of conf/precision."
    )


def name(dtype: torch.dtype) -> str:
    """A format as conf/precision spells it."""
    return str(dtype).removeprefix("torch.")


def names(tensors: Iterable[Tensor]) -> str:
    """The formats of tensors, in words."""
    return " and ".join(dict.fromkeys(name(tensor.dtype) for tensor in tensors))

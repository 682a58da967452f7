"""By how much an optimizer looks at once: at one element, at a parameter, or at all of them. It is tried, not guessed.

Who steps a part of a parameter by itself (ZeRO, FSDP, tensor parallelism) may do so for an optimizer that updates each
element from what it has kept of that element: Adam, Lion, schedule-free SGD. One that looks at a row, a norm or a
product of a matrix (Adafactor, LAMB, LARS, Muon, Shampoo) would become another algorithm without a word.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.engines.groups import Settings, same, settings_of

Scope = Literal["element", "parameter", "all"]

# Known to update each element by itself; not tried, since some of them are built for other devices.
ELEMENTWISE = {
    "torch.optim": {"Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"},
    "deepspeed.ops": {"DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedAdam", "FusedLion"},
}

STEPS = 3
SHAPES = {0: (), 1: (8,), 2: (6, 8), 3: (4, 3, 4), 4: (4, 3, 2, 2), 5: (4, 3, 2, 2, 2)}
RATE = 0.1  # instead of one so small that nothing shows
TOLERANCE = 1e-4  # of what steps in float32 change, relative to the largest change

Cut = Callable[[Sequence[Tensor]], list[list[Tensor]]]  # tensors as those of one optimizer or of several


def scope_of(optimizer: Optimizer, num_dims: Sequence[Sequence[int]], device: torch.device) -> Scope:
    """What an update of an element depends on, besides the element: nothing, its parameter, or all parameters.

    Small tensors are stepped by a copy of the optimizer, whole and in parts, on gradients drawn at random.

    num_dims: of the parameters of each of its groups. An optimizer that cannot be tried counts as looking at all.
    """
    kind = type(optimizer)
    if any(kind.__module__.startswith(home) and kind.__name__ in names for home, names in ELEMENTWISE.items()):
        return "element"
    scopes: list[Scope] = ["all", "parameter", "element"]
    found = 2
    for group, dims in zip(optimizer.param_groups, num_dims, strict=True):
        shapes = [SHAPES[min(number, 5)] for number in sorted({0, *dims} - {0} or {1})] * 2  # two of each
        try:
            whole, (kept,) = stepped(optimizer, group, shapes, device, lambda tensors: [list(tensors)])
            alone, others = stepped(optimizer, group, shapes, device, lambda tensors: [[tensor] for tensor in tensors])
        except Exception:  # noqa: BLE001  # whatever an optimizer says to tensors that are not its own
            return "all"
        # What it keeps in its groups, such as Prodigy's distance, may show in no weight yet.
        if not agree(whole, alone) or not all(same(kept, other) for other in others):
            return "all"
        if not all(agree(whole, tried(optimizer, group, shapes, device, cut)) for cut in (rows, flat)):
            found = min(found, 1)
    return scopes[found]


def tried(
    optimizer: Optimizer, group: dict[str, Any], shapes: Sequence[tuple[int, ...]], device: torch.device, cut: Cut
) -> list[Tensor]:
    try:
        return stepped(optimizer, group, shapes, device, cut)[0]
    except Exception:  # noqa: BLE001  # Muon takes no vector, others no tensor without elements
        return []


def stepped(
    optimizer: Optimizer, group: dict[str, Any], shapes: Sequence[tuple[int, ...]], device: torch.device, cut: Cut
) -> tuple[list[Tensor], list[Settings]]:
    """What steps of `optimizer` change of tensors of these shapes, flat, and what is then in its groups.

    In as many optimizers as `cut` makes of it.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    made = cut(draw())
    parameters = [[nn.Parameter(tensor.clone()) for tensor in tensors] for tensors in made]
    copies = [alike(optimizer, group, those) for those in parameters]
    for _ in range(STEPS):
        for those, gradients, one in zip(parameters, cut(draw()), copies, strict=True):
            for parameter, gradient in zip(those, gradients, strict=True):
                parameter.grad = gradient.clone()
            ready_to_step(one)
            one.step()
    pairs = [pair for those, before in zip(parameters, made, strict=True) for pair in zip(those, before, strict=True)]
    changes = [(parameter.detach() - before).flatten() for parameter, before in pairs]
    return changes, [settings_of(one)[0] for one in copies]


def alike(optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """A copy of an optimizer that has nothing of it but its settings."""
    made: Any = object.__new__(type(optimizer))  # copy.copy keeps what Optimizer has, and leaves out what a class adds
    vars(made).update(vars(optimizer))
    vars(made).pop("step", None)  # a schedule puts one there that counts
    made.state = defaultdict(dict)
    for hooks in [name for name, value in vars(made).items() if isinstance(value, OrderedDict)]:
        setattr(made, hooks, OrderedDict())
    settings = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    if "lr" in settings:
        settings["lr"] = settings["lr"] * 0 + RATE  # of the type that it has
    made.param_groups = [{**settings, "params": list(parameters)}]
    return made


def ready_to_step(optimizer: Optimizer) -> None:
    """Switch an optimizer that has modes, as schedule-free ones do, to the one in which it steps."""
    switch = getattr(optimizer, "train", None)  # torch's own have none
    if callable(switch):
        switch()


def check_modes(optimizer: Optimizer, where: str) -> None:
    """ValueError for an optimizer with an eval() that moves weights, as schedule-free ones do, which would not arrive.

    where: what keeps the weights that are stepped apart from those that compute.
    """
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"{where} steps copies of the weights, and {type(optimizer).__name__}.eval() would not reach those that "
            f"are validated; choose strategy=ddp or fsdp with precision=fp32 or bf16, or another optimizer."
        )


def rows(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Each tensor's first half of rows for one optimizer, the others for another, as FSDP has them."""
    halves = [tensor.tensor_split(2) for tensor in tensors]
    return [[first for first, _ in halves], [second for _, second in halves]]


def flat(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """All numbers in one vector, cut in the middle, as ZeRO has them."""
    return [[half] for half in torch.cat([tensor.flatten() for tensor in tensors]).tensor_split(2)]


def agree(whole: Sequence[Tensor], parts: Sequence[Tensor]) -> bool:
    """Whether the same numbers came out, in whichever order."""
    if not parts:
        return False
    one, other = (torch.cat(list(tensors)).sort().values for tensors in (whole, parts))
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())

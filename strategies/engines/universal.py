"""DeepSpeed's universal checkpoint, and a whole model with its optimizer's state, from a checkpoint of any strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from strategies.checkpoint import AVERAGE, Manifest
from strategies.engines.checkpoint import Reader
from strategies.engines.deepspeed import import_deepspeed
from strategies.engines.formats import places, read_whole
from strategies.fitting import Rename
from strategies.weights import Source, only_weights


def give_storage(module: nn.Module) -> None:
    """Make a net's parameters and persistent buffers CPU tensors, of memory that is not taken before it is filled."""
    made: dict[Tensor, Tensor] = {}
    saved = module.state_dict().keys()
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="cpu")
                part._parameters[name] = made.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in part._buffers.items():
            if buffer is not None and f"{prefix}.{name}".removeprefix(".") in saved:
                part._buffers[name] = made.setdefault(buffer, torch.empty_like(buffer, device="cpu"))


def fill(reader: Reader, module: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights and optimizer state into a whole model."""
    place, tensors = places(only_weights(reader.manifest), module), module.state_dict(keep_vars=True)
    for fqn, name in place.items():
        tensors[fqn].data = read_whole(reader, name)
        states = state_names(reader.manifest, fqn)
        if states:
            optimizer.state[tensors[fqn]] = {key: read_whole(reader, state) for key, state in states.items()}


def state_names(manifest: Manifest, fqn: str) -> dict[str, str]:
    """By its key, where what the optimizer keeps for a parameter lies; no other program looks for an average there."""
    keys = {name.split("/")[1] for name in manifest.tensors if name.startswith("state/")} - {AVERAGE}
    return {key: f"state/{key}/{fqn}" for key in sorted(keys) if f"state/{key}/{fqn}" in manifest.tensors}


def to_universal(
    source: Source,
    module: nn.Module,
    optimizer: Optimizer,
    schedule: Mapping[str, Any] | None,
    out: Path,
    rename: Rename,
) -> None:
    """Write the folder that DeepSpeed loads with `checkpoint: {load_universal: true}`; one tensor is in memory.

    What is in it: deepspeed.checkpoint.ds_to_universal. Of the module and the optimizer, names and settings are read.
    """
    import_deepspeed(on_gpu=False)
    from deepspeed import __version__
    from deepspeed.checkpoint import constants

    step = source.manifest.step
    tag = out / f"global_step{step}"
    zero = tag / "zero"
    zero.mkdir(parents=True)
    groups = [{**group, "params": []} for group in optimizer.state_dict()["param_groups"]]
    with Reader(source.folder, source.manifest) as reader:
        place = places(only_weights(source.manifest), module)
        for fqn, parameter in module.named_parameters():
            if parameter.requires_grad:
                write_universal(reader, place[fqn], state_names(source.manifest, fqn), zero / rename(fqn))
        count = first_count(reader)
    torch.save(
        {
            constants.PARAM_GROUPS: groups,
            # ZeRO-3 gives all groups what stands in the first: so only what they have in common stands there.
            constants.OPTIMIZER_STATE_DICT: {"state": {0: {"step": count}}, constants.PARAM_GROUPS: [common(groups)]},
            constants.DS_VERSION: __version__,
        },
        zero / "optimizer_state.pt",
    )
    state = {
        "module": {}, "optimizer": None, "lr_scheduler": schedule, "global_steps": step, "skipped_steps": 0,
        "dp_world_size": 1, "mp_world_size": 1, constants.DS_VERSION: __version__,
    }  # fmt: skip
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2 look for the first, 3 for the second
        torch.save(state, tag / f"{name}_model_states.pt")
    (out / "latest_universal").write_text(tag.name)


def write_universal(reader: Reader, weight: str, states: Mapping[str, str], folder: Path) -> None:
    """One parameter's folder: its master weight, and what the optimizer keeps of it."""
    folder.mkdir()
    for key, name in {"fp32": weight, **states}.items():
        write_value(read_whole(reader, name), key, folder)


def write_value(value: Tensor, key: str, folder: Path) -> None:
    torch.save(value if key == "step" else {"param": value.float()}, folder / f"{key}.pt")


def first_count(reader: Reader) -> Tensor:
    """How many steps the optimizer has counted; zero where it counts none."""
    counts = [name for name in reader.manifest.tensors if name.startswith("state/step/")]
    return read_whole(reader, counts[0]) if counts else torch.zeros(())


def common(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all groups of an optimizer share."""
    first, *others = groups
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

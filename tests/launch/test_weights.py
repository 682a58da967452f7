"""`model.weights`: every strategy starts from the same weights, wherever they lie; what does not fit is one line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.compose import compose
from launch.dispatch import prepare
from launch.schema import ConfigError, RunConfig, validate
from launch.weights import StartingWeights
from launch.worker import build_model
from strategies.checkpoint import checkpoints
from strategies.engines.formats import described, to_checkpoint
from strategies.fitting import renamer
from strategies.weights import INDEX
from tests.agreement.cases import Case
from tests.agreement.grid_cases import GridCase
from tests.agreement.training import train_case
from tests.launch.command import TINY
from tests.launch.warm import train
from tests.tiers import in_tiers
from tracking.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class StartCase(GridCase):
    """A model of four blocks and a tied head, which tensor and pipe ranks can cut."""

    tied: bool = True

    @property
    def net(self) -> list[str]:
        return [*(word for word in super().net if "num_layers" not in word), "model.net.num_layers=4"]


SINGLE = StartCase(strategy="single", world_size=1)
STARTS = {
    case.strategy: case
    for case in (
        SINGLE,
        StartCase(strategy="ddp", accumulation=2),
        StartCase(strategy="zero1"),
        StartCase(strategy="zero3"),
        StartCase(strategy="fsdp"),
        StartCase(strategy="tensor"),
        StartCase(strategy="pipeline", schedule="1f1b"),
        StartCase(strategy="3d", world_size=8),
    )
}
STAYS = ["optimizer.lr=0", "trainer.max_steps=1"]  # after a step the weights are what they were


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return validate(compose([*SINGLE.overrides, f"run_dir='{tmp_path_factory.mktemp('config')}'"]))


@pytest.fixture(scope="module")
def state(config: RunConfig) -> dict[str, Tensor]:
    """Weights that no draw would give, each tensor once."""
    model = build_model(config)
    model.configure_model()
    generator = torch.Generator().manual_seed(5)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def as_file(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def as_index(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "b.safetensors")
    places = ", ".join(f'"{name}": "{"ab"[i % 2]}.safetensors"' for i, name in enumerate(names))
    (folder / INDEX).write_text(f'{{"weight_map": {{{places}}}}}')
    return folder


def as_checkpoint(state: dict[str, Tensor], folder: Path) -> Path:
    to_checkpoint(described(state), state.__getitem__, folder / "made")
    return folder / "made"


def under_the_tied_name(state: dict[str, Tensor], folder: Path) -> Path:
    """Of tensors that are one, safetensors keeps any of the names."""
    assert "net.head.logits.weight" not in state
    names = {"net.embed.tokens.weight": "net.head.logits.weight"}
    return as_file({names.get(name, name): tensor for name, tensor in state.items()}, folder)


Place = Callable[[dict[str, Tensor], Path], Path]
KINDS: list[Place] = [as_file, as_index, as_checkpoint, under_the_tied_name]
PAIRS = [(name, KINDS[number % len(KINDS)]) for number, name in enumerate(STARTS)]


@pytest.fixture(scope="module")
def first_loss(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> float:
    """What one process loses in its first step from these weights on."""
    folder = tmp_path_factory.mktemp("single")
    path = as_file(state, folder)
    return train_case([*SINGLE.overrides, *STAYS, f"model.weights='{path}'"], folder / "run").losses[0]


@pytest.mark.parametrize(
    ("strategy", "place"),
    in_tiers(PAIRS, [pair for pair in PAIRS if pair[0] in ("single", "zero3", "fsdp")]),
    ids=lambda part: getattr(part, "__name__", part),
)
def test_every_rank_starts_from_these_very_weights(
    strategy: str, place: Place, state: dict[str, Tensor], first_loss: float, tmp_path: Path
) -> None:
    path = place(state, tmp_path)
    evidence = train_case([*STARTS[strategy].overrides, *STAYS, f"model.weights='{path}'"], tmp_path / "run")
    assert evidence.losses[0] == pytest.approx(first_loss, rel=2e-6)
    shown = {name: weight for weights in evidence.weights for name, weight in weights.items()}
    assert shown.keys() == state.keys()
    for weights in evidence.weights:
        for name, weight in weights.items():
            assert np.array_equal(weight, state[name].numpy()), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence]:
    """A run of two steps with a checkpoint of the last, and its evidence."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    words = [*SINGLE.overrides, "trainer.max_steps=2", "checkpoint.at_end=true"]
    return run_dir, train_case(words, run_dir)


def test_of_a_run_only_the_weights_are_taken(trained: tuple[Path, Evidence], tmp_path: Path) -> None:
    """Its optimizer's state and its place in the data stay behind: the same weights in a plain file do the same."""
    run_dir, before = trained
    save_file(
        {name: torch.from_numpy(weight) for name, weight in before.weights[0].items()}, tmp_path / "w.safetensors"
    )
    (newest,) = checkpoints(run_dir)
    by_run, by_file = (
        train_case([*SINGLE.overrides, f"model.weights='{path}'"], tmp_path / "runs" / path.name)
        for path in (newest, tmp_path / "w.safetensors")
    )
    assert by_run.losses == by_file.losses
    assert by_run.samples[:2] == before.samples[:2]
    assert by_run.losses[0] < before.losses[0]


def test_start_is_part_of_what_a_run_is(config: RunConfig) -> None:
    other = validate(compose([*SINGLE.overrides, "run_dir=x", "model.weights=w.safetensors"]))
    assert other.weights == "w.safetensors"
    assert other.hash != config.hash
    assert validate(other.model_dump()) == other
    assert "weights" not in other.model
    build_model(other)


def of_another_code(state: dict[str, Tensor], folder: Path) -> Path:
    """Under the names of a compiled net in another module, without adapters and with a head of other classes."""
    kept = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    others = {f"module._orig_mod.{name.removeprefix('net.')}": tensor for name, tensor in kept.items()}
    return as_file({**others, "module._orig_mod.pooler.weight": torch.zeros(3)}, folder)


FITS = [
    "model.weights_rename=[module._orig_mod.:net.]",
    "model.weights_ignore=[net.pooler.*]",
    "model.weights_may_lack=[net.blocks.*.mlp.*]",
]
FITTED = ["fsdp", "zero3", "pipeline", "zero1", "tensor"]


@pytest.mark.parametrize("strategy", in_tiers(FITTED, ["fsdp"]))
def test_what_a_file_may_lack_keeps_its_initial_values(strategy: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = of_another_code(state, tmp_path)
    words = [*STARTS[strategy].overrides, *STAYS]
    drawn = train_case(words, tmp_path / "drawn")
    evidence = train_case([*words, f"model.weights='{path}'", *FITS], tmp_path / "run")
    log = (tmp_path / "run" / "rank0.log").read_text()
    assert "26 of 38 tensors are from there; 12 keep their initial values (net.blocks.0.mlp.gate.weight, " in log
    assert "; 1 there are left out (net.pooler.weight)\n" in log
    for weights, initial in zip(evidence.weights, drawn.weights, strict=True):
        for name, weight in weights.items():
            assert np.array_equal(weight, initial[name] if ".mlp." in name else state[name].numpy()), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], r"set model.weights_rename=\[module._orig_mod.:net.\]\.$"),
        (
            FITS[:1],
            r"set model.weights_may_lack=\[net.blocks.\*.mlp.gate.weight,.*\] if they are to keep",
        ),
        ([FITS[0], FITS[2]], r"set model.weights_ignore=\[net.pooler.weight\] to leave them out\.$"),
        (
            [*FITS[:2], "model.weights_may_lack=[*.mlp.*,nothing]"],
            "the model has no tensor nothing, as model",
        ),
    ],
)
def test_key_that_would_make_them_fit_is_in_the_line(
    words: list[str], told: str, state: dict[str, Tensor], config: RunConfig, tmp_path: Path
) -> None:
    path = of_another_code(state, tmp_path)
    given = validate(compose([*SINGLE.overrides, f"model.weights='{path}'", *words, f"run_dir='{tmp_path}'"]))
    with pytest.raises(ConfigError, match=told) as refusal:
        StartingWeights(path, build_model(config), given.fitting)
    assert "\n" not in str(refusal.value)


def test_names_are_parts_that_stars_stand_for() -> None:
    rename = renamer(["*.q.weight:net.*.q.base_layer.weight", "*_orig_mod.*:**", ":net."], ":", "any")
    assert rename("layers.0.q.weight") == "net.layers.0.q.base_layer.weight"
    assert rename("a._orig_mod.b") == "a.b"
    assert rename("layers.0.norm.weight") == "net.layers.0.norm.weight"


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing there": (["model.weights=nowhere"], "model.weights=nowhere: .*nowhere does not exist"),
    "pickle": (["model.weights={folder}/w.pt"], r"convert it first: python scripts/convert.py --from .*w\.pt"),
    "no weights": (["model.weights={folder}"], "has no checkpoint.json"),
    "going on, too": (["model.weights={folder}/w.pt", "resume=first"], "model.weights=.* and resume=first: .* leave"),
    "no pair": (
        ["model.weights={folder}/w.safetensors", "model.weights_rename=[net.]"],
        "model.weights_rename=net.: give old:new",
    ),
    "as many stars": (
        ["model.weights={folder}/w.safetensors", "model.weights_rename=[*.a:b]"],
        "model.weights_rename=.*: give both sides as many stars",
    ),
    "renames nothing": (
        ["model.weights={folder}/w.safetensors", "model.weights_rename=[other.:net.]"],
        "model.weights_rename=other.:net.: no tensor there is called so",
    ),
    "ignores nothing": (
        ["model.weights={folder}/w.safetensors", "model.weights_ignore=[other.*]"],
        r"model.weights_ignore=other.\*: no tensor there is called so",
    ),
    "nothing to fit": (["model.weights_may_lack=[a]"], "model.weights_may_lack=.*: there are no model.weights"),
    "what lies on a disk": (
        ["model.weights={folder}/w.safetensors", "strategy=zero3_nvme", "strategy.offload.nvme_path=."],
        "strategy=zero3_nvme has; choose strategy=zero3_offload",
    ),
}


@pytest.mark.parametrize(("words", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_before_anything_starts(words: list[str], told: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "w.pt")
    save_file({"net.a": torch.zeros(1)}, tmp_path / "w.safetensors")
    words = [word.format(folder=tmp_path) for word in words]
    with pytest.raises(ConfigError, match=told) as refusal:
        prepare(compose([*SINGLE.shared, *words, f"run_dir='{tmp_path}'"]))
    assert "\n" not in str(refusal.value)


def test_run_that_finds_no_checkpoint_to_go_on_from_starts_from_them(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = as_file(state, tmp_path)
    words = [*SINGLE.overrides, f"model.weights='{path}'", "resume=auto", f"run_dir='{tmp_path}'"]
    config = prepare(compose(words)).config
    assert (config.resume, config.weights) == (None, str(path))


def lacking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if ".mlp." not in name}


def too_much(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "net.adapter": torch.zeros(1), "net.bridge": torch.zeros(1)}


def misshapen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "net.norm.weight": torch.zeros(5)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lacking, r"it has no net.blocks.0.mlp.gate.weight \(12 of the model's 38 tensors are not there\)"),
        (too_much, "the model has no net.adapter .2 of its 40 tensors"),
        (misshapen, r"net.norm.weight is of shape \(5,\), not \(32,\) \(1 differ\)"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_weights_of_another_model_are_told_by_the_first_that_differs(
    change: Callable, told: str, state: dict[str, Tensor], config: RunConfig, tmp_path: Path
) -> None:
    path = as_file(change(state), tmp_path)
    with pytest.raises(ConfigError, match=f"model.weights={path}: {told}") as refusal:
        StartingWeights(path, build_model(config))
    assert "\n" not in str(refusal.value)


@pytest.mark.full
def test_mistake_that_takes_torch_to_see_is_one_line_too(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = as_file(state, tmp_path)
    run = train(tmp_path, *TINY, "strategy=ddp", f"model.weights='{path}'", "run_dir=run")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"model.weights={path}: it has") or "net." in run.stderr


@pytest.mark.full
def test_verify_starts_its_references_from_them_too(state: dict[str, Tensor], tmp_path: Path) -> None:
    from launch.verify import verify

    path = of_another_code(state, tmp_path)
    words = [*FITS, *Case(strategy="ddp").net, "model.net.num_layers=4", "model.net.tie_embeddings=true"]
    words += [
        "data.global_batch_size=8",
        "data.micro_batch_size=4",
        "data.max_val_samples=8",
        "launcher.accelerator=cpu",
    ]
    assert verify([*words, "strategy=ddp", f"model.weights='{path}'", f"run_dir={tmp_path / 'proof'}"]) == 0
    for name in ("exact", "reference", "candidate"):
        assert f"weights: {path}" in (tmp_path / "proof" / name / "resolved.yaml").read_text()

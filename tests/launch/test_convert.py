"""scripts/convert.py: others go on from our checkpoints as we would have, and we start from weights of theirs."""

import json
import re
import shlex
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from torch import Tensor

from datamodules.loading import BatchDataset
from datamodules.order import Order
from datamodules.spec import SampledData
from launch.dispatch import load_resolved
from launch.job import Job
from launch.worker import build_model, quiet
from scripts.convert import FORMATS, main, parse
from strategies.checkpoint import MANIFEST, Manifest, checkpoints, folder_of
from strategies.engines import formats
from strategies.engines.checkpoint import Reader
from strategies.engines.deepspeed import import_deepspeed
from strategies.engines.materialize import materialize
from strategies.weights import INDEX, weights_of
from tests.agreement.cases import Case, own
from tests.agreement.grid_cases import GridCase
from tests.agreement.training import job_of, train_case
from tests.harness import run_ranks
from tests.launch.command import REPOSITORY
from tracking.evidence import Evidence

SAVED, LAST = 2, 4  # optimizer steps
# Sums in another order, in one process: what one step's losses differ by in float32.
RTOL = 2e-6


@dataclass(frozen=True)
class Run:
    folder: Path
    evidence: Evidence

    @property
    def checkpoint(self) -> Path:
        return folder_of(self.folder, SAVED)


def run_of(case: Case, folder: Path) -> Run:
    words = [*case.overrides, f"checkpoint.every_steps={SAVED}"]
    run = Run(folder, train_case(words, folder))
    (folder / "resolved.yaml").write_text(yaml.safe_dump(job_of(words, folder).config.model_dump()))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two ranks that each have half of every tensor; a tied head, and groups of which one does not decay."""
    import_deepspeed(on_gpu=False)
    case = GridCase(strategy="fsdp", tied=True, accumulation=2)
    return run_of(case, tmp_path_factory.mktemp("fsdp"))


def weights_at(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, read by no converter."""
    folder, manifest = weights_of(folder)
    with Reader(folder, manifest) as reader:
        return {name.removeprefix("weight/"): formats.read_whole(reader, name) for name in manifest.tensors}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_safetensors_hold_whole_weights_by_name(run: Run, tmp_path: Path) -> None:
    assert main([str(run.folder), "--to", "safetensors", str(tmp_path / "w.safetensors")]) == 0
    found = load_file(tmp_path / "w.safetensors")
    (*_, newest) = checkpoints(run.folder)
    assert same(found, weights_at(newest))
    shown = run.evidence.weights[0]  # of the last step, as verify sees it
    assert found.keys() == shown.keys()
    assert all(torch.equal(found[name], torch.from_numpy(shown[name])) for name in shown)


def test_shards_are_of_the_size_asked_for_and_in_the_index(run: Run, tmp_path: Path) -> None:
    limit = 8192
    words = ["--to", "safetensors", "--shard-gib", str(limit / 2**30), "--rename", "net.=transformer."]
    assert main([str(run.checkpoint), str(tmp_path / "w"), *words]) == 0
    index = json.loads((tmp_path / "w" / INDEX).read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "w").glob("*.safetensors")}
    assert len(shards) > 3
    assert sorted(shards)[0] == f"model-00001-of-{len(shards):05}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values()]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards.values(), strict=True))
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    found = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert same(found, {"transformer." + name[4:]: tensor for name, tensor in weights_at(run.checkpoint).items()})
    assert same(found, weights_at(tmp_path / "w"))


def test_one_tensor_is_in_memory_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0
    read = Reader.read

    def counted(*args: Any) -> Tensor:
        nonlocal most
        tensor = read(*args)
        living.add(tensor)
        most = max(most, len(living))
        return tensor

    monkeypatch.setattr(Reader, "read", counted)
    assert main([str(run.checkpoint), "--to", "safetensors", str(tmp_path / "w.safetensors")]) == 0
    assert main([str(run.checkpoint), "--to", "deepspeed-universal", str(tmp_path / "u")]) == 0
    assert most == 1


class Losses(pl.Callback):
    """What each optimizer step's micro-batches lost, in the mean."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.so_far = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.so_far += float(outputs["loss"])  # which Lightning has divided by the accumulation
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.steps.append(self.so_far)
            self.so_far = 0.0


def go_on_in_lightning(run: Run, path: Path, folder: Path) -> tuple[list[float], pl.LightningModule]:
    """Losses of a plain Trainer's steps from a checkpoint of ours on, and what it trained."""
    job = Job.of(load_resolved(run.folder))
    model = build_model(job.config)
    model.configure_model()
    materialize(model, torch.device("cpu"), seed=99)  # values that are to be replaced
    strategy: Any = SingleDeviceStrategy("cpu")
    strategy.distributed_sampler_kwargs = {"rank": 0, "num_replicas": 1}  # what our data ask for
    losses = Losses()
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_steps=LAST,
        accumulate_grad_batches=job.data.global_batch_size // job.data.micro_batch_size,
        gradient_clip_val=job.config.trainer.clip_norm,
        callbacks=[losses],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(model, datamodule=job.data.build(), ckpt_path=path, weights_only=True)
    return losses.steps, model


@pytest.mark.filterwarnings("ignore:The .*_dataloader. does not have many workers")
def test_lightning_trainer_goes_on_as_the_run_did(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    assert main([str(run.checkpoint), "--to", "lightning", str(path)]) == 0
    tree = torch.load(path, weights_only=True)
    assert tree["global_step"] == SAVED
    assert len(tree["optimizer_states"][0]["param_groups"]) == 2
    losses, model = go_on_in_lightning(run, path, tmp_path)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.evidence.losses[SAVED:]), rtol=RTOL, atol=0)
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, weight in run.evidence.weights[0].items():
        torch.testing.assert_close(after[name], torch.from_numpy(weight), rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The .*_dataloader. does not have many workers")
def test_optimizer_state_left_out_would_be_noticed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "step.ckpt"
    assert main([str(run.checkpoint), "--to", "lightning", str(path)]) == 0
    tree = torch.load(path, weights_only=True)
    for state in tree["optimizer_states"][0]["state"].values():
        state["exp_avg"].zero_()
    torch.save(tree, path)
    losses, _ = go_on_in_lightning(run, path, tmp_path)
    assert abs(losses[-1] - run.evidence.losses[-1]) > 1e-3


@pytest.mark.full
def test_statistics_go_along(tmp_path: Path) -> None:
    """Persistent buffers are weights to everybody."""
    run = run_of(own("HasStatistics", strategy="single", world_size=1), tmp_path / "run")
    assert main([str(run.checkpoint), "--to", "lightning", str(tmp_path / "a.ckpt"), "--trust"]) == 0
    assert main([str(run.checkpoint), "--to", "safetensors", str(tmp_path / "w.safetensors")]) == 0
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "net.1.running_mean" in state
    assert same(state, load_file(tmp_path / "w.safetensors"))


@pytest.fixture(params=["w.pt", "w.ckpt", "w.safetensors", "w"])
def plain(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint's weights as others have them."""
    path = tmp_path / request.param
    words = {
        "w.ckpt": ["--to", "lightning"],
        "w.safetensors": ["--to", "safetensors"],
        "w": ["--to", "safetensors", "--shard-gib", "1e-5"],
    }
    if request.param == "w.pt":
        torch.save(weights_at(run.checkpoint), path)
    else:
        assert main([str(run.checkpoint), str(path), *words[request.param]]) == 0
    yield path


def test_weights_of_others_become_a_checkpoint(plain: Path, run: Run, tmp_path: Path) -> None:
    assert main(["--from", str(plain), str(tmp_path / "made"), "--rename", "net.=body."]) == 0
    assert main(["--from", str(tmp_path / "made"), str(tmp_path / "again"), "--rename", "body.=net."]) == 0
    manifest = Manifest.read(tmp_path / "again")
    manifest.check(tmp_path / "again")
    found = weights_at(tmp_path / "again")
    if plain.suffix == ".ckpt":  # Lightning's has every name of what is tied
        assert torch.equal(found.pop("net.head.logits.weight"), found["net.embed.tokens.weight"])
    assert same(found, weights_at(run.checkpoint))


def test_weights_alone_are_no_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(run.checkpoint), "--to", "safetensors", str(tmp_path / "w.safetensors")]) == 0
    assert main([str(tmp_path / "w.safetensors"), "--to", "lightning", str(tmp_path / "w.ckpt")]) == 2
    assert "holds weights alone" in capsys.readouterr().err


MISTAKES = {
    "nothing there": (["{folder}/nowhere", "--to", "safetensors", "{folder}/w.safetensors"], "nowhere does not exist"),
    "no checkpoint": (["{folder}", "--to", "safetensors", "{folder}/w.safetensors"], f"has no {MANIFEST}"),
    "name of another format": (["{run}", "--to", "safetensors", "{folder}/w"], "a name that ends in .safetensors"),
    "there already": (["{run}", "--to", "lightning", "{folder}/there.ckpt"], "there.ckpt exists already"),
    "shards of nothing": (["{run}", "--to", "safetensors", "--shard-gib", "0", "{folder}/w"], "--shard-gib=0"),
    "shards of another format": (
        ["{run}", "--to", "lightning", "--shard-gib", "1", "{folder}/w.ckpt"],
        "--shard-gib=1",
    ),
    "rename without names": (
        ["{run}", "--to", "safetensors", "{folder}/w.safetensors", "--rename", "net"],
        "--rename=net: give old=new",
    ),
    "rename to one name": (
        ["{run}", "--to", "safetensors", "{folder}/w.safetensors", *(f"--rename=net.blocks.{n}=b" for n in (0, 1))],
        "would both be",
    ),
    "no weights at all": (
        ["--from", "{folder}/there.ckpt", "{folder}/out"],
        "there.ckpt is no plain file of torch.save",
    ),
    "text": (["--from", "{folder}/words.txt", "{folder}/out"], "give a file of .pt"),
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing(
    words: list[str], told: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "there.ckpt").write_text("words")
    (tmp_path / "words.txt").write_text("words")
    assert main([word.format(folder=tmp_path, run=run.checkpoint) for word in words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.ckpt", "words.txt"]


@pytest.mark.parametrize(
    "words", [[], ["a"], ["a", "b"], ["--to", "safetensors", "a"], ["--to", "gguf", "a", "b"]], ids=str
)
def test_command_that_is_none_is_one_line(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def deepspeed_rank(folder: Path, universal: Path, run_dir: Path, stage: int) -> None:
    """Two steps of plain DeepSpeed from a universal checkpoint on; the first rank leaves the losses."""
    import deepspeed
    from deepspeed import comm

    quiet()  # DeepSpeed's own deprecations
    deepspeed.init_distributed("gloo")
    rank, ranks = comm.get_rank(), comm.get_world_size()
    job = Job.of(load_resolved(run_dir))
    assert isinstance(job.data, SampledData)
    model = build_model(job.config)
    model.configure_model()
    materialize(model, torch.device("cpu"), seed=99)  # values that are to be replaced
    model.forward = lambda batch: model.training_step(batch, 0)  # type: ignore[method-assign, misc]
    optimizer = model.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
    size = job.data.global_batch_size // ranks
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": size,
            "gradient_clipping": job.config.trainer.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "checkpoint": {"load_universal": True},
        },
    )
    path, _ = engine.load_checkpoint(str(universal))
    assert path is not None
    assert engine.global_steps == SAVED
    states = engine.optimizer.optimizer.state.values()
    if stage == 3:  # DeepSpeed gives all its sub-groups one count, which each would raise
        assert len({id(state["step"]) for state in states}) < len(states)
        for state in states:
            state["step"] = state["step"].clone()
    assert [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups] == [0.1, 0.0]
    samples = job.data.train_samples()
    order = Order(num_samples=len(samples), global_batch_size=job.data.global_batch_size, seed=job.data.seed)
    losses = []
    for step in range(SAVED, LAST):
        mine = order.micro_batch(step, 0, micro_batch_size=size, data_rank=rank, data_ranks=ranks)
        loss = engine(BatchDataset(samples)[mine])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        comm.all_reduce(total)
        losses.append(float(total) / ranks)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def universal(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("universal") / "made"
    assert main([str(run.checkpoint), "--to", "deepspeed-universal", str(path)]) == 0
    return path


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_goes_on_from_its_universal_checkpoint(
    stage: int, ranks: int, universal: Path, run: Run, tmp_path: Path
) -> None:
    run_ranks(ranks, tmp_path, deepspeed_rank, tmp_path, universal, run.folder, stage)
    losses = json.loads((tmp_path / "losses.json").read_text())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(run.evidence.losses[SAVED:]), rtol=RTOL, atol=0)


def test_every_file_of_a_universal_checkpoint_is_tensors_and_plain_values(universal: Path, run: Run) -> None:
    files = list(universal.rglob("*.pt"))
    for path in files:
        torch.load(path, weights_only=True)
    names = {path.parent.name for path in files if path.name == "exp_avg.pt"}
    assert names == weights_at(run.checkpoint).keys()


def test_commands_that_the_readme_shows_are_commands() -> None:
    shown = re.findall(r"`scripts/convert.py (.*?)`", (REPOSITORY / "README.md").read_text())
    assert {parse(shlex.split(command)).to for command in shown} == {*FORMATS, None}

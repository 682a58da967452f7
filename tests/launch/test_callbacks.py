"""callbacks=: which of Lightning's go with a run, and which are refused by name, with what to use instead."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from launch.callbacks import INSTEAD, WATCHING, WHOLE, check_callbacks, refusal
from launch.dispatch import complete
from launch.guests import Guests, build_callbacks, plain, revived
from launch.job import Job, resolve
from launch.schema import ConfigError, RunConfig, validate
from launch.worker import build_model
from strategies.spec import Strategy
from tests.composing import compose_fast
from tracking.status import ended, running

CONF = Path(__file__).parents[2] / "conf/callbacks"


def config_of(*words: str) -> RunConfig:
    return resolve(validate(compose_fast(["data=synthetic", "launcher.accelerator=cpu", *words])))


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(*words)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def told_of(name: str, strategy: str, package: str = "lightning.pytorch.callbacks") -> str:
    """What is said of a callback, by the config alone; a section is put in the place of one that is composed."""
    config = bare().model_copy(update={"callbacks": {"mine": {"_target_": f"{package}.{name}"}}})
    with pytest.raises(ValueError, match=r"^callbacks\.mine: ") as caught:
        check_callbacks(config, spec_of(strategy))
    return str(caught.value)


@cache
def bare() -> RunConfig:
    return config_of()


@cache
def spec_of(strategy: str) -> Strategy:
    return Job.of(config_of(f"strategy={strategy}")).strategy


def test_a_config_is_refused_before_anything_starts() -> None:
    words = ["callbacks=own", "callbacks.own._target_=lightning.pytorch.callbacks.ModelCheckpoint"]
    assert refused(*words) == f"callbacks.own: ModelCheckpoint {INSTEAD['ModelCheckpoint']}"


@pytest.mark.parametrize("name", INSTEAD)
def test_a_callback_that_does_not_go_with_a_run_is_refused_by_name(name: str) -> None:
    for package in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks", "lightning.pytorch.callbacks.deep"):
        told = told_of(name, "single", package)
        assert told == f"callbacks.mine: {name} {INSTEAD[name]}"
        assert "leave it out" in told
        assert len(told.splitlines()) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_a_summary_of_what_one_rank_holds_is_refused(name: str) -> None:
    for strategy in ("zero3", "fsdp", "pipeline"):
        assert told_of(name, strategy) == f"callbacks.mine: {name} {refusal(name, spec_of(strategy))}"
        assert f"strategy={strategy}" in told_of(name, strategy)
    assert refusal(name, spec_of("zero2")) is None


def test_early_stopping_without_validations_is_refused() -> None:
    told = refused("callbacks=early_stopping", "trainer.val_every_steps=null")
    assert told.startswith("callbacks.early_stopping: EarlyStopping looks when the run validates")
    assert told.endswith("set trainer.val_every_steps.")


def test_an_average_beside_state_on_a_disk_is_refused() -> None:
    assert "choose strategy=zero3_offload" in refused(
        "callbacks=ema", "strategy=zero3_nvme", "strategy.offload.nvme_path=."
    )


def test_a_callback_without_a_class_is_refused() -> None:
    told = refused("callbacks=[early_stopping,ema]", "callbacks.ema=3")
    assert told.startswith("callbacks.ema: a callback needs callbacks.ema._target_=")


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_says_what_it_does_and_is_built(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    given = ["callbacks.own._target_=lightning.pytorch.Callback"] if path.stem == "own" else []
    config = config_of(f"callbacks={path.stem}", "trainer.val_every_steps=1", *given)
    assert list(config.callbacks) == [path.stem]
    (built,) = build_callbacks(config, Job.of(config).strategy)
    assert isinstance(built, pl.Callback)


def test_several_are_a_list_and_one_can_be_taken_back() -> None:
    config = config_of("callbacks=[lr_monitor,ema]", "callbacks.ema.decay=0.9")
    assert config.callbacks["ema"]["decay"] == 0.9
    assert list(config.callbacks) == ["lr_monitor", "ema"]
    assert list(config_of("callbacks=[lr_monitor,ema]", "callbacks.ema=null").callbacks) == ["lr_monitor"]
    assert config_of().callbacks == {}


WRONG = {
    "tests.launch.test_callbacks.SavesMore": "SavesMore, a ModelCheckpoint, saves what one rank holds",
    "torch.nn.Linear": "__init__() missing",
    "builtins.dict": "callbacks.own._target_=builtins.dict is not a lightning.pytorch.callbacks.Callback",
    "lightning.pytorch.callbacks.NotThere": "NotThere",
    "strategies.engines.ema.EMA": "decay: must be a number in [0, 1) (got 1)",
}


class SavesMore(ModelCheckpoint):
    """As users write it."""


@pytest.mark.parametrize("target", WRONG)
def test_what_only_the_class_tells_is_one_line(target: str) -> None:
    words = ["+callbacks.own.decay=1"] if target.endswith("EMA") else []
    config = config_of("callbacks=own", f"callbacks.own._target_={target}", *words)
    with pytest.raises(ConfigError) as caught:
        build_callbacks(config, Job.of(config).strategy)
    assert WRONG[target] in str(caught.value)
    assert str(caught.value).startswith("callbacks.own")
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_model_brings_is_checked_alike() -> None:
    words = ["model=vit_tiny", "data=digits", "model._target_=tests.strategies.trainer_models.BringsCheckpoint"]
    config = config_of(*words, "strategy=fsdp")
    model = build_model(config)
    Guests(Job.of(config)).meet(model)
    with pytest.raises(ConfigError, match=r"BringsCheckpoint.configure_callbacks: ModelCheckpoint saves what one rank"):
        model.configure_callbacks()


def test_runs_that_differ_in_what_looks_on_train_the_same_thing() -> None:
    bare = config_of("trainer.val_every_steps=5").hash
    assert config_of("trainer.val_every_steps=5", "callbacks=[early_stopping,ema,lr_monitor]").hash == bare
    own = ["trainer.val_every_steps=5", "callbacks=own", "callbacks.own._target_=package.Own"]
    assert config_of(*own).hash != bare


def test_runs_that_are_compared_are_not_ended_early() -> None:
    words = ["callbacks=[early_stopping,timer,lr_monitor]", "trainer.val_every_steps=1"]
    for evidence, kept in (("false", 3), ("true", 1), ("plain", 0)):
        config = config_of(*words, f"evidence={evidence}")
        assert len(build_callbacks(config, Job.of(config).strategy)) == kept


STATES: list[Any] = [
    {"best": torch.tensor(float("inf")), "count": 3, "name": None},
    {"by_step": {1: (0.5, True), 2: ("x", [])}, "scores": torch.arange(3), "half": torch.tensor([0.1]).bfloat16()},
    EarlyStopping("val/loss").state_dict(),
]


@pytest.mark.parametrize("state", STATES)
def test_state_is_the_same_behind_json(state: dict[str, Any]) -> None:
    again = revived(plain(state))
    assert plain(again) == plain(state)
    assert repr(again) == repr(state)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.zeros(5000), torch.zeros(2, dtype=torch.complex64)])
def test_state_that_cannot_be_kept_is_told(value: object) -> None:
    with pytest.raises(TypeError, match=f"a {type(value).__name__}"):
        plain({"kept": [value]})


@pytest.mark.parametrize(
    "lie", [{"dict": [[[1], 2]]}, {"dict": 3}, {"tensor": ["x"], "dtype": "float32"}, {"eval": "1"}]
)
def test_state_that_was_never_written_is_refused(lie: Any) -> None:
    with pytest.raises(ValueError, match="the state of a callback is not as it was written"):
        revived({"dict": [["seen", lie]]})


def test_a_run_that_ended_early_goes_on_without_what_ended_it(tmp_path: Path) -> None:
    words = ["data=synthetic", "launcher.accelerator=cpu", "trainer.val_every_steps=1", f"run_dir='{tmp_path}'"]
    stopping = compose_fast([*words, "callbacks=early_stopping"])
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(validate(stopping).model_dump()))
    ended(running("single", "single"), "completed").write(tmp_path)
    assert complete(tmp_path, lambda: stopping) is not None
    assert complete(tmp_path, lambda: compose_fast(words)) is None


def test_every_callback_of_lightning_is_known() -> None:
    """A new one of a later Lightning has to be tried first."""
    assert set(lightnings.__all__) - set(INSTEAD) - set(WATCHING) == {"Callback", "LambdaCallback"}

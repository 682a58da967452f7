"""What a person types, and what is said of it, asked in this process: exit 2, one line, nothing touched or started."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from launch.check import checked
from launch.compose import compose
from launch.join import OuterLauncher, join
from launch.typed import read_words
from launch.verify import verify
from launch.wording import MISTAKES, one_line
from tests.tiers import in_tiers

GPT = "model=gpt_tiny"

# What is typed, as a shell takes it: what must be said. Words that are no overrides are told before anything is read.
TYPED = {
    "strategy=[zero1]": ["strategy=[zero1] is a list; write strategy=zero1", "-m"],
    "--multirun": ["--multirun has nothing to sweep over"],
    "strategy=": ["strategy= one of 2d, ", "zero3_offload"],
    "~strategy": ["~strategy: strategy needs a choice", " ddp, "],
    "~profile": ["profile=null for none"],
    "callbacks=null": ["callbacks= one of", "callbacks=[] for none"],
    "model=null": ["model is a group", "gpt_tiny"],
    "-m strategy=ddp, zero1": ["write strategy=ddp,zero1"],
    "--strategy ddp": ["--strategy is no flag", "strategy=ddp"],
    "--resume": ["--resume is no flag", "resume=..."],
    "--max-steps 5": ["trainer.max_steps=5"],
    "--multirn strategy=ddp": ["did you mean --multirun?"],
    "run_dir=": ["run_dir= is empty; give a folder"],
    "run_dir=''": ["run_dir= is empty"],
    "run_dir=\"' '\"": ["is empty; give a folder"],
    "seed=": ["seed= has no value", "seed=null"],
    "strategy=ddp strategy=fsdp": ["a run has one", "-m strategy=ddp,fsdp"],
    "ddp": ["write strategy=ddp"],
    "strategy:ddp": ["write strategy=ddp"],
    "trainer.max_steps = 5": ["leave the space out around =; write trainer.max_steps="],
    "trainer.max_steps": ["trainer.max_steps has no value; write trainer.max_steps=..."],
    "'trainer.max_steps =5'": ["leave the space", "trainer.max_steps=5"],
    "optimizer.betas=[0.9, 0.95]": ["'optimizer.betas=[0.9, 0.95]'"],
    "seed==3": ["write one =: seed=3"],
    "name=my run": ['put the whole in quotes: "name=my run"'],
    "strategy=:ddp": ["strategy=:ddp is no choice; choose strategy= one of"],
}

# What has to be composed first.
COMPOSED = {
    "stratgy=zero1": ["stratgy: there is no such key", "did you mean strategy?"],
    "model.num_heads=4": ["did you mean model.net.num_heads?"],
    "trainer.devices=2": ["did you mean launcher.devices?"],
    "data.context_length=8": ["did you mean data.sequence_length?"],
    "optimizer.learning_rate=1": ["did you mean optimizer.lr?"],
    "trainer.max_epochs=2": ["did you mean trainer.max_steps?"],
    "batch_size=2": ["did you mean data.global_batch_size?"],
    "strategy.cpu_ofload=true": ["did you mean strategy.cpu_offload?"],
    "+strategy.shard_rank=2 strategy=fsdp": ["strategy.shard_rank=2: there is no such key", "strategy.shard_ranks?"],
    "zzz=1": ["zzz: there is no such key", "--help"],
    "~seeed": ["~seeed: there is no such key; did you mean seed?"],
    "+seed=3": ["+seed: there is that key already; leave the + out."],
    "strategy=zero9": ["strategy=zero9", "did you mean strategy=zero3?", " single, "],
    "optimizer=adam": ["did you mean optimizer=adamw?"],
    "strategy=ddp,zero1": ["a run has one; for a run of each add -m"],
    "callbacks=ema,timer": ["for several in one run write 'callbacks=[ema,timer]'"],
    "callbacks=[early_stoping]": ["did you mean callbacks=early_stopping?"],
    "optimizer.lr=0,001": ["is several values; for a run of each add -m"],
    "\"run_dir=it's\"": ["a quote is not closed", "\"run_dir='...'\""],
    "'name=(x'": ["a bracket is not closed"],
    "model._target_=models.mine.Mien": ["there is no module models.mine"],
    "model._target_=models.language.Mien": ["models/language.py has no Mien; it has LanguageModel."],
    "model._target_=models.languag.LanguageModel": ["did you mean models.language?"],
    "model._target_=models.language": ["is a module; name a class in it"],
    "model._target_=LanguageModel": ["write package.module.Class"],
    "model._target_=nosuchpackage.Model": ["there is no module nosuchpackage here"],
    "strategy._target_=strategies.replicate.DPP": ["strategies/replicate.py has no DPP; did you mean DDP?"],
    "+model.nett=1": ["LanguageModel (models/language.py:", "takes no nett; did you mean model.net?"],
    "+model.net.depth=1": ["GPT (models/nets/gpt.py:", "takes no depth"],
    "+optimizer.momentum=0.5": ["AdamW (", "takes no momentum"],
    "~model.net.mlp_size data=text ~model.scheduler": ["model.scheduler has no value, which LanguageModel ("],
    "model.net.num_heads=5": ["model.net.num_heads=5 does not divide model.net.hidden_size=128; choose one of 1, 2"],
    "model.net.hidden_size=100": ["model.net.positions=rotary cannot pair up the 25 dims of a head"],
    "model.net.num_kv_heads=3": ["model.net.num_kv_heads=3 does not divide model.net.num_heads=4"],
    "model=vit_tiny data=digits model.net.patch_size=3": ["patch_size=3 does not divide model.net.image_size=8"],
    "scheduler.warmup_steps=1000 trainer.max_steps=3": ["scheduler.warmup_steps=1000 end behind trainer.max_steps=3"],
    "resume_despite=[data.seed]": ["resume_despite=[data.seed] is for resume="],
    "trainer.clip_norm=0": ["trainer.clip_norm=0", "null to clip none"],
    "optimizer.betas=0.9": ["optimizer.betas: must be two numbers in [0, 1)", "got 0.9"],
    "profile=torch profile.first_step=3 trainer.max_steps=6": ["set trainer.trace_steps=0, or raise trainer.max_steps"],
    "resume=/nowhere": ["resume=/nowhere is no checkpoint"],
    "model.weights=/nowhere": ["model.weights=/nowhere: /nowhere does not exist"],
    "data.tokenizer=words": ["data.tokenizer='words' is unknown; choose bytes, bpe, gpt2."],
    "trainer.on_nan=ignore": ["trainer.on_nan", "'stop' or 'skip'"],
    "logger.mode=onlin": ["logger.mode", "'offline'"],
    "launcher.devices=two": ["launcher.devices", "valid integer", "got 'two'"],
    "data.global_batch_size=0": ["data.global_batch_size", "greater than 0"],
}  # fmt: skip
EVERYDAY = (
    "model.num_heads=4", "data.context_length=8", "strategy=zero9", "model._target_=models.language.Mien",
    "+model.nett=1", "model.net.num_heads=5", "scheduler.warmup_steps=1000 trainer.max_steps=3",
    "resume_despite=[data.seed]",
    "profile=torch profile.first_step=3 trainer.max_steps=6", "trainer.clip_norm=0",
)  # fmt: skip


def refusal(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the words of a command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(MISTAKES) as caught:
        checked(compose([word for word in read_words(words) if not word.startswith("-")]))
    line = one_line(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("typed", TYPED)
def test_word_that_is_no_override_is_told_with_what_to_type(typed: str) -> None:
    with pytest.raises(ValueError, match=re.escape(TYPED[typed][0])) as caught:
        read_words(shlex.split(typed))
    assert all(words in str(caught.value) for words in TYPED[typed]), caught.value
    assert "\n" not in str(caught.value)
    assert " _" not in str(caught.value)  # bases are no choices


@pytest.mark.parametrize("typed", in_tiers(list(COMPOSED), EVERYDAY))
def test_mistake_is_told_in_one_line(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(shlex.split(typed), monkeypatch)
    assert all(words in line for words in COMPOSED[typed]), line
    assert " _" not in line


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["trainer.max_steps=5", "-m", "strategy=ddp,zero1"], ["-m", "trainer.max_steps=5", "strategy=ddp,zero1"]),
        (["model=gpt_small.yaml"], ["model=gpt_small"]),
        (["-m", "model=gpt_small.yaml,gpt_tiny.yaml"], ["-m", "model=gpt_small,gpt_tiny"]),
        (["data.files=~/books/*.txt"], ["data.files='/home/who/books/*.txt'"]),
        (["data.files=[~/a.txt,~/b.txt]"], ["data.files=['/home/who/a.txt','/home/who/b.txt']"]),
        (["run_dir=a~b", "name=~"], ["run_dir=a~b", "name='/home/who'"]),
        (["--config-dir", "extra", "--cfg", "job"], ["--config-dir", "extra", "--cfg", "job"]),
        (["debug=nan"], ["debug='nan'"]),
        (["callbacks=[ema.yaml,timer]"], ["callbacks=[ema,timer]"]),
    ],
)
def test_what_is_meant_is_read(typed: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/who")
    assert read_words(typed) == read


def test_path_below_home_in_a_config_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/who")
    assert compose(["data.files=['~/a.txt']"])["data"]["files"] == ["/home/who/a.txt"]


FILES = {
    "tab": ("defaults:\n  - ddp\n  - _self_\nname: x\n\tmesh: 3\n", ["strategy/tab.yaml:5: a tab"]),
    "open": ("defaults:\n  - ddp\nmesh: [\n", ["strategy/open.yaml:4: ", "not closed"]),
    "list": ("- a\n- b\n", ["strategy/list.yaml:1: it holds", "keys and their values"]),
    "key": ("defaults:\n  - ddp\n  - _self_\nbuckt_mb: 3\n", ["buckt_mb=3", "strategy/key.yaml:4", ".bucket_mb?"]),
    "open_interpolation": ("defaults:\n  - ddp\n  - _self_\nname: ${naam}\n", ["open_interpolation.yaml:4: "]),
    "no_text": ("\udcff\udcfe", ["strategy/no_text.yaml is no text in UTF-8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", in_tiers(list(FILES), ("tab", "open", "key")))
def test_broken_file_is_told_by_file_and_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, words = FILES[name]
    (tmp_path / "strategy").mkdir()
    (tmp_path / f"strategy/{name}.yaml").write_bytes(os.fsencode(content))
    monkeypatch.chdir(tmp_path)
    line = refusal([f"strategy={name}", f"hydra.searchpath=[file://{tmp_path}]"], monkeypatch)
    assert all(word in line for word in words), line


@pytest.mark.full
def test_variable_of_wandb_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "bogus")
    assert "WANDB_MODE=bogus is no mode of W&B; set it to one of online" in refusal(["logger=wandb"], monkeypatch)


OWN = """
from models.language import LanguageModel

class Mine(LanguageModel):
    def __init__(self, *, width, **parts):
        super().__init__(**parts)
"""


def test_own_class_is_asked_for_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("class Mine:\n    def f(self:\n")
    monkeypatch.chdir(tmp_path)
    line = refusal(["model._target_=mine.Mine"], monkeypatch)
    assert line == "model.width has no value, which Mine (mine.py:4) needs; give +model.width=..."
    line = refusal(["model._target_=mine.Mine", "+model.width=3", "+model.wide=3"], monkeypatch)
    assert line == "model.wide=3: Mine (mine.py:4) takes no wide; did you mean model.width?"
    assert refusal(["model._target_=broken.Mine"], monkeypatch).startswith("broken.py:2: '(' was never closed")
    checked(compose(["model._target_=mine.Mine", "+model.width=3"]))


def test_own_net_is_asked_by_the_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text("import nowhere\nclass Net:\n    def __init__(self, *, width): ...\n")
    (tmp_path / "nets_settings.py").write_text(
        "def check(*, width):\n    if width % 2:\n        raise ValueError(f'model.net.width={width} is odd')\n"
        "CHECKS = {'Net': check}\n"
    )
    monkeypatch.chdir(tmp_path)
    net = "model.net={_target_:nets.Net,_partial_:true,width:%d}"
    assert refusal(["~model.net", "+" + net % 3], monkeypatch) == "model.net.width=3 is odd"
    checked(compose(["~model.net", "+" + net % 4]))


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_of_another_launcher_refuses_at_once(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = OuterLauncher(name="slurm", job_id="1.0", restarts=0, rank=rank, world_size=2, local_world_size=2)
    assert join(launcher, ["strategy=single", "logger=none"]) == 2
    assert "start 1, or change strategy.mesh" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify_words_mistakes_as_train_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in ((["--bisct", "strategy=ddp"], "--bisect?"), (["trainer.max_stps=3"], "trainer.max_steps?")):
        assert verify(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert not list(tmp_path.iterdir())

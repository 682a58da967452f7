"""What a user sees of a run while it goes on, with and without a terminal."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tracking.meter import Meter
from tracking.progress import AboveBar, Progress, duration

# Lightning's advice about loaders, which these few numbers do not need.
pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning")


class Talkative(pl.LightningModule):
    """Prints now and then, and fails at step `fails_at`."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.fails_at = fails_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 2:
            print("said on stdout")
            print("said on stderr [red]", file=sys.stderr)
        if batch_idx == self.fails_at:
            raise RuntimeError("on purpose")
        return self.weight * 0 + 2.5

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(2.25))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Talkative, *, max_steps: int = 10, **keys: Any) -> None:
    meter = Meter(samples_per_step=1, tokens_per_sample=8, log_every_steps=4)
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(100.0)), batch_size=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=[meter, Progress(meter, **keys)],
        logger=False,
        limit_val_batches=1,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)


def test_without_a_terminal_each_row_and_each_validation_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Talkative())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    rows = [line for line in lines if "train/loss" in line]
    assert [line.split()[1] for line in rows] == ["4/10", "8/10", "10/10"]
    assert re.fullmatch(r"step 8/10  train/loss 2\.5  tokens/s [\d,]+  eta 0:00", rows[1])
    assert [line for line in lines if "val/loss" in line] == ["step 5/10  val/loss 2.25", "step 10/10  val/loss 2.25"]


class Terminal:
    """A pseudo-terminal whose screen output is kept."""

    def __init__(self) -> None:
        self._screen, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w")

    def close(self) -> str:
        self.stream.flush()
        os.set_blocking(self._screen, False)
        seen = b""
        while True:
            try:
                seen += os.read(self._screen, 65536)
            except BlockingIOError:
                break
        self.stream.close()
        os.close(self._screen)
        return seen.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_on_a_terminal_there_is_a_bar_and_prints_reach_screen_and_log(tmp_path: Path, terminal: Terminal) -> None:
    before = sys.stdout, sys.stderr
    with (tmp_path / "0.log").open("w") as log:
        fit(Talkative(), terminal=terminal.stream, log=log)
    assert (sys.stdout, sys.stderr) == before
    screen, logged = terminal.close(), (tmp_path / "0.log").read_text()
    assert "10/10" in screen and "━" in screen and "train/loss 2.5" in screen and "tokens/s" in screen
    for line in ("said on stdout", "said on stderr [red]", "step 5/10  val/loss 2.25"):
        assert screen.count(line) == 1 and logged.count(line) == 1
    assert "step 8/10  train/loss 2.5" in logged and "step 8/10" not in screen
    assert "\x1b" not in logged and "━" not in logged


def test_prints_go_where_they_went_before_when_no_log_is_given(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Talkative(), terminal=terminal.stream)
    told = capsys.readouterr()
    assert "said on stdout" in told.out and "said on stderr [red]" in told.err
    assert "said on stdout" in terminal.close()


def test_a_run_that_fails_gives_the_streams_back(tmp_path: Path, terminal: Terminal) -> None:
    before = sys.stdout, sys.stderr
    with (tmp_path / "0.log").open("w") as log, pytest.raises(RuntimeError, match="on purpose"):
        fit(Talkative(fails_at=6), terminal=terminal.stream, log=log)
    assert (sys.stdout, sys.stderr) == before
    assert "\x1b[?25h" in terminal.close()  # the cursor is shown again


def test_a_line_in_pieces_is_shown_whole_and_its_last_piece_at_the_end() -> None:
    log, screen = io.StringIO(), io.StringIO()
    stream = AboveBar(log, Console(file=screen, width=80))
    stream.write("one ")
    assert (log.getvalue(), screen.getvalue()) == ("one ", "")
    stream.write("line\ntwo")
    assert screen.getvalue() == "one line\n"
    stream.finish()
    assert screen.getvalue() == "one line\ntwo\n"
    assert log.getvalue() == "one line\ntwo"


def test_a_subprocess_may_write_to_the_stream_s_log(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        stream = AboveBar(log, Console(file=io.StringIO()))
        subprocess.run(["echo", "from a child"], stdout=stream.fileno(), check=True)
    assert (tmp_path / "log").read_text() == "from a child\n"


def test_a_forked_worker_writes_to_the_log_and_leaves_the_screen_alone(tmp_path: Path, terminal: Terminal) -> None:
    with (tmp_path / "log").open("w") as log:
        stream = AboveBar(log, Console(file=terminal.stream))
        child = os.fork()
        if child == 0:
            stream.write("from a fork\n")
            os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "log").read_text() == "from a fork\n"
    assert "from a fork" not in terminal.close()


def test_durations_read_like_a_clock() -> None:
    assert [duration(seconds) for seconds in (0, 31.4, 725, 10807)] == ["0:00", "0:31", "12:05", "3:00:07"]

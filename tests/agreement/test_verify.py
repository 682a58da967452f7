"""`scripts/verify.py` as a user runs it: tables, certificates, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.agreement.cases import VIT
from tests.launch.command import REPOSITORY, TINY, user_environment
from tracking.agreement import Certificate

SHORT = [word for word in TINY if not word.startswith(("logger", "trainer"))] + ["trainer.max_steps=2"]


def verify(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts/verify.py"), *arguments],
        cwd=cwd, env=user_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.full
def test_each_candidate_gets_its_verdict(tmp_path: Path) -> None:
    """Two world sizes share their references; the model that depends on its rank agrees with one process on one."""
    model = "model._target_=tests.launch.failing.DependsOnRank"
    run = verify(tmp_path, "-m", "strategy=ddp", "launcher.devices=1,2", *SHORT, model, "run_dir=proof")
    assert run.returncode == 1, run.stderr
    alone, together = (Certificate.read(tmp_path / f"proof/{job}-candidate/certificate.json") for job in (0, 1))
    assert (alone.verdict, alone.world_size) == ("agrees", 1)
    assert (together.verdict, together.world_size) == ("disagrees", 2)
    assert {check.quantity for check in together.failed} >= {"loss", "gradient norm", "weights"}
    assert "ddp x 1 agrees with one process" in run.stdout
    assert "ddp x 2 disagrees with one process" in run.stdout
    assert sorted(path.name for path in (tmp_path / "proof").iterdir()) == [
        "0-candidate",
        "1-candidate",
        "exact",
        "exact-1",
        "reference",
    ]
    assert alone.reference_config_hash == together.reference_config_hash
    assert "float64" in alone.tolerance


SAID = {
    "Contrastive": ("disagrees", "the loss depends on how a batch is cut"),
    "Normalized": ("disagrees", "statistics of the batch (BatchNorm: net.1)"),
    "Drops": ("agrees", "dropout is switched off (net.1"),
    "Noisy": ("agrees", "the step draws at random"),
    "Masked": ("agrees", "certificates in"),
    "NoFloat64": ("agrees", "the model has no float64: compared with fp32 on whole batches"),
    "NoisyAndMasked": ("agrees", "its loss is a mean over targets, of which micro-batches have unlike numbers"),
    "NoFloat64AndHalf": ("disagrees", "First at the loss of step 0"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SAID)
def test_what_stands_between_a_module_and_agreement_is_said(name: str, tmp_path: Path) -> None:
    verdict, words = SAID[name]
    own = [word for word in VIT if not word.startswith("model.net")]
    model = f"model._target_=tests.strategies.foreign_models.{name}"
    run = verify(tmp_path, "strategy=ddp", *own, model, "trainer.max_steps=2", "run_dir=proof")
    certificate = Certificate.read(tmp_path / "proof/candidate/certificate.json")
    assert certificate.verdict == verdict, run.stdout
    assert words in " ".join(run.stdout.split())
    assert run.returncode == (verdict == "disagrees")


@pytest.mark.full
def test_module_that_optimizes_manually_is_certified_if_it_draws_nothing(tmp_path: Path) -> None:
    own = [word for word in VIT if not word.startswith("model.net")]
    models = "model._target_=tests.strategies.manual_models.GAN,tests.strategies.manual_models.NoisyGAN"
    keys = ["trainer.clip_norm=null", "strategy.find_unused_parameters=true", "trainer.max_steps=2"]
    sizes = ["data.global_batch_size=16", "data.micro_batch_size=8"]
    run = verify(tmp_path, "-m", "strategy=ddp", *own, models, *keys, *sizes, "run_dir=proof")
    assert "ddp x 2 agrees with one process" in run.stdout, run.stderr
    assert "optimizes manually and draws at random, so that one process draws other numbers than 2" in run.stderr


def test_verify_imports_nothing_heavy_before_it_has_read_its_words(tmp_path: Path) -> None:
    program = "import sys, launch.verify; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=user_environment() | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "[]"


def test_mistake_gets_one_line(tmp_path: Path) -> None:
    for arguments, word in (
        (["strategy=ddpp"], "ddpp"),
        (["strategy=ddp", "trainer.max_steps=0"], "trainer.max_steps"),
    ):
        run = verify(tmp_path, *arguments)
        assert run.returncode == 2
        assert len(run.stderr.strip().splitlines()) == 1, run.stderr
        assert word in run.stderr

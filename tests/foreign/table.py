"""What `verify` says of other people's models: `python -m tests.foreign.table [--write] [model ...]`, outside CI.

Needs `pip install -e '.[foreign]'` or these packages (transformers, timm, torchvision, peft) in the interpreter's
environment. Without `--write`, the table in docs/foreign-models.md must be what comes out; exit 1 if it is not.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tracking.agreement import Certificate

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/foreign-models.md"
HERE = Path(__file__).parent
STRATEGIES = ("ddp", "zero3", "fsdp")
ON_TEXT = ["data=text", "data.sequence_length=32"]
ON_IMAGES = ["data=digits"]
BATCH = ["data.global_batch_size=16", "data.micro_batch_size=4", "launcher.devices=2", "launcher.threads_per_rank=1"]


def models() -> dict[str, str]:
    """By its choice in conf/model, what a model is."""
    return {path.stem: path.read_text().splitlines()[0].strip("# .") for path in sorted((HERE / "conf").glob("*.yaml"))}


def data_of(model: str) -> list[str]:
    is_of_images = model.startswith(("timm", "tv", "lstm")) or model in ("hf_vit", "hf_clip")
    return ON_IMAGES if is_of_images else ON_TEXT


def clone_with_models(folder: Path) -> Path:
    """The repository as its user has it who has added these models."""
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
    shutil.copytree(HERE / "models", clone / "models", dirs_exist_ok=True)
    shutil.copytree(HERE / "conf", clone / "conf/model", dirs_exist_ok=True)
    return clone


def row(model: str, what: str, clone: Path) -> str:
    """A model's verdict under each strategy, and what verify adds."""
    words = [f"model={model}", *data_of(model), *BATCH]
    command = [sys.executable, "scripts/verify.py", "-m", *words, f"strategy={','.join(STRATEGIES)}", "run_dir=proof"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    verdicts: list[str] = []
    said = dict[str, None]()
    for number, strategy in enumerate(STRATEGIES):
        path = clone / f"proof/{number}-candidate/certificate.json"
        if path.exists():
            certificate = Certificate.read(path)
            verdicts.append(certificate.verdict)
            said |= dict.fromkeys([*certificate.conditions, *([certificate.cause] if certificate.cause else [])])
        else:
            verdicts.append("refused" if "choose another strategy" in run.stderr else "failed")
            lines = [line for line in run.stderr.splitlines() if re.search(rf"strategy={strategy}[ :]", line)]
            said |= dict.fromkeys(line.split(": ", 1)[1] for line in lines)
    shutil.rmtree(clone / "proof", ignore_errors=True)
    return f"| `{model}` | {what} | {' | '.join(verdicts)} | {'; '.join(said)} |"


def main(arguments: list[str]) -> int:
    chosen = [word for word in arguments if word != "--write"] or list(models())
    page = PAGE.read_text()
    failed = []
    with TemporaryDirectory() as folder:
        clone = clone_with_models(Path(folder))
        for model in chosen:
            found = row(model, models()[model], clone)
            print(found, flush=True)
            before = re.search(rf"^\| `{model}` \|.*$", page, re.MULTILINE)
            if before is None or before[0] != found:
                failed.append(model)
                page = page.replace(before[0], found) if before else f"{page.rstrip()}\n{found}\n"
    if "--write" in arguments:
        PAGE.write_text(page)
        return 0
    for model in failed:
        print(f"docs/foreign-models.md says something else of {model}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

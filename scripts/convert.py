"""Checkpoints for others, and weights of others for runs here; nothing that is read can run code.

python scripts/convert.py <checkpoint or run folder> --to safetensors <out>.safetensors     weights, as others know them
python scripts/convert.py <checkpoint or run folder> --to safetensors --shard-gib 5 <out>   the same as several files
python scripts/convert.py <checkpoint or run folder> --to safetensors --weights ema <out>.safetensors    their average
python scripts/convert.py <checkpoint or run folder> --to lightning <out>.ckpt              for Trainer.fit(ckpt_path=)
python scripts/convert.py <checkpoint or run folder> --to deepspeed-universal <out>         for load_universal
python scripts/convert.py --from <weights> <out>    .pt, .ckpt, .safetensors or a folder; for model.weights=<out>

DeepSpeed 0.19.8 loads a universal checkpoint at any stage and world size, but for buffers and frozen parameters.
ZeRO-1 and 2 go on as they are. ZeRO-3 loads the state of Adam alone, and has all of its sub-groups share one count of
steps, which torch's AdamW then raises once for each: after load_checkpoint, give every state a count of its own,
  for state in engine.optimizer.optimizer.state.values(): state["step"] = state["step"].clone()
Names are those of the LightningModule; for an engine that was given its net, add --rename net.=
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.installed import check_installed

check_installed()


FORMATS = ("safetensors", "lightning", "deepspeed-universal")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"convert.py: {message}; see --help.\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=FORMATS)
    direction.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--shard-gib", type=float, help="GiB of a file, at most")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="another prefix of names")
    parser.add_argument("--weights", choices=("own", "ema"), default="own", help="ema: their average, of callbacks=ema")
    parser.add_argument("--trust", action="store_true", help="call whatever classes the run's resolved.yaml names")
    given = parser.parse_intermixed_args(arguments)
    if len(given.paths) != (2 if given.to else 1):
        parser.error("give <checkpoint or run folder> and <out>" if given.to else "give one <out>")
    if given.source and given.weights != "own":
        parser.error("--weights goes with --to")
    return given


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    from launch.convert import convert_from, convert_to

    try:
        if given.to:
            convert_to(
                given.to,
                *given.paths,
                shard_gib=given.shard_gib,
                rename=given.rename,
                trust=given.trust,
                average=given.weights == "ema",
            )
        else:
            convert_from(given.source, *given.paths, rename=given.rename)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; correct the path, or free some space.", file=sys.stderr)
        return 2
    print(f"wrote {given.paths[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

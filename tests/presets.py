"""The presets of conf/strategy, found by glob: a new file brings its own tests."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[1] / "conf"
PRESETS = sorted(path for path in (CONF / "strategy").glob("*.yaml") if not path.name.startswith("_"))

"""Does a strategy compute what one process computes? `python scripts/verify.py strategy=ddp [-m] [--bisect] [...]`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.verify import verify

if __name__ == "__main__":
    sys.exit(verify(sys.argv[1:]))

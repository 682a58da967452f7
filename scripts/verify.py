"""Does a strategy compute what one process computes?

python scripts/verify.py strategy=ddp [override ...]            trains it and one process, compares, and certifies
python scripts/verify.py -m strategy=ddp,zero1 [override ...]   the same for each
python scripts/verify.py --bisect strategy=ddp [override ...]   of one that disagrees, the module that differs first

Overrides are those of train.py. Exit code: 0 if all agree, 1 if one disagrees or fails, 2 for a mistake.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.installed import check_installed

check_installed()

from launch.verify import verify

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    sys.exit(verify(sys.argv[1:]))

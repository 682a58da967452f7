#!/bin/sh
# Make .venv from requirements.lock: `sh scripts/setup.sh [python]`. One clear line for each thing that can be missing.
set -u
python=${1:-python3}

fail() { echo "setup: $1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is not installed; install Python 3.11 or newer, or name one: make setup PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old; Concord needs 3.11 or newer: make setup PYTHON=python3.12"

echo "setup: making .venv with $("$python" --version) from requirements.lock (once; a minute or more)"
"$python" -m venv .venv || fail "the venv module is missing; on Debian: apt install python3-venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock \
    || fail "the packages could not be installed; check the network (pip's own message is above) and run make setup again"
touch .venv/ready
echo "setup: done; activate it with: . .venv/bin/activate"

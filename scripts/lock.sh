#!/bin/sh
# Write requirements.lock from what is installed in .venv, where versions are tried out before they are pinned.
# torch's own dependencies on CUDA are left out: pip adds those that the machine's build of torch asks for.
set -eu
.venv/bin/python -m pip freeze --disable-pip-version-check --exclude-editable > requirements.lock.frozen
{
    echo "# One set of versions that was tested together. Made by \`make lock\`; the ranges are in pyproject.toml."
    grep -v -i -E '^(nvidia-|cuda-|triton)' requirements.lock.frozen | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'
} > requirements.lock.new
rm requirements.lock.frozen
mv requirements.lock.new requirements.lock

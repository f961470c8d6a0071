#!/usr/bin/env bash
# Remake constraints.txt, one file for every supported Python, with uv (`pip install uv`) from the ranges of
# pyproject.toml. Pins that still fit are kept. Arguments pass through to uv:
#   --upgrade, --upgrade-package=jax   take the newest releases
# CUDA's libraries are left out: the extra `cuda` and PyTorch need different ones, and each pins its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lock=$(mktemp)
trap 'rm -f "$lock"' EXIT
cp constraints.txt "$lock"
uv pip compile --quiet --universal --python-version=3.11 --no-annotate --no-header \
    --extra=dev --extra=app --extra=torch --extra=pod --extra=tpu pyproject.toml --output-file="$lock" "$@"
{
    echo "# The versions this project is tested with (pip --constraint). Written by scripts/lock.sh."
    grep -Ev '^(cuda|nvidia)-|^triton=' "$lock"
} >constraints.txt

#!/usr/bin/env bash
# Make .venv with the pinned dependencies and this package in it. Safe to run again: it does nothing
# when pins and package description are unchanged. Usage: setup.sh [extra ...] (extras of pyproject.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=""
for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: Python 3.11 or newer with the venv module is needed; install it, or name it: PYTHON=/path/to/python $0" >&2
    exit 2
fi

extras=$(IFS=,; echo "$*")
stamp=.venv/.installed
wanted="$(cat constraints.txt pyproject.toml) extras=$extras"
wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())' <<<"$wanted")
if [ -x .venv/bin/python ] && [ -f "$stamp" ] && grep -qx "$wanted" "$stamp"; then
    exit 0
fi
echo "setup: installing pinned dependencies into .venv (a minute or two, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"
# Several sets of extras can be current at once: each has its line; other pins start the list anew.
if [ -f "$stamp" ] && [ constraints.txt -nt "$stamp" ]; then rm -f "$stamp"; fi
echo "$wanted" >>"$stamp"

#!/usr/bin/env bash
# Make .venv with the pinned dependencies and this package in it. Safe to run again: it does nothing if pins,
# pyproject.toml and Python are unchanged. Usage: setup.sh [extra ...] (extras of pyproject.toml)
#   setup.sh --find-python [minor ...]   only print which Python it would use, of these minor versions
# Environment: PYTHON, which Python to use (default: the first of 3.13, 3.12, 3.14, 3.11 that is found, pyenv's too);
# SFD_VENV, another folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${SFD_VENV:-.venv}

find_python() {
    local minor candidate candidates
    for minor in "$@"; do
        candidates=("python3.$minor" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor."*/bin/python)
        candidates+=("$(readlink -f "$venv/bin/python" || true)") # from tpu_setup.sh
        [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
        for candidate in "${candidates[@]}"; do
            if "$candidate" -c "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "setup: Python 3.11 to 3.14 with the venv module is needed; install it, or name it: PYTHON=/path/to/python $0" >&2
    return 2
}

minors=(13 12 14 11) # the tests run on 3.13 and 3.11
if [ "${1:-}" = --find-python ]; then
    shift
    [ $# -gt 0 ] || set -- "${minors[@]}"
    find_python "$@"
    exit
fi
python=$(find_python "${minors[@]}")

extras=$(IFS=,; echo "$*")
stamp=$venv/.installed
version=$("$python" --version)
wanted="$(cat constraints.txt pyproject.toml) $version extras=$extras"
wanted=$("$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())' <<<"$wanted")
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && grep -qx "$wanted" "$stamp"; then
    exit 0
fi

# One installation at a time; the mark left by a killed one shows that the environment is incomplete.
mark=$venv/.installing
if [ -f "$mark" ] && kill -0 "$(cat "$mark")" 2>/dev/null; then
    echo "setup: process $(cat "$mark") installs into $venv; waiting for it (if that is another program, remove $mark)"
    while [ -f "$mark" ] && kill -0 "$(cat "$mark")" 2>/dev/null; do sleep 1; done
    exec bash scripts/setup.sh "$@"
fi
if [ -d "$venv" ] && { [ -f "$mark" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    echo "setup: $venv is incomplete; creating it again"
    rm -rf "$venv"
elif [ -d "$venv" ] && [ "$("$venv/bin/python" --version)" != "$version" ]; then
    echo "setup: $venv has $("$venv/bin/python" --version); creating it again with $version (PYTHON= chooses another)"
    rm -rf "$venv"
fi
echo "setup: installing pinned dependencies into $venv with $version (a minute or two, once)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo $$ >"$mark"
for attempt in 1 2 3; do
    if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".${extras:+[$extras]}"; then
        break
    fi
    # Pip downloads everything before it installs, so a network failure changes nothing.
    if [ "$attempt" = 3 ]; then
        rm -f "$mark"
        echo "setup: pip failed three times, see its messages above; if the network failed, run this again" >&2
        exit 1
    fi
    echo "setup: pip failed; trying again in $((5 * attempt)) s" >&2
    sleep $((5 * attempt))
done
# Several sets of extras can be current at once, one line each; other pins reset the list.
if [ -f "$stamp" ] && [ constraints.txt -nt "$stamp" ]; then rm -f "$stamp"; fi
echo "$wanted" >>"$stamp"
rm -f "$mark"

#!/usr/bin/env bash
# Prepare one worker of a TPU VM: a Python of 3.12 or newer, the pinned dependencies and libtpu in .venv, then a check
# of the devices. Safe to run again. For all workers of a slice: scripts/tpu/setup.sh.
#
# Environment: PYTHON (which Python to use, 3.11 too), TPU_CHECK_TIMEOUT (seconds to wait for the chips, default 600;
# 0 skips the check). On a slice of several workers the chips answer only when all of its workers ask.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
die() {
    echo "tpu_setup: $*" >&2
    exit 1
}

# Many images have Python 3.10, but the newest JAX needs 3.12. uv is a package that installs a Python without root or
# compiler. Its version is pinned here and not in constraints.txt, since it runs under the image's Python.
uv_version=0.13.9
python_wanted=3.13
if [ -z "${PYTHON:-}" ] && ! PYTHON=$(bash scripts/setup.sh --find-python 13 12 14 2>/dev/null); then
    tools=.tools/uv-$uv_version
    if [ ! -x "$tools/bin/uv" ]; then
        echo "tpu_setup: no Python 3.12 or newer found; installing one"
        rm -rf "$tools" "$tools.part"
        python3 -m pip install --quiet --disable-pip-version-check --target "$tools.part" "uv==$uv_version" ||
            die "uv, which installs Python $python_wanted, could not be installed. Run this again if the network \
failed; or install Python 3.12 or newer with its venv module yourself and run this again"
        mv "$tools.part" "$tools"
    fi
    if ! PYTHON=$("$tools/bin/uv" python find --managed-python "$python_wanted" 2>/dev/null); then
        "$tools/bin/uv" python install "$python_wanted" ||
            die "Python $python_wanted could not be downloaded. Run this again if the network failed; on a machine \
without a network install Python 3.12 or newer with its venv module yourself (Ubuntu 24.04: apt-get install python3-venv; \
with Python 3.11: PYTHON=python3.11 $0)"
        PYTHON=$("$tools/bin/uv" python find --managed-python "$python_wanted")
    fi
fi
PYTHON=$PYTHON bash scripts/setup.sh tpu

[ "${TPU_CHECK_TIMEOUT:-600}" != 0 ] || exit 0
exec .venv/bin/python scripts/tpu/check_devices.py "${TPU_CHECK_TIMEOUT:-600}"

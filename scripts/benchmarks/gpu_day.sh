#!/usr/bin/env bash
# Measure on a GPU, in under eight minutes, what docs/performance.md lacks. Flags pass through: gpu_day.sh --help.
# Uses the first Python whose JAX has a GPU plugin, else the first with JAX; PYTHON=/path/to/python is tried first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
for wanted in 'import jaxlib, jax_plugins' 'import jaxlib'; do
    for python in "${PYTHON:-}" "$here/.venv/bin/python" python3; do
        if [ -n "$python" ] && "$python" -c "$wanted" 2>/dev/null; then
            exec "$python" "$here/scripts/benchmarks/gpu_day.py" "--spent=$SECONDS" "$@"
        fi
    done
done
echo "gpu_day: no Python with JAX found; install the extra cuda, or name one: PYTHON=/path/to/python $0" >&2
exit 2

#!/usr/bin/env bash
# Measure on a GPU, in under eight minutes, what docs/performance.md lacks. Flags pass through: gpu_day.sh --help.
# Takes the first Python whose JAX has a GPU's plugin, else the first with JAX; PYTHON=/path/to/python is asked first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
for wanted in 'import jaxlib, jax_plugins' 'import jaxlib'; do
    for python in "${PYTHON:-}" "$here/.venv/bin/python" python3; do
        if [ -n "$python" ] && "$python" -c "$wanted" 2>/dev/null; then
            exec "$python" "$here/scripts/benchmarks/gpu_day.py" "--spent=$SECONDS" "$@"
        fi
    done
done
echo "gpu_day: no Python with JAX here; install the extra cuda, or say where it is: PYTHON=/path/to/python $0" >&2
exit 2

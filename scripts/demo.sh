#!/usr/bin/env bash
# From real handwritten digits to new ones on this machine's processor: see README.md.
# Flags pass through to `sfd demo`; the work folder is demo_out unless --workdir says otherwise.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$here/scripts/setup.sh" demo
case " $* " in *" --workdir"*) ;; *) set -- --workdir=demo_out "$@" ;; esac
exec "$here/.venv/bin/sfd" demo "$@"

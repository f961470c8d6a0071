#!/usr/bin/env bash
# Prepare one worker of a TPU VM: the pinned dependencies and libtpu in .venv, then a look at the devices.
# Safe to run again. On all workers of a slice:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='cd sfd_jax && bash tpu_setup.sh'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
bash scripts/setup.sh tpu
# Libtpu belongs to one process at a time: this one must end before a training run starts.
.venv/bin/python - <<'CHECK'
import jax
devices = jax.local_devices()
print(f"{len(devices)} local devices: {devices[0].device_kind} ({devices[0].platform})")
if devices[0].platform != "tpu":
    raise SystemExit("tpu_setup: no TPU seen here; is this a TPU VM, and does no other process hold the chips?")
CHECK

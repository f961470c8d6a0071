"""Print this worker's TPU devices, or the reason why they cannot be used: `check_devices.py [SECONDS]`.

Only one process at a time can use libtpu, and on a slice of several workers it waits for all of them. So a separate
process queries the devices: it ends before a training run starts, and can be killed if it waits too long.
"""

import glob
import os
import subprocess
import sys

ASK = """
import jax
devices = jax.local_devices()
kind = f"{devices[0].device_kind} ({devices[0].platform})"
print(f"{len(devices)} local devices of {jax.device_count()}: {kind}, jax {jax.__version__}")
raise SystemExit(0 if devices[0].platform == "tpu" else 3)
"""
CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")


def holders(chips: list[str]) -> list[str]:
    """Return the other processes that have one of the files `chips` open, as "PID (command line)"."""
    found = {}
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        pid = link.split("/")[2]
        try:
            if int(pid) != os.getpid() and os.readlink(link) in chips:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    found[pid] = file.read().replace(b"\0", b" ").decode(errors="replace").strip()[:100]
        except OSError:
            continue  # it has ended, or is another user's
    return [f"process {pid} ({command})" for pid, command in found.items()]


def check(seconds: float, chips: list[str]) -> str:
    """Print the devices; return "" or a sentence that says what is wrong."""
    if not chips:
        return "this machine has no TPU chips (no /dev/accel* or /dev/vfio/*): is it a TPU VM?"
    if busy := holders(chips):
        return f"the chips are held by {', '.join(busy)}. Wait for it, or stop it, then run this again"
    try:
        done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return (
            f"everything is installed, but the chips did not answer within {seconds:.0f} s. Those of a slice answer "
            "only when all of its workers ask: run this on all of them at the same time (scripts/tpu/setup.sh), or "
            "skip this check (TPU_CHECK_TIMEOUT=0)"
        )
    print(done.stdout, end="")
    if done.returncode == 0:
        return ""
    reason = (done.stderr.strip().splitlines() or ["JAX chose another platform"])[-1]
    return f"JAX finds no TPU: {reason}. If another user's process holds the chips, `sudo lsof {chips[0]}` names it"


def main() -> None:
    chips = sorted(path for pattern in CHIPS for path in glob.glob(pattern))
    if fault := check(float(sys.argv[1]) if len(sys.argv) > 1 else 600, chips):
        raise SystemExit(f"tpu_setup: {fault}")


if __name__ == "__main__":
    main()

"""A stand-in for `gcloud`, put first on PATH: it records its calls and simulates a small cloud in local folders.

The folder GCLOUD_WORLD holds `calls.jsonl` (one argv a line), `world.json` and a home folder for each worker. A
worker's ssh command is run for real, by bash, in its home. `world.json`:

    state     the queued resource's state; "ABSENT" where there is none
    pending   its next states, one for each query
    coming    its states after a creation
    nodes     {name: state of the slice's node}
    workers   workers of a node
    type      accelerator type of the nodes
    silent    workers that gcloud skips without an error
    fail      numbers of the calls (from 0, in order) that fail; "from N" is [N, -1]
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORLD = Path(os.environ.get("GCLOUD_WORLD", "."))


def main(argv):
    with open(WORLD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        calls = WORLD / "calls.jsonl"
        number = len(calls.read_text().splitlines()) if calls.exists() else 0
        with calls.open("a") as out:
            out.write(json.dumps(argv) + "\n")
        world = json.loads((WORLD / "world.json").read_text())
        fail = world["fail"]
        if number in fail or (fail and fail[-1] == -1 and number >= fail[0]):
            print(f"ERROR: (gcloud) call {number} fails, as the test wants", file=sys.stderr)
            return 1
        flags = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
        words = [word for word in argv if not word.startswith("--")]
        answer = answer_of(words, flags, argv, world)
        (WORLD / "world.json").write_text(json.dumps(world))
    if answer == "ssh":  # outside the lock, as several slices are reached at once
        return ssh(words[4], flags, world)
    if answer == "scp":
        return scp(words[4:-1], words[-1], flags, world)
    print(answer, end="")
    return 0


def answer_of(words, flags, argv, world):
    assert words[:2] == ["compute", "tpus"] and flags["zone"] == "zone-a" and flags["project"] == "some-project", argv
    kind, verb = words[2:4]
    if (kind, verb) == ("queued-resources", "list"):
        if world["pending"]:
            become(world, world["pending"].pop(0))
        return "" if world["state"] == "ABSENT" else world["state"] + "\n"
    if (kind, verb) == ("queued-resources", "create"):
        assert world["state"] == "ABSENT", "it exists already"
        count = int(flags.get("node-count", 1))
        world["names"] = [flags["node-id"]] if count == 1 else [f"{flags['node-prefix']}-{i}" for i in range(count)]
        world["type"] = flags["accelerator-type"]
        become(world, "WAITING_FOR_RESOURCES")
        world["pending"] = list(world["coming"])
        return ""
    if (kind, verb) == ("queued-resources", "delete"):
        assert "--force" in argv and "--quiet" in argv
        become(world, "ABSENT")
        return ""
    if (kind, verb) == ("tpu-vm", "list"):
        pattern = flags["filter"].removeprefix("name ~ ")
        rows = [(name, state) for name, state in world["nodes"].items() if re.search(pattern, f"x/nodes/{name}")]
        return "".join(f"{name} {state} {world['workers']} {world['type']}\n" for name, state in rows)
    assert kind == "tpu-vm" and verb in ("ssh", "scp"), argv
    return verb


def become(world, state):
    """Set the state of the queued resource; create or delete its nodes and their disks accordingly."""
    world["state"] = state
    if state == "ACTIVE" and not world["nodes"]:
        world["nodes"] = {name: "READY" for name in world["names"]}
        for name in world["names"]:
            for worker in range(world["workers"]):
                home(name, worker).mkdir(parents=True)
    elif state in ("ABSENT", "SUSPENDED", "FAILED"):
        world["nodes"] = {}
        for folder in (WORLD / "homes").glob("*"):
            kill_jobs(folder)
            shutil.rmtree(folder)


def kill_jobs(folder):
    """SIGKILL the jobs whose PIDs are in a worker's home folder, if they are still jobs."""
    for file in folder.glob("sfd_jobs/*/pid"):
        pid = int(file.read_text())
        try:
            if b"supervise" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.killpg(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass


def home(node, worker):
    return WORLD / "homes" / f"{node}-w{worker}"


def chosen(node, flags, world):
    if world["nodes"].get(node) != "READY":
        sys.exit(f"ERROR: {node} is {world['nodes'].get(node)}")
    workers = range(world["workers"]) if flags["worker"] == "all" else [int(flags["worker"])]
    return [home(node, worker) for worker in workers if worker not in world["silent"]]


def ssh(node, flags, world):
    status = 0
    for folder in chosen(node, flags, world):
        # gcloud splits the command at spaces and ssh joins it again: the login shell parses it.
        environment = {**os.environ, "HOME": str(folder), "WORKER": folder.name}
        done = subprocess.run(["bash", "-c", flags["command"]], cwd=folder, env=environment)
        status = status or done.returncode
    return status


def scp(sources, target, flags, world):
    if ":" in target:
        for folder in chosen(target.split(":")[0], flags, world):
            for source in sources:
                shutil.copy(source, folder)
        return 0
    node, path = sources[0].split(":")
    (source,) = chosen(node, flags, world)
    if not (source / path).exists():
        sys.exit(f"ERROR: no such file {path}")
    shutil.copy(source / path, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

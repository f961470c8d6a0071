"""A small cloud for the scripts of scripts/tpu: a repository of their own, a stand-in for gcloud, a fake command."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts.gcloud_stand_in import kill_jobs

# Replaces tpu_setup.sh: makes the environment with a command that records its arguments and then follows the file
# `command`: the exit status of each start in turn, or "stay" until SIGTERM.
SETUP = r"""#!/usr/bin/env bash
set -e
cd "$(dirname "$0")"
[ ! -f "$HOME/setup_fails" ] || { echo "the package index did not answer" >&2; exit 3; }
mkdir -p .venv/bin
cat >.venv/bin/sfd <<'COMMAND'
#!/usr/bin/env bash
printf '%s\0' "$@" >"$HOME/given"
env >"$HOME/environment"
plan=$(head -n 1 "$HOME/../../command")
[ "$(wc -l <"$HOME/../../command")" -le 1 ] || sed -i 1d "$HOME/../../command"
echo "the command does: $plan"
if [ "$plan" = stay ]; then trap 'echo saved; exit 75' TERM; while :; do sleep 0.05; done; fi
exit "$plan"
COMMAND
chmod +x .venv/bin/sfd
echo prepared >>"$HOME/prepared"
"""


class Cloud:
    """The simulated cloud, and a way to run the scripts against it."""

    def __init__(self, root: Path, folder: Path, like: "Cloud | None" = None):
        """Create it in a folder; with `like`, copy that one's repository and, in `up`, its prepared workers."""
        self.folder, self.world, self.like = folder, folder / "world", like
        self.repository, tools = folder / "a checkout", folder / "bin"
        self.scripts = self.repository / "scripts" / "tpu"
        tools.mkdir()
        self.world.mkdir()
        if like:
            shutil.copytree(like.repository, self.repository)
            self.commit = like.commit
        else:
            shutil.copytree(root / "scripts" / "tpu", self.scripts)
            (self.repository / "sfd_jax").mkdir()
            shutil.copy(root / "sfd_jax" / "tpu_flags.txt", self.repository / "sfd_jax")
            (self.repository / "tpu_setup.sh").write_text(SETUP)
            self.git("init", "-q")
            self.commit = self.commit_all("first")
        stand_in = Path(__file__).with_name("gcloud_stand_in.py")
        self.tool(tools / "gcloud", f'#!/bin/sh\nexec {sys.executable} -S "{stand_in}" "$@"\n')
        self.tool(tools / "hostname", '#!/bin/sh\necho "$WORKER"\n')
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("JOB", "SPOT", "COMMIT", "POLL")},
            "PATH": f"{tools}:{os.environ['PATH']}",
            "GCLOUD_WORLD": str(self.world),
            "TPU_NAME": "pod",
            "ZONE": "zone-a",
            "PROJECT": "some-project",
            "ACCELERATOR_TYPE": "v5litepod-8",
            "POLL": "0",
            "BACKOFF": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        coming = ["PROVISIONING", "ACTIVE"]
        self.set(state="ABSENT", pending=[], coming=coming, nodes={}, names=[], fail=[])
        self.set(workers=2, type="v5litepod-8", silent=[])
        self.command("0")

    @staticmethod
    def tool(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *arguments: str) -> str:
        name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(self.repository), *name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit_all(self, message: str) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def set(self, **values) -> None:
        path = self.world / "world.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | values))

    def command(self, *plan: str) -> None:
        """Set what the command does at each start, on any worker; the last entry is repeated."""
        (self.world / "command").write_text("".join(f"{line}\n" for line in plan))

    def reset(self) -> None:
        """Empty the cloud and forget all calls."""
        for home in self.homes():
            kill_jobs(home)
            shutil.rmtree(home)
        self.set(state="ABSENT", pending=[], nodes={}, fail=[])
        self.forget_calls()

    @property
    def state(self) -> str:
        return json.loads((self.world / "world.json").read_text())["state"]

    def calls(self) -> list[list[str]]:
        path = self.world / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget_calls(self) -> None:
        (self.world / "calls.jsonl").unlink(missing_ok=True)

    def homes(self) -> list[Path]:
        return sorted((self.world / "homes").glob("*"))

    def given(self, home: Path) -> list[str]:
        """Return the arguments of the command on a worker."""
        return (home / "given").read_text().split("\0")[:-1]

    def run(
        self, script: str, *arguments: str, drop: tuple[str, ...] = (), **environment
    ) -> subprocess.CompletedProcess:
        settings = {name: value for name, value in (self.environment | environment).items() if name not in drop}
        return subprocess.run(
            ["bash", str(self.scripts / f"{script}.sh"), *arguments],
            capture_output=True,
            text=True,
            timeout=600,  # a busy machine takes a minute
            env=settings,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
        )

    def up(self, workers: int = 2, ready: bool = True) -> None:
        """Create a slice of up to two workers, and set it up if `ready`."""
        self.set(workers=workers)
        if self.like and "SLICES" not in self.environment:
            for home in self.like.homes()[:workers]:
                target = self.world / "homes" / home.name
                shutil.copytree(home, target) if ready else target.mkdir(parents=True)
            self.set(state="ACTIVE", nodes={"pod": "READY"}, names=["pod"])
            return
        assert self.run("create").returncode == 0
        done = self.run("setup")
        assert done.returncode == 0, done.stderr
        self.forget_calls()

    def wait_for(self, condition, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def prepared_cloud(root, tmp_path_factory):
    cloud = Cloud(root, tmp_path_factory.mktemp("cloud"))
    cloud.up()
    return cloud


@pytest.fixture
def cloud(root, tmp_path, prepared_cloud):
    cloud = Cloud(root, tmp_path, prepared_cloud)
    yield cloud
    cloud.reset()

"""The launch scripts against a stand-in for gcloud: their calls, and their behaviour when a call fails."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfd_jax import libtpu

ODD = [
    "train",
    "--workdir=gs://bucket/my run",
    "it's",
    'a "b" c',
    "$HOME `id` \\",
    "two  spaces",
    "",
    "new\nline",
    "*",
    "--x=ü",
]
SCRIPTS = ("create", "setup", "launch", "stop", "watch", "logs", "delete")


def test_shellcheck_finds_nothing(root):
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    assert Path(checker).exists(), "shellcheck comes with the extra `dev`: bash scripts/setup.sh dev"
    files = [
        root / "tpu_setup.sh",
        *sorted((root / "scripts").glob("*.sh")),
        *sorted((root / "scripts/tpu").glob("*.sh")),
    ]
    done = subprocess.run([checker, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_missing_settings(cloud, script):
    done = cloud.run(script, "--help", drop=("ZONE", "PROJECT"))
    assert done.returncode == 0 and "TPU_NAME" in done.stdout and f"{script}.sh" in done.stdout
    done = cloud.run(script, "--", "train", drop=("ZONE", "PROJECT"))
    assert done.returncode == 2
    assert (
        "--zone=... (or the variable ZONE)" in done.stderr and "--project=... (or the variable PROJECT)" in done.stderr
    )
    done = cloud.run(script, "--zoen=x")
    assert done.returncode == 2 and "--zoen" in done.stderr
    assert cloud.calls() == []


def test_a_dry_run_prints_the_calls_of_a_run(cloud):
    def shown(script, *arguments):
        done = cloud.run(script, "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
        words = ["-c", 'for line; do eval "set -- $line"; printf "%s\\0" "$@"; printf "\\n"; done', "bash", *lines]
        split = subprocess.run(["bash", *words], capture_output=True, text=True, check=True).stdout
        return [line.split("\0")[1:-1] for line in split.splitlines()]

    def called(script, *arguments):
        cloud.forget_calls()
        done = cloud.run(script, *arguments)
        assert done.returncode == 0, done.stderr
        return [call for call in cloud.calls()]

    def same(words):
        """Drop the folder of copied files, which differs."""
        return [Path(word).name if word.startswith("/") else word for word in words]

    assert shown("create", "--spot") and cloud.calls() == []
    cloud.set(coming=["ACTIVE"], workers=1)
    job = ("--env=A=b c", "--", "train", "it's")
    for script, arguments in [
        ("create", ("--spot",)),
        ("setup", ()),
        ("launch", job),
        ("logs", ()),
        ("stop", ()),
        ("delete", ()),
    ]:
        expected = [same(words) for words in shown(script, *arguments)]
        assert [same(words) for words in called(script, *arguments)] == expected, script


def test_create_requests_a_slice_and_waits(cloud):
    cloud.set(pending=[])
    done = cloud.run(
        "create",
        "--spot",
        "--topology=v4:2x2x4",
        "--slices=3",
        "--create-flag=--network=own net",
        drop=("ACCELERATOR_TYPE",),
    )
    assert done.returncode == 0, done.stderr
    request = cloud.calls()[1]
    assert request[:4] == ["compute", "tpus", "queued-resources", "create"]
    assert {"--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base", "--spot", "--network=own net"} <= set(
        request
    )
    assert {"--node-count=3", "--node-prefix=pod"} <= set(request)
    assert "PROVISIONING" in done.stdout and cloud.state == "ACTIVE"
    # Again: it exists, nothing is requested.
    cloud.forget_calls()
    assert cloud.run("create").returncode == 0
    assert "create" not in [word for call in cloud.calls() for word in call]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--topology=v5e:4x4",), "is v5litepod-16, but --accelerator-type=v5litepod-8"),
        (("--topology=v9:4x4", "--accelerator-type="), "v9:4x4: the known chips are"),
        (("--topology=v5e:4xx", "--accelerator-type="), "write CHIP:SHAPE"),
        (("--accelerator-type=v9-8",), "--runtime-version=... (or the variable RUNTIME_VERSION)"),
        (("--slices=two",), "--slices=two: give a whole number"),
        (("--tpu-name=Pod_1",), "small letters"),
        (("--spot=yes",), "--spot takes no value"),
        (("pod",), "'pod' is not a flag"),
    ],
)
def test_create_refuses_invalid_settings(cloud, flags, sentence):
    done = cloud.run("create", *flags)
    assert done.returncode == 2 and sentence in done.stderr and cloud.calls() == []


def test_create_reports_a_failed_request(cloud):
    cloud.set(coming=["PROVISIONING", "FAILED"])
    done = cloud.run("create")
    assert done.returncode == 1 and "FAILED and will not become ready" in done.stderr and "delete" in done.stderr


def test_arguments_arrive_as_they_were_given(cloud):
    cloud.up()
    done = cloud.run("launch", "--job=one", "--env=NOTE=it's $5", "--", *ODD)
    assert done.returncode == 0, done.stderr
    assert len(cloud.homes()) == 2
    for home in cloud.homes():
        cloud.wait_for((home / "sfd_jobs/one/status").exists)
        assert cloud.given(home) == ODD
        environment = (home / "environment").read_text().splitlines()
        assert {"NOTE=it's $5", "SFD_EXPECT_PROCESSES=2", "SFD_EXPECT_DEVICES=8", "SFD_MULTIHOST=1"} <= set(environment)
        assert f"SFD_COMMIT={cloud.commit}" in environment
        flags = " ".join(f"--{name}={value}" for name, value in libtpu.flags_of("default", "v5e").items())
        assert f"LIBTPU_INIT_ARGS={flags}" in environment and "xla_tpu_scoped_vmem_limit_kib=50000" in flags
        log = (home / "sfd_jobs/one/log").read_text()
        assert "the command does: 0" in log and f"=== libtpu: {flags}\n" in log


def test_slices_are_reached_together(cloud):
    cloud.environment["SLICES"] = "2"
    cloud.up(workers=2)
    assert cloud.run("launch", "--", "train").returncode == 0
    assert [home.name for home in cloud.homes()] == ["pod-0-w0", "pod-0-w1", "pod-1-w0", "pod-1-w1"]
    for home in cloud.homes():
        cloud.wait_for((home / "sfd_jobs/train/status").exists)
        environment = (home / "environment").read_text().splitlines()
        assert {"SFD_EXPECT_PROCESSES=4", "SFD_EXPECT_DEVICES=16"} <= set(environment)
    # A missing slice is reported, not ignored.
    cloud.set(nodes={"pod-0": "READY"})
    done = cloud.run("launch", "--", "train")
    assert done.returncode == 1 and "1 of 2 slices exist" in done.stderr


def test_setup_keeps_the_environment_and_leaves_a_running_job_alone(cloud):
    cloud.up(ready=False)
    done = cloud.run("launch", "--", "train")
    assert done.returncode != 0 and "setup.sh first" in done.stderr
    assert cloud.run("setup").returncode == 0
    home = cloud.homes()[0]
    (home / "sfd_jax/.venv/mark").touch()
    first = cloud.commit
    assert (home / "sfd_jax/.commit").read_text().strip() == first
    (cloud.repository / "new_file").touch()
    second = cloud.commit_all("second")
    cloud.command("stay")
    assert cloud.run("launch", "--", "train").returncode == 0
    done = cloud.run("setup")
    assert done.returncode != 0 and "job train runs" in done.stderr and not (home / "sfd_jax/new_file").exists()
    assert cloud.run("stop").returncode == 0
    (home / "setup_fails").touch()
    done = cloud.run("setup")
    assert done.returncode == 1 and "pod" in done.stderr and "index did not answer" in done.stdout + done.stderr
    (home / "setup_fails").unlink()
    assert cloud.run("setup").returncode == 0
    for home in cloud.homes():
        assert (home / "sfd_jax/.commit").read_text().strip() == second and (home / "sfd_jax/new_file").exists()
    assert (cloud.homes()[0] / "sfd_jax/.venv/mark").exists()


def test_setup_does_not_touch_a_users_checkout(cloud):
    cloud.up(ready=False)
    own = cloud.homes()[1] / "sfd_jax"
    own.mkdir()
    (own / "work").write_text("unsaved")
    done = cloud.run("setup")
    assert done.returncode == 1 and "move it away" in done.stderr and (own / "work").read_text() == "unsaved"


def test_uncommitted_changes_are_reported_and_not_copied(cloud):
    cloud.up(ready=False)
    (cloud.repository / "tpu_setup.sh").write_text("exit 9\n")
    done = cloud.run("setup")
    assert done.returncode == 0 and "uncommitted" in done.stdout


def test_launch_again_starts_missed_workers_and_refuses_another_command(cloud):
    cloud.up()
    cloud.command("stay")
    assert cloud.run("launch", "--", "train", "--a").returncode == 0
    pids = [(home / "sfd_jobs/train/pid").read_text() for home in cloud.homes()]
    done = cloud.run("launch", "--", "train", "--a")
    assert done.returncode == 0 and done.stdout.count(" before") == 2
    assert pids == [(home / "sfd_jobs/train/pid").read_text() for home in cloud.homes()]
    done = cloud.run("launch", "--", "train", "--b")
    assert done.returncode == 1 and "another command" in done.stderr
    # Stopped, it saves and reports that.
    done = cloud.run("stop")
    assert done.returncode == 0 and done.stdout.count("exited 75") == 2
    assert all("saved" in (home / "sfd_jobs/train/log").read_text() for home in cloud.homes())


def test_a_job_that_does_not_save_in_time_is_killed(cloud):
    cloud.up(workers=1)
    (home,) = cloud.homes()
    command = home / "sfd_jax/.venv/bin/sfd"
    command.write_text("#!/usr/bin/env bash\ntrap '' TERM\nwhile :; do sleep 0.05; done\n")
    assert cloud.run("launch", "--", "train").returncode == 0
    done = cloud.run("stop", "--grace=1")
    assert done.returncode == 0 and "exited 137" in done.stdout
    assert subprocess.run(["pgrep", "-f", str(command)], capture_output=True).returncode == 1


def test_logs_come_from_all_workers_and_old_ones_are_kept(cloud):
    cloud.up()
    cloud.run("launch", "--", "train")
    for home in cloud.homes():
        cloud.wait_for((home / "sfd_jobs/train/status").exists)
    done = cloud.run("logs", "--out=got")
    assert done.returncode == 0, done.stderr
    files = sorted((cloud.folder / "got").glob("*"))
    assert [file.name for file in files] == ["pod-0.log", "pod-1.log"]
    assert all("exit status 0" in file.read_text() for file in files)
    shutil.rmtree(cloud.homes()[1] / "sfd_jobs")
    done = cloud.run("logs", "--out=got")
    assert done.returncode == 1 and "pod-1" in done.stderr and "exit status 0" in files[1].read_text()
    assert "the command does: 0" in cloud.run("logs", "--tail=5").stdout


@pytest.mark.parametrize("script", ["create", "setup", "launch", "logs", "stop", "delete"])
def test_each_failing_call_stops_with_a_message_and_a_second_run_continues(cloud, script):
    """For each n, the n-th call fails; then the same command ends as an undisturbed one does."""
    arguments = ("--", "train", "--flag") if script == "launch" else ()

    def prepare():
        cloud.reset()
        if script != "create":
            cloud.up(ready=script != "setup")
        if script in ("logs", "stop"):
            assert cloud.run("launch", "--", "train").returncode == 0
            for home in cloud.homes():
                cloud.wait_for((home / "sfd_jobs/train/status").exists)
        cloud.forget_calls()

    prepare()
    assert cloud.run(script, *arguments).returncode == 0
    count = len(cloud.calls())
    assert count >= 2
    for number in range(count):
        prepare()
        cloud.set(fail=[number])
        done = cloud.run(script, *arguments)
        assert done.returncode == 1, (number, done)
        assert f"tpu/{script}: " in done.stderr and "Traceback" not in done.stderr
        if (script, number) != ("logs", 2):  # the second worker's log is still fetched
            assert len(cloud.calls()) == number + 1 or script == "logs", "it continued after a failed call"
        cloud.set(fail=[])
        done = cloud.run(script, *arguments)
        assert done.returncode == 0, (number, done.stderr)
        if script == "create":
            assert cloud.state == "ACTIVE"
        if script == "delete":
            assert cloud.state == "ABSENT"
        if script == "launch":
            assert len(cloud.homes()) == 2
            for home in cloud.homes():
                cloud.wait_for((home / "given").exists)


def test_a_worker_that_gcloud_skips_is_noticed(cloud):
    """gcloud ends with 0 although it reached only one of two workers: no script accepts that."""
    cloud.up(ready=False)
    cloud.set(silent=[1])
    done = cloud.run("setup")
    assert done.returncode == 1 and "on 1 of 2 workers only" in done.stderr
    cloud.set(silent=[])
    assert cloud.run("setup").returncode == 0
    cloud.set(silent=[1])
    for script, arguments in (("launch", ("--", "train")), ("stop", ())):
        done = cloud.run(script, *arguments)
        assert done.returncode == 1 and "on 1 of 2 workers only" in done.stderr
    done = cloud.run("watch", "--looks=2", "--", "train")
    assert done.returncode == 1 and "1 of 2 workers answer, in 2 checks" in done.stderr


# --- watch ------------------------------------------------------------------------------------------------------------


def starts(cloud):
    return json.dumps(cloud.calls()).count("sfd_worker.sh start")


def test_watch_creates_sets_up_launches_and_ends_with_the_job(cloud):
    done = cloud.run("watch", "--spot", "--delete-when-done", "--", *ODD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is done on all 2 workers" in done.stdout and cloud.state == "ABSENT"
    assert starts(cloud) == 1
    order = [call[3] for call in cloud.calls() if call[3] in ("create", "scp", "delete")]
    assert order == ["create", "scp", "delete"]


def test_watch_restarts_preempted_and_killed_jobs(cloud):
    cloud.set(workers=1)
    cloud.command("75", "137", "134", "143", "75", "0")
    done = cloud.run("watch", "--", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert starts(cloud) == 6
    log = (cloud.homes()[0] / "sfd_jobs/train/log").read_text()
    assert [line.split()[-1] for line in log.splitlines() if "exit status" in line] == [
        "75",
        "137",
        "134",
        "143",
        "75",
        "0",
    ]


def test_watch_stops_at_once_on_a_fault(cloud):
    cloud.up()
    cloud.command("2")
    done = cloud.run("watch", "--", "train")
    assert done.returncode == 2 and "ended with status 2" in done.stderr
    assert "the command does: 2" in done.stdout, "it prints the last lines of the logs"
    assert starts(cloud) == 1 and cloud.state == "ACTIVE" and "costs" in done.stderr
    # Started again, it tries once more; and then again, after the user has fixed the fault.
    cloud.command("1")
    assert cloud.run("watch", "--", "train").returncode == 1 and starts(cloud) == 2
    cloud.command("0")
    done = cloud.run("watch", "--", "train")
    assert done.returncode == 0 and starts(cloud) == 3, done.stdout + done.stderr


def test_watch_retries_a_limited_number_of_times(cloud):
    cloud.set(workers=1)
    cloud.command("75")
    done = cloud.run("watch", "--attempts=3", "--", "train")
    assert done.returncode == 1 and "3 attempts in a row failed" in done.stderr
    assert starts(cloud) == 3
    # The same holds for a queued resource that always fails.
    cloud.run("delete")
    cloud.forget_calls()
    cloud.set(coming=["FAILED"])
    done = cloud.run("watch", "--attempts=3", "--", "train")
    assert done.returncode == 1 and "FAILED" in done.stdout
    assert [call[3] for call in cloud.calls()].count("create") == 3


@pytest.mark.parametrize("how", ["SUSPENDED", "PREEMPTED"])
def test_watch_creates_a_lost_slice_again(cloud, how):
    cloud.up(workers=1)
    cloud.command("stay", "0")
    assert cloud.run("launch", "--", "train").returncode == 0
    cloud.wait_for((cloud.homes()[0] / "given").exists)
    if how == "PREEMPTED":
        cloud.set(nodes={"pod": how})
    else:
        cloud.set(pending=["SUSPENDING", how, how])
    cloud.forget_calls()
    done = cloud.run("watch", "--", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    order = [call[3] for call in cloud.calls() if call[3] in ("create", "scp", "delete")]
    assert order == ["delete", "create", "scp"] and starts(cloud) == 1


@pytest.mark.slow
def test_watch_survives_a_failing_call_and_resumes_after_many(cloud):
    """At the first call of each kind: one failure is survived; if all further calls fail, watch stops, and run again it
    ends as an undisturbed one does, since it keeps no state of its own."""
    cloud.set(workers=1, coming=["ACTIVE"])
    assert cloud.run("watch", "--", "train").returncode == 0
    kinds = {}
    for number, call in enumerate(cloud.calls()):
        verb = [word.split()[8] for word in call if word.startswith("--command=if")]
        kinds.setdefault((call[2], call[3], *verb), number)
    assert {kind[-1] for kind in kinds} == {"list", "create", "scp", "ssh", "start", "status"}
    for kind, number in kinds.items():
        for fail in ([number], [number, -1]) if kind[-1] in ("create", "start", "status") else ([number, -1],):
            cloud.reset()
            cloud.set(fail=fail)
            done = cloud.run("watch", "--attempts=2", "--looks=2", "--", "train")
            if len(fail) == 2:
                assert done.returncode == 1 and "tpu/watch: " in done.stderr, (number, done)
                cloud.set(fail=[])
                done = cloud.run("watch", "--", "train")
            assert done.returncode == 0, (number, fail, done.stdout + done.stderr)
            assert cloud.given(cloud.homes()[0]) == ["train"]


def test_watch_stops_the_others_when_one_worker_has_ended(cloud):
    cloud.up()
    cloud.command("stay")
    assert cloud.run("launch", "--", "train").returncode == 0
    for home in cloud.homes():
        cloud.wait_for((home / "given").exists)
    (cloud.homes()[0] / "sfd_jobs/train/status").write_text("137\n")
    subprocess.run(
        ["kill", "-KILL", "--", "-" + (cloud.homes()[0] / "sfd_jobs/train/pid").read_text().strip()], check=True
    )
    cloud.command("0")
    done = cloud.run("watch", "--", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended on 1 of 2 workers" in done.stdout and "stopping train on the others" in done.stdout
    assert "saved" in (cloud.homes()[1] / "sfd_jobs/train/log").read_text()


def test_watch_refuses_a_slice_that_runs_another_command(cloud):
    cloud.up()
    cloud.command("stay")
    assert cloud.run("launch", "--", "train", "--a").returncode == 0
    done = cloud.run("watch", "--", "train", "--b")
    assert done.returncode == 2 and "runs another command" in done.stderr


def test_watch_stops_a_job_whose_heartbeat_is_old(cloud, root):
    """The worker reads the heartbeats with the environment's Python, here this one."""
    cloud.up(workers=1)
    (home,) = cloud.homes()
    cloud.tool(home / "sfd_jax/.venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    work = cloud.folder / "work"
    beats = work / "heartbeats"
    beats.mkdir(parents=True)
    cloud.command("stay", "0")
    command = ("--", "train", f"--workdir={work}")
    assert cloud.run("launch", *command).returncode == 0
    now = (home / "sfd_jobs/train/pid").stat().st_mtime + 5
    beat = {"process": 0, "processes": 1, "time": now, "step": 41, "step_time": now - 900, "status": None}
    (beats / "process_00000.json").write_text(json.dumps(beat))
    # A file of an earlier start on more hosts.
    (beats / "process_00001.json").write_text(json.dumps(beat | {"time": now - 9000, "step_time": now - 9000}))
    done = cloud.run("watch", "--stall=600", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 41" in done.stdout and re.search("is silent for (8|9)[0-9][0-9] s", done.stdout)
    assert starts(cloud) == 2

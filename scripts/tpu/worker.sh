#!/usr/bin/env bash
# Runs on a worker, in its home folder; the other scripts copy it there and call it by ssh.
#
#   worker.sh install COMMIT            unpack sfd_jax-COMMIT.tar.gz to sfd_jax/, then run tpu_setup.sh
#   worker.sh start JOB [NAME=VALUE ...] -- COMMAND ARGUMENT...
#                                       start `sfd COMMAND ...` so that it outlives this connection
#   worker.sh status JOB [COMMIT -- COMMAND ARGUMENT...]
#                                       print the job's state: bare (not installed at the commit), idle (not started),
#                                       running, exited STATUS, lost (ended without a status, e.g. by a reboot), or
#                                       other (it runs another command)
#   worker.sh stop JOB [SECONDS]        SIGTERM, upon which a command saves; SIGKILL after that long (default 300)
#
# A job's folder sfd_jobs/JOB holds: command (with its variables), arguments (without), log, pid and, at the end, status.
# Each successful call prints one line "sfd@HOST ..."; calls may repeat, since gcloud retries after a lost connection.
set -euo pipefail
self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
cd "$HOME"
host=$(hostname)

reply() { printf 'sfd@%s %s\n' "$host" "$*"; }

die() {
    printf '%s: %s\n' "$host" "$*" >&2
    exit 2
}

# alive JOB: whether its supervisor runs. The command line is compared too, since PIDs are reused after a reboot.
alive() {
    local pid
    pid=$(cat "sfd_jobs/$1/pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF " supervise $1 "
}

install() {
    local commit=$1 archive=sfd_jax-$1.tar.gz job
    # After a broken connection an installation may still be running: wait for it, then check again.
    exec 9>.sfd_install.lock
    flock -w 1800 9 || die "another installation has been running here for half an hour: ps aux | grep tpu_setup"
    if [ "$(cat sfd_jax/.ready 2>/dev/null)" = "$commit" ]; then
        reply "ready $commit"
        return
    fi
    for job in sfd_jobs/*/; do
        job=$(basename "$job")
        ! alive "$job" || die "job $job runs from the installed checkout; stop it first (stop.sh --job=$job)"
    done
    if [ "$(cat sfd_jax/.commit 2>/dev/null)" != "$commit" ]; then
        if [ -e sfd_jax ] && [ ! -f sfd_jax/.commit ]; then
            die "$HOME/sfd_jax was not made by setup.sh and is not changed; move it away, then run this again"
        fi
        rm -rf sfd_jax.new
        mkdir sfd_jax.new
        tar -xzf "$archive" -C sfd_jax.new || die "$archive is incomplete; run setup.sh again"
        # Keep the environment: only changed pins rebuild it.
        if [ -d sfd_jax/.venv ]; then mv sfd_jax/.venv sfd_jax.new/sfd_jax/.venv; fi
        rm -rf sfd_jax
        mv sfd_jax.new/sfd_jax sfd_jax
        rm -rf sfd_jax.new
        echo "$commit" >sfd_jax/.commit
    fi
    rm -f sfd_jax/.ready
    bash sfd_jax/tpu_setup.sh 9>&-
    echo "$commit" >sfd_jax/.ready
    find . -maxdepth 1 -name 'sfd_jax-*.tar.gz' ! -name "$archive" -delete
    reply "ready $commit"
}

start() {
    local job=$1 folder=sfd_jobs/$1 command
    shift
    [ -f sfd_jax/.ready ] || die "nothing is installed here; run setup.sh first"
    command=$(printf '%q ' "$@")
    mkdir -p "$folder"
    exec 9>"$folder/lock"
    flock 9
    if alive "$job"; then
        [ "$command" = "$(cat "$folder/command")" ] ||
            die "job $job runs another command here: $(cat "$folder/command"). Stop it, or choose another --job"
        reply "started $(cat "$folder/pid") before"
        return
    fi
    rm -f "$folder/pid" "$folder/status"
    printf '%s' "$command" >"$folder/command"
    arguments "$@" >"$folder/arguments"
    # In its own session without terminal, so that it gets no signal when the connection ends.
    setsid nohup bash "$self" supervise "$job" "$@" </dev/null >>"$folder/log" 2>&1 9>&- &
    for _ in $(seq 100); do
        if [ -s "$folder/pid" ]; then
            reply "started $(cat "$folder/pid")"
            return
        fi
        sleep 0.05
    done
    die "job $job did not start: $(tail -n 3 "$folder/log")"
}

# arguments [NAME=VALUE ...] -- COMMAND ARGUMENT...: the words after --, so that they can be compared.
arguments() {
    while [ "$1" != -- ]; do shift; done
    shift
    printf '%q ' "$@"
}

# The job's process: the command's parent, which records its exit status. A SIGTERM goes only to the command, not to
# its data workers, which it needs until it has saved.
supervise() {
    local job=$1 folder=sfd_jobs/$1 child status signalled
    shift
    while [ "$1" != -- ]; do
        export "${1?}"
        shift
    done
    shift
    SFD_COMMIT=$(cat sfd_jax/.commit)
    export SFD_COMMIT
    echo "=== $(date -u '+%F %T') UTC, $host, commit $SFD_COMMIT: sfd $(printf '%q ' "$@")"
    [ -z "${LIBTPU_INIT_ARGS:-}" ] || echo "=== libtpu: $LIBTPU_INIT_ARGS"
    sfd_jax/.venv/bin/sfd "$@" &
    child=$!
    trap 'signalled=1; kill -TERM "$child" 2>/dev/null || true' TERM
    echo $$ >"$folder/pid.part"
    mv "$folder/pid.part" "$folder/pid"
    # A signal ends `wait` at once, while the command still saves, so wait again.
    while :; do
        signalled="" status=0
        wait "$child" || status=$?
        [ -n "$signalled" ] || break
    done
    echo "=== $(date -u '+%F %T') UTC: exit status $status"
    echo "$status" >"$folder/status.part"
    mv "$folder/status.part" "$folder/status"
}

status() {
    local job=$1 folder=sfd_jobs/$1 commit=${2:-} same=1
    if [ $# -gt 2 ] && [ "$(arguments "$@")" != "$(cat "$folder/arguments" 2>/dev/null)" ]; then same=""; fi
    if [ -z "$same" ] && alive "$job"; then
        reply "other"
    elif [ ! -f sfd_jax/.ready ] || { [ "${commit:-$(cat sfd_jax/.ready)}" != "$(cat sfd_jax/.ready)" ] && ! alive "$job"; }; then
        reply "bare"
    elif [ -z "$same" ]; then
        reply "idle"
    elif alive "$job"; then
        reply "running $(heartbeats "$folder" || true)"
    elif [ -f "$folder/status" ]; then
        reply "exited $(cat "$folder/status")"
    elif [ -f "$folder/command" ]; then
        reply "lost"
    else
        reply "idle"
    fi
}

# From the heartbeats in the job's work folder, which may be gs://: the step, and the longest silence of a process in
# seconds. Prints nothing where there is no work folder or no heartbeat yet.
heartbeats() {
    local word words=() workdir=""
    eval "words=($(cat "$1/arguments"))"
    for word in "${words[@]}"; do
        case $word in --workdir=* | --out=*) workdir=${word#*=} ;; esac
    done
    [ -n "$workdir" ] || return 0
    timeout 30 sfd_jax/.venv/bin/python - "$workdir" "$1/pid" 2>/dev/null <<'READ'
import json, os, sys, time
from etils import epath
beats = [json.loads(file.read_text()) for file in (epath.Path(sys.argv[1]) / "heartbeats").glob("process_*.json")]
# Those of an earlier start, perhaps on more hosts, are in the folder too.
beats = [beat for beat in beats if beat["time"] >= os.path.getmtime(sys.argv[2])]
if beats:
    # Silence counts from the last step, or before the first step, which takes long to compile, from the heartbeat.
    ages = [time.time() - (beat.get("step_time") or beat["time"]) for beat in beats if beat.get("status") is None]
    steps = [beat["step"] for beat in beats if beat.get("step") is not None]
    print(f"step={max(steps, default=0)} silent={max(0, int(max(ages, default=0)))}")
READ
}

stop() {
    local job=$1 left=$((5 * ${2:-300}))
    alive "$job" || { status "$job"; return; }
    kill -TERM "$(cat "sfd_jobs/$job/pid")"
    while alive "$job"; do
        if [ "$left" -le 0 ]; then
            kill -KILL -- "-$(cat "sfd_jobs/$job/pid")" 2>/dev/null || true
            for _ in $(seq 50); do alive "$job" || break; sleep 0.1; done
            echo 137 >"sfd_jobs/$job/status"
            break
        fi
        sleep 0.2
        left=$((left - 1))
    done
    status "$job"
}

case ${1:-} in
    install | start | supervise | status | stop) "$@" ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$self"; [ "${1:-}" = --help ] || exit 2 ;;
esac

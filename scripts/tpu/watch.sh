#!/usr/bin/env bash
# Keep a job going until it is done: make the slice where there is none, set it up, launch, look on; after a
# preemption delete it, make it anew and go on. It asks the cloud how things stand and does the next thing, so it may
# itself be stopped and started again at any time, on another machine too.
#
#   watch.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT --accelerator-type=v5litepod-16 --spot -- \
#       train --config=configs/sfd.py:xl --workdir=gs://bucket/runs/xl --config.data.path=/mnt/latents
#
# Ends with 0 once all workers ended with 0. Status 75 of a command means "told to leave, saved" or "another host did
# not come", 134 that JAX ended it since another host is gone, 137 and 143 that it was killed: these start again.
# Anything else is a fault that a new start does not fix: watch shows the logs' ends and stops with that status; started
# again after that, it tries once more.
# It stops, too, after too many starts in a row none of which ran for long.
#
#   --accelerator-type, --topology, --runtime-version, --spot, --create-flag: see create.sh; --job, --env: see launch.sh
#   --commit=COMMIT            COMMIT              what the workers get (default: HEAD as watch starts)
#   --poll=SECONDS             POLL                between two looks (default 60)
#   --attempts=N               ATTEMPTS            starts in a row that may fail (default 10), with longer and longer
#   --backoff=SECONDS          BACKOFF             pauses, the first one this long (default 30), none above 15 minutes
#   --healthy=SECONDS          HEALTHY             a job that ran this long was no failed start (default 1800)
#   --stall=SECONDS            STALL               stop and start again a job silent for this long (default 3600; 0: never)
#   --looks=N                  LOOKS               looks in a row without an answer before it gives up (default 30)
#   --delete-when-done         DELETE_WHEN_DONE=1  delete the slice after a job that ended with 0
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="accelerator-type topology runtime-version commit job poll attempts backoff healthy stall looks"
SWITCHES="spot delete-when-done" LISTS="create-flag env"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project
[ -n "${ACCELERATOR_TYPE:-}${TOPOLOGY:-}" ] || need accelerator-type
[ ${#AFTER[@]} -gt 0 ] || die 2 "say what to run after --, as in: -- train --config=configs/sfd.py:xl --workdir=gs://..."
JOB=${JOB:-${AFTER[0]}} POLL=${POLL:-60} ATTEMPTS=${ATTEMPTS:-10} BACKOFF=${BACKOFF:-30} HEALTHY=${HEALTHY:-1800}
STALL=${STALL:-3600} LOOKS=${LOOKS:-30}
for name in poll attempts backoff healthy stall looks; do number "$name"; done
COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}") ||
    die 2 "--commit=${COMMIT:-HEAD} is no commit of $ROOT"

# The other scripts read the settings from their variables.
export TPU_NAME ZONE PROJECT SLICES COMMIT JOB DRY_RUN
for name in ACCELERATOR_TYPE TOPOLOGY RUNTIME_VERSION SPOT INTERNAL_IP TUNNEL_THROUGH_IAP; do
    [ -z "${!name:-}" ] || export "${name?}"
done
create=(bash "$HERE/create.sh" --no-wait)
for flag in ${CREATE_FLAG[@]+"${CREATE_FLAG[@]}"}; do create+=("--create-flag=$flag"); done
launch=(bash "$HERE/launch.sh")
for setting in ${ENV[@]+"${ENV[@]}"}; do launch+=("--env=$setting"); done
launch+=(-- "${AFTER[@]}")
look=$(worker status "$JOB" "$COMMIT" -- "${AFTER[@]}")

if [ -n "$DRY_RUN" ]; then
    "${create[@]}"
    bash "$HERE/setup.sh"
    "${launch[@]}"
    echo "# then, every $POLL s until the job has ended:"
    query_state ACTIVE
    query_nodes
    on_workers "$look"
    echo "# and after a preemption, before it begins anew:"
    bash "$HERE/delete.sh"
    exit
fi

told=""
# tell SENTENCE: say it once, not at every look.
tell() {
    [ "$*" = "$told" ] || say "$(date '+%F %T') $*"
    told=$*
}

# survey: find out how things stand and put it into SITUATION:
#   absent, gone (to be deleted), waiting (nothing to do), unreachable, bare, idle, running, mixed (some ended, some
#   run), again (ended, to be started again), done, fault (FAULT is the status), other (another command runs there).
survey() {
    local count
    SITUATION=unreachable WHY="gcloud did not answer"
    query_state "" || return 0
    case $STATE in
        ACTIVE) ;;
        ABSENT) SITUATION=absent; return ;;
        FAILED | SUSPENDED) SITUATION=gone WHY="the queued resource is $STATE"; return ;;
        *) SITUATION=waiting WHY="the queued resource is $STATE"; return ;;
    esac
    query_nodes || return 0
    case $UNREADY in
        "") ;;
        *PREEMPTED* | *TERMINATED* | *STOPPED*) SITUATION=gone WHY=$UNREADY; return ;;
        *) SITUATION=waiting WHY=$UNREADY; return ;;
    esac
    QUIET=1 on_workers "$look" || true
    count=$(replied "bare|idle|running|exited|lost|other")
    if [ "$count" -lt "$WORKERS" ]; then
        WHY="$count of $WORKERS workers answer"
        return
    fi
    WHY=""
    FAULT=$(printf '%s\n' "$REPLIES" | sed -n 's/^sfd@[^ ]* exited //p' | grep -Evx '0|75|134|137|143' | head -n 1 || true)
    if [ "$(replied other)" -gt 0 ]; then
        SITUATION=other
    elif [ "$(replied bare)" -gt 0 ]; then
        SITUATION=bare
    elif [ "$(replied running)" -eq "$WORKERS" ]; then
        SITUATION=running
    elif [ "$(replied idle)" -gt 0 ] && [ "$(replied "idle|running")" -eq "$WORKERS" ]; then
        SITUATION=idle
    elif [ "$(replied running)" -gt 0 ]; then
        SITUATION=mixed
    elif [ -n "$FAULT" ]; then
        SITUATION=fault
    elif [ "$(replied "exited 0\$")" -eq "$WORKERS" ]; then
        SITUATION="done"
    else
        SITUATION=again
    fi
}

# shellcheck disable=SC2034  # read by the name that `another` is given
# How often in a row each kind of start came to nothing; a job that runs for long sets them back.
healthy() { creations=0 setups=0 launches=0 failures=0; }
healthy

# another KIND WHY: count a start of a kind; stop after too many, pause before each but the first.
another() {
    local count=$((${!1} + 1)) pause
    printf -v "$1" '%s' "$count"
    [ "$count" -gt 1 ] || return 0
    [ "$count" -le "$ATTEMPTS" ] || give_up "$2"
    pause=$((count < 14 ? BACKOFF << (count - 2) : 900))
    [ "$pause" -le 900 ] || pause=900
    tell "$2; attempt $count of $ATTEMPTS in $pause s"
    sleep "$pause"
}

give_up() {
    die 1 "$1, and $ATTEMPTS attempts in a row came to nothing. The slice may still be there and cost: look at the \
logs ($HERE/logs.sh --job=$JOB --tail=50), then fix it and run this again, or delete it ($HERE/delete.sh)"
}

# tried WHAT COMMAND...: a step that failed is no end; the next survey sees what came of it.
tried() {
    local what=$1
    shift
    tell "$what"
    if "$@"; then
        failures=0
    else
        failures=$((failures + 1))
        [ "$failures" -lt "$ATTEMPTS" ] || give_up "$what failed"
        tell "$what failed; looking again in $POLL s"
        sleep "$POLL"
    fi
}

since=0 silent_looks=0 mixed_looks=0 started="" step="" old_step=-1
while :; do
    survey
    [ "$SITUATION" = running ] || since=0
    [ "$SITUATION" = unreachable ] || silent_looks=0
    [ "$SITUATION" = mixed ] || mixed_looks=0
    case $SITUATION in
        absent) another creations "there is no $TPU_NAME"; tried "asking for $TPU_NAME" "${create[@]}" ;;
        gone) tell "$WHY: deleting it"; tried "deleting $TPU_NAME" bash "$HERE/delete.sh" ;;
        waiting) tell "$WHY" ;;
        bare) another setups "workers are not set up"; tried "setting up $WORKERS workers" bash "$HERE/setup.sh" ;;
        idle) another launches "job $JOB is not started"; tried "launching $JOB" "${launch[@]}"; started=1 ;;
        again)
            another launches "job $JOB ended ($(printf '%s\n' "$REPLIES" | sed 's/^[^ ]* exited //' | sort | uniq -c | tr -s ' \n' ' '))"
            old_step=${step:--1}
            tried "launching $JOB again" "${launch[@]}"
            started=1
            ;;
        running)
            started=1
            [ "$since" -ne 0 ] || since=$(date +%s)
            silent=$(printf '%s\n' "$REPLIES" | sed -n 's/.* silent=\([0-9]*\).*/\1/p' | sort -n | tail -n 1)
            step=$(printf '%s\n' "$REPLIES" | sed -n 's/.* step=\([0-9]*\).*/\1/p' | sort -n | tail -n 1)
            tell "job $JOB runs on $WORKERS workers${step:+, step $step}"
            # Long without a new step is not healthy; where no step is to be seen, long must do.
            if [ $(($(date +%s) - since)) -ge "$HEALTHY" ] && [ "${step:-$((old_step + 1))}" -gt "$old_step" ]; then healthy; fi
            if [ "$STALL" -gt 0 ] && [ "${silent:-0}" -gt "$STALL" ]; then
                tried "job $JOB is silent for $silent s: stopping it" bash "$HERE/stop.sh"
            fi
            ;;
        mixed)
            # The others notice within SFD_PEER_TIMEOUT (60 s) and end by themselves; those that hang are stopped.
            mixed_looks=$((mixed_looks + 1))
            tell "job $JOB ended on $(replied "exited|lost") of $WORKERS workers; waiting for the others"
            if [ "$mixed_looks" -gt 5 ]; then tried "stopping $JOB on the others" bash "$HERE/stop.sh"; fi
            ;;
        unreachable)
            silent_looks=$((silent_looks + 1))
            tell "$WHY; looking again"
            [ "$silent_looks" -lt "$LOOKS" ] || die 1 "$WHY, for $silent_looks looks; is this machine online, and logged in \
(gcloud auth login)? The job goes on without watch; run this again to look after it"
            ;;
        other) die 2 "job $JOB runs another command on $TPU_NAME; stop it ($HERE/stop.sh), or choose another --job" ;;
        fault)
            if [ -z "$started" ]; then
                tried "job $JOB had ended with status $FAULT before; trying it once more" "${launch[@]}"
                started=1
                continue
            fi
            bash "$HERE/logs.sh" --tail=20 || true
            die "$FAULT" "job $JOB ended with status $FAULT, which a new start does not fix; the logs' ends are above. \
The slice is still there and costs: fix it and run this again, or delete it ($HERE/delete.sh)"
            ;;
        done)
            say "job $JOB is done on all $WORKERS workers"
            if [ -n "${DELETE_WHEN_DONE:-}" ]; then exec bash "$HERE/delete.sh"; fi
            say "the slice is still there and costs: $HERE/delete.sh"
            exit 0
            ;;
    esac
    # After a step of its own watch looks at once; where it only waits, it waits.
    case $SITUATION in waiting | running | mixed | unreachable) sleep "$POLL" ;; esac
done

#!/usr/bin/env bash
# Run a job until it is done: create the slice if there is none, set it up, launch, monitor; after a preemption delete
# the slice, create it again and resume. The script keeps no state: it asks the cloud for the current state and takes the
# next step, so it may be stopped and started again at any time, on another machine too.
#
#   watch.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT --accelerator-type=v5litepod-16 --spot -- \
#       train --config=configs/sfd.py:xl --workdir=gs://bucket/runs/xl --config.data.path=/mnt/latents
#
# Ends with 0 when all workers have ended with 0. A command's status 75 means "preempted, saved" or "another host did
# not start", 134 that JAX aborted it because another host is lost, 137 and 143 that it was killed: these are restarted.
# Any other status is a fault that a restart does not fix: watch prints the last lines of the logs and stops with that
# status; if it is started again, it tries once more.
# It also stops after too many starts in a row none of which ran for long.
#
#   --accelerator-type, --topology, --runtime-version, --spot, --create-flag: see create.sh; --job, --env,
#   --libtpu-flags: see launch.sh
#   --commit=COMMIT            COMMIT              what the workers get (default: HEAD when watch starts)
#   --poll=SECONDS             POLL                between two checks (default 60)
#   --attempts=N               ATTEMPTS            starts in a row that may fail (default 10)
#   --backoff=SECONDS          BACKOFF             first pause between them (default 30); doubles up to 15 minutes
#   --healthy=SECONDS          HEALTHY             a job that ran this long is not a failed start (default 1800)
#   --stall=SECONDS            STALL               restart a job that is silent for this long (default 3600; 0: never)
#   --looks=N                  LOOKS               checks in a row without an answer before it gives up (default 30)
#   --delete-when-done         DELETE_WHEN_DONE=1  delete the slice after a job that ended with 0
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="accelerator-type topology runtime-version commit job libtpu-flags poll attempts backoff healthy stall looks"
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
    die 2 "--commit=${COMMIT:-HEAD} is not a commit of $ROOT"

# The other scripts read the settings from their variables.
export TPU_NAME ZONE PROJECT SLICES COMMIT JOB DRY_RUN
for name in ACCELERATOR_TYPE TOPOLOGY RUNTIME_VERSION LIBTPU_FLAGS SPOT INTERNAL_IP TUNNEL_THROUGH_IAP; do
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
    echo "# and after a preemption, before it starts again:"
    bash "$HERE/delete.sh"
    exit
fi

reported=""
# report SENTENCE: print it, unless it is the one printed last.
report() {
    [ "$*" = "$reported" ] || say "$(date '+%F %T') $*"
    reported=$*
}

# survey: query the current state and put it into SITUATION:
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
# Failed starts in a row, by kind; a job that runs for long resets them.
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
    report "$2; attempt $count of $ATTEMPTS in $pause s"
    sleep "$pause"
}

give_up() {
    die 1 "$1, and $ATTEMPTS attempts in a row failed. The slice may still exist and cost: look at the logs \
($HERE/logs.sh --job=$JOB --tail=50), then fix the cause and run this again, or delete the slice ($HERE/delete.sh)"
}

# tried WHAT COMMAND...: run a step; if it fails, the next survey decides what to do.
tried() {
    local what=$1
    shift
    report "$what"
    if "$@"; then
        failures=0
    else
        failures=$((failures + 1))
        [ "$failures" -lt "$ATTEMPTS" ] || give_up "$what failed"
        report "$what failed; checking again in $POLL s"
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
        gone) report "$WHY: deleting it"; tried "deleting $TPU_NAME" bash "$HERE/delete.sh" ;;
        waiting) report "$WHY" ;;
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
            report "job $JOB runs on $WORKERS workers${step:+, step $step}"
            # Healthy: it ran for long and made a new step, if steps are reported.
            if [ $(($(date +%s) - since)) -ge "$HEALTHY" ] && [ "${step:-$((old_step + 1))}" -gt "$old_step" ]; then healthy; fi
            if [ "$STALL" -gt 0 ] && [ "${silent:-0}" -gt "$STALL" ]; then
                tried "job $JOB is silent for $silent s: stopping it" bash "$HERE/stop.sh"
            fi
            ;;
        mixed)
            # The others notice within SFD_PEER_TIMEOUT (60 s) and end by themselves; those that hang are stopped.
            mixed_looks=$((mixed_looks + 1))
            report "job $JOB ended on $(replied "exited|lost") of $WORKERS workers; waiting for the others"
            if [ "$mixed_looks" -gt 5 ]; then tried "stopping $JOB on the others" bash "$HERE/stop.sh"; fi
            ;;
        unreachable)
            silent_looks=$((silent_looks + 1))
            report "$WHY; checking again"
            [ "$silent_looks" -lt "$LOOKS" ] || die 1 "$WHY, in $silent_looks checks; is this machine online, and logged \
in (gcloud auth login)? The job continues without watch; run this again to monitor it"
            ;;
        other) die 2 "job $JOB runs another command on $TPU_NAME; stop it ($HERE/stop.sh), or choose another --job" ;;
        fault)
            if [ -z "$started" ]; then
                tried "job $JOB had ended with status $FAULT before; trying it once more" "${launch[@]}"
                started=1
                continue
            fi
            bash "$HERE/logs.sh" --tail=20 || true
            die "$FAULT" "job $JOB ended with status $FAULT, which a restart does not fix; the last lines of its logs \
are above. The slice still exists and costs: fix the fault and run this again, or delete the slice ($HERE/delete.sh)"
            ;;
        done)
            say "job $JOB is done on all $WORKERS workers"
            if [ -n "${DELETE_WHEN_DONE:-}" ]; then exec bash "$HERE/delete.sh"; fi
            say "the slice still exists and costs; to delete it: $HERE/delete.sh"
            exit 0
            ;;
    esac
    # After a step, check at once; otherwise wait.
    case $SITUATION in waiting | running | mixed | unreachable) sleep "$POLL" ;; esac
done

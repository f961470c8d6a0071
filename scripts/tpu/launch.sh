#!/usr/bin/env bash
# Start a command of `sfd` on all workers, independent of this connection: closing the laptop does not stop it.
# Where it runs already it is left as it is, so run this again to start it on workers that were missed.
#
#   launch.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT -- \
#       train --config=configs/sfd.py:xl --workdir=gs://bucket/runs/xl --config.data.path=/mnt/latents
#
# Each worker writes its output to ~/sfd_jobs/JOB/log (see logs.sh). Commands run in the worker's home folder; with
# several workers the work folder must be one that all of them share: gs://... or a network disk.
#
#   --job=JOB                  JOB                 a name for it (default: the command's)
#   --env=NAME=VALUE                               a variable for the command; repeatable
#   --libtpu-flags=SET         LIBTPU_FLAGS        a set of sfd_jax/tpu_flags.txt, or none (default: default); they are
#                                                  given as LIBTPU_INIT_ARGS, which --env=LIBTPU_INIT_ARGS=... replaces
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="job libtpu-flags" LISTS="env"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project
[ ${#AFTER[@]} -gt 0 ] || die 2 "say what to start after --, as in: -- train --config=configs/sfd.py:xl --workdir=gs://..."
JOB=${JOB:-${AFTER[0]}}
case $JOB in *[!A-Za-z0-9_.-]* | [.-]*) die 2 "--job=$JOB: give letters, digits, dots, dashes and underscores" ;; esac
for setting in ${ENV[@]+"${ENV[@]}"}; do
    case $setting in [A-Za-z_]*=*) ;; *) die 2 "--env=$setting: write --env=NAME=VALUE" ;; esac
done

LIBTPU_FLAGS=${LIBTPU_FLAGS:-default}
[ "$LIBTPU_FLAGS" = none ] || grep -q "^$LIBTPU_FLAGS " "$ROOT/sfd_jax/tpu_flags.txt" ||
    die 2 "--libtpu-flags=$LIBTPU_FLAGS: give none, or a set of sfd_jax/tpu_flags.txt"

ready_nodes
# The command's preflight compares these with what it finds, so that a missing worker is named.
environment=("SFD_EXPECT_PROCESSES=$WORKERS")
devices=$(devices_of "$NODE_TYPE")
[ -z "$devices" ] || environment+=("SFD_EXPECT_DEVICES=$((devices * SLICES))")
[ "$WORKERS" -eq 1 ] || environment+=("SFD_MULTIHOST=1")
flags=$(flags_of "$NODE_TYPE" "$LIBTPU_FLAGS")
[ -z "$flags" ] || environment+=("LIBTPU_INIT_ARGS=$flags")
on_workers "$(worker start "$JOB" "${environment[@]}" ${ENV[@]+"${ENV[@]}"} -- "${AFTER[@]}")" ||
    die 1 "job $JOB did not start on a worker of $FAILED; see its message above. Those that started wait for the \
others for 5 minutes: run this again, or $HERE/stop.sh"
[ "$(replied bare)" -eq 0 ] || die 2 "workers are not set up: run $HERE/setup.sh first"
all_replied started "job $JOB was started"
[ -n "$DRY_RUN" ] || say "job $JOB runs on $WORKERS workers; its output: $HERE/logs.sh --job=$JOB --follow"

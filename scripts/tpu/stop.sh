#!/usr/bin/env bash
# Stop a job on all workers: a command saves upon SIGTERM and ends with status 75, and launch.sh resumes it.
#
#   stop.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT --job=train
#
#   --job=JOB                  JOB                 which (default: train)
#   --grace=SECONDS            GRACE               time to save before it is killed (default 300)
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="job grace"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project
JOB=${JOB:-train} GRACE=${GRACE:-300}
number grace

ready_nodes
on_workers "$(worker stop "$JOB" "$GRACE")" ||
    die 1 "job $JOB may still run on a worker of $FAILED; run this again"
all_replied "exited|lost|idle|bare" "job $JOB was stopped"

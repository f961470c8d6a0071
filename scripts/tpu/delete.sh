#!/usr/bin/env bash
# Delete the slices and the queued resource, so that they cost nothing more, and wait until they are gone. The
# workers' disks are deleted too: fetch logs before (logs.sh). Run again, it continues to wait.
#
#   delete.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT
#
#   --poll=SECONDS             POLL                between two checks (default 15)
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="poll"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project
POLL=${POLL:-15}
number poll

query_state ACTIVE || die 1 "gcloud could not list the queued resources of $ZONE; nothing was deleted, run this again"
if [ "$STATE" = ABSENT ]; then
    say "there is no $TPU_NAME in $ZONE"
    exit 0
fi
if [ "$STATE" != DELETING ]; then
    run gcloud compute tpus queued-resources delete "$TPU_NAME" "--zone=$ZONE" "--project=$PROJECT" --force --quiet ||
        die 1 "gcloud did not delete $TPU_NAME, which still costs; see its message, then run this again"
fi
while :; do
    query_state ABSENT || die 1 "gcloud could not check whether $TPU_NAME is gone; run this again"
    [ "$STATE" != ABSENT ] || break
    sleep "$POLL"
done
[ -n "$DRY_RUN" ] || say "$TPU_NAME is deleted"

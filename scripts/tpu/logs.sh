#!/usr/bin/env bash
# Fetch a job's logs from all workers into a folder, or print their last lines.
#
#   logs.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT --job=train    to tpu_logs/sfd/train/NODE-WORKER.log
#   logs.sh ... --tail=20                                                     the last lines of each worker
#   logs.sh ... --follow                                                      worker 0's log as it grows; Ctrl-C stops
#
#   --job=JOB                  JOB                 which (default: train)
#   --out=FOLDER               OUT                 where to (default: tpu_logs/TPU_NAME/JOB)
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="job out tail" SWITCHES="follow"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project
JOB=${JOB:-train}
OUT=${OUT:-tpu_logs/$TPU_NAME/$JOB}
log=$(quoted "sfd_jobs/$JOB/log")

ready_nodes
if [ -n "${FOLLOW:-}" ]; then
    tpu_vm ssh 0 "${NODES[0]}" "--command=tail -n ${TAIL:-50} -F $log"
    exit
fi
if [ -n "${TAIL:-}" ]; then
    number tail
    on_workers "printf '==> %s\\n' \"\$(hostname)\"; tail -n $TAIL $log" || die 1 "a worker of $FAILED has no log of job $JOB"
    exit
fi
run mkdir -p "$OUT"
missed=""
for node in "${NODES[@]}"; do
    for ((worker = 0; worker < WORKERS / SLICES; worker++)); do
        file=$OUT/$node-$worker.log
        # Renamed only when complete, so that a broken connection does not destroy an older log.
        if tpu_vm scp "$worker" "$node:sfd_jobs/$JOB/log" "$file.part"; then
            run mv "$file.part" "$file"
        else
            rm -f "$file.part"
            missed="$missed $node-$worker"
        fi
    done
done
[ -z "$missed" ] || die 1 "no log came from:$missed; the others are in $OUT"
[ -n "$DRY_RUN" ] || say "the logs of $WORKERS workers are in $OUT"

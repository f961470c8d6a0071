#!/usr/bin/env bash
# Request a TPU slice (a queued resource) and wait until it is ready. Run again, it continues to wait.
#
#   create.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT --accelerator-type=v5litepod-16 --spot
#   create.sh ... --topology=v5e:4x4 --slices=2
#
#   --accelerator-type=TYPE    ACCELERATOR_TYPE    v5litepod-16, v4-128, v5p-128, v6e-64, ...
#   --topology=CHIP:SHAPE      TOPOLOGY            instead, as for `sfd compile_pod`: v5e:4x4, v4:4x4x4, v6e:8x8
#   --runtime-version=VERSION  RUNTIME_VERSION     image of the workers (default: the one for the type)
#   --spot                     SPOT=1              cheaper, may be preempted at any time (default: on demand)
#   --create-flag=FLAG                             another flag of gcloud's `queued-resources create`; repeatable
#   --poll=SECONDS             POLL                between two checks (default 30)
#   --no-wait                  NO_WAIT=1           request and return
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="accelerator-type topology runtime-version poll" SWITCHES="spot no-wait" LISTS="create-flag"
. "$HERE/common.sh"
parse "$@"

# From --topology=CHIP:SHAPE to an accelerator type: those of v5e and v6e count chips, of v4 and v5p cores.
if [ -n "${TOPOLOGY:-}" ]; then
    shape=${TOPOLOGY#*:}
    case $shape in '' | *[!0-9x]* | x* | *x | *xx*) die 2 "--topology=$TOPOLOGY: write CHIP:SHAPE, as in v5e:4x4" ;; esac
    chips=$((${shape//x/ * }))
    case ${TOPOLOGY%%:*} in
        v5e) wanted=v5litepod-$chips ;;
        v6e) wanted=v6e-$chips ;;
        v4 | v5p) wanted=${TOPOLOGY%%:*}-$((2 * chips)) ;;
        *) die 2 "--topology=$TOPOLOGY: the known chips are v4, v5e, v5p and v6e; give --accelerator-type instead" ;;
    esac
    [ "${ACCELERATOR_TYPE:-$wanted}" = "$wanted" ] ||
        die 2 "--topology=$TOPOLOGY is $wanted, but --accelerator-type=$ACCELERATOR_TYPE; give one of them"
    ACCELERATOR_TYPE=$wanted
fi
need tpu-name zone project accelerator-type
POLL=${POLL:-30}
number poll
if [ -z "${RUNTIME_VERSION:-}" ]; then
    case $ACCELERATOR_TYPE in
        v2-* | v3-* | v4-*) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
        v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
        v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
        v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
        *) die 2 "no image is known for $ACCELERATOR_TYPE; give --runtime-version=... (or the variable RUNTIME_VERSION)" ;;
    esac
fi

query_state ABSENT || die 1 "gcloud could not list the queued resources of $ZONE; see its message, then run this again"
if [ "$STATE" = ABSENT ]; then
    nodes=("--node-id=$TPU_NAME")
    [ "$SLICES" -eq 1 ] || nodes=("--node-count=$SLICES" "--node-prefix=$TPU_NAME")
    run gcloud compute tpus queued-resources create "$TPU_NAME" "--zone=$ZONE" "--project=$PROJECT" \
        "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" "${nodes[@]}" \
        ${SPOT:+--spot} ${CREATE_FLAG[@]+"${CREATE_FLAG[@]}"} ||
        die 1 "gcloud did not accept the request for $TPU_NAME; see its message, then run this again"
else
    say "$TPU_NAME exists already: $STATE"
fi
[ -z "${NO_WAIT:-}" ] || exit 0

seen=""
while :; do
    query_state ACTIVE || die 1 "gcloud could not query $TPU_NAME; it stays in the queue, run this again to wait for it"
    [ "$STATE" = "$seen" ] || [ -n "$DRY_RUN" ] || say "$(date '+%F %T') $TPU_NAME is $STATE"
    seen=$STATE
    case $STATE in
        ACTIVE) break ;;
        ABSENT) die 1 "$TPU_NAME was deleted during the wait" ;;
        FAILED | SUSPENDED | SUSPENDING | DELETING)
            die 1 "$TPU_NAME is $STATE and will not become ready; for the reason: gcloud compute tpus queued-resources \
describe $TPU_NAME --zone=$ZONE --project=$PROJECT. Then delete it ($HERE/delete.sh) and create it again" ;;
    esac
    sleep "$POLL"
done

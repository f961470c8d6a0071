# Shared functions of the scripts in this folder: settings, gcloud, and the workers of a slice. Sourced, never run.
#
# A setting is a flag or the variable of the same name in capitals: --tpu-name=NAME or TPU_NAME=NAME. Written for
# bash 3.2 too, which is what macOS has: no associative arrays, no mapfile, empty arrays guarded.
# shellcheck shell=bash disable=SC2034  # many variables are read by the scripts that source this
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
ME=tpu/$(basename "$0" .sh)

COMMON_HELP="Settings, each a flag or a variable:
  --tpu-name=NAME            TPU_NAME            the queued resource, and its slice (with more slices: NAME-0, NAME-1, ...)
  --zone=ZONE                ZONE                e.g. us-central2-b
  --project=PROJECT          PROJECT             the Google Cloud project
  --slices=N                 SLICES              slices of one type that train together (default 1)
  --internal-ip              INTERNAL_IP=1       reach workers by their internal addresses
  --tunnel-through-iap       TUNNEL_THROUGH_IAP=1  reach them through Google's proxy (needs gcloud's alpha component)
  --dry-run                  DRY_RUN=1           print the gcloud commands, run nothing
Workers are reached by ssh from several threads at once, so gcloud needs its key in the agent:
  ssh-add ~/.ssh/google_compute_engine"

say() { printf '%s: %s\n' "$ME" "$*"; }

# die STATUS SENTENCE: status 2 for a user's error, 1 for a failure that may pass by itself.
die() {
    local status=$1
    shift
    printf '%s: %s\n' "$ME" "$*" >&2
    exit "$status"
}

# --- settings ---------------------------------------------------------------------------------------------------

variable() { printf '%s' "$1" | tr 'a-z-' 'A-Z_'; }

listed() { case " $2 " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

# The comment at the top of the script that runs is its help text.
help() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    printf '%s\n' "$COMMON_HELP"
}

# parse "$@": read flags into variables, and the words after -- into AFTER. A script sets its own flags before:
# VALUES (one value each), SWITCHES (no value), LISTS (repeatable; they fill arrays).
parse() {
    local values="tpu-name zone project slices ${VALUES:-}"
    local switches="dry-run internal-ip tunnel-through-iap ${SWITCHES:-}"
    local flag name value
    AFTER=()
    for name in ${LISTS:-}; do eval "$(variable "$name")=()"; done
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) help; exit 0 ;;
            --) shift; AFTER=(${1+"$@"}); break ;;
            --*) ;;
            *) die 2 "'$1' is not a flag; see $0 --help" ;;
        esac
        flag=${1%%=*}
        name=${flag#--}
        if listed "$name" "$switches"; then
            [ "$flag" = "$1" ] || die 2 "$flag takes no value"
            printf -v "$(variable "$name")" 1
            shift
            continue
        fi
        listed "$name" "$values ${LISTS:-}" || die 2 "there is no flag $flag; see $0 --help"
        if [ "$flag" != "$1" ]; then
            value=${1#*=}
        else
            [ $# -gt 1 ] || die 2 "$flag needs a value: $flag=VALUE"
            value=$2
            shift
        fi
        shift
        if listed "$name" "${LISTS:-}"; then
            eval "$(variable "$name")+=(\"\$value\")"
        else
            printf -v "$(variable "$name")" '%s' "$value"
        fi
    done
    for name in $switches; do
        name=$(variable "$name")
        case ${!name:-} in 0 | false | no | '') printf -v "$name" '' ;; esac
    done
    SLICES=${SLICES:-1}
    number slices
    [ "$SLICES" -ge 1 ] || die 2 "--slices=$SLICES: give 1 or more"
    # It is used in filters and folder names.
    case ${TPU_NAME:-a} in
        *[!a-z0-9-]* | [!a-z]*) die 2 "--tpu-name=$TPU_NAME: give small letters, digits and dashes, a letter first" ;;
    esac
    if [ -z "$DRY_RUN" ] && ! command -v gcloud >/dev/null; then
        die 2 "gcloud is not on PATH: install the Google Cloud CLI, then run: gcloud auth login"
    fi
}

# need FLAG...: stop if settings are missing, and name all of them.
need() {
    local name missing="" var
    for name in "$@"; do
        var=$(variable "$name")
        [ -n "${!var:-}" ] || missing="$missing --$name=... (or the variable $var),"
    done
    [ -z "$missing" ] || die 2 "missing:${missing%,}; see $0 --help"
}

# number FLAG: stop if its value is not a whole number.
number() {
    local var
    var=$(variable "$1")
    case ${!var} in '' | *[!0-9]*) die 2 "--$1=${!var}: give a whole number" ;; esac
}

# --- gcloud -----------------------------------------------------------------------------------------------------

# quoted WORD...: the words quoted for any shell: POSIX single quotes where a word needs them.
quoted() {
    local word space=""
    for word in "$@"; do
        printf '%s' "$space"
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) printf '%s\n' "$word" | sed "s/'/'\\\\''/g; 1s/^/'/; \$s/\$/'/" | printf '%s' "$(cat)" ;;
            *) printf '%s' "$word" ;;
        esac
        space=" "
    done
}

show() { printf '%s\n' "$(quoted "$@")"; }

# run gcloud ...: run it, or print it in a dry run.
run() { if [ -n "$DRY_RUN" ]; then show "$@"; else "$@"; fi; }

# ask ASSUMED gcloud ...: put its output into ANSWER; a dry run uses ASSUMED.
ask() {
    ANSWER=$1
    shift
    if [ -n "$DRY_RUN" ]; then show "$@"; else ANSWER=$("$@"); fi
}

# query_state ASSUMED: put the queued resource's state into STATE; ABSENT where there is none. Uses `list`, since
# `describe` fails alike for a missing resource and for a gcloud error.
query_state() {
    ask "$1" gcloud compute tpus queued-resources list "--zone=$ZONE" "--project=$PROJECT" \
        "--filter=name ~ /queuedResources/$TPU_NAME\$" "--format=value(state.state)" || return
    STATE=${ANSWER:-ABSENT}
}

# query_nodes: fill NODES (names), WORKERS (total number), NODE_TYPE, and UNREADY ("name is STATE", ...).
query_nodes() {
    local pattern="$TPU_NAME" name state workers type assumed i
    NODES=() WORKERS=0 UNREADY="" NODE_TYPE=""
    [ "$SLICES" -eq 1 ] || pattern="$TPU_NAME-[0-9]+"
    # A dry run assumes the slices that the settings describe.
    NODE_TYPE=${ACCELERATOR_TYPE:-}
    assumed=""
    for ((i = 0; i < SLICES; i++)); do
        name=$TPU_NAME
        [ "$SLICES" -eq 1 ] || name=$TPU_NAME-$i
        assumed="$assumed$name READY $(workers_of "${NODE_TYPE:-unknown}") ${NODE_TYPE:-unknown}"$'\n'
    done
    ask "$assumed" gcloud compute tpus tpu-vm list "--zone=$ZONE" "--project=$PROJECT" \
        "--filter=name ~ /nodes/$pattern\$" \
        '--format=value[separator=" "](name.basename(),state,networkEndpoints.len(),acceleratorType.basename())' || return
    while read -r name state workers type; do
        [ -n "$name" ] || continue
        NODES+=("$name")
        NODE_TYPE=$type
        [ "$state" = READY ] || UNREADY="$UNREADY$name is $state, "
        WORKERS=$((WORKERS + workers))
    done <<<"$ANSWER"
    if [ ${#NODES[@]} -ne "$SLICES" ]; then UNREADY="$UNREADY${#NODES[@]} of $SLICES slices exist, "; fi
    UNREADY=${UNREADY%, }
}

# ready_nodes: query_nodes, and stop if a slice is not ready.
ready_nodes() {
    query_nodes || die 1 "gcloud could not list the TPUs of $ZONE; see its message, then run this again"
    [ -z "$UNREADY" ] || die 1 "$TPU_NAME cannot be used: $UNREADY. $HERE/create.sh makes it and waits for it"
}

# --- sizes: devices and hosts of a slice by type ----------------------------------------------------------------

# devices_of TYPE: devices as JAX counts them; empty where the type is not known. The number in a type's name
# counts cores (v4 and v5p have two for each device), but chips for v5e and v6e.
devices_of() {
    local count=${1##*-}
    case $count in '' | *[!0-9]*) return 0 ;; esac
    case $1 in
        v2-* | v3-* | v5litepod-* | v6e-*) echo "$count" ;;
        v4-* | v5p-*) echo $((count / 2)) ;;
    esac
}

# flags_of TYPE SET: libtpu's flags of a set of sfd_jax/tpu_flags.txt ("none": none), as LIBTPU_INIT_ARGS has them.
flags_of() {
    local chip=${1%%-*}
    [ "$chip" != v5litepod ] || chip=v5e
    awk -v chip="$chip" -v set="$2" '$1 == set && index("," $2 ",", "," chip ",") { printf "%s--%s", space, $3; space = " " }' \
        "$ROOT/sfd_jax/tpu_flags.txt"
}

# workers_of TYPE: hosts of a slice; 1 where the type is not known. Only for a dry run: otherwise gcloud lists them.
workers_of() {
    local devices
    devices=$(devices_of "$1")
    case $1 in
        v2-* | v3-*) echo $(((devices + 7) / 8)) ;;
        v5litepod-* | v6e-*) if [ "$devices" -le 8 ]; then echo 1; else echo $((devices / 4)); fi ;;
        v4-* | v5p-*) echo $(((devices + 3) / 4)) ;;
        *) echo 1 ;;
    esac
}

# --- workers ----------------------------------------------------------------------------------------------------

# tpu_vm VERB NODE WORKER ARGUMENT...: gcloud's ssh or scp to one worker of a node, or to "all".
tpu_vm() {
    local verb=$1 worker=$2 track=() route=()
    shift 2
    [ -z "${INTERNAL_IP:-}" ] || route=(--internal-ip)
    [ -z "${TUNNEL_THROUGH_IAP:-}" ] || track=(alpha) route=(--tunnel-through-iap --batch-size=all)
    run gcloud ${track[@]+"${track[@]}"} compute tpus tpu-vm "$verb" "$@" \
        "--zone=$ZONE" "--project=$PROJECT" "--worker=$worker" ${route[@]+"${route[@]}"}
}

# on_workers COMMAND: run a shell command on all workers of all slices at once. Their output is shown (unless QUIET
# is set), their lines "sfd@..." are kept in REPLIES. Status: 0, or that of a failed slice; FAILED names the slices.
on_workers() {
    local node pid code status=0 pids="" scratch
    FAILED="" REPLIES=""
    if [ -n "$DRY_RUN" ]; then
        for node in "${NODES[@]}"; do tpu_vm ssh all "$node" "--command=$1"; done
        return
    fi
    scratch=$(mktemp -d)
    for node in "${NODES[@]}"; do
        if [ -n "${QUIET:-}" ]; then
            tpu_vm ssh all "$node" "--command=$1" >"$scratch/$node" 2>"$scratch/$node.err" </dev/null &
        else
            (tpu_vm ssh all "$node" "--command=$1" </dev/null | tee "$scratch/$node") &
        fi
        pids="$pids $!:$node"
    done
    for pid in $pids; do
        node=${pid#*:}
        code=0
        wait "${pid%%:*}" || code=$?
        if [ "$code" -ne 0 ]; then
            status=$code
            FAILED="$FAILED${FAILED:+, }$node"
            [ ! -s "$scratch/$node.err" ] || tail -n 5 "$scratch/$node.err" >&2
        fi
    done
    REPLIES=$(cat "$scratch"/* | grep '^sfd@' || true)
    rm -rf "$scratch"
    return "$status"
}

# worker WORD...: the shell command by which a worker runs worker.sh, or replies that it is bare (not set up).
worker() {
    printf '%s' "if [ -f sfd_worker.sh ]; then bash sfd_worker.sh $(quoted "$@"); else echo sfd@\$(hostname) bare; fi"
}

# replied PATTERN: count the workers whose reply fits. Every worker confirms success with one line, since gcloud's
# status does not prove that all were reached.
replied() { printf '%s\n' "$REPLIES" | grep -Ec "^sfd@[^ ]* ($1)" || true; }

# all_replied PATTERN WHAT: stop unless every worker's reply fits.
all_replied() {
    local count
    [ -z "$DRY_RUN" ] || return 0
    count=$(replied "$1")
    [ "$count" -eq "$WORKERS" ] || die 1 "$2 on $count of $WORKERS workers only; run this again to reach the others"
}

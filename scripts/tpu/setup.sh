#!/usr/bin/env bash
# Copy a commit of this checkout to all workers and set them up with tpu_setup.sh. Safe to run again: finished work is
# kept, and a worker whose job runs from another commit is reported and not changed.
#
#   setup.sh --tpu-name=sfd --zone=us-west4-a --project=PROJECT
#
#   --commit=COMMIT            COMMIT              commit to copy (default: HEAD); uncommitted changes are not copied
HERE=$(dirname "${BASH_SOURCE[0]}")
VALUES="commit"
. "$HERE/common.sh"
parse "$@"
need tpu-name zone project

COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}") ||
    die 2 "--commit=${COMMIT:-HEAD} is not a commit of $ROOT"
if [ -n "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]; then
    say "the checkout has uncommitted changes; the workers get commit ${COMMIT:0:12} without them"
fi

ready_nodes
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git -C "$ROOT" archive --format=tar.gz --prefix=sfd_jax/ -o "$scratch/sfd_jax-$COMMIT.tar.gz" "$COMMIT"
cp "$HERE/worker.sh" "$scratch/sfd_worker.sh"
for node in "${NODES[@]}"; do
    tpu_vm scp all "$scratch/sfd_jax-$COMMIT.tar.gz" "$scratch/sfd_worker.sh" "$node:" ||
        die 1 "the checkout could not be copied to all workers of $node; nothing was installed, run this again"
done
on_workers "bash sfd_worker.sh install $COMMIT" ||
    die 1 "setup failed on a worker of $FAILED; see its message above, fix that and run this again"
all_replied "ready $COMMIT" "setup was done"
[ -n "$DRY_RUN" ] || say "$WORKERS workers are ready, commit ${COMMIT:0:12}"

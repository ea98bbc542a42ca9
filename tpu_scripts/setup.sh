#!/usr/bin/env bash
# Makes all workers of the TPU ready to train: copies this clone as it is (new files too, nothing
# that git ignores), installs it, mounts the bucket. Can be repeated, but not under a running run.
#
#   setup.sh [--dry-run]
#
# Settings: NAME, ZONE, BUCKET, PROJECT, MOUNT (/bucket)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "" "$@"
no_arguments
need BUCKET
tpu_settings

pack
run gcloud compute tpus tpu-vm scp "$SCRATCH/$PACKED" "$NAME:$PACKED" \
  "${SCOPE[@]}" --quiet --worker=all
# The extra `plan` is the one that brings jax for TPUs.
on_workers all "$UNPACK && cd $PLACE && tpu_scripts/worker.sh install plan &&\
 tpu_scripts/worker.sh mount $(quoted "$BUCKET" "$MOUNT")"
dry || say "$NAME is set up"

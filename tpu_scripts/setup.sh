#!/usr/bin/env bash
# Prepares all workers of the TPU for training: copies this clone (with changed and new files,
# without files that git ignores), installs it, and mounts the bucket. It can be repeated, but not
# while a run is in progress.
#
#   setup.sh [--dry-run]
#
#   --dry-run    print the commands without running them
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
# The extra `plan` installs `jax[tpu]`.
on_workers all "$UNPACK && cd $PLACE && tpu_scripts/worker.sh install plan &&\
 tpu_scripts/worker.sh mount $(quoted "$BUCKET" "$MOUNT")"
dry || say "$NAME is set up"

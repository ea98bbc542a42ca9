#!/usr/bin/env bash
# Deletes the TPU and its request in the queue, after asking for confirmation. The bucket and all
# results stay.
#
#   delete.sh [--yes] [--dry-run]
#
#   --yes        do not ask for confirmation
#   --dry-run    print the commands without running them
#
# Settings: NAME, ZONE, PROJECT

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--yes" "$@"
no_arguments
tpu_settings

if [[ -z ${FLAG[--yes]:-} ]] && ! dry; then
  [[ -t 0 ]] || die "delete.sh asks for confirmation, but there is no terminal; pass --yes"
  read -r -p "Delete the TPU $NAME in $ZONE? A run on it stops. [y/N] " answer
  [[ $answer == [yY]* ]] || die "$NAME was not deleted"
fi

queue=$(queue_state)
if [[ $queue ]] || dry; then  # deletes its TPU too
  run gcloud compute tpus queued-resources delete "$NAME" "${SCOPE[@]}" --force --quiet
fi
state=$(node_state)
while [[ $state == DELETING ]]; do
  sleep "$POLL"
  state=$(node_state)
done
if [[ $state ]] || dry; then
  run gcloud compute tpus tpu-vm delete "$NAME" "${SCOPE[@]}" --quiet
fi
dry || say "$NAME is deleted"

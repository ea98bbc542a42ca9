#!/usr/bin/env bash
# Trains a config until the run is finished: creates the TPU, sets it up and launches the run, and
# repeats this when the TPU is preempted or the run stops. The run is finished when
# model/config.json is in its directory. The script gives up after RELAUNCHES launches from the same
# checkpoint.
#
#   watch.sh [--spot] [--queued] [--delete] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#
#   --spot, --queued    how to create the TPU, as in create.sh
#   --delete            delete the TPU (never the bucket) when the run is finished
#   --dry-run           print the commands without running them
#
# Settings: those of create.sh and launch.sh, RELAUNCHES (5), CREATES (1000 failed creations in a
# row before the script gives up), POLL (30 seconds)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--spot --queued --delete" "$@"
need TYPE BUCKET
tpu_settings
need_config
HOW=(${FLAG[--spot]:+--spot} ${FLAG[--queued]:+--queued})

look() {
  local state workers checkpoints
  state=$(node_state) && DONE=$(in_bucket model/config.json) &&
    checkpoints=$(in_bucket checkpoints/) || return 1
  STEP=$(newest_step <<<"$checkpoints")
  case $state in
    READY)
      # A TPU that was created but not set up prints nothing, which counts as idle.
      workers=$(ask "" gcloud compute tpus tpu-vm ssh "$NAME" "${SCOPE[@]}" --quiet --worker=all \
        "--command=! cd $PLACE 2>/dev/null || tpu_scripts/worker.sh status") || return 1
      state_of_workers "$workers"
      ;;
    "" | PREEMPTED | TERMINATED | STOPPED | HIDDEN)
      STATE=gone
      say "$NAME: ${state:-does not exist}"
      ;;
    *)
      STATE=busy
      say "$NAME: $state"
      ;;
  esac
}

# Prints "remains" if a TPU or request must be deleted before the TPU can be created again.
remains() {
  local state queue
  state=$(node_state) && queue=$(queue_state) || return 1
  # A request that is still waiting keeps its place in the queue.
  [[ $state || $queue == ACTIVE || $queue == FAILED || $queue == SUSPEND* ]] && echo remains
  return 0
}

relaunch() {
  local remains
  if [[ $STATE == gone ]]; then
    remains=$(remains) || return 1
    if [[ $remains ]] || dry; then script delete.sh --yes || return 1; fi
    script create.sh "${HOW[@]}" || return 1
  else
    script launch.sh --stop || say "(there was no run to stop)"
  fi
  script setup.sh && script launch.sh --detach "${ARGS[@]}"
}

if ! watch_run "$NAME"; then
  say "$NAME was not deleted; it costs money until you run tpu_scripts/delete.sh"
  exit 1
fi
if [[ ${FLAG[--delete]:-} ]]; then
  script delete.sh --yes
else
  say "to get the results, run tpu_scripts/sync.sh; the TPU costs money until you run" \
    "tpu_scripts/delete.sh"
fi

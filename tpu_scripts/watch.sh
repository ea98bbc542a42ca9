#!/usr/bin/env bash
# Trains a config until it is finished: creates the TPU, sets it up, launches, and does so again
# whenever the TPU was taken away or the run stopped. Finished means that model/config.json is in
# the directory of the run. Gives up when several launches in a row reach no new checkpoint.
#
#   watch.sh [--spot] [--queued] [--delete] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#
#   --spot, --queued    how to create it, as in create.sh
#   --delete            deletes the TPU when the run is finished (never the bucket)
#
# Settings: those of create.sh and launch.sh; RELAUNCHES (5), from one checkpoint; POLL (30 s)

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
      # One that was created but not set up has nothing to say: idle.
      workers=$(ask "" gcloud compute tpus tpu-vm ssh "$NAME" "${SCOPE[@]}" --quiet --worker=all \
        "--command=! cd $PLACE 2>/dev/null || tpu_scripts/worker.sh status") || return 1
      state_of_workers "$workers"
      ;;
    "" | PREEMPTED | TERMINATED | STOPPED | HIDDEN)
      STATE=gone
      say "$NAME: ${state:-not there}"
      ;;
    *)
      STATE=busy
      say "$NAME: $state"
      ;;
  esac
}

remains() {  # something of it has to be deleted before it can be created again
  local state queue
  state=$(node_state) && queue=$(queue_state) || return 1
  # A request that still waits keeps its place in the queue.
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
    script launch.sh --stop || say "(nothing to stop)"
  fi
  script setup.sh && script launch.sh --detach "${ARGS[@]}"
}

if ! watch_run "$NAME"; then
  say "$NAME was not deleted: it costs money until tpu_scripts/delete.sh"
  exit 1
fi
if [[ ${FLAG[--delete]:-} ]]; then
  script delete.sh --yes
else
  say "results: tpu_scripts/sync.sh; the TPU costs money until tpu_scripts/delete.sh"
fi

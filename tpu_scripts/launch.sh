#!/usr/bin/env bash
# Trains a config on all workers of the TPU, in the directory RUN of the bucket, and shows the
# output of worker 0. A run that was stopped is resumed. The run continues if this script is
# interrupted.
#
#   launch.sh [--detach] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#   launch.sh --follow      show the output of worker 0 again, from the beginning
#   launch.sh --stop        save and stop the run
#
#   --detach     return as soon as the run has started
#   --dry-run    print the commands without running them
#
# The logs of all workers are in the directory of the run, in logs/TIME/worker-N.log.
# Settings: NAME, ZONE, BUCKET, PROJECT, RUN (runs/NAME), MOUNT (/bucket)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--detach --follow --stop" "$@"
need BUCKET
tpu_settings
WORKER="cd $PLACE && tpu_scripts/worker.sh"

if [[ ${FLAG[--stop]:-} ]]; then
  no_arguments
  on_workers all "$WORKER stop"
  exit
fi
if [[ ${FLAG[--follow]:-} ]]; then
  no_arguments
else
  need_config
  # Check all workers before any process starts: the others would wait for one that cannot start.
  on_workers all "$WORKER idle && tpu_scripts/worker.sh mount $(quoted "$BUCKET" "$MOUNT")"
  on_workers all "$WORKER start $(quoted "$MOUNT/$RUN" "$(launch_id)" "${TRAIN[@]}")"
  if [[ ${FLAG[--detach]:-} ]]; then exit; fi
fi

code=0
on_workers 0 "$WORKER follow" || code=$?
if ((code)); then
  say "worker 0 ended with status $code; the logs of all workers are in $RESULTS/logs/"
elif [[ $(in_bucket model/config.json) ]]; then
  say "finished: $RESULTS/model"
else
  say "not finished; the same command resumes the run"
fi
exit "$code"

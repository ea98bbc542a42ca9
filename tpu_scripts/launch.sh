#!/usr/bin/env bash
# Trains a config on all workers of the TPU, in the directory RUN of the bucket, and shows what
# worker 0 prints. A run that was stopped continues. It goes on when this script is interrupted.
#
#   launch.sh [--detach] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#   launch.sh --follow      shows worker 0's output again, from its beginning
#   launch.sh --stop        saves and stops
#
#   --detach    returns as soon as the run is started
#
# Logs of all workers: logs/TIME/worker-N.log in the directory of the run.
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
  # Before any worker starts: processes that wait for one which cannot start would hang.
  on_workers all "$WORKER idle && tpu_scripts/worker.sh mount $(quoted "$BUCKET" "$MOUNT")"
  on_workers all "$WORKER start $(quoted "$MOUNT/$RUN" "$(launch_id)" "${TRAIN[@]}")"
  if [[ ${FLAG[--detach]:-} ]]; then exit; fi
fi

code=0
on_workers 0 "$WORKER follow" || code=$?
if ((code)); then
  say "worker 0 ended with status $code; the logs of all workers: $RESULTS/logs/"
elif [[ $(in_bucket model/config.json) ]]; then
  say "finished: $RESULTS/model"
else
  say "not finished; the same command continues"
fi
exit "$code"

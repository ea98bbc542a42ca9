#!/usr/bin/env bash
# Copies the results of the run (model, report, metrics, rollouts, logs) from the bucket to a local
# directory. It can be repeated. Files that are already there are not copied again.
#
#   sync.sh [--checkpoints] [--dry-run] [DIRECTORY]
#
#   --checkpoints    also copy the checkpoints, which are large
#   --dry-run        print the commands without running them
#
# The default of DIRECTORY is RUN. Settings: NAME, ZONE, BUCKET, RUN (runs/NAME)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--checkpoints" "$@"
need BUCKET
tpu_settings
((${#ARGS[@]} <= 1)) || die "${ARGS[1]}: sync.sh takes one directory; see --help"
target=${ARGS[0]:-$RUN}

skip=("--exclude=^checkpoints/.*")
if [[ ${FLAG[--checkpoints]:-} ]]; then skip=(); fi
run mkdir -p "$target"
run gcloud storage rsync --recursive "${skip[@]}" "$RESULTS" "$target"

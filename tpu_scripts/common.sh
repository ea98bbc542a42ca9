# shellcheck shell=bash
# Code that the scripts share: settings, flags, and functions that run commands. To be sourced.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLONE=$(dirname "$HERE")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

POLL=${POLL:-30}                # seconds between two checks
RELAUNCHES=${RELAUNCHES:-5}     # launches from the same checkpoint before watching gives up
CREATES=${CREATES:-1000}        # failed creations of a TPU in a row before watching gives up
MOUNT=${MOUNT:-/bucket}         # directory where every host mounts the bucket

declare -A EXAMPLE=(
  [NAME]="my-tpu" [ZONE]="us-west4-a" [TYPE]="v5litepod-16" [BUCKET]="my-bucket"
  [RUNTIME]="v2-alpha-tpuv5-lite" [WORKDIR]="/shared/runs/mine" [TOPOLOGY]="4x4"
  [IMAGE]="us-west4-docker.pkg.dev/my-project/my-images/jaxrl_vlm"
)

say() { echo "$*" >&2; }
die() {
  say "$*"
  exit 2
}

# need NAME...: exits unless these settings are set.
need() {
  local name
  for name in "$@"; do
    [[ ${!name:-} ]] || die "$name is not set; export $name=${EXAMPLE[$name]}"
  done
}

# Prints the comment at the beginning of the script, which is its help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse FLAGS "$@": sets FLAG[--x]=1 for each leading flag, which must be one of FLAGS, and ARGS to
# the remaining words, from the first one that is not a flag.
declare -A FLAG=()
parse() {
  local known="--dry-run --help${1:+ $1}"
  shift
  while (($#)) && [[ $1 == -* ]]; do
    [[ " $known " == *" $1 "* ]] ||
      die "$1: $(basename "$0") has no such flag; expected one of: $known" \
        "(flags of the run come after its config)"
    FLAG[$1]=1
    shift
  done
  ARGS=("$@")
  if [[ ${FLAG[--help]:-} ]]; then
    usage
    exit 0
  fi
}

no_arguments() {
  ((${#ARGS[@]} == 0)) || die "${ARGS[0]}: $(basename "$0") takes no such argument; see --help"
}

# Checks that ARGS are a config of this clone and flags of the run, and sets TRAIN to the arguments
# of jaxrl_vlm.train.
need_config() {
  ((${#ARGS[@]})) || die "no config; expected: $(basename "$0") configs/NAME.py [FLAGS OF THE RUN]"
  [[ -e $CLONE/${ARGS[0]%%:*} ]] ||
    die "${ARGS[0]}: no such file in $CLONE; expected a config of this clone, like configs/NAME.py"
  # shellcheck disable=SC2034  # for the script that sources this
  TRAIN=("--config=${ARGS[0]}" "${ARGS[@]:1}")
}

dry() { [[ ${FLAG[--dry-run]:-} ]]; }

# Prints the words in shell quotes, so that a shell reads the same words, here or over ssh.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

show() { say "+ $(quoted "$@")"; }

# `run` and `ask` run all commands. They print each command first, and with --dry-run only print it.
run() {
  show "$@"
  dry || "$@"
}

# ask ABSENT COMMAND...: prints the output of the command. If the command fails with an error that
# matches ABSENT, the object does not exist, and nothing is printed. Any other failure is an error,
# so that an outage is not taken for absence.
ask() {
  local absent=$1 answer
  shift
  show "$@"
  dry && return
  if answer=$("$@" 2>"$SCRATCH/errors"); then
    [[ -z $answer ]] || echo "$answer"
  elif [[ -z $absent ]] || ! grep -Eq "$absent" "$SCRATCH/errors"; then
    cat "$SCRATCH/errors" >&2
    return 1
  fi
}

# Runs another one of these scripts, with --dry-run if this script has it.
script() {
  local name=$1
  shift
  dry && set -- --dry-run "$@"
  show "$HERE/$name" "$@"
  "$HERE/$name" "$@"
}

# Paths in the home directory of a host: the packed clone, and the directory where it is unpacked
# and run. Neither is in ~/jaxrl_vlm, which may be the user's own clone. Hosts may share a home
# directory, so each host has its own subdirectory.
PACKED=.jaxrl_vlm.tar.gz
# shellcheck disable=SC2016  # expanded on the host
PLACE='.jaxrl_vlm/"$(uname -n)"/clone'

launch_id() { date -u +%Y%m%dT%H%M%SZ; }

# Packs the clone into $SCRATCH/$PACKED, with changed and new files, without files that git ignores.
pack() {
  local tree
  run env GIT_INDEX_FILE="$SCRATCH/index" git -C "$CLONE" add --all
  tree=$(ask "" env GIT_INDEX_FILE="$SCRATCH/index" git -C "$CLONE" write-tree)
  run git -C "$CLONE" archive --format=tar.gz --output="$SCRATCH/$PACKED" "${tree:-TREE}"
}

# Unpacks it in the home directory of a host. Fails if a run is in progress there, because its files
# must not change.
# shellcheck disable=SC2034  # for the scripts that source this
UNPACK="if [ -x $PLACE/tpu_scripts/worker.sh ]; then $PLACE/tpu_scripts/worker.sh idle ||\
 exit 1; fi; mkdir -p $PLACE && rm -rf $PLACE/jaxrl_vlm $PLACE/configs &&\
 tar -xzf $PACKED -C $PLACE"

# -- Cloud TPUs -----------------------------------------------------------------------------------

tpu_settings() {
  need NAME ZONE
  # shellcheck disable=SC2153  # ZONE is no misspelling of DONE
  SCOPE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  RUN=${RUN:-runs/$NAME}        # directory of the run in the bucket
  BUCKET=${BUCKET:-}
  BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}
  RESULTS=gs://$BUCKET/$RUN
  dry || command -v gcloud >/dev/null ||
    die "gcloud is not on the PATH; install the Google Cloud CLI, then: gcloud init"
}

node_state() {
  ask "NOT_FOUND|not found" gcloud compute tpus tpu-vm describe "$NAME" "${SCOPE[@]}" \
    "--format=value(state)"
}

queue_state() {
  ask "NOT_FOUND|not found" gcloud compute tpus queued-resources describe "$NAME" "${SCOPE[@]}" \
    "--format=value(state.state)"
}

in_bucket() { ask "matched no objects" gcloud storage ls "$RESULTS/$1"; }

# on_workers WHICH COMMAND: runs the command in the home directory of one worker, or of `all`
# workers in parallel.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${SCOPE[@]}" --quiet "--worker=$1" "--command=$2"
}

# -- Watching -------------------------------------------------------------------------------------

# Prints the number of the newest checkpoint in a listing.
newest_step() { sed -n 's|^.*/checkpoints/\([0-9][0-9]*\)/*$|\1|p' | sort -n | tail -n 1; }

# Sets STATE from the output of `worker.sh status` on all workers.
state_of_workers() {
  local all running
  all=$(grep -c '^worker ' <<<"$1" || true)
  running=$(grep -c '^worker .*: running$' <<<"$1" || true)
  if ((running == 0)); then
    STATE=idle
    [[ -z $1 ]] || say "$1"
  elif ((running < all)); then
    STATE=mixed
    say "$1"
  else
    STATE=running
  fi
}

# watch_run NAME: checks the run until it is finished, and launches it again if it is not running.
# The script that calls it defines two functions:
#   look        sets STATE (running, mixed, idle, gone, busy), STEP (the newest checkpoint) and DONE
#               (not empty if the final model exists); fails if a host or service does not answer
#   relaunch    launches the run again, depending on STATE; fails if a command fails
watch_run() {
  local last=- tries=0 failures=0 mixed=0 creates=0
  while :; do
    STATE="" STEP="" DONE=""
    if ! look; then
      ((++failures < 10)) || break
      sleep "$POLL"
      continue
    fi
    # While processes run, an existing model is still being written.
    if [[ $DONE && $STATE != running && $STATE != mixed ]]; then
      say "$1: finished"
      return
    fi
    # After one process has died, the others stop by themselves within a minute.
    if [[ $STATE == mixed ]]; then ((++mixed)); else mixed=0; fi
    if [[ $STATE == running || $STATE == busy ]] || ((mixed > 0 && mixed < 5)); then
      failures=0
      sleep "$POLL"
      continue
    fi
    if [[ $STEP != "$last" ]]; then last=$STEP tries=0; fi
    if ((tries >= RELAUNCHES)); then
      say "$1: launched $tries times from checkpoint ${STEP:-none} without reaching a newer one;" \
        "giving up. The last lines above and the logs show the cause. Fix it, then watch again."
      return 1
    fi
    say "$1: $STATE, checkpoint ${STEP:-none}; launch $((tries + 1)) of $RELAUNCHES"
    if relaunch; then
      ((++tries))
      failures=0 creates=0
    elif [[ $STATE == gone ]]; then  # most probably, no TPU is available at the moment
      if ((++creates >= CREATES)); then
        say "$1: could not be created $creates times in a row; giving up. The errors are above."
        return 1
      fi
    else
      ((++failures < 10)) || break
    fi
    if dry; then
      say "(dry run) this is repeated every $POLL s until model/config.json exists"
      return
    fi
    sleep "$POLL"
  done
  say "$1: ten failures in a row; giving up. The failures are printed above."
  return 1
}

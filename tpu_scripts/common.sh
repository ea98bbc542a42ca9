# shellcheck shell=bash
# What the scripts share: settings, flags, and the one way in which commands are run. Sourced.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash $BASH_VERSION is too old: 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CLONE=$(dirname "$HERE")
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

POLL=${POLL:-30}                # seconds between two looks
RELAUNCHES=${RELAUNCHES:-5}     # launches from the same checkpoint before watching gives up
CREATES=${CREATES:-1000}        # times in a row that a TPU may not be had before watching gives up
MOUNT=${MOUNT:-/bucket}         # where every host sees the bucket

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

# need NAME...: these settings are there.
need() {
  local name
  for name in "$@"; do
    [[ ${!name:-} ]] || die "$name is not set; export $name=${EXAMPLE[$name]}"
  done
}

# The comment that a script begins with.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse FLAGS "$@": own flags become FLAG[--x]=1; ARGS is the rest, from the first other word on.
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

# ARGS are a config of this clone and flags for the run; they become TRAIN.
need_config() {
  ((${#ARGS[@]})) || die "no config; expected: $(basename "$0") configs/NAME.py [FLAGS OF THE RUN]"
  [[ -e $CLONE/${ARGS[0]%%:*} ]] ||
    die "${ARGS[0]}: no such file in $CLONE; a config is named from there, as configs/NAME.py"
  # shellcheck disable=SC2034  # for the script that sources this
  TRAIN=("--config=${ARGS[0]}" "${ARGS[@]:1}")
}

dry() { [[ ${FLAG[--dry-run]:-} ]]; }

# The words in such quotes that a shell, here or at the other end of ssh, reads the same words.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

show() { say "+ $(quoted "$@")"; }

# Every command goes through one of these two, which show it first.
run() {
  show "$@"
  dry || "$@"
}

# ask ABSENT COMMAND...: prints what it prints; nothing where its error matches ABSENT, which
# says that there is no such thing. Any other failure is one: an outage must not look like absence.
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

# Another of these scripts, with the same --dry-run.
script() {
  local name=$1
  shift
  dry && set -- --dry-run "$@"
  show "$HERE/$name" "$@"
  "$HERE/$name" "$@"
}

# In a host's home directory: the packed clone, and where it is unpacked and run. ~/jaxrl_vlm may be
# the user's own clone, so neither is there; and hosts may share a home, so each has its own part.
PACKED=.jaxrl_vlm.tar.gz
# shellcheck disable=SC2016  # the host asks for its name
PLACE='.jaxrl_vlm/"$(uname -n)"/clone'

launch_id() { date -u +%Y%m%dT%H%M%SZ; }

# The clone as it is now, new files too but nothing that git ignores, as $SCRATCH/$PACKED.
pack() {
  local tree
  run env GIT_INDEX_FILE="$SCRATCH/index" git -C "$CLONE" add --all
  tree=$(ask "" env GIT_INDEX_FILE="$SCRATCH/index" git -C "$CLONE" write-tree)
  run git -C "$CLONE" archive --format=tar.gz --output="$SCRATCH/$PACKED" "${tree:-TREE}"
}

# What a host does with it, in its home directory. Under a running run no file is changed.
# shellcheck disable=SC2034  # for the scripts that source this
UNPACK="if [ -x $PLACE/tpu_scripts/worker.sh ]; then $PLACE/tpu_scripts/worker.sh idle ||\
 exit 1; fi; mkdir -p $PLACE && rm -rf $PLACE/jaxrl_vlm $PLACE/configs &&\
 tar -xzf $PACKED -C $PLACE"

# -- Cloud TPUs -----------------------------------------------------------------------------------

tpu_settings() {
  need NAME ZONE
  # shellcheck disable=SC2153  # ZONE is no misspelling of DONE
  SCOPE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  RUN=${RUN:-runs/$NAME}        # the run's directory in the bucket
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

# on_workers WHICH COMMAND: in the home directory of one worker or of `all` at once.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${SCOPE[@]}" --quiet "--worker=$1" "--command=$2"
}

# -- Watching -------------------------------------------------------------------------------------

# The number of the newest checkpoint in a listing.
newest_step() { sed -n 's|^.*/checkpoints/\([0-9][0-9]*\)/*$|\1|p' | sort -n | tail -n 1; }

# Sets STATE from what all workers' `worker.sh status` printed.
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

# Until the run is finished: looks, and launches it again where it is not running.
#   look        sets STATE (running, mixed, idle, gone, busy), STEP (of the newest checkpoint) and
#               DONE (not empty: the final model is written); fails where something did not answer
#   relaunch    from STATE; fails where a command did
watch_run() {
  local last=- tries=0 failures=0 mixed=0 creates=0
  while :; do
    STATE="" STEP="" DONE=""
    if ! look; then
      ((++failures < 10)) || break
      sleep "$POLL"
      continue
    fi
    # A model that is there while processes run is still being written.
    if [[ $DONE && $STATE != running && $STATE != mixed ]]; then
      say "$1: finished"
      return
    fi
    # After one process died the others stop by themselves, within a minute.
    if [[ $STATE == mixed ]]; then ((++mixed)); else mixed=0; fi
    if [[ $STATE == running || $STATE == busy ]] || ((mixed > 0 && mixed < 5)); then
      failures=0
      sleep "$POLL"
      continue
    fi
    if [[ $STEP != "$last" ]]; then last=$STEP tries=0; fi
    if ((tries >= RELAUNCHES)); then
      say "$1: launched $tries times from checkpoint ${STEP:-none} without reaching a newer one;" \
        "giving up. Its last lines, above, and its logs tell why; mend it, then watch again."
      return 1
    fi
    say "$1: $STATE, checkpoint ${STEP:-none}; launch $((tries + 1)) of $RELAUNCHES from there"
    if relaunch; then
      ((++tries))
      failures=0 creates=0
    elif [[ $STATE == gone ]]; then  # nothing is free at the moment, most probably
      if ((++creates >= CREATES)); then
        say "$1: could not be had $creates times in a row; giving up. The reason stands above."
        return 1
      fi
    else
      ((++failures < 10)) || break
    fi
    if dry; then
      say "(dry run) and so on, every $POLL s, until model/config.json is there"
      return
    fi
    sleep "$POLL"
  done
  say "$1: ten failures in a row; giving up. What failed stands above."
  return 1
}

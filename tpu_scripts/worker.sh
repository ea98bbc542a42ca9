#!/usr/bin/env bash
# What one host does; the other scripts run it there, in its copy of the clone.
#
#   worker.sh install EXTRA                 Python 3.11 and this package in .venv
#   worker.sh mount BUCKET DIRECTORY        the bucket, as a directory
#   worker.sh start WORKDIR LAUNCH ARG...   trains in the background
#   worker.sh idle                          fails if a run is going on
#   worker.sh status [WORKDIR]              one line; of a WORKDIR also what is there
#   worker.sh follow                        what the run prints, until it ends; then its status
#   worker.sh stop                          saves and stops
#   worker.sh pod WORKDIR LAUNCH ARG...     trains in the foreground, in a container
#
# What a run prints goes to a file here, copied to WORKDIR/logs/LAUNCH every minute: a bucket keeps
# no line of a file that is still being written.

set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
CLONE=$(dirname "$HERE")
# Of the run here: keeper, child, log, status. Hosts may share a home: each has its own.
NOTES=$HOME/.jaxrl_vlm/$(uname -n)
WORKER=${WORKER:-${JAX_PROCESS_ID:-}}
GCSFUSE=3.4.4

run() {
  echo "+ $*" >&2
  "$@"
}

# Of this host among all; on a TPU asked for where JAX asks for it.
number() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  mkdir -p "$NOTES"
  if [[ $WORKER ]]; then
    echo "$WORKER" >"$NOTES/number"
  elif [[ ! -s $NOTES/number ]]; then
    curl -sf --max-time 5 -H "Metadata-Flavor: Google" "$url/agent-worker-number" \
      >"$NOTES/number" || uname -n >"$NOTES/number"
  fi
  cat "$NOTES/number"
}

note() { if [[ -e $NOTES/$1 ]]; then cat "$NOTES/$1"; fi; }

# The process that keeps the run is there; after a reboot its number may be another's.
alive() {
  local keeper
  keeper=$(note keeper)
  [[ $keeper ]] && grep -qs "worker.sh" "/proc/$keeper/cmdline"
}

install() {
  cd "$CLONE"
  # The image's own Python may be older than 3.11; uv brings one.
  export PATH=$HOME/.local/bin:$PATH:$NOTES/uv/bin
  command -v uv >/dev/null || run python3 -m pip install -q --target="$NOTES/uv" uv
  [[ -x .venv/bin/python ]] || run uv venv -q --python=3.11 .venv
  run uv pip install -q --python=.venv/bin/python -e ".[$1]"
}

mount() {
  if mountpoint -q "$2"; then
    local mounted
    mounted=$(findmnt -no SOURCE --mountpoint "$2" || true)  # gcsfuse names its bucket there
    [[ $mounted != "$1" ]] || return 0
    # A run would write where nobody looks for it.
    echo "worker $(number): $2 is ${mounted:-something else}, not the bucket BUCKET=$1;" \
      "unmount it on all workers (fusermount -u $2), or set BUCKET to that one," \
      "or another MOUNT" >&2
    return 1
  fi
  if [[ ! $(gcsfuse --version 2>/dev/null) =~ version\ [3-9] ]]; then
    local file=gcsfuse_${GCSFUSE}_amd64.deb
    local url=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download
    run curl -sfL -o "/tmp/$file" "$url/v$GCSFUSE/$file"
    run sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y "/tmp/$file"
  fi
  run sudo mkdir -p "$2"
  run sudo chown "$(id -u):$(id -g)" "$2"
  # Nothing is remembered of what is not there: a host must see at once what another wrote. On TPU
  # machines the default is to remember for ever.
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$1" "$2"
}

idle() {
  if alive; then
    echo "worker $(number): a run is going on here; stop it first" >&2
    return 1
  fi
}

start() {
  idle
  mkdir -p "$NOTES"
  rm -f "$NOTES"/{keeper,child,status}
  echo "$NOTES/$2.log" >"$NOTES/log"
  : >"$NOTES/$2.log"
  setsid nohup "$0" keep "$@" </dev/null >>"$NOTES/$2.log" 2>&1 &
  echo $! >"$NOTES/keeper"
  echo "worker $(number): started"
}

copy_often() { while sleep "${COPY_SECONDS:-60}"; do cp "$1" "$2" || true; done; }

# Keeps a run: starts it, copies its log, notes its exit status. With FORWARD it passes SIGTERM on:
# whoever ends a container signals this process alone; who shuts a machine down signals them all.
keep() {
  local workdir=$1 launch=$2 log=$NOTES/$2.log code=0 child copy python=$CLONE/.venv/bin/python
  shift 2
  [[ -x $python ]] || python=python3
  mkdir -p "$workdir/logs/$launch" "$NOTES"
  copy="$workdir/logs/$launch/worker-$(number).log"
  cd "$CLONE"
  set -- "$python" -u -m jaxrl_vlm.train "$@" "--workdir=$workdir"
  { echo "$(date -u +%FT%TZ) +" "${@@Q}"; } >>"$log"
  "$@" >>"$log" 2>&1 </dev/null &
  child=$!
  echo "$child" >"$NOTES/child"
  # This process lives on until the run has ended, to note how.
  trap 'if [[ ${FORWARD:-} ]]; then kill -TERM "$child" || true; fi' TERM
  trap : HUP INT
  copy_often "$log" "$copy" &>/dev/null &
  local copier=$! shown=""
  if [[ ${FORWARD:-} ]]; then
    tail -n +1 -F --pid="$child" "$log" 2>/dev/null &
    shown=$!
  fi
  # A signal ends the waiting, not the run.
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  kill "$copier" || true
  cp "$log" "$copy" || true
  echo "$code" >"$NOTES/status"
  [[ -z $shown ]] || wait "$shown" || true
  return "$code"
}

status() {
  local line
  if alive; then
    echo "worker $(number): running"
  elif [[ -e $NOTES/log ]]; then
    line=$(tail -n 1 "$(note log)" 2>/dev/null || true)
    echo "worker $(number): ended with status $(note status): $line"
  else
    echo "worker $(number): no run yet"
  fi
  [[ ${1:-} ]] || return 0
  if [[ -e $1/model/config.json ]]; then echo "finished"; fi
  find "$1/checkpoints" -mindepth 1 -maxdepth 1 -type d 2>/dev/null || true
}

follow() {
  [[ -e $NOTES/log ]] || { echo "worker $(number): no run yet" >&2; exit 1; }
  tail -n +1 -F --pid="$(note keeper)" "$(note log)" 2>/dev/null || true
  local code
  code=$(note status)
  exit "${code:-1}"
}

stop() {
  if ! alive; then
    echo "worker $(number): no run to stop"
    return
  fi
  local seconds
  until [[ -s $NOTES/child ]] || ! alive; do sleep 0.1; done
  kill -TERM "$(note child)" 2>/dev/null || true
  for ((seconds = 0; seconds < ${STOP_SECONDS:-600}; seconds++)); do
    alive || break
    sleep 1
  done
  if alive; then  # the keeper leads the group of all that the run started
    kill -KILL -- "-$(note keeper)" || true
    echo "worker $(number): killed, after ${STOP_SECONDS:-600} s"
  else
    echo "worker $(number): stopped: $(tail -n 1 "$(note log)")"
  fi
}

# A run that SIGTERM stopped ends with status 0 too; its container must be started again. With 75
# the run itself says that another is gone: if that one has failed, it should be heard first.
pod() {
  local code=0
  FORWARD=1 keep "$@" || code=$?
  if ((code == 75)); then sleep "${OTHERS_SECONDS:-20}"; fi
  if ((code == 0)) && [[ ! -e $1/model/config.json ]]; then code=75; fi
  exit "$code"
}

case ${1:-} in
  install | mount | start | idle | keep | status | follow | stop | pod) "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    [[ ${1:-} == --help ]] || exit 2
    ;;
esac

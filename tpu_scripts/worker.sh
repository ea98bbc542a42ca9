#!/usr/bin/env bash
# Runs on one host of a TPU slice or GPU cluster. The other scripts call it there, in the host's
# copy of the clone.
#
#   worker.sh install EXTRA                 install Python 3.11 and this package in .venv
#   worker.sh mount BUCKET DIRECTORY        mount the bucket as a directory
#   worker.sh start WORKDIR LAUNCH ARG...   train in the background
#   worker.sh idle                          fail if a run is in progress
#   worker.sh status [WORKDIR]              print one line about the run; with WORKDIR also whether
#                                           it is finished, and its checkpoints
#   worker.sh follow                        show the output of the run until it ends; exit with its
#                                           status
#   worker.sh stop                          save and stop the run
#   worker.sh pod WORKDIR LAUNCH ARG...     train in the foreground, in a container
#
# The output of a run goes to a local file, which is copied to WORKDIR/logs/LAUNCH every minute. It
# is not written to the bucket directly, because a bucket stores a file only when it is closed.

set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
CLONE=$(dirname "$HERE")
# Directory of notes about the run on this host: keeper, child, log, status. Hosts may share a home
# directory, so each has its own.
NOTES=$HOME/.jaxrl_vlm/$(uname -n)
WORKER=${WORKER:-${JAX_PROCESS_ID:-}}
GCSFUSE=3.4.4

run() {
  echo "+ $*" >&2
  "$@"
}

# Prints the number of this host in the run. On TPUs, the metadata server has it, as for JAX.
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

# Succeeds if the process that keeps the run exists. After a reboot, its id may be another's.
alive() {
  local keeper
  keeper=$(note keeper)
  [[ $keeper ]] && grep -qs "worker.sh" "/proc/$keeper/cmdline"
}

install() {
  cd "$CLONE"
  # The Python of the image may be older than 3.11, so uv installs one.
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
    # A run would write its results to the wrong place.
    echo "worker $(number): $2 is ${mounted:-something else}, not the bucket BUCKET=$1;" \
      "unmount it on all workers (fusermount -u $2), or set BUCKET to the mounted bucket," \
      "or set another MOUNT" >&2
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
  # Metadata is not cached, because a host must see immediately what another host has written. On
  # TPU machines, gcsfuse caches metadata forever by default.
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

# Keeps a run: starts it, copies its log, and stores its exit status. With FORWARD, it forwards
# SIGTERM to the run, because the end of a container signals only this process. The shutdown of a
# machine signals all processes.
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
  # This process continues until the run has ended, to store the exit status.
  trap 'if [[ ${FORWARD:-} ]]; then kill -TERM "$child" || true; fi' TERM
  trap : HUP INT
  copy_often "$log" "$copy" &>/dev/null &
  local copier=$! shown=""
  if [[ ${FORWARD:-} ]]; then
    tail -n +1 -F --pid="$child" "$log" 2>/dev/null &
    shown=$!
  fi
  # A signal interrupts `wait`, but not the run.
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
  if alive; then  # the keeper leads the process group of the run
    kill -KILL -- "-$(note keeper)" || true
    echo "worker $(number): killed, after ${STOP_SECONDS:-600} s"
  else
    echo "worker $(number): stopped: $(tail -n 1 "$(note log)")"
  fi
}

# Exits with 0 only if the run is finished. A run that SIGTERM stopped also exits with 0, but its
# container must be started again, so the pod exits with 75. A run exits with 75 if another process
# is lost. The pod then waits, so that an error of the other process is reported first.
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

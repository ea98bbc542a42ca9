#!/usr/bin/env bash
# The same for hosts with GPUs: this machine, or others over ssh. One process drives all GPUs of a
# host; a run that is already finished is left alone.
#
#   gpu_host.sh [--dry-run] setup                               copies this clone, installs it
#   gpu_host.sh [--detach] [--dry-run] launch configs/NAME.py [FLAGS OF THE RUN]
#   gpu_host.sh [--dry-run] watch configs/NAME.py [FLAGS OF THE RUN]    again until finished
#   gpu_host.sh [--dry-run] follow                              the first host's output
#   gpu_host.sh [--dry-run] stop                                saves, then stops
#
# Settings: WORKDIR, a directory that all hosts see; HOSTS ("user@a user@b", as ssh knows them;
# none: this machine); COORDINATOR (first host:8476, as the others reach it); POLL; RELAUNCHES

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--detach" "$@"
((${#ARGS[@]})) || die "no command; expected setup, launch, watch, follow or stop; see --help"
command=${ARGS[0]}
ARGS=("${ARGS[@]:1}")
read -r -a hosts <<<"${HOSTS:-}"
count=${#hosts[@]}
if ((count)); then there="cd $PLACE"; else there="cd $(quoted "$CLONE")"; fi
WORKER="$there && tpu_scripts/worker.sh"

# at NUMBER COMMAND: ON becomes what runs it on that host.
at() {
  # Without a standard input: hosts are spoken to at the same time.
  if ((count)); then ON=(ssh -n "${hosts[$1]}" "$2"); else ON=(bash -c "$2"); fi
}

# on_all COMMAND [REST]: on all hosts at once, because a run stops on all or on none. %i in COMMAND
# is the number of the host.
on_all() {
  local i pids=() code=0
  for ((i = 0; i < (count ? count : 1); i++)); do
    at "$i" "${1//%i/$i}${2:-}"
    run "${ON[@]}" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i" || code=$?; done
  return "$code"
}

setup() {
  no_arguments
  if ((count)); then
    pack
    local host
    for host in "${hosts[@]}"; do
      run scp -q "$SCRATCH/$PACKED" "$host:$PACKED"
    done
    on_all "$UNPACK && $WORKER install gpu"
  else
    on_all "$WORKER install gpu"
  fi
}

launch() {
  need WORKDIR
  ((count < 2)) || [[ $WORKDIR == /* ]] ||
    die "WORKDIR=$WORKDIR: expected an absolute path, of a directory that all $count hosts see"
  local together=""
  if ((count > 1)); then
    together="JAX_COORDINATOR_ADDRESS=$(quoted "${COORDINATOR:-${hosts[0]#*@}:8476}")"
    together+=" JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=%i "
  fi
  # Before any starts: processes that wait for one which cannot start would hang.
  on_all "$WORKER idle" || return 1
  on_all "$there && ${together}WORKER=%i tpu_scripts/worker.sh start " \
    "$(quoted "$WORKDIR" "$(launch_id)" "${TRAIN[@]}")"
}

follow() {
  at 0 "$WORKER follow"
  run "${ON[@]}"
}

look() {
  local i all="" one
  for ((i = 0; i < (count ? count : 1); i++)); do
    at "$i" "$WORKER status $(quoted "$WORKDIR")"
    one=$(ask "" "${ON[@]}") || return 1
    all+="$one"$'\n'
  done
  DONE=$(grep -m 1 '^finished$' <<<"$all" || true)
  STEP=$(newest_step <<<"$all")
  state_of_workers "$(grep '^worker ' <<<"$all" || true)"
}

relaunch() {
  on_all "$WORKER stop" || return 1
  launch
}

case $command in
  setup) setup ;;
  launch)
    need_config
    launch
    if [[ -z ${FLAG[--detach]:-} ]]; then follow; fi
    ;;
  follow)
    no_arguments
    follow
    ;;
  watch)
    need WORKDIR
    need_config
    watch_run "$WORKDIR"
    ;;
  stop)
    no_arguments
    on_all "$WORKER stop"
    ;;
  *) die "$command: no such command; expected setup, launch, watch, follow or stop" ;;
esac

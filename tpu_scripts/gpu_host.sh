#!/usr/bin/env bash
# Trains a config on hosts with GPUs: on this machine, or on others over ssh. One process per host
# uses all of its GPUs. A run that is finished stays as it is.
#
#   gpu_host.sh [--dry-run] setup
#       copy this clone to the hosts and install it; on this machine, only install it
#   gpu_host.sh [--detach] [--dry-run] launch configs/NAME.py [FLAGS OF THE RUN]
#       launch the run and show the output of the first host; with --detach, return at once
#   gpu_host.sh [--dry-run] watch configs/NAME.py [FLAGS OF THE RUN]
#       launch the run, again and again until it is finished
#   gpu_host.sh [--dry-run] follow
#       show the output of the first host again
#   gpu_host.sh [--dry-run] stop
#       save and stop the run
#
#   --dry-run    print the commands without running them
#
# Settings: WORKDIR (a directory that all hosts can read and write), HOSTS (names for ssh, such as
# "user@a user@b"; default: this machine), COORDINATOR (host:port at which the other hosts reach the
# first one; default: port 8476 of the first host), POLL (30 seconds), RELAUNCHES (5)

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

# at NUMBER COMMAND: sets ON to the command line that runs the command on this host.
at() {
  # ssh gets no standard input, because commands run on several hosts at the same time.
  if ((count)); then ON=(ssh -n "${hosts[$1]}" "$2"); else ON=(bash -c "$2"); fi
}

# on_all COMMAND [REST]: runs the command on all hosts in parallel, because the processes of a run
# stop together. %i in COMMAND stands for the number of the host. REST is appended as it is.
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
    die "WORKDIR=$WORKDIR: expected the absolute path of a directory that all $count hosts share"
  local together=""
  if ((count > 1)); then
    together="JAX_COORDINATOR_ADDRESS=$(quoted "${COORDINATOR:-${hosts[0]#*@}:8476}")"
    together+=" JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=%i "
  fi
  # Check all hosts before any process starts: the others would wait for one that cannot start.
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

#!/usr/bin/env bash
# Creates the TPU and waits until it is ready. A TPU that is ready stays as it is.
#
#   create.sh [--spot] [--queued] [--dry-run]
#
#   --spot      request a spot TPU, which is cheaper and can be preempted at any time (watch.sh
#               creates it again)
#   --queued    wait in Google's queue until a TPU is available, instead of failing
#   --dry-run   print the commands without running them
#
# Settings: NAME, ZONE, TYPE (v5litepod-16, ...), PROJECT, RUNTIME (default: depends on TYPE),
# POLL (30 seconds)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
parse "--spot --queued" "$@"
no_arguments
need TYPE
tpu_settings

case $TYPE in
  v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
  v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
  v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
  v4-*) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
  *)
    [[ ${RUNTIME:-} ]] || die "TYPE=$TYPE: unknown type; expected v4-*, v5litepod-*, v5p-*" \
      "or v6e-*, or set RUNTIME to a version of: gcloud compute tpus versions list"
    ;;
esac
SPOT=(${FLAG[--spot]:+--spot})

# wait_for STATE FUNCTION: waits until the function prints this state.
wait_for() {
  local state
  dry && return
  while :; do
    state=$($2) || exit 1
    case $state in
      "$1") return ;;
      FAILED | SUSPEND* | PREEMPTED | TERMINATED | STOP* | DELETING | HID*)
        die "$NAME is $state; run tpu_scripts/delete.sh, then create it again"
        ;;
    esac
    say "$NAME: ${state:-does not exist yet}; checking again in $POLL s"
    sleep "$POLL"
  done
}

state=$(node_state)
if [[ $state == READY ]]; then
  say "$NAME exists and is ready"
  exit
fi

if [[ ${FLAG[--queued]:-} ]]; then
  queue=$(queue_state)
  if [[ -z $queue ]]; then
    run gcloud compute tpus queued-resources create "$NAME" "${SCOPE[@]}" --quiet \
      "--node-id=$NAME" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" "${SPOT[@]}"
  fi
  wait_for ACTIVE queue_state
elif [[ -z $state ]]; then
  run gcloud compute tpus tpu-vm create "$NAME" "${SCOPE[@]}" --quiet \
    "--accelerator-type=$TYPE" "--version=$RUNTIME" "${SPOT[@]}"
fi
wait_for READY node_state
dry || say "$NAME is ready"

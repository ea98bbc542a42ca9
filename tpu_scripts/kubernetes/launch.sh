#!/usr/bin/env bash
# Trains a config on a TPU slice of a Google Kubernetes Engine cluster: fills in jobset.yaml and
# applies it. The cluster restarts the run until it is finished.
#
#   launch.sh [--spot] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#
#   --spot       use spot nodes
#   --dry-run    print the manifest without applying it
#
# Settings: NAME, BUCKET, IMAGE (built with kubernetes/Dockerfile), TOPOLOGY (4x4, ...), ACCELERATOR
# (tpu-v5-lite-podslice), CHIPS (chips of a host; 4, or all chips of a smaller slice),
# SERVICE_ACCOUNT (default), RUN (runs/NAME), MOUNT (/bucket), RELAUNCHES (5)

# shellcheck source=../common.sh
source "$(dirname "$0")/../common.sh"
parse "--spot" "$@"
need NAME BUCKET IMAGE TOPOLOGY
need_config
BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}

[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "NAME=$NAME: expected at most 40 lowercase letters, digits and dashes, with a letter first" \
    "and no dash at the end"
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  die "TOPOLOGY=$TOPOLOGY: expected the number of chips in each direction, such as 4x4 or 2x2x4"
total=$((${TOPOLOGY//x/*}))
CHIPS=${CHIPS:-$((total < 4 ? total : 4))}
((total % CHIPS == 0)) ||
  die "CHIPS=$CHIPS: expected a divisor of $total, the number of chips of TOPOLOGY=$TOPOLOGY"

args=""
for word in "${TRAIN[@]}"; do
  # YAML doubles quotes in quoted strings. Kubernetes reads $$ as $, and $(...) as a variable.
  word=${word//"'"/"''"}
  args+="${args:+, }'${word//"\$"/"\$\$"}'"
done

declare -A value=(
  [NAME]=$NAME [BUCKET]=$BUCKET [IMAGE]=$IMAGE [TOPOLOGY]=$TOPOLOGY [CHIPS]=$CHIPS
  [HOSTS]=$((total / CHIPS)) [ACCELERATOR]=${ACCELERATOR:-tpu-v5-lite-podslice}
  [SERVICE_ACCOUNT]=${SERVICE_ACCOUNT:-default} [RELAUNCHES]=$RELAUNCHES [MOUNT]=$MOUNT
  [WORKDIR]=$MOUNT/${RUN:-runs/$NAME} [LAUNCH]=$(launch_id)
)
manifest=$(<"$HERE/kubernetes/jobset.yaml")
spot=""
if [[ ${FLAG[--spot]:-} ]]; then spot='cloud.google.com/gke-spot: "true"'; fi
manifest=${manifest/"# \${SPOT}"/"$spot"}
for name in "${!value[@]}"; do
  manifest=${manifest//"\${$name}"/"${value[$name]}"}
done
# The arguments come last, because text like a setting in them must not be replaced.
manifest=${manifest/"\"\${ARGS}\""/"$args"}
if dry; then echo "$manifest"; fi
echo "$manifest" >"$SCRATCH/jobset.yaml"

run kubectl apply -f "$SCRATCH/jobset.yaml"
first=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0
dry || say "$NAME is applied. Useful commands:
  kubectl get jobset $NAME
  kubectl logs --follow --container=train --selector=$first
  kubectl delete jobset $NAME"

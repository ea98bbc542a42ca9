#!/usr/bin/env bash
# Trains a config on a TPU slice of a Google Kubernetes Engine cluster: fills in jobset.yaml and
# applies it. The cluster relaunches the run until it is finished.
#
#   launch.sh [--spot] [--dry-run] configs/NAME.py [FLAGS OF THE RUN]
#
#   --spot       on spot nodes
#   --dry-run    prints the manifest and applies nothing
#
# Settings: NAME, BUCKET, IMAGE (made with the Dockerfile here), TOPOLOGY (4x4, ...), ACCELERATOR
# (tpu-v5-lite-podslice), CHIPS (of a host: 4, or all if there are fewer), SERVICE_ACCOUNT
# (default), RUN (runs/NAME), MOUNT (/bucket), RELAUNCHES (5)

# shellcheck source=../common.sh
source "$(dirname "$0")/../common.sh"
parse "--spot" "$@"
need NAME BUCKET IMAGE TOPOLOGY
need_config
BUCKET=${BUCKET#gs://} BUCKET=${BUCKET%/}

[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
  die "NAME=$NAME: expected small letters, digits and dashes, at most 40 of them, a letter first"
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
  die "TOPOLOGY=$TOPOLOGY: expected chips in each direction, as 4x4 or 2x2x4"
total=$((${TOPOLOGY//x/*}))
CHIPS=${CHIPS:-$((total < 4 ? total : 4))}
((total % CHIPS == 0)) ||
  die "CHIPS=$CHIPS of a host: the $total chips of TOPOLOGY=$TOPOLOGY are no multiple of it"

args=""
for word in "${TRAIN[@]}"; do
  # YAML's quotes; and to Kubernetes $$ is $, and $(...) is a variable.
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
# Last: nothing in the user's words is a setting.
manifest=${manifest/"\"\${ARGS}\""/"$args"}
if dry; then echo "$manifest"; fi
echo "$manifest" >"$SCRATCH/jobset.yaml"

run kubectl apply -f "$SCRATCH/jobset.yaml"
first=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0
dry || say "$NAME is applied. What now:
  kubectl get jobset $NAME
  kubectl logs --follow --container=train --selector=$first
  kubectl delete jobset $NAME"

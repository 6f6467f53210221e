#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster that xpk made (pip install xpk).
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/xpk.sh --cluster=NAME --workload=NAME --tpu_type=TYPE --image=IMAGE --project=PROJECT --zone=ZONE [--slices=N] [--spot] \
  [--dry_run] -- FLAGS OF speedit_jax.train

  launch/xpk.sh --cluster=tpus --workload=dig-xl --tpu_type=v5litepod-256 --slices=2 --image=REGISTRY/speedit_jax:tpu \
    --project=PROJECT --zone=us-east5-a -- \
    --config=configs/imagenet.py:DiG-XL/2 --workdir=gs://bucket/runs/xl --config.mesh.slices=2

The image is made from launch/Dockerfile.tpu. The workload starts again, at most 1000 times, when a process was lost (exit code
75), asked to stop (130) or killed (137), and not after a mistake (1). With --slices=N set --config.mesh.slices=N too.
--dry_run prints the command and runs nothing. To see what xpk would do with it, add --dry-run to that command.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

cluster='' workload='' tpu_type='' image='' project='' zone='' slices=1 spot='' dry_run=''
while (($#)); do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --workload=*) workload=${1#*=} ;;
    --tpu_type=*) tpu_type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; flags of speedit_jax.train come after --" ;;
  esac
  shift
done
for name in cluster workload tpu_type image project zone; do
  [[ ${!name} ]] || fail "--$name is missing; --help shows an example"
done
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices: give a positive number"
(($#)) || fail "flags of speedit_jax.train are missing after --"

command=(
  xpk workload create --cluster="$cluster" --workload="$workload" --project="$project" --zone="$zone"
  --tpu-type="$tpu_type" --num-slices="$slices" --docker-image="$image" ${spot:+--spot}
  --max-restarts=1000 --restart-on-exit-codes=75 --termination-grace-period-seconds=300
  --command="exec python -m speedit_jax.train --multihost $(printf '%q ' "$@")"
)
if [[ $dry_run ]]; then printf '%q ' "${command[@]}" && echo; else exec "${command[@]}"; fi

#!/usr/bin/env bash
# Trains on every host of a TPU VM slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--setup] [--dry_run] -- FLAGS OF speedit_jax.train

  launch/tpu_pod.sh --tpu=pod --zone=us-east5-b --setup
  launch/tpu_pod.sh --tpu=pod --zone=us-east5-b -- --config=configs/imagenet.py:DiG-XL/2 --workdir=/mnt/shared/runs/xl

--setup copies this directory to every host and installs it there; do it once, and again when the code has changed.
--dry_run prints the commands and runs nothing.
The data and --workdir must be on a file system that all hosts mount (Filestore, or a bucket through gcsfuse).
After a preemption run the same command again: the run goes on from its last checkpoint.
TEXT
}

tpu= zone= project= setup= dry_run=
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --setup) setup=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; flags of speedit_jax.train come after --" >&2; exit 1 ;;
  esac
  shift
done
for name in tpu zone; do
  [[ ${!name} ]] || { echo "error: --$name is missing; --help shows an example" >&2; exit 1; }
done
[[ $setup ]] || (($#)) || { echo "error: nothing to do: give --setup, or flags of speedit_jax.train after --" >&2; exit 1; }

run() {
  if [[ $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
where=(--zone="$zone" --worker=all)
[[ $project ]] && where+=(--project="$project")

if [[ $setup ]]; then
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=$(mktemp -d)/speedit_jax.tar
  run git -C "$root" archive --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$tpu:speedit_jax.tar" "${where[@]}"
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command="mkdir -p speedit_jax && tar -xf speedit_jax.tar -C speedit_jax && cd speedit_jax && python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
fi
if (($#)); then
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --command="cd speedit_jax && .venv/bin/python -m speedit_jax.train --multihost $(printf '%q ' "$@")"
fi

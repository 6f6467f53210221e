#!/usr/bin/env bash
# Trains on GPUs of a SLURM cluster, one process a GPU.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/slurm.sh --nodes=N --gpus=G [--time=HH:MM:SS] [--partition=NAME] [--dry_run] -- FLAGS OF speedit_jax.train

  launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 -- --config=configs/imagenet.py:DiT-XL/2 --workdir=runs/xl

--gpus is per node. --dry_run prints the command and submits nothing.
Run it from the repository, where .venv is; the data and --workdir must be on a file system that all nodes see.
Two minutes before the time is over, and on preemption, SLURM sends SIGTERM: the run saves and ends. It is put into the queue again
on preemption and node failure; after a time-out submit the same command again.
TEXT
}

nodes= gpus= dry_run= options=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=* | --partition=*) options+=("$1") ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; flags of speedit_jax.train come after --" >&2; exit 1 ;;
  esac
  shift
done
for name in nodes gpus; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || { echo "error: --$name=${!name}: give a positive number; --help shows an example" >&2; exit 1; }
done
(($#)) || { echo "error: flags of speedit_jax.train are missing after --" >&2; exit 1; }

command=(
  sbatch --job-name=speedit_jax --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --requeue --signal=TERM@120
  "${options[@]}" --wrap="srun .venv/bin/python -m speedit_jax.train --multihost $(printf '%q ' "$@")"
)
if [[ $dry_run ]]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi

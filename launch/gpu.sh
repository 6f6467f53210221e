#!/usr/bin/env bash
# Trains on GPUs of this host, detached from the terminal.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/gpu.sh run --gpus=N [--name=NAME] [--dry_run] -- FLAGS OF speedit_jax.train
launch/gpu.sh status | logs | stop [--name=NAME] [--dry_run]

  launch/gpu.sh run --gpus=8 -- --config=configs/imagenet.py:DiT-XL/2 --workdir=runs/xl
  launch/gpu.sh run --gpus=4,5 --name=small -- --config=configs/digits.py --workdir=runs/digits

--gpus is how many, from the first on, or their numbers with commas between them ("5," is GPU 5 alone). One process drives them
all. It is started again if it ends with exit code 75. Run this in the repository; PYTHON is .venv/bin/python if not set.
status, logs and stop are those of launch/detached.sh. --dry_run prints the command and runs nothing.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

here=$(dirname "$0")
case ${1:-} in
  run) shift ;;
  --help | -h) usage; exit 0 ;;
  status | logs | stop) exec "$here/detached.sh" "$@" ;;
  '') fail "name what to do: run, status, logs or stop; --help shows examples" ;;
  *) fail "unknown command $1; choose run, status, logs or stop" ;;
esac
gpus='' options=()
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --name=* | --dry_run) options+=("$1") ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; flags of speedit_jax.train come after --" ;;
  esac
  shift
done
if [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  gpus=$(seq -s, 0 $((gpus - 1)))
elif [[ ! $gpus =~ ^[0-9]+,([0-9]+(,[0-9]+)*)?$ ]]; then
  fail "--gpus=$gpus: give how many, or their numbers as in 4,5"
fi
(($#)) || fail "flags of speedit_jax.train are missing after --"
exec "$here/detached.sh" run --restart "${options[@]}" -- \
  env CUDA_VISIBLE_DEVICES="${gpus%,}" "${PYTHON:-.venv/bin/python}" -m speedit_jax.train "$@"

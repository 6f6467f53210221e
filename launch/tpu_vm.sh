#!/usr/bin/env bash
# Trains on every host of a TPU VM slice.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/tpu_vm.sh COMMAND --tpu=NAME --zone=ZONE [--project=PROJECT] [--dry_run] [...]

  create   --type=TYPE --version=VERSION [--spot]       makes the slice: from here on it costs money
  setup                                                 installs this directory's HEAD on every host, again after a change
  run      -- FLAGS OF speedit_jax.train                starts training on every host, and returns
  status                                                the slice's state, and of each host: none, running, stopped, exit code
  logs                                                  the last lines of the first host
  stop                                                  asks the run to save and end
  delete                                                deletes the slice, after a question
  babysit  --type=TYPE --version=VERSION [--spot] -- FLAGS OF speedit_jax.train
           in the background of this machine, which must stay on: makes the slice again when it was preempted, and runs the
           same command again after every end but a complete run, a mistake (exit code 1) and `stop`

  launch/tpu_vm.sh create --tpu=pod --zone=us-west4-a --type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot
  launch/tpu_vm.sh setup --tpu=pod --zone=us-west4-a
  launch/tpu_vm.sh run --tpu=pod --zone=us-west4-a -- --config=configs/imagenet.py:DiG-XL/2 --workdir=gs://bucket/runs/xl
  launch/tpu_vm.sh delete --tpu=pod --zone=us-west4-a

--dry_run prints the commands and runs nothing. The data and --workdir must be where every host sees them: a bucket, or a mounted
file system (Filestore). gcsfuse is not for --workdir: it does not keep the renaming by which a checkpoint becomes complete.
babysit and a finished run leave the slice: delete it. It looks every --poll=60 seconds; `kill` its process to end it.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

action=${1:-}
case $action in
  create | setup | run | status | logs | stop | delete | babysit) shift ;;
  --help | -h) usage; exit 0 ;;
  '') fail "name a command, such as create or run; --help lists them" ;;
  *) fail "unknown command $action; --help lists them" ;;
esac
all=("$@") tpu='' zone='' project='' type='' version='' spot='' dry_run='' poll=60 here=''
while (($#)); do
  case $1 in
    --tpu=*) tpu=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --in_this_process) here=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; flags of speedit_jax.train come after --" ;;
  esac
  shift
done
needed=(tpu zone)
case $action in create | babysit) needed+=(type version) ;; esac
for name in "${needed[@]}"; do
  [[ ${!name} ]] || fail "--$name is missing; --help shows an example"
done
[[ $poll =~ ^[1-9][0-9]*$ ]] || fail "--poll=$poll: give a positive number of seconds"
case $action in run | babysit) (($#)) || fail "flags of speedit_jax.train are missing after --" ;; esac

where=(--zone="$zone")
if [[ $project ]]; then where+=(--project="$project"); fi
root=$(cd "$(dirname "$0")/.." && pwd)

run() { # COMMAND...
  if [[ $dry_run ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

vm() { # gcloud's command for the slice, and its arguments
  run gcloud compute tpus tpu-vm "$1" "$tpu" "${where[@]}" "${@:2}"
}

on() { # WORKER COMMAND: a shell command on a host, or on all of them
  vm ssh --worker="$1" --command="$2"
}

quoted() {
  printf '%q ' "$@"
}

create() {
  vm create --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

# uv brings a Python of its own: that of the TPU's images may be older than 3.11.
install="mkdir -p speedit_jax && tar -xf speedit_jax.tar -C speedit_jax && cd speedit_jax && python3 -m pip install --user --quiet uv"
install+=" && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv"
install+=" && python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"

setup() {
  local archive=${TMPDIR:-/tmp}/speedit_jax-$tpu.tar
  # Not one command a line: of those that babysit looks at the outcome of, bash goes on after a failure.
  run git -C "$root" archive --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$tpu:speedit_jax.tar" "${where[@]}" --worker=all &&
    on all "$install" &&
    run rm "$archive"
}

start() {
  on all "cd speedit_jax && launch/detached.sh run -- .venv/bin/python -m speedit_jax.train --multihost $(quoted "$@")"
}

# READY, PREEMPTED and so on; nothing if there is no such slice. Fails if Google cannot be asked.
state() {
  gcloud compute tpus tpu-vm list "${where[@]}" --format="value(name.basename(),state)" | awk -v name="$tpu" '$1 == name { print $2 }'
}

# One word for all hosts, the first that is true of any: running, 1, stopped, another exit code, 0, none.
outcome() {
  local words word
  words=$(on all "cd speedit_jax 2>/dev/null && launch/detached.sh status || echo none") || return
  for word in running 1 stopped; do
    if grep -qx "$word" <<<"$words"; then echo "$word" && return; fi
  done
  grep -xE '[0-9]+' <<<"$words" | grep -vx 0 | head -n 1 | grep . || grep -xE '0|none' <<<"$words" | sort | head -n 1
}

note() {
  echo "$(date '+%F %T') $1"
}

babysit() {
  local is how began='' short=0
  while :; do
    if ! is=$(state); then
      note "Google cannot be asked; the next try is in $poll s."
    elif [[ ! $is ]]; then
      note "There is no slice; creating it."
      if create && setup && start "$@"; then began=$SECONDS; else note "That failed; the next try is in $poll s."; fi
    elif [[ $is == PREEMPTED || $is == TERMINATED ]]; then
      note "The slice is $is; deleting what is left of it."
      if vm delete --quiet; then continue; fi
      note "That failed; the next try is in $poll s."
    elif [[ $is != READY ]]; then
      note "The slice is $is; looking again in $poll s."
    elif ! how=$(outcome); then
      note "A host of the slice does not answer; the next try is in $poll s."
    else
      case $how in
        running) ;;
        0) note "The run is complete. The slice still costs money: delete it." && return 0 ;;
        1) note "The run ended with a mistake; see logs. The slice still costs money: delete it." && return 1 ;;
        stopped) note "The run was stopped. The slice still costs money: delete it." && return 130 ;;
        *)
          if [[ $began ]] && ((SECONDS - began < 600)); then short=$((short + 1)); else short=0; fi
          if ((short == 5)); then
            note "The run ended five times within ten minutes of its start, the last time with $how; see logs. Delete the slice."
            return 1
          fi
          note "The run ended with $how; starting it again."
          if { [[ $how != none ]] || setup; } && start "$@"; then began=$SECONDS; else note "That failed; the next try is in $poll s."; fi
          ;;
      esac
    fi
    sleep "$poll"
  done
}

case $action in
  create) create ;;
  setup) setup ;;
  run) start "$@" ;;
  status)
    vm describe --format="value(state)"
    on all "cd speedit_jax && launch/detached.sh status"
    ;;
  logs) on 0 "cd speedit_jax && launch/detached.sh logs" ;;
  stop) on all "cd speedit_jax && launch/detached.sh stop" ;;
  delete) vm delete ;;
  babysit)
    if [[ $dry_run ]]; then
      echo "# while there is no slice:"
      create && setup && start "$@"
      echo "# after a preemption, and then as above:"
      vm delete --quiet
      echo "# every $poll seconds, and then as the last command above if it is needed:"
      on all "cd speedit_jax && launch/detached.sh status"
    elif [[ $here ]]; then
      babysit "$@"
    else
      log=babysit-$tpu.log
      setsid nohup "$0" babysit --in_this_process "${all[@]}" >>"$log" 2>&1 </dev/null &
      echo "Babysitting as process $!; it writes to $log."
    fi
    ;;
esac

#!/usr/bin/env bash
# Runs a command on this host, detached from the terminal.
set -euo pipefail

usage() {
  cat <<'TEXT'
launch/detached.sh run [--restart] [--name=NAME] [--dry_run] -- COMMAND
launch/detached.sh status | logs | stop [--name=NAME] [--dry_run]

  launch/detached.sh run -- .venv/bin/python -m speedit_jax.train --config=configs/digits.py --workdir=runs/digits
  launch/detached.sh logs

  run     starts COMMAND; it goes on when the terminal closes. --restart starts it again when it ends with 75.
  status  prints one word: none, running, stopped (by stop), or the exit code
  logs    prints the last 100 lines of its output
  stop    sends SIGTERM: training saves and ends

All files are in .launch/NAME of the current directory; NAME is "run" if not given. The exit codes of training are in
docs/launch.md. --dry_run prints the commands and runs nothing.
TEXT
}

fail() {
  echo "error: $1" >&2
  exit 1
}

action=${1:-} name=run restart='' dry_run=''
case $action in
  run | status | logs | stop) shift ;;
  --help | -h) usage; exit 0 ;;
  '') fail "name what to do: run, status, logs or stop; --help shows examples" ;;
  *) fail "unknown command $action; choose run, status, logs or stop" ;;
esac
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --restart) restart=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; --help shows examples" ;;
  esac
  shift
done
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name=$name: use letters, digits, dots, _ and -"
place=.launch/$name

# The process group of a run that is alive; nothing if there is none. When the machine has started again, the number may be that
# of another process, which is not to be waited for, let alone stopped.
alive() {
  local pid
  pid=$(cat "$place/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null || return
  if [[ -r /proc/$pid/cmdline ]] && ! grep -qaE 'detached\.sh|supervise' "/proc/$pid/cmdline"; then return 1; fi
  echo "$pid"
}

show() { # COMMAND...: prints it as a line for a shell
  printf '%q ' "$@"
  echo
}

# Runs COMMAND and notes its exit code. SIGTERM of `stop` goes to COMMAND only, which ends when it has saved.
# shellcheck disable=SC2016
supervise='
place=$1 restart=$2
shift 2
trap "kill -TERM \$child 2>/dev/null" TERM
while :; do
  "$@" </dev/null &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done
  [[ $restart && $code == 75 && ! -e $place/stop ]] || break
  echo "Exit code 75: starting again."
done
echo "$code" >"$place/exit.partial"
mv "$place/exit.partial" "$place/exit"
'

case $action in
  run)
    (($#)) || fail "the command is missing after --"
    if [[ $dry_run ]]; then show "$@"; exit; fi
    if pid=$(alive); then fail "process $pid already runs here; stop it first, or choose another --name"; fi
    mkdir -p "$place"
    rm -f "$place/exit" "$place/stop"
    setsid nohup bash -c "$supervise" supervise "$place" "$restart" "$@" >>"$place/log" 2>&1 </dev/null &
    echo $! >"$place/pid"
    echo "Started; its output goes to $PWD/$place/log."
    ;;
  status)
    if [[ $dry_run ]]; then show cat "$place/exit"; exit; fi
    if alive >/dev/null; then
      echo running
    elif [[ -e $place/stop && -e $place/exit ]]; then
      echo stopped
    elif [[ -e $place/exit ]]; then
      cat "$place/exit"
    elif [[ -e $place/pid ]]; then
      echo 137 # killed before it could say how it ended
    else
      echo none
    fi
    ;;
  logs)
    if [[ $dry_run ]]; then show tail -n 100 "$place/log"; exit; fi
    [[ -e $place/log ]] || fail "nothing has run in $PWD/$place"
    tail -n 100 "$place/log"
    ;;
  stop)
    if [[ $dry_run ]]; then show kill -TERM "PID in $place/pid"; exit; fi
    pid=$(alive) || fail "nothing runs in $PWD/$place"
    touch "$place/stop"
    kill -TERM "$pid"
    echo "Asked process $pid to save and end; status says when it has."
    ;;
esac

#!/usr/bin/env bash
# The main job on one worker, as every launcher here starts it: compiler flags for the accelerator, and an exit code that
# says what to do next.
#
#   bash launch/job.sh [options] -- --config C --workdir W [--config.x=y ...]
#
#   --flags NAME      compiler flags for this accelerator (launch/xla_flags.py: v5litepod-16, v6e, h100, ...)
#   --slices N        TPU slices or GPU nodes of the job (1)
#   --check           run launch/check.py with the same arguments instead of the main job
#   --forward         pass SIGTERM on to the job: in a container only this process gets it. Elsewhere (SLURM, a machine that
#                     shuts down) every process gets it by itself
#   --failed FILE     add a line to FILE when the job ends in an error; for launchers that see one code for many workers
#   --detach DIR      run in the background, with DIR/log, DIR/pid and, at the end, DIR/exit_code
#   --state DIR       what became of it: running, "exit N", died (no exit code, as after a reboot) or none
#   --stop DIR        ask it to save and end
#   --dry-run         print the command and stop
#
# Exit codes: 0 done; 75 run it again (told to stop and saved, or killed, or the job's own 75); anything else is an error.
# The main job itself ends with 0 when it has saved after SIGTERM. A launcher would take that for done, so it is 75 here.
# Relative paths, DIR and FILE too, are relative to the clone.
set -euo pipefail
script=${BASH_SOURCE[0]}

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$script"; }
die() { echo "error: $1 See launch/job.sh --help." >&2; exit 2; }

flags="" slices=1 check="" forward="" failed="" detach="" dry_run=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --check) check=1 ;;
    --forward) forward=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift; break ;;
    --flags | --slices | --failed | --detach | --state | --stop)
      [ $# -gt 1 ] || die "$1 needs a value."
      case $1 in
        --flags) flags=$2 ;;
        --slices) slices=$2 ;;
        --failed) failed=$2 ;;
        --detach) detach=$2 ;;
        --state | --stop) action=${1#--} place=$2 ;;
      esac
      shift ;;
    *) die "Unknown argument '$1'; the main job's own come after --." ;;
  esac
  shift
done

cd "$(dirname "$script")/.."
alive() { [ -s "$1/pid" ] && kill -0 "$(cat "$1/pid")" 2>/dev/null; }

case ${action:-} in
  state)
    if [ -s "$place/exit_code" ]; then echo "exit $(cat "$place/exit_code")"
    elif alive "$place"; then echo running
    elif [ -e "$place/log" ]; then echo died
    else echo none; fi
    exit 0 ;;
  stop)
    if alive "$place"; then touch "$place/told"; kill -TERM "$(cat "$place/pid")"; else echo "No job runs in $place."; fi
    exit 0 ;;
esac

[ $# -gt 0 ] || die "Give the main job's arguments after --."
python=.venv/bin/python
[ -x "$python" ] || python=python3
command=("$python" -m jaxvlm.main "$@")
[ -z "$check" ] || command=("$python" launch/check.py "$@")
setting=:
[ -z "$flags" ] || setting=$("$python" launch/xla_flags.py "$flags" --slices "$slices") || exit 2
if [ -n "$dry_run" ]; then
  [ "$setting" = : ] || echo "$setting"
  printf 'cd %q && ' "$PWD"
  printf '%q ' "${command[@]}"; echo
  exit 0
fi
eval "$setting"

work() {
  child="" told=""
  trap 'told=1; [ -z "$child" ] || [ -z "$forward" ] || kill -TERM "$child"' TERM
  "${command[@]}" &
  child=$!
  [ -z "$told" ] || kill -TERM "$child"  # told before there was anybody to pass it on to
  [ -z "$detach" ] || echo "$child" >"$detach/pid"
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a trapped signal ends `wait` early
  code=0
  wait "$child" || code=$?
  [ -z "$detach" ] || [ ! -e "$detach/told" ] || told=1
  case $code in
    0) [ -z "$told" ] || { echo "job.sh: told to stop, and saved."; code=75; } ;;
    134 | 137 | 143) echo "job.sh: killed ($code: 134 a peer was lost, 137 often out of memory); counts as 'again'."; code=75 ;;
  esac
  case $code in
    0 | 75) ;;
    *) echo "job.sh: the job failed with exit code $code."; [ -z "$failed" ] || echo "$(hostname) $code" >>"$failed" ;;
  esac
  [ -z "$detach" ] || echo "$code" >"$detach/exit_code"
  return "$code"
}

if [ -z "$detach" ]; then
  work
else
  mkdir -p "$detach"
  if alive "$detach"; then echo "error: a job runs already in $detach. Stop it first: --stop $detach." >&2; exit 1; fi
  rm -f "$detach/exit_code" "$detach/told" "$detach/pid"
  trap '' HUP  # runs on when the terminal goes
  work >>"$detach/log" 2>&1 </dev/null &
  until [ -s "$detach/pid" ]; do sleep 0.1; done
  echo "Started as process $(cat "$detach/pid") on $(hostname); its output goes to $detach/log."
fi

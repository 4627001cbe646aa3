#!/usr/bin/env bash
# Keeps a job going on TPU VMs that may be taken away: creates the slices, installs, runs, and after a preemption or exit
# code 75 does so again, until the job ends with 0, or with an error (then the end of every worker's log is shown). Either
# way the slices are deleted. Started a second time, it takes up what it finds.
#
#   launch/babysit.sh --name N --type v5litepod-16 --zone Z --spot [options of tpu_vm.sh] -- --config C --workdir gs://B/W
#
#   --retries N     give up after N ends with 75 in a row without a new checkpoint in the workdir (5); preemptions do not count
#   --keep          leave the slices up after an error; they cost money until `tpu_vm.sh delete`
#   --dry-run       print the commands of one attempt and stop
#
# Resuming needs no option: the main job goes on from the newest checkpoint in its workdir, which must be on gs://.
# Run it where it is not cut off: in tmux on a small VM, or on a workstation.
set -euo pipefail
script=${BASH_SOURCE[0]}
here=$(cd "$(dirname "$script")" && pwd)

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$script"; }
die() { echo "error: $1 See launch/babysit.sh --help." >&2; exit 2; }
say() { echo "$(date -u +%H:%M:%S) babysit: $1"; }

retries=5 poll=60 keep="" dry_run="" options=()
while [ $# -gt 0 ]; do
  case $1 in --retries=* | --poll=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
  case $1 in
    -h | --help) usage; exit 0 ;;
    --retries) [ $# -gt 1 ] || die "$1 needs a value."; retries=$2; shift ;;
    --poll) [ $# -gt 1 ] || die "$1 needs a value."; poll=$2; options+=("$1" "$2"); shift ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1; options+=("$1") ;;
    --) shift; break ;;
    *) options+=("$1") ;;
  esac
  shift
done
case $retries in *[!0-9]* | "") die "--retries is a number, not '$retries'." ;; esac

workdir="" previous=""
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  [ "$previous" != --workdir ] || workdir=$argument
  previous=$argument
done
case $workdir in
  gs://*) ;;
  *) die "Give the main job --workdir gs://BUCKET/FOLDER after --: what lies on the VMs goes with them, not '$workdir'." ;;
esac

tpu() { local command=$1; shift; "$here/tpu_vm.sh" "$command" ${options[@]+"${options[@]}"} "$@"; }

steps="${workdir%/}/stages/*/checkpoints/"  # a folder for each saved step
saved() { gcloud storage ls "$steps" 2>/dev/null || true; }

if [ -n "$dry_run" ]; then
  for command in state create wait install; do tpu "$command"; done
  tpu run -- "$@"
  tpu join
  printf 'gcloud storage ls %q\n' "$steps"
  tpu delete
  exit 0
fi
tpu run --dry-run -- "$@" >/dev/null || exit 2

SETUP=70  # something before the job failed, an API call or an ssh say: worth another try, but not for ever

attempt() {  # the job, on slices that are there or new ones, to its end: its exit code, SETUP, or 69 when the slices went
  local state states
  state=$(tpu state) || return $SETUP
  case $state in
    FAILED | SUSPEND*) tpu delete && tpu create || return $SETUP ;;  # what a preemption leaves
    NONE) tpu create || return $SETUP ;;
  esac  # else they are there, or on their way
  [ "$state" = ACTIVE ] || tpu wait || return
  states=$(tpu status) || return $SETUP
  case $states in
    *running*) ;;
    *)
      tpu install || return $SETUP
      tpu run -- "$@" || return $SETUP ;;
  esac
  tpu join
}

finish() {  # finish CODE MESSAGE
  say "$2"
  [ "$1" = 0 ] || tpu tail || true
  if [ "$1" != 0 ] && [ -n "$keep" ]; then say "The slices are still up, and cost money until: tpu_vm.sh delete"; else tpu delete; fi
  exit "$1"
}

futile=0 before=$(saved)
while :; do
  code=0
  attempt "$@" || code=$?
  case $code in
    0) finish 0 "done." ;;
    69) say "the slices are gone; asking for new ones." ;;
    75 | "$SETUP")
      after=$(saved)
      if [ "$after" = "$before" ]; then futile=$((futile + 1)); else futile=0; fi
      before=$after
      [ "$futile" -lt "$retries" ] || finish "$code" "exit code $code, $futile times without a new checkpoint in $workdir. Giving up."
      say "exit code $code; again ($futile of $retries without a new checkpoint)." ;;
    *) finish "$code" "the job failed with exit code $code." ;;
  esac
  sleep "$poll"
done

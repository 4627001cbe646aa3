#!/usr/bin/env bash
# TPU VMs through queued resources, one slice or several: from nothing to a running job, with gcloud alone.
#
#   launch/tpu_vm.sh COMMAND --name N --type v5litepod-16 --zone Z [options] [-- main job's arguments]
#
#   create    ask for the slices
#   wait      until they are there
#   install   this clone's present commit, and the packages, on every worker
#   check     run launch/check.py on all workers: devices, network, data, checkpoints
#   run       start the main job on all workers, in the background
#   logs      follow the log of one worker
#   tail      the last lines of every worker's log
#   state     of the slices, as gcloud calls it; NONE if there are none
#   status    that, and what the job does on every worker
#   join      wait for the job's end; exit code 0 done, 75 run it again, 69 the slices are gone, else the job's error
#   stop      ask the job to save and end
#   delete    give the slices back
#
#   --name N          of the queued resource; the slices are N, or N-0, N-1, ... where there are several
#   --type T          gcloud's accelerator type: v4-32, v5litepod-16, v5p-64, v6e-16 (v4 and v5p count cores, two a chip)
#   --zone Z          --project P (gcloud's default)
#   --slices S        1
#   --spot            preemptible and cheap
#   --runtime R       the VM's image (chosen by type)
#   --create-flag F   one more flag for `queued-resources create`, say --create-flag=--reserved; may be repeated
#   --ssh-flag F      one more for every ssh and scp, say --ssh-flag=--internal-ip; may be repeated
#   --extras E        of setup.py (tpu,data,gcs)
#   --setup CMD       a command to run on every worker after the installation, say to mount a bucket with data
#   --worker W        whose log `logs` follows (0), --slice K of which slice (0)
#   --poll SECONDS    between looks, in `wait` and `join` (60)
#   --dry-run         print the commands and stop
#
# The job is `python -m jaxvlm.main` with the arguments after --. Put its workdir on gs://: the VMs' disks go with them.
set -euo pipefail
script=${BASH_SOURCE[0]}
here=$(cd "$(dirname "$script")" && pwd)

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$script"; }
die() { echo "error: $1 See launch/tpu_vm.sh --help." >&2; exit 2; }

command="" name="" kind="" zone="" project="" slices=1 spot="" runtime="" extras=tpu,data,gcs setup="" worker=0 slice=0 poll=60 dry_run=""
create_flags=() ssh_flags=()
while [ $# -gt 0 ]; do
  argument=$1
  case $argument in
    --?*=*) set -- "${argument%%=*}" "${argument#*=}" "${@:2}"; argument=$1 ;;
  esac
  case $argument in
    -h | --help) usage; exit 0 ;;
    --spot) spot=1; shift; continue ;;
    --dry-run) dry_run=1; shift; continue ;;
    --) shift; break ;;
    --*) [ $# -gt 1 ] || die "$argument needs a value." ;;
    *) [ -z "$command" ] || die "Unknown argument '$argument'; the main job's own come after --."; command=$1; shift; continue ;;
  esac
  case $argument in
    --name) name=$2 ;;
    --type) kind=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --slices) slices=$2 ;;
    --runtime) runtime=$2 ;;
    --create-flag) create_flags+=("$2") ;;
    --ssh-flag) ssh_flags+=("$2") ;;
    --extras) extras=$2 ;;
    --setup) setup=$2 ;;
    --worker) worker=$2 ;;
    --slice) slice=$2 ;;
    --poll) poll=$2 ;;
    *) die "Unknown option $argument." ;;
  esac
  shift 2
done

case $command in
  create | wait | install | check | run | logs | tail | state | status | join | stop | delete) ;;
  "") die "Give a command." ;;
  *) die "There is no command '$command'." ;;
esac
[ -n "$name" ] && [ -n "$zone" ] && [ -n "$kind" ] || die "Give --name, --zone and --type."
case $slices in *[!0-9]* | "" | 0) die "--slices is a number from 1 on, not '$slices'." ;; esac
case $command in
  check | run) [ $# -gt 0 ] || die "Give the main job's arguments after --." ;;
  *) [ $# -eq 0 ] || die "'$command' takes nothing after --." ;;
esac
case $kind in
  v4-*) image=tpu-ubuntu2204-base ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5e-*) die "gcloud's name for $kind is v5litepod-${kind#v5e-}." ;;
  *) die "--type $kind is not one of v4-N, v5litepod-N, v5p-N, v6e-N." ;;
esac

where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
[ "$slice" -lt "${#nodes[@]}" ] 2>/dev/null || die "--slice is a number below $slices, not '$slice'."
tpus=(gcloud compute tpus)

run() {  # a command, or with --dry-run its text as a shell reads it
  local word line=""
  if [ -z "$dry_run" ]; then "$@"; return; fi
  for word in "$@"; do
    # shellcheck disable=SC2001  # the quoting of ${word//...} differs between versions of bash
    case $word in *[!A-Za-z0-9_./:=,+@%-]*) word="'$(sed "s/'/'\\\\''/g" <<<"$word")'" ;; esac
    line+=" $word"
  done
  echo "${line# }"
}

state() {  # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if there is no such queued resource
  local out
  if [ -n "$dry_run" ]; then
    run "${tpus[@]}" queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
  elif out=$("${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>&1); then
    echo "$out"
  else
    case $out in *NOT_FOUND* | *"not found"*) echo NONE ;; *) echo "$out" >&2; return 1 ;; esac
  fi
}

ssh_to() {  # ssh_to NODE WORKERS COMMAND
  run "${tpus[@]}" tpu-vm ssh "$1" "${where[@]}" --quiet "--worker=$2" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$3"
}

on_all() {  # a command on every worker of every slice at once; fails if one fails
  local node pid failed=0 pids=()
  for node in "${nodes[@]}"; do
    if [ -n "$dry_run" ]; then ssh_to "$node" all "$1"; else ssh_to "$node" all "$1" & pids+=($!); fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=$?; done
  return "$failed"
}

create() {
  local request=("${tpus[@]}" queued-resources create "$name" "${where[@]}" "--accelerator-type=$kind"
    "--runtime-version=${runtime:-$image}")
  if [ "$slices" -gt 1 ]; then request+=("--node-count=$slices" "--node-prefix=$name"); else request+=("--node-id=$name"); fi
  [ -z "$spot" ] || request+=(--spot)
  run "${request[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

wait_for_slices() {
  local now last=""
  if [ -n "$dry_run" ]; then state; return; fi
  while :; do
    now=$(state) || now=UNKNOWN  # a failed look is not an answer
    [ "$now" = "$last" ] || echo "$(date -u +%H:%M:%S) $name: $now"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED) echo "error: the request for $name failed. What gcloud says: ${tpus[*]} queued-resources describe $name ${where[*]}" >&2; return 70 ;;
      NONE | SUSPEND*) echo "error: $name went away. Delete it and create it again." >&2; return 69 ;;
    esac
    sleep "$poll"
  done
}

install() {
  local revision bundle node remote
  revision=$(git -C "$here/.." rev-parse HEAD)
  if [ -n "$(git -C "$here/.." status --porcelain --untracked-files=no)" ]; then
    echo "error: there are changes that are not committed, and the workers get the commit $revision. Commit or stash them." >&2
    [ -n "$dry_run" ] || exit 1
  fi
  # A bundle holds the history, so that a run records its revision, and needs no server that the workers can reach.
  bundle=${TMPDIR:-/tmp}/jaxvlm-$revision.bundle
  run git -C "$here/.." bundle create --quiet "$bundle" HEAD
  for node in "${nodes[@]}"; do
    run "${tpus[@]}" tpu-vm scp "$bundle" "$node:jaxvlm.bundle" "${where[@]}" --quiet --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}
  done
  remote="git init -q jaxvlm && cd jaxvlm && git fetch -q ../jaxvlm.bundle HEAD && git checkout -q -f --detach $revision"
  remote+=" && bash launch/install.sh $extras"
  [ -z "$setup" ] || remote+=" && { $setup; }"
  on_all "$remote"
}

job() {  # job.sh with these arguments on every worker; its directory is beside the clone
  local text
  text=$(printf '%q ' bash jaxvlm/launch/job.sh "$@")
  on_all "${text% }"
}

look() {  # what the job does on every worker, one line each
  local text="if [ -e jaxvlm ]; then bash jaxvlm/launch/job.sh --state ../jaxvlm-job; else echo none; fi"
  if [ -n "$dry_run" ]; then on_all "$text"; else on_all "$text" 2>/dev/null </dev/null; fi
}

join() {
  local states now unreachable=0
  if [ -n "$dry_run" ]; then look; return; fi
  while :; do
    now=$(state) || now=UNKNOWN
    case $now in
      ACTIVE | UNKNOWN) ;;
      *) echo "$(date -u +%H:%M:%S) $name: the slices are gone ($now)."; return 69 ;;
    esac
    if states=$(look); then
      unreachable=0
      verdict "$states" && return "$code"
    elif [ $((unreachable += 1)) -ge 10 ]; then
      echo "$(date -u +%H:%M:%S) $name: $now, but not all workers have answered ten times."
      return 69
    fi
    sleep "$poll"
  done
}

verdict() {  # the job's exit code from its workers' states in `code`; false while it goes on
  local bad
  bad=$(sed -n 's/^exit //p' <<<"$1" | grep -vx -e 0 -e 75 | head -n 1 || true)
  if [ -n "$bad" ]; then code=$bad
  elif grep -q '^running' <<<"$1"; then return 1
  elif grep -qx 'none' <<<"$1"; then echo "error: no job was started on some workers: $(tr '\n' ' ' <<<"$1")" >&2; code=1
  elif grep -qx -e 'exit 75' -e died <<<"$1"; then code=75
  elif [ "$(grep -cx 'exit 0' <<<"$1")" -lt "${#nodes[@]}" ]; then return 1  # an empty answer says nothing
  else code=0; fi
}

# shellcheck disable=SC2016  # for the workers to expand
ends='echo "== $(hostname)"; tail -n 40 jaxvlm-job/log'

case $command in
  create) create ;;
  wait) wait_for_slices ;;
  install) install ;;
  check) job --flags "$kind" --slices "$slices" --check -- "$@" ;;
  run) job --flags "$kind" --slices "$slices" --detach ../jaxvlm-job -- "$@" ;;
  logs) ssh_to "${nodes[$slice]}" "$worker" 'tail -n 200 -F jaxvlm-job/log' ;;
  tail) on_all "$ends" ;;
  state) state ;;
  status) state && look ;;
  join) join ;;
  stop) job --stop ../jaxvlm-job ;;
  delete) run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet ;;
esac

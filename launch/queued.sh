#!/usr/bin/env bash
# Trains on Cloud TPU VMs (v4 to v6e) that a queued resource provides.
#   launch/queued.sh --name NAME --zone ZONE --type TYPE [options] -- COMMAND
# Asks for the TPU, waits until it is there, sets every host up, and runs the same command on all of
# them, in the folder of the checkout. After a preemption, the same line asks again and goes on from
# the last checkpoint: --out must lie on a file system that outlives the hosts and that all of them
# mount (--setup does it).
#   --type TYPE       v4-32, v5litepod-16, v5p-32, v6e-16 ...
#   --project ID      of Google Cloud (default: gcloud's own)
#   --repository URL  the checkout that hosts clone
#   --setup LINE      runs on every host first, such as a mount
#   --spot            cheaper, and may be taken away
#   --dry-run         print the commands and do nothing
set -euo pipefail
name='' zone='' type='' project='' repository='' setup=':' spot='' dry=''
fail() {
  echo "launch/queued.sh: $1" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=1; continue ;;
    --spot) spot=1; continue ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || fail "$option needs a value"
  case $option in
    --name) name=$1 ;;
    --zone) zone=$1 ;;
    --type) type=$1 ;;
    --project) project=$1 ;;
    --repository) repository=$1 ;;
    --setup) setup=$1 ;;
    *) fail "unknown option $option; see the head of this file" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no command; give it after --"
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$repository" ]; then
  fail "--name, --zone, --type and --repository are needed"
fi
case $type in
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) fail "--type $type is not v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
where=(--zone "$zone")
[ -z "$project" ] || where+=(--project "$project")
run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "$1"
}
state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format 'value(state.state)' 2>/dev/null || true
}

found=''
if [ -z "$dry" ]; then
  found=$(state)
  case $found in
    FAILED | SUSPENDED) # preempted: it must go before its name is free
      gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
      found=''
      ;;
  esac
fi
if [ -z "$found" ]; then
  more=()
  [ -z "$spot" ] || more=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
    --accelerator-type "$type" --runtime-version "$runtime" "${more[@]}"
fi
if [ -z "$dry" ]; then
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED) fail "$name is $(state); run the same line again" ;;
    esac
    sleep 30
  done
fi
everywhere "$setup && { [ -d genret ] || git clone $(printf '%q' "$repository") genret; } && \
cd genret && python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' && \
.venv/bin/pip install -q --no-deps --no-build-isolation -e ."
# TPU VMs show no variables that tell of the others: JAX asks the metadata server.
everywhere "cd genret && . .venv/bin/activate && export JAX_NUM_PROCESSES=auto && \
exec $(printf '%q ' "$@")"

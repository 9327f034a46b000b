#!/usr/bin/env bash
# Trains on whatever cloud SkyPilot finds, as a managed job that is recovered after preemptions.
#   launch/sky.sh --name NAME --accelerators A --bucket URL [options] -- COMMAND
# The command is the same on every node; the bucket is mounted at /shared, for example
#   genret fit /shared/corpus --out /shared/run
#   --accelerators A  of a node, such as H100:8 or tpu-v6e-8
#   --nodes N         (default 1)
#   --on-demand       no spot machines
#   --dry-run         print the command and do nothing
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
name='' accelerators='' bucket='' nodes=1 spot=--use-spot dry=''
fail() {
  echo "launch/sky.sh: $1" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=1; continue ;;
    --on-demand) spot=--no-use-spot; continue ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || fail "$option needs a value"
  case $option in
    --name) name=$1 ;;
    --accelerators) accelerators=$1 ;;
    --bucket) bucket=$1 ;;
    --nodes) nodes=$1 ;;
    *) fail "unknown option $option; see the head of this file" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no command; give it after --"
if [ -z "$name" ] || [ -z "$accelerators" ] || [ -z "$bucket" ]; then
  fail "--name, --accelerators and --bucket are needed"
fi
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes $nodes is not a whole number above 0"
line=(sky jobs launch --yes --name "$name" --num-nodes "$nodes" --gpus "$accelerators" "$spot"
  --env "COMMAND=$(printf '%q ' "$@")" --env "BUCKET=$bucket" "$folder/sky.yaml")
if [ -n "$dry" ]; then
  printf '%q ' "${line[@]}"
  echo
else
  exec "${line[@]}"
fi

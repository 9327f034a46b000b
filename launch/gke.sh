#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, by JobSet (and Kueue, where a queue is named) or by xpk.
#   launch/gke.sh --name NAME --image IMAGE --accelerator A --topology T [options] -- COMMAND
# The command is the same on every host, for example
#   genret fit /shared/corpus --out /shared/run
# /shared is the claim's volume, which must be one that many nodes may write (Filestore, Lustre).
#   --accelerator A   tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology T      chips of a slice, such as 4x4 or 2x2x4
#   --chips N         of a host (default 4)
#   --slices N        (default 1)
#   --claim NAME      PersistentVolumeClaim with corpus and runs (default genret)
#   --queue NAME      LocalQueue of Kueue
#   --restarts N      after failures and preemptions (default 100)
#   --xpk CLUSTER     let xpk make the JobSet; --accelerator is then a type such as v5litepod-16,
#                     and volumes are those that the cluster was given by xpk storage
#   --dry-run         print the manifest, or the xpk command, and do nothing
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
name='' image='' accelerator='' topology='' queue='' xpk='' dry=''
chips=4 slices=1 claim=genret restarts=100
fail() {
  echo "launch/gke.sh: $1" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  option=$1
  shift
  case $option in
    --dry-run) dry=1; continue ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || fail "$option needs a value"
  case $option in
    --name) name=$1 ;;
    --image) image=$1 ;;
    --accelerator) accelerator=$1 ;;
    --topology) topology=$1 ;;
    --chips) chips=$1 ;;
    --slices) slices=$1 ;;
    --claim) claim=$1 ;;
    --queue) queue=$1 ;;
    --restarts) restarts=$1 ;;
    --xpk) xpk=$1 ;;
    *) fail "unknown option $option; see the head of this file" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no command; give it after --"
if [ -z "$name" ] || [ -z "$image" ] || [ -z "$accelerator" ]; then
  fail "--name, --image and --accelerator are needed"
fi
for number in "$chips" "$slices" "$restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "$number is not a whole number"
done

if [ -n "$xpk" ]; then
  line=(xpk workload create --cluster "$xpk" --workload "$name" --tpu-type "$accelerator"
    --num-slices "$slices" --docker-image "$image" --max-restarts "$restarts"
    --command "exec $(printf '%q ' "$@")")
  if [ -n "$dry" ]; then
    printf '%q ' "${line[@]}"
    echo
    exit
  fi
  exec "${line[@]}"
fi

[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology '$topology' is not like 4x4 or 2x2x4"
in_slice=$((${topology//x/*}))
if [ "$chips" -lt 1 ] || [ $((in_slice % chips)) -ne 0 ]; then
  fail "a slice of $in_slice chips has no hosts of $chips; give --chips"
fi

# JSON is YAML: strings and lists are written as JSON, whatever is in them.
quoted() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//$'\t'/\\t}"
}
listed() {
  local part separator=''
  printf '['
  for part in "$@"; do
    printf '%s' "$separator"
    quoted "$part"
    separator=', '
  done
  printf ']'
}
labels='{}'
[ -z "$queue" ] || labels="{kueue.x-k8s.io/queue-name: $(quoted "$queue")}"
manifest=$(<"$folder/gke-jobset.yaml")
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$(quoted "$name")"
fill LABELS "$labels"
fill RESTARTS "$restarts"
fill SLICES "$slices"
fill HOSTS "$((in_slice / chips))"
fill ACCELERATOR "$(quoted "$accelerator")"
fill TOPOLOGY "$(quoted "$topology")"
fill IMAGE "$(quoted "$image")"
fill CHIPS "$chips"
fill CLAIM "$(quoted "$claim")"
fill COMMAND "$(listed "$@")"
if [ -n "$dry" ]; then
  printf '%s\n' "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi

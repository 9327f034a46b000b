#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster, one process a GPU, which is what JAX expects there.
#   launch/slurm.sh --name NAME --nodes N --gpus G [options] -- COMMAND
# The command is the same for every process, for example
#   genret fit /home/me/corpus --out /home/me/run
# with both on a file system that the nodes share. Slurm sends SIGTERM before the time is over, or
# when it preempts the job; a checkpoint is written, and the job is queued again.
#   --gpus G          of a node
#   --time T          of one session (default 24:00:00)
#   --cpus N          of a process (default 8)
#   --partition P     of the cluster
#   --account A       to charge
#   --dry-run         print the batch script and do nothing
set -euo pipefail
name='' nodes='' gpus='' time=24:00:00 cpus=8 partition='' account='' dry=''
fail() {
  echo "launch/slurm.sh: $1" >&2
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
    --nodes) nodes=$1 ;;
    --gpus) gpus=$1 ;;
    --time) time=$1 ;;
    --cpus) cpus=$1 ;;
    --partition) partition=$1 ;;
    --account) account=$1 ;;
    *) fail "unknown option $option; see the head of this file" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "no command; give it after --"
[ -n "$name" ] || fail "--name, --nodes and --gpus are needed"
for number in "$nodes" "$gpus" "$cpus"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "'$number' is not a whole number above 0"
done

script() {
  cat <<HEAD
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
HEAD
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  [ -z "$account" ] || echo "#SBATCH --account=$account"
  echo 'set -uo pipefail'
  echo "srun --kill-on-bad-exit=1 $(printf '%q ' "$@")"
  cat <<'TAIL'
code=$?
# 143: stopped by SIGTERM with its checkpoint written.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
TAIL
}
if [ -n "$dry" ]; then
  script "$@"
else
  script "$@" | sbatch
fi

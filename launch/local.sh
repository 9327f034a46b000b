#!/usr/bin/env bash
# Trains on this machine with whatever devices JAX finds, and keeps the log beside the run.
#   launch/local.sh CORPUS RUN [options of genret fit]
# Started again after an interruption, it goes on from the last checkpoint.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/local.sh CORPUS RUN [options of genret fit]" >&2
  exit 2
fi
corpus=$1 run=$2
shift 2
mkdir -p "$(dirname "$run")"
genret fit "$corpus" --out "$run" "$@" 2>&1 | tee -ia "$run.log"

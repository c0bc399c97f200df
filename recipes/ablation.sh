#!/bin/sh
# What matters when an AR model becomes a BD3LM, one factor at a time; about an hour on two quiet cores, no network. It
# goes on where it was stopped. For a trial: recipes/ablation.sh --sets sums --arms base,all --seeds 1 --steps 50 \
#     --output runs/trial --table runs/trial.md
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
exec "${PYTHON:-python}" -m recipes.ablation "$@"

#!/bin/bash
# A sweep over models, learning rates and decays: one job array, each element a run of its own. Run it where you would run sbatch:
#
#   LRS="1e-5 3e-5 1e-4" DECAYS="0.1" MODELS="ViT-B-32" slurm/sweep.sh --csv data.csv --lmdb images.lmdb --pretrained openai
#
# AT_ONCE limits how many run at the same time; SBATCH_FLAGS go to sbatch. The runs lie below CLIPJOB_RUN [./clipjob-<array job>].
set -euo pipefail
: "${LRS:=3e-6 1e-5 3e-5}" "${DECAYS:=0.1}" "${MODELS:=ViT-B-32}" "${AT_ONCE:=0}" "${SBATCH_FLAGS:=}"

SWEEP=""
for model in $MODELS; do
    for lr in $LRS; do
        for decay in $DECAYS; do SWEEP+="$model $lr $decay"$'\n'; done
    done
done
SWEEP=${SWEEP%$'\n'}
export SWEEP
count=$(printf '%s\n' "$SWEEP" | wc -l)
limit=""
[ "$AT_ONCE" = 0 ] || limit="%$AT_ONCE"
read -ra flags <<< "$SBATCH_FLAGS"
exec sbatch --array="0-$((count - 1))$limit" --output="%x-%A_%a.log" "${flags[@]}" "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"

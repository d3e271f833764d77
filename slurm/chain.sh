#!/bin/bash
# For sites where jobs can't be requeued: several jobs in a row go on with one run, and those after its end do nothing.
#
#   JOBS=5 slurm/chain.sh --csv data.csv --lmdb images.lmdb --pretrained openai
#
# SBATCH_FLAGS go to sbatch. The run is CLIPJOB_RUN [clipjob-chain-<time> here].
set -euo pipefail
: "${JOBS:=3}" "${SBATCH_FLAGS:=}" "${CLIPJOB_RUN:=$PWD/clipjob-chain-$(date +%Y%m%d-%H%M%S)}"
export CLIPJOB_RUN MAX_REQUEUES=0
read -ra flags <<< "$SBATCH_FLAGS"
before=()
for ((number = 1; number <= JOBS; number++)); do
    job=$(sbatch --parsable --no-requeue "${before[@]}" "${flags[@]}" "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@")
    echo "job $number of $JOBS: $job"
    before=(--dependency="afterany:${job%%;*}")
done
echo "run: $CLIPJOB_RUN"

#!/bin/bash
# One run of clipjob under Slurm, on one GPU or many nodes. Submit it from anywhere; nothing in it needs editing.
#
#   sbatch slurm/train.sh                                                       the demo
#   sbatch slurm/train.sh --csv data.csv --lmdb images.lmdb --pretrained openai      your data, one GPU
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 slurm/train.sh …     eight GPUs: one task for each
#
# It is requeued after a signal, and after a crash if the run got on since; never when starting again can't help. docs/slurm.md
#
# Environment, all optional:
#   CLIPJOB_<SETTING>    any setting of clipjob; CLIPJOB_RUN is the run [clipjob-<job> in the folder of sbatch]
#   CLIPJOB              the command, such as "/opt/venv/bin/clipjob"      [clipjob]
#   CONTAINER_RUNTIME    none, pyxis, apptainer or podman                  [none]
#   IMAGE, MOUNTS        the container's image, and folders it needs: /a:/a,/b:/b  [the folder of sbatch]
#   MAX_REQUEUES         how often it may be requeued; 0: never            [100]
#
#SBATCH --job-name=clipjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
#SBATCH --output=%x-%j.log

set -u
: "${CLIPJOB:=clipjob}" "${CONTAINER_RUNTIME:=none}" "${IMAGE:=}" "${MOUNTS:=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR}" "${MAX_REQUEUES:=100}"
: "${CLIPJOB_RUN:=$SLURM_SUBMIT_DIR/clipjob-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}" "${CLIPJOB_DEVICE:=cuda}"

# An element of slurm/sweep.sh: its own settings, its own run.
if [ -n "${SWEEP:-}" ]; then
    element=$(printf '%s\n' "$SWEEP" | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
    IFS=' ' read -r CLIPJOB_MODEL CLIPJOB_LR CLIPJOB_WEIGHT_DECAY <<< "$element"
    CLIPJOB_RUN="$CLIPJOB_RUN/${CLIPJOB_MODEL//\//-}-lr$CLIPJOB_LR-wd$CLIPJOB_WEIGHT_DECAY"
    export CLIPJOB_MODEL CLIPJOB_LR CLIPJOB_WEIGHT_DECAY
fi
export CLIPJOB_RUN CLIPJOB_DEVICE
arguments=("$@")

case "${1:-}" in
    "") if [ -n "${CLIPJOB_CSV:-}${CLIPJOB_CONFIG:-}" ]; then set -- train; else set -- demo; fi ;;
    -*) set -- train "$@" ;;
esac

# Since Slurm 22.05 srun asks for one core per task, whatever sbatch was told.
launch=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
inside=()
case "$CONTAINER_RUNTIME" in
    none) ;;
    pyxis) launch+=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --no-container-mount-home) ;;
    apptainer) inside=(apptainer exec --nv --bind "$MOUNTS" "$IMAGE") ;;
    podman)
        inside=(podman run --rm --network=host --env-host --device nvidia.com/gpu=all --entrypoint "")
        IFS=, read -ra folders <<< "$MOUNTS"
        for folder in "${folders[@]}"; do inside+=(--volume "$folder"); done
        inside+=("$IMAGE")
        ;;
    *) echo "train.sh: CONTAINER_RUNTIME must be none, pyxis, apptainer or podman; found $CONTAINER_RUNTIME" >&2; exit 2 ;;
esac
read -ra command <<< "$CLIPJOB"

# "complete", the name of the newest checkpoint, or "none". Steps of one job share its resources only if told to.
progress() {
    "${launch[@]}" --overlap --nodes=1 --ntasks=1 "${inside[@]}" "${command[@]}" inspect --progress "$CLIPJOB_RUN" 2>/dev/null ||
        echo unknown
}

before=$(mktemp)
progress > "$before" & # beside the start of the job, which saves nothing before it has imported torch

# bash loses one of two traps that come close together, so there is only this one. TERM: preemption is over its grace, or a person
# said scancel; both are for Slurm to decide, and a requeue by us would undo the scancel.
term=""
trap 'term=yes' TERM
"${launch[@]}" "${inside[@]}" "${command[@]}" "$@" &
step=$!
code=0
while kill -0 "$step" 2>/dev/null; do # a trap ends wait early
    wait "$step"
    code=$?
done

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo "train.sh: $1, but it was requeued ${SLURM_RESTART_COUNT:-0} times already (MAX_REQUEUES)" >&2
    elif [ "$(squeue --noheader --format=%T --jobs "$SLURM_JOB_ID" 2>/dev/null)" != RUNNING ]; then
        echo "train.sh: $1; Slurm is ending this job, so it is left to Slurm" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "train.sh: $1; requeued" >&2
        exec sleep 600 # leaving first would race with the requeue
    fi
    echo "train.sh: to go on: CLIPJOB_RUN=$CLIPJOB_RUN sbatch slurm/train.sh ${arguments[*]}" >&2
    exit "$code"
}

case "$code" in
    0) # a node that died leaves srun with 0 as well
        [ "$(progress)" = complete ] && exit 0
        code=70
        ;;
    # permanent: bad settings, bad data, superseded, no access, a contradiction
    2 | 65 | 76 | 77 | 78) exit "$code" ;;
esac
[ -n "$term" ] && exit "$code"
[ "$code" = 75 ] && requeue "saved at a signal"
after=$(progress)
[ "$after" != unknown ] && [ "$after" != "$(cat "$before")" ] && requeue "ended with $code, after progress"
echo "train.sh: ended with $code and without a new checkpoint, so it is not requeued" >&2
exit "$code"

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
#   CLIPJOB_<SETTING>    any setting of clipjob; CLIPJOB_RUN (or --run) is the run   [<job name>-<job> in the folder of sbatch]
#   CLIPJOB              the command, such as "/opt/venv/bin/clipjob"      [clipjob; else .venv/bin/clipjob of this project]
#   CONTAINER_RUNTIME    none, pyxis, apptainer or podman                  [none]
#   IMAGE, MOUNTS        the container's image, and folders it needs: /a:/a,/b:/b  [the folder of sbatch]
#   MAX_REQUEUES         how often it may be requeued; 0: never            [100]
#   METRICS_SD           a folder that Prometheus watches (file_sd): while the job runs, clipjob-<job>.json there says where    [none]
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
say() { echo "train.sh: $*" >&2; }

# An element of an array is named like this: its first element's number alone would mean all of them.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
of_job() { scontrol show job "$job" 2>/dev/null | sed -n "s|.*\b$1=||p"; }
script=$(of_job Command) # where it was submitted from: what runs is a copy
script=${script%%train.sh*}train.sh

: "${CONTAINER_RUNTIME:=none}" "${IMAGE:=}" "${MOUNTS:=$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR}" "${MAX_REQUEUES:=100}"
: "${CLIPJOB_DEVICE:=cuda}"
if [ -z "${CLIPJOB:-}" ]; then
    CLIPJOB=clipjob
    beside=$(dirname "$script")/../.venv/bin/clipjob
    [ "$CONTAINER_RUNTIME" != none ] || command -v clipjob > /dev/null || [ ! -x "$beside" ] || CLIPJOB=$beside
fi
read -ra command <<< "$CLIPJOB"

# The run is asked for its progress below, so it must be known here, however it is given.
arguments=()
submitted=("$@")
while [ $# -gt 0 ]; do
    case "$1" in
        --run) CLIPJOB_RUN=${2:-}; shift ;;
        --run=*) CLIPJOB_RUN=${1#--run=} ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
if [ -n "${SWEEP:-}" ]; then # an element of slurm/sweep.sh: its own settings, its own run
    element=$(printf '%s\n' "$SWEEP" | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
    IFS=' ' read -r CLIPJOB_MODEL CLIPJOB_LR CLIPJOB_WEIGHT_DECAY <<< "$element"
    CLIPJOB_RUN=${CLIPJOB_RUN:-$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID}
    CLIPJOB_RUN="$CLIPJOB_RUN/${CLIPJOB_MODEL//\//-}-lr$CLIPJOB_LR-wd$CLIPJOB_WEIGHT_DECAY"
    export CLIPJOB_MODEL CLIPJOB_LR CLIPJOB_WEIGHT_DECAY
fi
: "${CLIPJOB_RUN:=$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$job}"
export CLIPJOB_RUN CLIPJOB_DEVICE

targets=""
if [ -n "${METRICS_SD:-}" ]; then # rank 0 is on this node, which other jobs may share: the port is this job's own
    : "${CLIPJOB_METRICS_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
    export CLIPJOB_METRICS_PORT
    targets=$METRICS_SD/clipjob-$job.json
    labels=$(printf '{"job": "clipjob", "slurm_job": "%s", "slurm_job_name": "%s"}' "$job" "$SLURM_JOB_NAME")
    if ! echo "[{\"targets\": [\"$(hostname):$CLIPJOB_METRICS_PORT\"], \"labels\": $labels}]" > "$targets.part" ||
        ! mv "$targets.part" "$targets"; then
        say "METRICS_SD: $targets could not be written, so Prometheus does not hear of this job"
    fi
fi

case "${arguments[0]:-}" in
    "") if [ -n "${CLIPJOB_CSV:-}${CLIPJOB_CONFIG:-}" ]; then arguments=(train); else arguments=(demo); fi ;;
    -*) arguments=(train "${arguments[@]}") ;;
esac

# Since Slurm 22.05 srun asks for one core per task, whatever sbatch was told. Ranks that end early leave the others time to save.
launch=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0)
inside=()
case "$CONTAINER_RUNTIME" in
    none)
        if ! command -v "${command[0]}" > /dev/null; then
            say "there is no ${command[0]} on $(hostname). Set CLIPJOB to the command, or CONTAINER_RUNTIME and IMAGE."
            exit 2
        fi
        ;;
    pyxis) launch+=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --no-container-mount-home) ;;
    apptainer) inside=(apptainer exec --nv --bind "$MOUNTS" "$IMAGE") ;;
    podman)
        inside=(podman run --rm --network=host --env-host --device nvidia.com/gpu=all --entrypoint "")
        IFS=, read -ra folders <<< "$MOUNTS"
        for folder in "${folders[@]}"; do inside+=(--volume "$folder"); done
        inside+=("$IMAGE")
        ;;
    *)
        say "CONTAINER_RUNTIME must be none, pyxis, apptainer or podman; found $CONTAINER_RUNTIME"
        exit 2
        ;;
esac

# "complete", the name of the newest checkpoint, "none", or "unknown" while storage doesn't answer.
here=(timeout 300)
[ "$CONTAINER_RUNTIME" != pyxis ] || here+=("${launch[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME")
progress() { "${here[@]}" "${inside[@]}" "${command[@]}" inspect --progress "$CLIPJOB_RUN" 2>/dev/null || echo unknown; }

exec {before}< <(progress) # beside the start of the job, which saves nothing before it has imported torch

# bash loses one of two traps that come close together, so there is only this one. TERM: preemption is over its grace, or a person
# said scancel; both are for Slurm to decide, and a requeue by us would undo the scancel.
term=""
trap 'term=yes' TERM
"${launch[@]}" "${inside[@]}" "${command[@]}" "${arguments[@]}" &
step=$!
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done # the trap ends wait early
wait "$step"                                             # bash keeps the status of a child that has ended
code=$?
[ -z "$targets" ] || rm -f "$targets"

# Slurm sends TERM to every process of the job when it ends it, from a requeue on as well; these have to finish. An ignored signal is
# inherited.
unharmed() { (trap '' TERM && exec "$@"); }

state() { # empty: Slurm doesn't know the job any more, or doesn't answer
    for _ in 1 2 3; do
        unharmed squeue --noheader --format=%T --jobs "$job" 2>/dev/null && return
        sleep 1
    done
}

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        say "$1. It was requeued ${SLURM_RESTART_COUNT:-0} times, and MAX_REQUEUES is $MAX_REQUEUES"
    elif [ "$(state)" != RUNNING ]; then
        say "$1. Slurm is ending this job, so it is left to Slurm"
        exit "$code"
    elif unharmed scontrol requeue "$job"; then
        say "$1. Requeued"
        [ -z "${2:-}" ] || unharmed scontrol update "JobId=$job" "ExcNodeList=$2" || say "node $2 could not be excluded"
        exec sleep 600 # leaving first would race with the requeue
    fi
    give_up
}

give_up() {
    say "to go on: CLIPJOB_RUN=$(printf %q "$CLIPJOB_RUN") sbatch [flags as before] $script$([ ${#submitted[@]} = 0 ] || printf ' %q' "${submitted[@]}")"
    exit "$code"
}

case "$code" in
    0) # a node that died leaves srun with 0 as well
        [ "$(progress)" != complete ] || exit 0
        code=70
        ;;
    # permanent: bad settings, bad data, superseded, no access, a contradiction
    2 | 65 | 76 | 77 | 78) exit "$code" ;;
esac
[ -z "$term" ] || exit "$code"
# 138, 143: USR1 or TERM while Python itself was starting, as in a preemption with grace. There was nothing to save yet.
case "$code" in
    75) requeue "saved at a signal" ;;
    138 | 143) requeue "ended by a signal while it started" ;;
esac
if [ "$code" = 71 ] && [ "$SLURM_JOB_NUM_NODES" = 1 ]; then # this node can't do it: another may; not for ever
    excluded=$(of_job ExcNodeList)
    [ "$excluded" != "(null)" ] || excluded=""
    [ "$(scontrol show hostnames "$excluded" 2>/dev/null | wc -l)" -ge 3 ] ||
        requeue "this node can't do it, another may" "${excluded:+$excluded,}$SLURM_JOB_NODELIST"
fi
read -r -u "$before" was || was=unknown
now=$(progress)
[ "$was" = unknown ] || [ "$now" = unknown ] || [ "$now" = "$was" ] || requeue "ended with $code, after progress"
say "ended with $code and without a new checkpoint, so it is not requeued"
give_up

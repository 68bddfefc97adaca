# What the batch scripts beside this file share: one task a rank, signals handed on, and a job that is queued again until
# the training is done. They read it from the folder that the job starts in, which has to be the checkout.

SAVED=75 # the exit code of a run that was asked to stop, and has saved

# train RECIPE [SETTINGS]: run the recipe as this job's tasks, and leave with its exit code.
#
# Each task reads its place from Slurm's variables. The address of rank 0 is the step's first host; the port comes from
# the numbers of job and step (MASTER_PORT wins), so that jobs which share a node do not meet. MOE_SCALE_INTERFACE, set
# where sbatch is typed, names the network that gloo and NCCL use, as ib0.
#
# A job for several nodes is given whole nodes and no number of tasks: Slurm keeps that number when a node is lost, and a
# job of --nodes=1-4 could not go on with the three that are left. There is a task for each GPU of a node. A job's own
# --ntasks-per-node wins over that, and MOE_SCALE_RANKS_PER_NODE, set where sbatch is typed, over both.
train() {
    local recipe=$1 step code asked= ranks
    shift
    ranks=${MOE_SCALE_RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
    # Slurm hands the processors of a task to the script, and from version 22.05 no further.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # --resume comes first, so that a user's own wins.
    srun --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$ranks" python "$recipe" --resume auto "$@" &
    step=$!

    # Slurm signals this shell alone, before the limit (USR1) or when the job is preempted (TERM).
    trap 'asked=1; kill -USR1 "$step" 2>/dev/null' USR1 TERM

    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # a trapped signal ends the wait, not the step
        wait "$step"
        code=$?
    done

    if [ "$code" -eq "$SAVED" ] || { [ -n "$asked" ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; }; then
        echo "stopped with code $code: job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}

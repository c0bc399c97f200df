#!/bin/bash
# train.py on any number of nodes: sbatch --nodes 8 recipes/train.slurm.sh train.py FLAGS   (from the project's root)
# NPROC: processes a node (default: its GPUs). PYTHON: the interpreter, at the same path on all nodes.
#
# Five minutes before its time is up Slurm sends this shell SIGUSR1. srun passes it on to each node's torchrun, which
# passes it on to its ranks: they finish the step, save, and exit. The job then puts itself back into the queue, and
# --resume_from_checkpoint auto goes on from there. Preempted with some grace, the steps get SIGTERM, this shell not: the
# same happens, and the ranks tell by the file $STOPPED_FILE that they have not failed. Bereft of a node, or preempted at
# once, the job is requeued by Slurm. scancel ends this shell too, so a cancelled job stays so, and one that fails does.
#SBATCH --job-name=nanoa2d
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

warned='' job=''
export STOPPED_FILE=$PWD/.stopped-$SLURM_JOB_ID
rm -f "$STOPPED_FILE"
trap 'warned=yes; kill -USR1 "$job"' USR1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun by itself neither passes SIGUSR1 on nor leaves its ranks more than 30 s.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} \
    "${PYTHON:-python}" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc_per_node "${NPROC:-gpu}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
    --signals_to_handle SIGTERM,SIGINT,SIGUSR1 --shutdown_timeout 280 \
    "$1" --resume_from_checkpoint auto "${@:2}" &
job=$!
wait "$job"
status=$?
while kill -0 "$job" 2>/dev/null; do # a trap ends a wait
    wait "$job"
    status=$?
done
[ ! -e "$STOPPED_FILE" ] || { warned=yes && rm "$STOPPED_FILE"; }
[ -z "$warned" ] || [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"

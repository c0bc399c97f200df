#!/bin/sh
# Tiny-A2D's chat mixture, 2,048 rows a step: recipes/tiny-a2d.sh mdlm|bd3lm [FLAGS OF train.py]
#   NODES=8     submitted by sbatch (SBATCH_FLAGS: '--partition a100 --time 24:00:00', say), 8 GPUs a node; the default
#   NPROC=8     without Slurm, on so many GPUs of this machine
# The same command on fewer or more nodes goes on from the last checkpoint, with as many more or fewer micro-batches.
. "$(dirname "$0")/common.sh"
method "$@"
method=$1
shift
length=1024
[ "$method" != bd3lm ] || { length=512 && set -- --block_size 32 "$@"; }
gpus=${NPROC:-$((8 * ${NODES:-8}))}

set -- --objective "$method" --stage sft --parallel zero2 \
    --model_name_or_path "${MODEL:-.models/a2d/Qwen3-0.6B}" \
    --dataset_args "allenai/tulu-3-sft-mixture+HuggingFaceTB/smoltalk+OpenCoder-LLM/opc-sft-stage1[lang:python]+OpenCoder-LLM/opc-sft-stage2[lang:python]" \
    --max_length $length --num_train_epochs 10 --learning_rate 1e-4 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps $(((128 + gpus - 1) / gpus)) \
    --output_dir "${OUTPUT:-runs/tiny-a2d-$method}" --resume_from_checkpoint auto "$@"
[ -z "${NPROC:-}" ] || launch "$NPROC" "$@"
check "$@"
# shellcheck disable=SC2086
exec sbatch --nodes "${NODES:-8}" ${SBATCH_FLAGS:-} recipes/train.slurm.sh train.py "$@"

#!/bin/sh
# OpenWebText, streamed, on 8 GPUs of one node: recipes/openwebtext.sh mdlm|bd3lm [FLAGS OF train.py]
# NPROC: another number of processes; the rows of a step stay 128 where it divides 8.
. "$(dirname "$0")/common.sh"
method "$@"
method=$1
shift
[ "$method" != bd3lm ] || set -- --block_size 32 "$@"
gpus=${NPROC:-8}

launch "$gpus" \
    --objective "$method" --stage pt --parallel zero2 \
    --model_name_or_path "${MODEL:-.models/a2d/Qwen3-0.6B}" \
    --dataset_args dylanebert/openwebtext --text_field text --streaming True --insert_eos True --max_length 512 \
    --max_steps 20000 --learning_rate 1e-4 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps $(((8 + gpus - 1) / gpus)) --eval_strategy no \
    --output_dir "${OUTPUT:-runs/openwebtext-$method}" --resume_from_checkpoint auto "$@"

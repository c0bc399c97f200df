#!/bin/sh
# Tiny Shakespeare on one GPU (NPROC for more): recipes/shakespeare.sh mdlm|bd3lm [FLAGS OF train.py]
. "$(dirname "$0")/common.sh"
method "$@"
method=$1
shift
[ "$method" != bd3lm ] || set -- --block_size 32 "$@"

launch "${NPROC:-1}" \
    --objective "$method" --stage pt \
    --model_name_or_path "${MODEL:-.models/a2d/Qwen3-0.6B}" \
    --dataset_args Trelis/tiny-shakespeare --text_field Text --insert_eos False --max_length 128 \
    --num_train_epochs 10 --learning_rate 1e-4 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 \
    --output_dir "${OUTPUT:-runs/shakespeare-$method}" --resume_from_checkpoint auto "$@"

#!/bin/sh
# The whole path on two CPU cores in under ten minutes, without a GPU or a network: a small AR model is trained on
# generated questions (builtin/sums), then on conversations of four of them (builtin/chats), converted, trained on as
# MDLM and as BD3LM, sampled, and scored on unseen questions, alone and as the last of a conversation.
# Each training ends after its --max_minutes, on a fast machine earlier, after its --max_steps.
set -e
case ${1-} in
'') ;;
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
*) echo "quickstart.sh: $1: expected no argument; RUNS=DIR names where it writes" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/quickstart}

run() {
    printf '\n$ %s' "$PYTHON"
    for word in "$@"; do case $word in *[!A-Za-z0-9_./:=+-]*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done
    printf '\n'
    "$PYTHON" "$@"
}

train() {
    run train.py --stage sft --per_device_eval_batch_size 250 --optim muon --adam_beta2 0.95 --eval_steps 0.5 \
        --eval_rows 250 --save_steps 0 --logging_steps 100 --overwrite "$@"
}

chats() { # as many questions a step as of builtin/sums, in a quarter of the rows
    train --train_on all --max_length 128 --per_device_train_batch_size 8 "$@"
}

score() {
    name=$1 rows=$2
    shift 2
    run sample.py --model_name_or_path "$RUNS/$name/checkpoint-final" --dataset_args "builtin/$rows" \
        --max_new_tokens 8 --batch_size 125 --min_exact_match 60 "$@"
}

# Single questions of like length are of one task, and so would be a batch of them
train --model_name_or_path builtin/tiny --objective ar --dataset_args 'builtin/sums[train:25000]' \
    --group_by_length False --max_length 64 --per_device_train_batch_size 32 --learning_rate 1.5e-2 --max_steps 1400 \
    --max_minutes 2.1 --output_dir "$RUNS/ar-sums"
chats --model_name_or_path "$RUNS/ar-sums/checkpoint-final" --objective ar --dataset_args 'builtin/chats[train:3000]' \
    --learning_rate 5e-3 --max_steps 400 --max_minutes 0.65 --output_dir "$RUNS/ar"
run convert.py --model_name_or_path "$RUNS/ar/checkpoint-final" --output_dir "$RUNS/a2d" --overwrite
chats --model_name_or_path "$RUNS/a2d" --objective mdlm --dataset_args 'builtin/chats[train:5000]' \
    --right_shift_logits True --loss_weight_type uniform --learning_rate 5e-3 --max_steps 1500 --max_minutes 1.3 \
    --output_dir "$RUNS/mdlm"
# With causal context it is an AR model as well, which verifies its own drafts
chats --model_name_or_path "$RUNS/a2d" --objective bd3lm --block_size 8 --context causal --right_shift_logits True \
    --dataset_args 'builtin/chats[train:5000]+builtin/repeats[train:1500]' --loss_weight_type uniform \
    --learning_rate 5e-3 --max_steps 1000 --max_minutes 1.4 --output_dir "$RUNS/bd3lm"

for name in mdlm bd3lm; do
    run sample.py --model_name_or_path "$RUNS/$name/checkpoint-final" --max_new_tokens 8 --steps 8 --show \
        'What is 47 + 38?' 'Reverse the word PLANET.'
done
score ar 'sums[test:500]'
score mdlm 'sums[test:500]' --steps 8 --block_size 8
score mdlm 'sums[test:500]' --threshold 0.9 --block_size 8
score bd3lm 'sums[test:500]' --steps 8
score bd3lm 'sums[test:500]' --threshold 0.9
score bd3lm 'sums[test:500]' --speculate 8
# Answers of 24 tokens, which are not all right after so little training: what counts is how many forwards they take
for how in '--objective ar' '--speculate 8' '--threshold 0.9'; do
    score bd3lm 'repeats[test:125]' --max_new_tokens 28 --min_exact_match 0 $how
done
for name in mdlm bd3lm; do
    score "$name" 'chats[test:250]'
done

printf '\nYours to ask (add --show to watch it think), and to talk to:\n\n'
printf "  %s sample.py --model_name_or_path %s/mdlm/checkpoint-final --max_new_tokens 8 --threshold 0.9 'What is 12 + 34?'\n" \
    "$PYTHON" "$RUNS"
printf '  %s chat.py --model_name_or_path %s/mdlm/checkpoint-final\n' "$PYTHON" "$RUNS"

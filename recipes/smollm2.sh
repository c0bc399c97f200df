#!/bin/sh
# A real model on a laptop: SmolLM2-135M-Instruct becomes a block-diffusion model that still is an AR model, in half an
# hour on two CPU cores (needs 6 GB of memory), in minutes on a GPU. It converts the model, shows what that answers
# before training, trains it on instructions, shows what it answers now, and measures it. Started again, it goes on.
#
#   BASE=Qwen/Qwen3-0.6B        another model (default: HuggingFaceTB/SmolLM2-135M-Instruct)
#   DATA=SPEC                   another chat data set of train.py (default: tatsu-lab/alpaca)
#   MINUTES=100                 of training (default: 20, on a GPU 5); more for a finished run trains it on
#   ROWS=4                      of 512 tokens a step (default: 1, on a GPU 16)
#   QUESTIONS=50                held-out chats that the figures rest on (default: 16)
#   RUNS=DIR                    where it writes (default: runs/smollm2, of another BASE a directory in it)
#   PYTHON=PYTHON               the interpreter
set -e
case ${1-} in
'') ;;
-h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
*) echo "smollm2.sh: $1: expected no argument; recipes/smollm2.sh --help has the variables" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/smollm2${BASE:+/$(basename "$BASE")}}
BASE=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=${DATA:-tatsu-lab/alpaca}
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=1; else gpu=; fi
MINUTES=${MINUTES:-${gpu:+5}} MINUTES=${MINUTES:-20}
ROWS=${ROWS:-${gpu:+16}} ROWS=${ROWS:-1}
QUESTIONS=${QUESTIONS:-16}

say() {
    printf '\n# %s\n' "$*"
}

run() {
    printf '\n$ %s' "$PYTHON"
    for word in "$@"; do case $word in *[!A-Za-z0-9_./:=,+-]*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done
    printf '\n'
    "$PYTHON" "$@" || ended $?
}

ended() { # a status; the system kills what takes the last memory, and 137 is all that is left of it
    [ "$1" != 137 ] || echo "smollm2.sh: killed, perhaps for want of memory: SmolLM2-135M needs 6 GB, a larger BASE more" >&2
    exit "$1"
}

answers() { # MODEL FLAGS...; in float32: in bfloat16 rounding decides between tokens that are about as likely
    model=$1
    shift
    run sample.py --model_name_or_path "$model" --dtype float32 --max_new_tokens 64 "$@" 'What is the capital of France?' \
        'Why is the sky blue?' 'Give three tips for staying healthy.' 'Write a short story about a robot who paints.'
}

train() {
    run train.py --model_name_or_path "$RUNS/a2d" --objective bd3lm --stage sft --dataset_args "$DATA" --packing \
        --max_length 512 --per_device_train_batch_size "$ROWS" --per_device_eval_batch_size 4 \
        --block_size 1:0.1,2:0.2,4:0.3,8:0.4 --ar_weight 0.3 --loss_weight_type uniform --learning_rate 2e-4 \
        --adam_beta2 0.95 "$@"
}

if [ ! -d "$RUNS/a2d" ]; then
    run convert.py --model_name_or_path "$BASE" --output_dir "$RUNS/a2d" --objective bd3lm --block_size 8 \
        --context causal --right_shift_logits True
fi

say 'Before training: its AR side is the untouched model, its diffusion side knows nothing'
begun=$(date +%s)
answers "$RUNS/a2d" --objective ar
answers "$RUNS/a2d" --threshold 0.9
answering=$(($(date +%s) - begun))

if [ ! -d "$RUNS/run/checkpoint-final" ]; then
    say 'Three steps, to see how fast this machine is'
    train --max_steps 3 --eval_rows 1 --save_steps 0 --logging_steps 1 --output_dir "$RUNS/probe" --overwrite
    "$PYTHON" - "$RUNS/probe" "$MINUTES" "$answering" "$QUESTIONS" <<'END'
import sys
from pathlib import Path
from log import past_rows
*_, speed = (row["tokens_per_second"] for row in past_rows(Path(sys.argv[1])) if "tokens_per_second" in row)
minutes, answering, questions = float(sys.argv[2]), float(sys.argv[3]) / 60, int(sys.argv[4])
print(f"\n# {speed:.0f} tokens a second: {speed * 60 * minutes / 1e6:.2f} M tokens in {minutes:g} minutes of training. "
      f"With evaluations, answers and figures all of it takes about {1 + 1.05 * minutes + (4 + questions) * answering:.0f} minutes.")
END
    rm -r "$RUNS/probe"
fi
train --max_minutes "$MINUTES" --num_train_epochs 1000 --eval_steps 0.2 --eval_rows 12 --save_steps 0.25 \
    --save_total_limit 1 --logging_steps 20 --sample_prompt 'What is the capital of France?' \
    --resume_from_checkpoint auto --output_dir "$RUNS/run"

say 'After training: as AR, by drafts that the AR side verifies, by diffusion alone'
answers "$RUNS/run/checkpoint-final" --objective ar
answers "$RUNS/run/checkpoint-final" --speculate 4
answers "$RUNS/run/checkpoint-final" --threshold 0.9

say 'Measured on chats that it has not seen'
run -m recipes.smollm2 --before "$RUNS/a2d" --runs "$RUNS/run" --questions "$QUESTIONS" --table "$RUNS/figures.md"

printf '\nThe curves: %s/run/curves.png, and what it answered on the way: %s/run/curves.html. To talk to it:\n\n' "$RUNS" "$RUNS"
printf '  %s chat.py --model_name_or_path %s/run/checkpoint-final --speculate 4\n' "$PYTHON" "$RUNS"

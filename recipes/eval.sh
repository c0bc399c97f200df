#!/bin/sh
# One checkpoint's row of the table: eight tasks (the two about code for --model_type coder), each in the reference's
# setting and in one common to all rows. Every cell is one command of evaluate.py, with its manifest beside the result.
#
#   recipes/eval.sh --model_name_or_path CHECKPOINT [--num_gpu N] [--model_type normal|coder] [--method ar|mdlm|bd3lm]
#                   [--setting reference|common|both] [--output_dir DIR] [-- FLAGS OF evaluate.py, such as --limit 8]
#
# reference: dLLM's: 256 new tokens (3 for a letter), a token a step, blocks of 256 (mdlm) or, bd3lm, the checkpoint's, else 32,
# gsm8k_cot 5-shot (mdlm) or 0-shot (bd3lm), bbh 3-shot, the rest 0-shot; chat template. AR: mdlm's shots.
# common: the same for every model but for gsm8k_cot, which is 0-shot.
# open-dcoder: its own right shift, its rule p2, temperature 0.
set -eu
case ${1-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
model='' num_gpu=1 model_type=normal method='' setting=both output=runs/eval

while [ $# -gt 0 ]; do
    [ "$1" = -- ] || [ $# -gt 1 ] || { echo "eval.sh: $1 needs a value" >&2 && exit 2; }
    case $1 in
    --model_name_or_path) model=$2 ;;
    --num_gpu) num_gpu=$2 ;;
    --model_type) model_type=$2 ;;
    --method) method=$2 ;;
    --setting) setting=$2 ;;
    --output_dir) output=$2 ;;
    --) shift && break ;;
    *) echo "eval.sh: unknown flag $1; its first lines tell which there are" >&2 && exit 2 ;;
    esac
    shift 2
done
[ -n "$model" ] || { echo 'eval.sh: --model_name_or_path is missing' >&2 && exit 2; }
case $model_type in normal | coder) ;; *) echo "eval.sh: --model_type $model_type: expected normal or coder" >&2 && exit 2 ;; esac
case $setting in
both) settings='reference common' ;;
reference | common) settings=$setting ;;
*) echo "eval.sh: --setting $setting: expected reference, common or both" >&2 && exit 2 ;;
esac
# The method, if none is given, and the block length are what the checkpoint declares or is known as.
ask='import sys; from checkpoint import identify, load_config; from cli import one_line_errors
with one_line_errors("eval.sh"):
    try:
        config = load_config(sys.argv[1])
        print(sys.argv[2] or identify(config)[0], config.block_length or 32)
    except ValueError as error:
        raise ValueError(str(error).replace("--objective", "--method")) from error'
known=$("$PYTHON" -c "$ask" "$model" "$method")
method=${known% *} block=${known#* }

cell() { # TASK SHOTS TOKENS FLAGS...
    task=$1 shots=$2 tokens=$3
    shift 3
    args=pretrained=$model,max_new_tokens=$tokens
    case $method in
    ar) ;;
    mdlm) args=$args,steps=256,block_size=256,cfg_scale=0.0,temperature=0.0 ;;
    bd3lm) args=$args,steps=256,block_size=$block,cfg_scale=0.0,temperature=0.0 ;;
    *) echo "eval.sh: --method $method: expected ar, mdlm or bd3lm" >&2 && exit 2 ;;
    esac
    case $model in *open-dcoder*) args=$args,right_shift_logits=True,remasking=p2 ;; esac
    launch=$PYTHON
    [ "$num_gpu" -le 1 ] || launch="$PYTHON -m torch.distributed.run --standalone --nproc_per_node $num_gpu"
    # shellcheck disable=SC2086
    (set -x && $launch evaluate.py --model "a2d_$method" --model_args "$args" --tasks "$task" --num_fewshot "$shots" \
        --apply_chat_template --batch_size auto --output_path "$output/$cells/$task" --log_samples "$@")
}

for cells in $settings; do
    cot_shots=5
    [ "$method" != bd3lm ] || cot_shots=0
    [ "$cells" = reference ] || cot_shots=0
    if [ "$model_type" = normal ]; then
        cell mmlu_generative_dream 0 3 "$@"
        cell mmlu_pro 0 256 "$@"
        cell hellaswag_gen 0 3 "$@"
        cell gsm8k_cot $cot_shots 256 "$@"
        cell bbh 3 256 "$@"
        cell minerva_math 0 256 "$@"
    fi
    cell humaneval_instruct_sandboxed 0 256 --confirm_run_unsafe_code "$@"
    cell mbpp_instruct_sandboxed 0 256 --confirm_run_unsafe_code "$@"
done

for cells in $settings; do
    printf '\n%s setting, all rows in %s\n\n' "$cells" "$output/$cells"
    "$PYTHON" evaluate.py --table "$output/$cells"
done

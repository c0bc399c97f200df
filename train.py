"""Trains a language model as ar, mdlm or bd3lm, on plain text or chat. `python train.py --help` is the manual.

Read `train` at the end first: model, data, optimizers, then the loop. What an example and its loss are is in
diffusion.py, what a batch is in data.py.
"""

import argparse
import functools
import itertools
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import data
from checkpoint import DTYPES, OBJECTIVES, declare, load_model, resolve, save_model
from cli import Parser, boolean, one_line_errors, switch
from diffusion import Batch, Example, ar_example, bd3lm_example, draw_noise, loss, mdlm_example, with_complement
from model import Config, LanguageModel
from tokenizer import Tokenizer

TINY = "builtin/tiny"
METRICS = "metrics.jsonl"
EVALUATION_SEED = 0  # of the evaluation's noise: the same in every run

# What a flag is when it is not given, for those that belong to one stage or to noise; given elsewhere it is an error.
STAGE_DEFAULTS = {
    "pt": {"text_field": "text", "insert_eos": True, "drop_tail": True},
    "sft": {"truncation": "right", "mask_prompt_loss": True, "group_by_length": True},
}
NOISE_DEFAULTS = {
    "loss_weight_type": None,  # scheduler for levels, count for counts
    "noise_type": "level",
    "level_per": "block",
    "scheduler": "linear",
    "time_epsilon": 1e-3,
    "time_max": 1.0,
    "at_least_one": False,
    "complementary_masks": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def arguments() -> Parser:
    parser = Parser(
        "train.py",
        """\
Train a causal, masked-diffusion (MDLM) or block-diffusion (BD3LM) language model.

  python convert.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir .models/a2d/Qwen3-0.6B
  python train.py --objective mdlm --stage pt --model_name_or_path .models/a2d/Qwen3-0.6B \\
      --dataset_args Trelis/tiny-shakespeare --text_field Text --insert_eos False --output_dir runs/shakespeare

Writes OUTPUT_DIR/checkpoint-N and checkpoint-final (Hugging Face directories: model and tokenizer), metrics.jsonl (one
line a log, one an evaluation) and args.json. Flags bear dLLM's names and defaults where it has them.""",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model_name_or_path",
        required=True,
        help=f"a directory (also under $BASE_MODELS_DIR) or a Hub id, converted by convert.py for mdlm and bd3lm; or "
        f"{TINY}: random weights in a small Qwen3 shape, with a tokenizer trained on the data",
    )
    add(
        "--objective", choices=OBJECTIVES, help="what to train it as (default: what the checkpoint declares, else mdlm)"
    )
    add("--block_size", type=int, metavar="TOKENS", help="bd3lm's block length (default: the checkpoint's)")
    add(
        "--right_shift_logits",
        type=boolean,
        metavar="True|False",
        help="position i predicts token i + 1, as in the AR model (default: what the checkpoint declares, else False)",
    )
    add("--output_dir", required=True, help="directory of this run; one that holds a run is refused")
    switch(add, "--overwrite", False, "replace the run in --output_dir")
    add("--save_dtype", choices=list(DTYPES)[:3], help="of the saved weights (default: that of the source)")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset_args",
        required=True,
        help='data set, name[key:value,...], several joined by "+": Hub ids, local files, builtin/sums (chat), '
        "builtin/stdlib (text). Keys: train:5000 (row limit of a split), name:CONFIG, lang:LANGUAGE",
    )
    add("--stage", choices=["pt", "sft"], default="pt", help="pt: plain text in full pieces. sft: chat")
    add("--max_length", type=int, metavar="TOKENS", help="longest row (default: pt 128, sft 512)")
    add("--text_field", help="pt: the column with the text (default: text)")
    add("--insert_eos", type=boolean, metavar="True|False", help="pt: end each text in EOS (default: True)")
    add("--drop_tail", type=boolean, metavar="True|False", help="pt: drop the last, shorter piece (default: True)")
    add("--truncation", choices=["right", "filter"], help="sft: cut rows that are too long, or drop (default: right)")
    add(
        "--mask_prompt_loss",
        type=boolean,
        metavar="True|False",
        help="sft: learn the last assistant turn only, not the prompt (default: True)",
    )
    add(
        "--group_by_length",
        type=boolean,
        metavar="True|False",
        help="sft: rows of like length share a batch (default: True)",
    )
    add(
        "--pad_to",
        type=int,
        metavar="TOKENS",
        help="pad every batch to this length, at least max_length (default: to the global batch's longest row). Where "
        "mdlm learns chat, padding is visible and learnt, as it teaches where an answer ends inside a canvas",
    )
    add("--num_proc", type=int, default=8, metavar="N", help="processes that tokenise what is not builtin")

    add = parser.add_argument_group("noise and loss (mdlm and bd3lm, but for the last)").add_argument
    add(
        "--loss_weight_type",
        choices=["scheduler", "uniform", "count"],
        help="weight of a masked token: scheduler, -alpha'(t)/(1 - alpha(t)), 1/t for linear, the likelihood bound; "
        "uniform, 1, better at small budgets; count, m/n (default: scheduler; with --noise_type count: count)",
    )
    add(
        "--noise_type",
        choices=["level", "count"],
        help="level: mask each token with probability 1 - alpha(t). count: mask n of a block's m tokens, n uniform in "
        "1..m, of lower variance (default: level)",
    )
    add(
        "--level_per",
        choices=["block", "sequence"],
        help="a level for each block, spread evenly over a row's blocks, or one a row, as dLLM does (default: block)",
    )
    add("--scheduler", choices=["linear", "cosine"], help="alpha(t) (default: linear)")
    add("--time_epsilon", type=float, help="lowest t (default: 0.001)")
    add("--time_max", type=float, help="highest t (default: 1)")
    add(
        "--at_least_one",
        type=boolean,
        metavar="True|False",
        help="mask one token where a block's draw is empty; lowers variance, biases the 1/t weight (default: False)",
    )
    add(
        "--complementary_masks",
        type=boolean,
        metavar="True|False",
        help="train on every row twice, the second time with the other tokens masked (default: False)",
    )
    add(
        "--loss_norm_type",
        choices=["token", "sequence", "batch"],
        default="token",
        help="divide the loss by the supervised tokens of the global batch; each row's by its own, and by the rows; "
        "or by the rows alone",
    )

    add = parser.add_argument_group("optimization").add_argument
    add(
        "--optim",
        choices=["adamw", "muon"],
        default="adamw",
        help="muon: Muon on the layers' matrices, AdamW on the rest; much faster from random weights",
    )
    add("--learning_rate", type=float, default=1e-4, help="peak; Muon's is scaled to the size of AdamW's updates")
    add("--lr_scheduler_type", choices=["cosine", "linear", "constant"], default="cosine", help="after the warm-up")
    add("--warmup_ratio", type=float, default=0.1, help="part of the run in which the learning rate rises from 0")
    add("--weight_decay", type=float, default=0.0, help="of the matrices")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's")
    add("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm; 0: do not")
    add("--num_train_epochs", type=float, default=20.0, help="passes over the data")
    add("--max_steps", type=int, metavar="N", help="optimizer steps; replaces --num_train_epochs")
    add("--max_minutes", type=float, help="end the run by then; the learning rate's schedule ends with it")
    add("--per_device_train_batch_size", type=int, default=16, metavar="ROWS", help="rows of a micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-batches of an optimizer step")
    add("--seed", type=int, default=42, help="of the order of rows, the noise and random weights")
    add(
        "--compute_dtype",
        choices=["bfloat16", "float32"],
        help="of the matrix products; weights and optimizer are float32 (default: bfloat16 on CUDA, else float32)",
    )

    add = parser.add_argument_group("evaluation, saving, logging").add_argument
    add(
        "--eval_strategy",
        choices=["steps", "epoch", "no"],
        default="steps",
        help="evaluate on the set's validation split, else its test split, else 5 %% held out: the likelihood bound "
        "in nats per token and its perplexity, unbiased, with fixed noise",
    )
    add("--eval_steps", type=float, default=0.1, help="every so many steps; below 1, a part of the run")
    add("--per_device_eval_batch_size", type=int, default=16, metavar="ROWS", help="rows of an evaluation batch")
    add("--stop_at_eval_loss", type=float, metavar="NATS", help="end the run when the evaluated bound is at most this")
    add("--save_steps", type=float, default=0.1, help="every so many steps; below 1, a part of the run; 0: at the end")
    add("--save_total_limit", type=int, metavar="N", help="keep the last N checkpoint-N (default: all)")
    add("--logging_steps", type=int, default=10, metavar="N", help="a line in metrics.jsonl every so many steps")
    return parser


def complete(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on the stage and checks what can be checked before anything is loaded."""
    for stage, defaults in STAGE_DEFAULTS.items():
        for name, default in defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif stage != args.stage:
                raise ValueError(f"--{name} is for --stage {stage}; leave it out of --stage {args.stage}")
    if args.max_length is None:
        args.max_length = {"pt": 128, "sft": 512}[args.stage]
    least = {
        "max_length": 1,
        "num_proc": 1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "logging_steps": 1,
        "save_total_limit": 1,
        "seed": 0,
        "max_grad_norm": 0,
        "save_steps": 0,
    }
    for name, bound in least.items():
        if getattr(args, name) is not None and getattr(args, name) < bound:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {bound}")
    for name in ("learning_rate", "num_train_epochs", "max_minutes", "eval_steps"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: expected more than 0")
    if not 0 <= args.warmup_ratio <= 1:
        raise ValueError(f"--warmup_ratio {args.warmup_ratio}: expected 0 to 1, a part of the run")
    if args.stop_at_eval_loss is not None and args.eval_strategy == "no":
        raise ValueError("--stop_at_eval_loss needs evaluations; leave out --eval_strategy no")


def complete_noise(args: argparse.Namespace, objective: str) -> None:
    """The same for the noise, once the objective is known."""
    for name, default in NOISE_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif objective == "ar":
            raise ValueError(f"--{name} {getattr(args, name)}: ar has no noise; leave it out, or pass --objective")
    if args.loss_weight_type is None:
        args.loss_weight_type = "count" if args.noise_type == "count" else "scheduler"
    if (args.noise_type, args.loss_weight_type) in (("count", "scheduler"), ("level", "count")):
        raise ValueError(
            f"--loss_weight_type {args.loss_weight_type} does not go with --noise_type {args.noise_type}: level goes "
            "with scheduler or uniform, count with count or uniform"
        )
    if not 0 < args.time_epsilon < args.time_max <= 1:
        raise ValueError(f"--time_epsilon {args.time_epsilon}, --time_max {args.time_max}: expected 0 < both <= 1")
    if args.complementary_masks and (args.scheduler != "linear" or args.noise_type != "level"):
        raise ValueError("--complementary_masks needs --noise_type level and --scheduler linear, where 1 - t is a time")


def held_run(output: Path, overwrite: bool) -> list[Path]:
    """What a run left in `output`. Raises ValueError where that must not be replaced."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output_dir {output} is a file; choose a directory")
    held = [path for name in ("checkpoint-*", METRICS, "args.json") for path in sorted(output.glob(name))]
    if held and not overwrite:
        raise ValueError(f"--output_dir {output} holds a run ({held[0].name}); choose another, or pass --overwrite")
    return held


# ---------------------------------------------------------------------------------------------------------------------
# Model, examples, optimizers


def build_model(args: argparse.Namespace) -> tuple[LanguageModel, Tokenizer]:
    """The model, float32 on the CPU, its config declaring what it is trained as, and its tokenizer."""
    if args.model_name_or_path == TINY:
        texts = data.texts(args.dataset_args, args.stage, args.text_field)
        tokenizer = Tokenizer.train(texts, vocab_size=Config.vocab_size - 1)
        config = Config(vocab_size=(len(tokenizer) + 63) // 64 * 64)  # the tokenizer counts its mask token
        model = LanguageModel(config)
        model.init_weights(torch.Generator().manual_seed(args.seed))
        mask_id = tokenizer.mask_id
    else:
        source = resolve(args.model_name_or_path)
        tokenizer = Tokenizer(source)
        model = load_model(source, dtype=torch.float32)
        mask_id = None if tokenizer.mask_added else tokenizer.mask_id
    config = declare(
        model.config,
        objective=args.objective,
        block_length=args.block_size,
        right_shift=args.right_shift_logits,
        mask_token_id=mask_id,
    )
    used = max(i for i in tokenizer.ids if config.objective != "ar" or i != tokenizer.mask_id) + 1
    if used > config.vocab_size:
        raise ValueError(f"the tokenizer has ids up to {used - 1}, the embedding only {config.vocab_size} rows")
    K = config.block_length if config.objective == "bd3lm" else 1
    if K > args.max_length:
        raise ValueError(f"block size {K} exceeds --max_length {args.max_length}; lower the one or raise the other")
    longest = -(-args.max_length // K) * K if args.stage == "sft" else args.max_length
    if args.pad_to is not None and args.pad_to < longest:
        raise ValueError(f"--pad_to {args.pad_to} is less than the longest row, {longest}; raise it, or leave it out")
    longest = args.pad_to or longest
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"rows of {longest} tokens exceed the model's context of {config.max_position_embeddings}; lower "
            "--max_length or --pad_to"
        )
    return model.train(), tokenizer


def collate_for(args: argparse.Namespace, config: Config, tokenizer: Tokenizer):
    """data.collate as the stage and the objective want it: see its docstring for the two ways to fill a chat row."""
    chat = args.stage == "sft"
    return functools.partial(
        data.collate,
        pad_id=tokenizer.pad_id,
        train_on_padding=chat and config.objective == "mdlm",
        block_length=config.block_length if chat and config.objective == "bd3lm" else None,
        eos_id=tokenizer.eos_id,
        length=args.pad_to,
    )


def make_example(
    batch: dict, *, config: Config, draw, weight_type: str, norm_type: str, scheduler: str, complementary: bool
) -> Example:
    """The objective's Example of a micro-batch, as data.Loader gives it. draw: draw_noise with its options given."""
    batch = Batch(**batch)
    if config.objective == "ar":
        return ar_example(batch, norm_type=norm_type)
    block_length = config.block_length if config.objective == "bd3lm" else None
    noise = draw(batch, block_length=block_length)
    if complementary:
        batch, noise = with_complement(batch, noise)
    options = {"weight_type": weight_type, "norm_type": norm_type, "scheduler": scheduler}
    options |= {"mask_id": config.mask_token_id, "right_shift": config.right_shift}
    if config.objective == "mdlm":
        return mdlm_example(batch, noise, **options)
    return bd3lm_example(batch, noise, block_length=block_length, **options)


def training_example(args: argparse.Namespace, config: Config):
    """make_example as the flags say: a function of a micro-batch alone."""
    draw = functools.partial(
        draw_noise,
        seed=args.seed,
        noise_type=args.noise_type,
        level_per=args.level_per,
        scheduler=args.scheduler,
        time_epsilon=args.time_epsilon,
        time_max=args.time_max,
        at_least_one=args.at_least_one,
    )
    return functools.partial(
        make_example,
        config=config,
        draw=draw,
        weight_type=args.loss_weight_type,
        norm_type=args.loss_norm_type,
        scheduler=args.scheduler,
        complementary=args.complementary_masks,
    )


def build_optimizers(model: LanguageModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon (Keller Jordan's, in torch.optim) for the layers' matrices and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = []
    if args.optim == "muon":
        muon = torch.optim.Muon(
            matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    else:
        groups[0]["params"] = matrices + others
    adamw = torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,
    )
    return [*optimizers, adamw]


def learning_rate(progress: float, args: argparse.Namespace) -> float:
    """At a point of the run, 0 to 1: a linear rise over warmup_ratio, then a cosine or a line down to 0, or neither."""
    if progress < args.warmup_ratio:
        return args.learning_rate * progress / args.warmup_ratio
    rest = (progress - args.warmup_ratio) / max(1e-12, 1 - args.warmup_ratio)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}
    return args.learning_rate * factor[args.lr_scheduler_type]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: LanguageModel, rows: data.Rows, collate, *, batch_size: int, autocast) -> float:
    """The bound on the rows' negative log-likelihood in nats per supervised token: exact for ar, else unbiased.

    Mask counts with weight m/n (diffusion.draw_noise) under noise that is fixed, whatever the run trains with. Padding
    that mdlm or bd3lm must predict costs nats but is no token, so that the three objectives compare. Rows are taken in
    order of length: a batch's padding is little, and always the same.
    """
    config, device = model.config, model.head_weight.device
    draw = functools.partial(draw_noise, seed=EVALUATION_SEED, noise_type="count")
    options = {"weight_type": "count", "norm_type": "token", "scheduler": "linear", "complementary": False}
    first = int(config.right_shift)  # then a row's first token has no predictor
    order = sorted(range(len(rows)), key=lambda i: (rows.lengths[i], i))
    model.eval()
    total, tokens = 0.0, 0
    for begin in range(0, len(order), batch_size):
        picked = [rows[i] for i in order[begin : begin + batch_size]]
        batch = {**collate(picked), "sample": torch.arange(begin, begin + len(picked)), "epoch": 0}
        example = make_example(batch, config=config, draw=draw, **options)
        with autocast():
            total += loss(model, example.to(device))[0].item()
        tokens += sum(int(row["supervised"][first:].sum()) for row in picked)
    model.train()
    return total / max(1, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Log:
    """metrics.jsonl and the progress bar; where a line cannot be redrawn, plain lines in the bar's place."""

    def __init__(self, output: Path, steps: int):
        self.file = (output / METRICS).open("w", buffering=1)
        self.bar = tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)

    def write(self, step: int, **metrics: float | str) -> None:
        """A line in metrics.jsonl."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")

    def show(self, step: int, **metrics: float) -> None:
        """On the bar."""
        text = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self.bar.disable:
            print(f"step {step}/{self.bar.total} {text}", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def tell(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def every(interval: float, steps: int) -> int:
    """Steps: the interval itself, or below 1 that part of the run."""
    return max(1, math.ceil(steps * interval)) if interval < 1 else int(interval)


def describe(args, model: LanguageModel, rows: data.Rows, evaluation: data.Rows | None, steps: int, device) -> str:
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    shift = ", right shift" if config.right_shift and config.objective != "ar" else ""
    block = f", block length {config.block_length}" if config.objective == "bd3lm" else ""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    mean = rows.lengths.mean()
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items())
    held_out = "no evaluation" if evaluation is None else f"{len(evaluation):,} rows to evaluate on"
    return (
        f"model  {args.model_name_or_path}: {config.model_type}, {parameters:,} parameters, as {config.objective}"
        f"{block}{shift}, on {device}\n"
        f"data   {args.dataset_args}: {len(rows):,} rows of {mean:.0f} tokens on average ({counts}); {held_out}\n"
        f"run    {steps:,} steps of {batch:,} rows, about {batch * mean:,.0f} tokens; {args.optim}, "
        f"learning rate {args.learning_rate:g}"
    )


def train(args: argparse.Namespace) -> None:
    complete(args)
    output = Path(args.output_dir)
    held_run(output, args.overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model, tokenizer = build_model(args)
    config = model.config
    complete_noise(args, config.objective)
    load = functools.partial(
        data.load,
        args.dataset_args,
        stage=args.stage,
        tokenizer=tokenizer,
        max_length=args.max_length,
        text_field=args.text_field,
        insert_eos=args.insert_eos,
        drop_tail=args.drop_tail,
        truncation=args.truncation,
        mask_prompt_loss=args.mask_prompt_loss,
        num_proc=args.num_proc,
    )
    rows = load(split="train")
    evaluation = None if args.eval_strategy == "no" else load(split="validation")
    collate = collate_for(args, config, tokenizer)
    loader = data.Loader(
        rows,
        micro_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed,
        group_by_length=args.stage == "sft" and args.group_by_length,
        collate=collate,
    )
    steps = args.max_steps or math.ceil(args.num_train_epochs * loader.steps_per_epoch)
    eval_every = every(args.eval_steps, steps) if args.eval_strategy == "steps" else loader.steps_per_epoch
    save_every = every(args.save_steps, steps) if args.save_steps else steps

    model.to(device)
    optimizers = build_optimizers(model, args)
    example_of = training_example(args, config)
    compute_dtype = getattr(torch, args.compute_dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    autocast = functools.partial(torch.autocast, device.type, compute_dtype, enabled=compute_dtype != torch.float32)

    for path in held_run(output, args.overwrite):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    save = functools.partial(
        save_model, model, dtype=getattr(torch, args.save_dtype or config.dtype), tokenizer=tokenizer
    )
    log = Log(output, steps)
    log.tell(describe(args, model, rows, evaluation, steps, device))
    log.write(0, rows=len(rows), **{f"rows {name}": count for name, count in rows.counts.items()})
    began = time.perf_counter()

    def minutes() -> float:
        return (time.perf_counter() - began) / 60

    def run_evaluation(step: int) -> float:
        nats = evaluate(model, evaluation, collate, batch_size=args.per_device_eval_batch_size, autocast=autocast)
        perplexity = math.exp(min(nats, 700))
        log.write(step, eval_loss=nats, eval_perplexity=perplexity, minutes=minutes())
        log.tell(f"step {step}: evaluation {nats:.4f} nats per token, perplexity {perplexity:.4g}")
        return nats

    if evaluation is not None:
        run_evaluation(0)
    sums = Counter()  # since the last line of the log
    for step, (epoch, micro_batches) in enumerate(endless(loader), 1):
        step_began = time.perf_counter()
        progress = step / (steps + 1)  # neither the first step nor the last is in vain
        if args.max_minutes is not None:
            progress = min(1.0, max(progress, minutes() / args.max_minutes))
        rate = learning_rate(progress, args)
        examples = [example_of(batch) for batch in micro_batches]
        total, denominator, norm = optimize(model, optimizers, examples, rate, autocast, args.max_grad_norm)
        if not math.isfinite(norm):
            raise ValueError(f"step {step}: the gradient is not finite; the weights of the last checkpoint are")
        log.bar.update()
        sums["loss"] += total
        sums["denominator"] += denominator
        sums["tokens"] += sum(int((batch["document"] >= 0).sum()) for batch in micro_batches)
        sums["supervised"] += sum(int(batch["supervised"].sum()) for batch in micro_batches)
        sums["seconds"] += time.perf_counter() - step_began

        last = step == steps or (args.max_minutes is not None and minutes() >= args.max_minutes)
        if step % save_every == 0 and not last:
            save(output / f"checkpoint-{step}")
            for old in checkpoints(output)[: -args.save_total_limit] if args.save_total_limit else []:
                shutil.rmtree(old)
        if last:
            save(output / "checkpoint-final")
        if evaluation is not None and (step % eval_every == 0 or last):
            nats = run_evaluation(step)
            if not last and args.stop_at_eval_loss is not None and nats <= args.stop_at_eval_loss:
                log.tell(f"step {step}: the evaluated bound is at most {args.stop_at_eval_loss}; the run ends")
                save(output / "checkpoint-final")
                last = True
        if step % args.logging_steps == 0 or last:
            metrics = {"loss": sums["loss"] / max(1, sums["denominator"]), "learning_rate": rate, "grad_norm": norm}
            metrics["tokens_per_second"] = sums["tokens"] / sums["seconds"]
            counts = {"tokens": sums["tokens"], "supervised_tokens": sums["supervised"], "minutes": minutes()}
            log.write(step, epoch=epoch + 1, **metrics, **counts)
            log.show(step, **metrics)
            sums.clear()
        if last:
            break
    log.close()
    print(f"wrote  {output / 'checkpoint-final'} after {minutes():.1f} minutes")


def optimize(model, optimizers, examples: list[Example], rate: float, autocast, max_grad_norm: float):
    """One optimizer step on the micro-batches of a global batch: (summed loss, what to divide it by, gradient norm)."""
    device = model.head_weight.device
    denominator = sum(example.denominator for example in examples)
    total = 0.0
    for example in examples:
        with autocast():
            value, _ = loss(model, example.to(device))
        (value / max(1, denominator)).backward()
        total += value.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total.item(), denominator, norm.item()


def endless(loader: data.Loader):
    """(epoch, the micro-batches of an optimizer step), epoch after epoch."""
    for epoch in itertools.count():
        for micro_batches in loader.epoch(epoch):
            yield epoch, micro_batches


def checkpoints(output: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted(output.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.partition("-")[2]))


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        train(args)


if __name__ == "__main__":
    main()

"""Trains a language model as ar, mdlm or bd3lm, on plain text or chat. `python train.py --help` is the manual.

Read `train` at the end first: model, data, optimizers, then the loop. What an example and its loss are is in
diffusion.py, what a batch is in data.py.
"""

from cli import Parser, check_place, one_line_errors, replacing_file

import functools
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import data
import stream
from checkpoint import (
    barrier,
    config_dict,
    declare,
    drop_training,
    load_model,
    load_training,
    naming_file,
    read_progress,
    recover,
    remove,
    resolve,
    save_model,
    save_training,
)
from diffusion import Batch, Example, ar_example, bd3lm_example, draw_noise, loss, mdlm_example, with_complement
from log import METRICS, PEAK_FLOPS, curves, kept_bytes, read_runs, train_flops
from model import Config, LanguageModel
from options import Count, Decay, Natural, NonNegative, Options, Place, Positive, Seed, Share, add_flags, flags
from tokenizer import Tokenizer

TINY = "builtin/tiny"
ARGS, CURVES, FINAL = "args.json", "curves.png", "checkpoint-final"
SUMS = ("loss", "denominator", "tokens", "supervised", "flops", "seconds")  # what a line of the log is made of
AHEAD = {"cpu": 0, "cuda": 2}  # steps whose examples a thread makes meanwhile; a CPU has no meanwhile
REQUEUE = 75  # exit status of a run that a signal ended: it can go on (EX_TEMPFAIL)
EVALUATION_SEED = 0  # of the evaluation's noise: the same in every run


# ---------------------------------------------------------------------------------------------------------------------
# The settings: `python train.py --help` prints what follows. They bear dLLM's names and defaults where it has them.


@dataclass(kw_only=True)
class Model(Options):
    "model"

    model_name_or_path: Place
    """a directory (also under $BASE_MODELS_DIR) or a Hub id, converted by convert.py for mdlm and bd3lm; or
    builtin/tiny: random weights in a small Qwen3 shape, with a tokenizer trained on the data"""
    objective: Literal["ar", "mdlm", "bd3lm"] | None = None
    """what to train it as (default: what the checkpoint declares, else mdlm)"""
    block_size: int | None = None  # bd3lm's block length (default: the checkpoint's)
    right_shift_logits: bool | None = None
    """position i predicts token i + 1, as in the AR model (default: what the checkpoint declares, else False)"""


@dataclass(kw_only=True)
class Data(Options):
    "data"

    dataset_args: str
    """data set, name[key:value,...], several joined by "+": Hub ids, local files (.jsonl .json .txt .parquet),
    builtin/sums (chat), builtin/stdlib (text). Keys: train:5000 (row limit of a split), name:CONFIG, lang:LANGUAGE"""
    stage: Literal["pt", "sft"] = "pt"  # pt: plain text in full pieces. sft: chat
    max_length: Count | None = None  # longest row (default: pt 128, sft 512)
    pad_to: int | None = None
    """pad every batch to this length, at least max_length (default: to the global batch's longest row). Where mdlm
    learns chat, padding is visible and learnt, as it teaches where an answer ends inside a canvas"""
    load_preprocessed_data: bool = False  # --dataset_args is a directory that python data.py wrote
    streaming: bool = False
    """read and tokenise while training runs, without end (give --max_steps); canvases are --max_length long"""
    shuffle_buffer: Count = 2000  # with --streaming: rows shuffled among them
    seed: Seed = 42  # of the order of rows, the noise and random weights


@dataclass(kw_only=True)
class PlainText(Options):
    "data: plain text (--stage pt)"

    text_field: str = "text"  # the column with the text
    insert_eos: bool = True  # end each text in EOS
    drop_tail: bool = True  # drop the last, shorter piece


@dataclass(kw_only=True)
class Chat(Options):
    "data: chat (--stage sft)"

    truncation: Literal["right", "filter"] = "right"  # cut rows that are too long, or drop them
    mask_prompt_loss: bool = True  # learn the assistant's turns only (which: --train_on), not the whole chat
    train_on: Literal["last", "all"] = "last"
    """which of the assistant's turns are learnt; all only where the chat template lets the turns be told apart"""
    group_by_length: bool = True  # rows of like length share a batch
    packing: bool = False
    """ar or bd3lm: several chats to a row of --max_length (or --pad_to), which do not see each other; the loss is that
    of the same chats padded"""


@dataclass(kw_only=True)
class Noising(Options):
    "noise (mdlm and bd3lm)"

    loss_weight_type: Literal["scheduler", "uniform", "count"] | None = None
    """weight of a masked token: scheduler, -alpha'(t)/(1 - alpha(t)), 1/t for linear, the likelihood bound; uniform, 1,
    better at small budgets; count, m/n (default: scheduler; with --noise_type count: count)"""
    noise_type: Literal["level", "count"] = "level"
    """level: mask each token with probability 1 - alpha(t). count: mask n of a block's m tokens, n uniform in 1..m, of
    lower variance"""
    level_per: Literal["block", "sequence"] = "block"
    """a level for each block, spread evenly over a row's blocks, or one a row, as dLLM does"""
    scheduler: Literal["linear", "cosine"] = "linear"
    """alpha(t), the probability that a token is not masked at time t: 1 - t, or 1 - cos((1 - t) pi/2)"""
    time_epsilon: float = 1e-3  # lowest time that is drawn
    time_max: float = 1.0  # highest time, 1 for all masked
    at_least_one: bool = False  # mask one token where a block's draw is empty; lowers variance, biases the 1/t weight
    complementary_masks: bool = False  # train on every row twice, the second time with the other tokens masked


@dataclass(kw_only=True)
class Optimization(Options):
    "optimization"

    loss_norm_type: Literal["token", "sequence", "batch"] = "token"
    """what the loss is divided by. token: the supervised tokens of the global batch. sequence: each row's by its own,
    and by the rows. batch: the rows alone"""
    optim: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the layers' matrices, AdamW on the rest; much faster from random weights"""
    learning_rate: Positive = 1e-4  # peak; Muon's is scaled to the size of AdamW's updates
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls to 0 after the warm-up; constant: it stays at its peak"""
    warmup_ratio: Share = 0.1  # part of the run, 0 to 1, in which the learning rate rises from 0
    weight_decay: NonNegative = 0.0  # of the matrices, a step, times learning rate
    adam_beta1: Decay = 0.9  # how much AdamW's mean gradient keeps in a step
    adam_beta2: Decay = 0.999  # and its mean squared gradient
    adam_epsilon: NonNegative = 1e-8  # added to the root of AdamW's mean square
    max_grad_norm: NonNegative = 1.0  # clip the gradient's norm; 0: do not
    num_train_epochs: Positive = 20.0  # passes over the data
    max_steps: Count | None = None  # optimizer steps (default: what --num_train_epochs come to)


@dataclass(kw_only=True)
class Machine(Options):
    "processes, memory, speed: what changes no result but by rounding (many processes: start them by torchrun)"

    per_device_train_batch_size: Count = 16  # rows of a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches of an optimizer step
    per_device_eval_batch_size: Count = 16  # rows of an evaluation batch
    num_proc: Count = 8  # processes that tokenise what is not builtin
    dataloader_num_workers: Natural = 0  # with --streaming: processes of each rank that tokenise; 0: a thread
    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """of the matrix products; weights and optimizer are float32 (default: bfloat16 on CUDA, else float32)"""
    parallel: Literal["ddp", "zero2", "zero3", "hybrid"] = "ddp"
    """ddp: every process has the whole model. zero2: weights, gradients and optimizer are sharded, weights gathered
    once a step. zero3: and gathered again for the backward pass. hybrid: sharded within a node, replicated across
    nodes"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # in which gradients are summed over processes
    checkpoint_activations: Literal["none", "selective", "full"] = "none"
    """what the backward pass computes again instead of keeping it: selective, all but matrix products; full, everything
    inside a layer"""
    torch_compile: bool = False  # compile the layers (minutes at the start)


@dataclass(kw_only=True)
class Output(Options):
    "output: evaluation, saving, logging, and when to stop"

    output_dir: Place  # directory of this run; one that holds a run is refused
    overwrite: bool = False  # replace the run in --output_dir
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the saved weights (default: that of the source)"""
    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """evaluate on the set's validation split, else its test split, else 5 % held out: the likelihood bound in nats per
    token and its perplexity, unbiased, with fixed noise"""
    eval_steps: Positive = 0.1  # evaluate every so many optimizer steps; below 1, a part of the run
    stop_at_eval_loss: float | None = None  # end the run at this bound, in nats per token (default: never)
    save_steps: NonNegative = 0.1
    """save every so many optimizer steps; below 1, a part of the run; 0: at the end only"""
    save_total_limit: Count | None = None  # keep the last N checkpoint-N (default: all)
    resume_from_checkpoint: str | None = None
    """auto or a directory: go on from a checkpoint-N, on any number of processes; auto: the newest in --output_dir, or
    from the start where there is none. A checkpoint-N is a model; the two newest also hold what resuming takes
    (default: begin anew)"""
    max_minutes: Positive | None = None
    """end the run after that time; the learning rate's schedule ends with it (default: no limit)"""
    skip_nonfinite: Natural = 0
    """leave out up to N steps whose loss or gradient is not finite; one more ends the run"""
    logging_steps: Count = 10  # a line in metrics.jsonl every so many steps
    report_to: Literal["none", "wandb"] = "none"
    """wandb: also to Weights & Biases (a package of its own, which heeds WANDB_MODE, WANDB_PROJECT and so on)"""


@dataclass(kw_only=True)
class Settings(Model, Data, PlainText, Chat, Noising, Optimization, Machine, Output):
    def __post_init__(self):
        super().__post_init__()
        if self.max_length is None:
            self.max_length = {"pt": 128, "sft": 512}[self.stage]
        if self.optim == "muon" and self.parallel != "ddp":
            raise ValueError(
                f"--optim muon needs whole matrices, which --parallel {self.parallel} shards; use ddp, or adamw"
            )
        if self.packing and self.stage == "pt":
            raise ValueError("--packing is for --stage sft; plain text is always packed")
        if self.streaming and self.load_preprocessed_data:
            raise ValueError("--streaming and --load_preprocessed_data contradict each other; leave one out")
        if self.load_preprocessed_data and self.model_name_or_path == TINY:
            raise ValueError(
                f"--load_preprocessed_data holds tokens; {TINY} makes its tokenizer of text; leave one out"
            )
        if self.stop_at_eval_loss is not None and self.eval_strategy == "no":
            raise ValueError("--stop_at_eval_loss needs evaluations; leave out --eval_strategy no")

    @classmethod
    def parse(cls, parser, argv=None) -> "Settings":
        args = super().parse(parser, argv)
        other, group = {"pt": ("sft", Chat), "sft": ("pt", PlainText)}[args.stage]
        for name in args.given & flags(group).keys():
            raise ValueError(f"--{name} is for --stage {other}; leave it out of --stage {args.stage}")
        return args

    def check_noise(self, objective: str) -> None:
        """Refuses noise for ar and noise that contradicts itself, once the checkpoint has told the objective."""
        for name in self.given & flags(Noising).keys() if objective == "ar" else ():
            raise ValueError(f"--{name} {getattr(self, name)}: ar has no noise; leave it out, or pass --objective")
        if self.loss_weight_type is None:
            self.loss_weight_type = "count" if self.noise_type == "count" else "scheduler"
        if (self.noise_type, self.loss_weight_type) in (("count", "scheduler"), ("level", "count")):
            raise ValueError(
                f"--loss_weight_type {self.loss_weight_type} does not go with --noise_type {self.noise_type}: level "
                "goes with scheduler or uniform, count with count or uniform"
            )
        if not 0 < self.time_epsilon < self.time_max <= 1:
            raise ValueError(f"--time_epsilon {self.time_epsilon}, --time_max {self.time_max}: expected 0 < both <= 1")
        if self.complementary_masks and (self.scheduler, self.noise_type) != ("linear", "level"):
            raise ValueError(
                "--complementary_masks needs --noise_type level and --scheduler linear, where 1 - t is a time"
            )

    @property
    def learnt(self) -> dict:
        """What decides the weights, and so must not differ in a run that goes on with another."""
        free = flags(Machine).keys() | flags(Output).keys() | {"model_name_or_path"}
        return {name: value for name, value in asdict(self).items() if name not in free}


def held_run(output: Path, overwrite: bool) -> list[Path]:
    """What a run left in `output`. Raises ValueError where that must not be replaced."""
    held = [path for name in ("checkpoint-*", METRICS, ARGS, CURVES) for path in sorted(output.glob(name))]
    if held and not overwrite:
        raise ValueError(f"--output_dir {output} holds a run ({held[0].name}); choose another, or pass --overwrite")
    return held


# ---------------------------------------------------------------------------------------------------------------------
# Model, examples, optimizers


def build_model(args: Settings) -> tuple[LanguageModel, Tokenizer]:
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
    tokenizer.fit(config.vocab_size, mask=config.objective != "ar")
    K = config.block_length if config.objective == "bd3lm" else 1
    if K > args.max_length:
        raise ValueError(f"block size {K} exceeds --max_length {args.max_length}; lower the one or raise the other")
    if args.packing and config.objective == "mdlm":
        raise ValueError("--packing: mdlm learns chat with its padding, which packed rows do not have; leave it out")
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


def collate_for(args: Settings, config: Config, tokenizer: Tokenizer):
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


def training_example(args: Settings, config: Config):
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


def build_optimizers(model: LanguageModel, args: Settings) -> list[torch.optim.Optimizer]:
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


def learning_rate(progress: float, args: Settings) -> float:
    """At a point of the run, 0 to 1: a linear rise over warmup_ratio, then a cosine or a line down to 0, or neither."""
    if progress < args.warmup_ratio:
        return args.learning_rate * progress / args.warmup_ratio
    rest = (progress - args.warmup_ratio) / max(1e-12, 1 - args.warmup_ratio)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}
    return args.learning_rate * factor[args.lr_scheduler_type]


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone without it."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Over all ranks, each value; on the CPU, so that no GPU is waited for."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing) -> list:
        """Every rank's `thing`."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    @contextmanager
    def first_on_node(self):
        """Lets a node's first process do what is inside before its others: download, tokenise into a shared cache."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            barrier()
        yield
        if first:
            barrier()


def setup() -> Ranks:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def parallelize(model: LanguageModel, args: Settings, ranks: Ranks, compute_dtype: torch.dtype):
    """Activation checkpointing, compilation, precision, sharding, in this order: (engine, sync), what to call in the
    model's place, and a function of whether the next backward pass sums gradients over ranks, as a step's last must.

    DDP sums gradients while the backward pass runs; FSDP2 (`fully_shard`) also shards weights, gradients and optimizer.
    The embedding is in the root's unit with the last norm and the head, which may be tied to it.
    """
    for layer in model.model.layers:
        if args.checkpoint_activations != "none":
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **_kept(args))
        if args.torch_compile:
            torch._dynamo.config.recompile_limit = 64  # a shape of its own, and the last layer's, each count
            layer.compile()
    model.to(ranks.device)
    model.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype  # None: as the weights are
    if ranks.world_size == 1:
        return model, lambda on: None
    reduce_dtype = getattr(torch, args.reduce_dtype)
    if args.parallel == "ddp":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        devices = [ranks.device] if ranks.device.type == "cuda" else None
        ddp = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)  # else gradients are held twice
        if reduce_dtype == torch.bfloat16:
            # In a lambda, as DDP refuses that hook, known by its name, without NCCL; gloo sums bfloat16 as well.
            ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        return ddp, functools.partial(setattr, ddp, "require_backward_grad_sync")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (ranks.world_size,), ("shard",)
    if args.parallel == "hybrid":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        shape, names = (ranks.world_size // local, local), ("replicate", "shard")
    options = {
        "mesh": init_device_mesh(ranks.device.type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=model.compute_dtype,
            reduce_dtype=None if reduce_dtype == compute_dtype else reduce_dtype,
        ),
        "reshard_after_forward": args.parallel != "zero2",
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)

    def sync(on: bool) -> None:
        model.set_requires_gradient_sync(on)
        if args.parallel == "zero2":
            model.set_reshard_after_backward(on)  # the next micro-batch finds the weights gathered

    return model, sync


def _kept(args: Settings) -> dict:
    """For `selective`: the outputs of matrix products and attention are kept, all else is computed again."""
    if args.checkpoint_activations == "full":
        return {}
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention.default]
    kept += [aten._scaled_dot_product_efficient_attention.default, torch.ops.higher_order.flex_attention]
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(engine, model: LanguageModel, rows: data.Rows, collate, *, batch_size: int, ranks: Ranks) -> float:
    """The bound on the rows' negative log-likelihood in nats per supervised token: exact for ar, else unbiased.

    Mask counts with weight m/n (diffusion.draw_noise) under noise that is fixed, whatever the run trains with. Padding
    that mdlm or bd3lm must predict costs nats but is no token, so that the three objectives compare. Rows are taken in
    order of length: a batch's padding is little, and always the same. Batches are dealt to the ranks.
    """
    config = model.config
    draw = functools.partial(draw_noise, seed=EVALUATION_SEED, noise_type="count")
    options = {"weight_type": "count", "norm_type": "token", "scheduler": "linear", "complementary": False}
    first = int(config.right_shift)  # then a row's first token has no predictor
    order = sorted(range(len(rows)), key=lambda i: (rows.lengths[i], i))
    begins = range(0, len(order), batch_size)
    model.eval()
    total, tokens = 0.0, 0
    for turn in range(math.ceil(len(begins) / ranks.world_size)):
        n = turn * ranks.world_size + ranks.rank
        begin = begins[min(n, len(begins) - 1)]  # FSDP's ranks must go forward together, be it in vain
        picked = [rows[i] for i in order[begin : begin + batch_size]]
        batch = {**collate(picked), "sample": torch.arange(begin, begin + len(picked)), "epoch": 0}
        example = make_example(batch, config=config, draw=draw, **options)
        value = loss(engine, example.to(ranks.device))[0].item()
        if n < len(begins):
            total += value
            tokens += sum(int(row["supervised"][first:].sum()) for row in picked)
    model.train()
    total, tokens = ranks.sum(total, tokens)
    return total / max(1, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The run
class Log:
    """metrics.jsonl and the progress bar, of rank 0; where a line cannot be redrawn, plain lines in the bar's place."""

    def __init__(self, output: Path, step: int, steps: int, silent: bool, wandb):
        """wandb: that module, or None."""
        self.output, self.silent, self.total = output, silent, steps
        self.file = self.bar = self.wandb = None
        self.past = []  # the lines of the run that this one goes on with
        if not silent:
            if wandb is not None:
                name = str(output.resolve())
                id = hashlib.sha256(name.encode()).hexdigest()[:12]  # so that a resumed run goes on with its curves
                config = json.loads((output / ARGS).read_text())
                project = os.environ.get("WANDB_PROJECT", "nanoA2D")
                self.wandb = wandb.init(
                    project=project, name=output.name, id=id, resume="allow", dir=str(output), config=config
                )
            path = output / METRICS
            lines = path.read_text().split("\n")[:-1] if path.is_file() and step else []  # a last part is half a line
            self.past = [row for row in map(json.loads, lines) if row["step"] <= step]
            with replacing_file(path) as new:
                new.write_text("".join(json.dumps(row) + "\n" for row in self.past))
            self.file = path.open("a", buffering=1)
            self.bar = tqdm(initial=step, total=steps, unit="step", disable=None, dynamic_ncols=True)

    def write(self, step: int, **metrics: float | str) -> None:
        """A line in metrics.jsonl."""
        if not self.silent:
            with naming_file(self.output / METRICS):
                self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            if self.wandb is not None:
                self.wandb.log(metrics, step=step)

    def draw(self) -> None:
        """curves.png of what metrics.jsonl holds."""
        if not self.silent:
            with naming_file(self.output / CURVES):
                curves(read_runs([self.output]), self.output / CURVES)

    def show(self, step: int, left: float, **metrics: float) -> None:
        """On the bar, which tells the time left by itself; left: minutes."""
        if self.silent:
            return
        text = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self.bar.disable:
            print(f"step {step}/{self.total} {text} minutes_left {left:.3g}", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def update(self) -> None:
        if not self.silent:
            self.bar.update()

    def tell(self, text: str) -> None:
        """A line that stays."""
        if not self.silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if not self.silent:
            self.bar.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) as a wish that the run ends after its step; twice SIGINT: at once.

    `number` is that of the signal, 0 while there is none. Before `steps` is set there is nothing to finish or to save:
    SIGINT does what it did, the others exit with REQUEUE.
    """

    def __init__(self):
        self.number, self.steps, self.before, self.process = 0, False, {}, os.getpid()

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        if os.getpid() != self.process:  # a fork of it, to tokenise say, which ends as any other
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.steps:
            self.number = number
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        elif number == signal.SIGINT:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        else:
            tell_stopped()
            sys.exit(REQUEUE)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def tell_stopped() -> None:
    """Creates $STOPPED_FILE, if there is such a variable: for the script that started torchrun, whose own status is 1
    whatever that of its ranks."""
    if "STOPPED_FILE" in os.environ:
        Path(os.environ["STOPPED_FILE"]).touch()


def import_wandb():
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            "--report_to wandb: the package is not installed; pip install wandb, or leave it out"
        ) from error
    return wandb


def every(interval: float, steps: int) -> int:
    """Steps: the interval itself, or below 1 that part of the run."""
    return max(1, math.ceil(steps * interval)) if interval < 1 else int(interval)


def build_loaders(args: Settings, config: Config, tokenizer: Tokenizer, ranks: Ranks):
    """(loader of training batches, rows to evaluate on or None, collate, counts of rows, a line about the data)."""
    reading = {
        "stage": args.stage,
        "tokenizer": tokenizer,
        "max_length": args.max_length,
        "insert_eos": args.insert_eos,
        "truncation": args.truncation,
        "mask_prompt_loss": args.mask_prompt_loss,
        "train_on": args.train_on,
    }
    blocks = {"block_length": config.block_length, "eos_id": tokenizer.eos_id} if config.objective == "bd3lm" else {}
    collate = collate_for(args, config, tokenizer)
    pack_length = (args.pad_to or args.max_length) if args.packing else None
    batches = {
        "micro_batch_size": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "collate": collate,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "prefetch": 2,
    }
    if args.load_preprocessed_data:
        load = functools.partial(data.load_preprocessed, args.dataset_args, drop_tail=args.drop_tail, **reading)
    else:
        load = functools.partial(
            data.load,
            args.dataset_args,
            text_field=args.text_field,
            drop_tail=args.drop_tail,
            num_proc=args.num_proc,
            rows_of=stream.load_split if args.streaming else data.load_split,
            **reading,
        )
    held = None if args.eval_strategy == "no" else load(split="validation")
    held_lines = "no evaluation" if held is None else f"{len(held):,} rows to evaluate on"
    if args.streaming:
        packing = {"pack_length": pack_length, **(blocks if args.packing else {})}
        source = stream.Stream(args.dataset_args, text_field=args.text_field, **packing, **reading)
        loader = stream.StreamLoader(
            source, shuffle_buffer=args.shuffle_buffer, workers=args.dataloader_num_workers, **batches
        )
        return loader, held, collate, {}, f"{args.dataset_args}: streamed; {held_lines}"
    loader_of = functools.partial(data.Loader, group_by_length=args.stage == "sft" and args.group_by_length, **batches)
    loader = loader_of(load(split="train"))
    canvas = {"block_length": blocks.get("block_length"), "length": args.pad_to}
    shares = [f"{loader.useful_share(**canvas):.0%} of what is computed are their tokens"]
    if args.packing:
        loader = loader_of(data.Packed(loader.rows, pack_length, **blocks))
        shares.append(f"packed {loader.useful_share(**canvas):.0%}")
    rows = loader.rows
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items())
    return (
        loader,
        held,
        collate,
        rows.counts,
        f"{args.dataset_args}: {len(rows):,} rows of {rows.lengths.mean():.0f} tokens on average ({counts}); "
        f"{', '.join(shares)}; {held_lines}",
    )


def resume_point(args: Settings, output: Path) -> Path | None:
    """The checkpoint to go on from; None: from the start. ValueError or FileNotFoundError where that cannot be."""
    check_place("--output_dir", output)
    if args.resume_from_checkpoint is None:
        held_run(output, args.overwrite)
        return None
    if args.overwrite:
        raise ValueError("--overwrite and --resume_from_checkpoint contradict each other; leave one out")
    if args.resume_from_checkpoint != "auto":
        path = Path(args.resume_from_checkpoint)
        read_progress(path)
        if path.resolve().parent != output.resolve():
            held_run(output, False)
        return path
    held = checkpoints(output)
    for path in reversed(held):
        try:
            read_progress(path)
        except FileNotFoundError:
            continue
        return path
    if held:
        raise ValueError(f"{held[-1]} holds no training state to resume from; choose another directory, or --overwrite")
    return None


def check_resumed(path: Path, settings: dict, config: Config, rows: int, processes: int) -> None:
    """ValueError where the run that wrote checkpoint `path` was another: by its flags, model, or rows of a step."""
    progress = read_progress(path)
    for name, value in settings.items():
        before = progress["settings"].get(name)
        if before != value:
            raise ValueError(
                f"--{name} {value} contradicts {path}, of a run with {before}; resume with that, or start another run "
                "in a directory of its own"
            )
    if progress["config"] != config_dict(config):
        raise ValueError(f"{path} is a checkpoint of another model; resume with the one it was trained from")
    before = progress["loader"][0]["global_batch_size"]
    if before != rows:
        raise ValueError(
            f"--per_device_train_batch_size x --gradient_accumulation_steps x {processes} processes are {rows} rows a "
            f"step, but {before} in the run of {path}; choose the first two so that the product is that"
        )


def train(args: Settings, ranks: Ranks, signals: Signals) -> int:
    """The exit status: 0, or where a signal ended the run after a step and a save, REQUEUE (130 for SIGINT)."""
    wandb = import_wandb() if args.report_to == "wandb" else None
    for other in ranks.gather(asdict(args)):
        for name, value in asdict(args).items():
            if other[name] != value:
                raise ValueError(f"--{name} is {value} here, {other[name]} on another process; start all with the same")
    output = Path(args.output_dir)
    if args.resume_from_checkpoint is not None and ranks.rank == 0:
        recover(output)
    barrier()
    if args.resume_from_checkpoint == "auto" and ranks.gather((output / FINAL).is_dir())[0]:
        if ranks.rank == 0:
            print(f"{output / FINAL} is there: the run is complete")
        return 0
    begin_at = resume_point(args, output)
    if len(set(ranks.gather(begin_at))) > 1:
        raise ValueError(f"processes see different checkpoints in {output}; choose a directory that all nodes share")

    with ranks.first_on_node():
        model, tokenizer = build_model(args)
        config = model.config
        args.check_noise(config.objective)
        settings = args.learnt
        if begin_at is not None:
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
            check_resumed(begin_at, settings, config, rows, ranks.world_size)
        loader, held, collate, counts, about_data = build_loaders(args, config, tokenizer, ranks)
    if args.max_steps is None and loader.steps_per_epoch is None:
        raise ValueError("--streaming has no epochs; pass --max_steps")
    if loader.steps_per_epoch is None and args.eval_strategy == "epoch":
        raise ValueError("--eval_strategy epoch: --streaming has no epochs; pass --eval_strategy steps or no")
    steps = args.max_steps or math.ceil(args.num_train_epochs * loader.steps_per_epoch)
    eval_every = loader.steps_per_epoch if args.eval_strategy == "epoch" else every(args.eval_steps, steps)
    save_every = every(args.save_steps, steps) if args.save_steps else steps

    compute_dtype = getattr(torch, args.compute_dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32"))
    engine, sync = parallelize(model, args, ranks, compute_dtype)
    optimizers = build_optimizers(model, args)
    example_of = training_example(args, config)
    peak = _peak(ranks.device)
    step, skipped, minutes_before, sums = 0, 0, 0.0, Counter()
    if begin_at is not None:
        progress = load_training(begin_at, model, optimizers)
        loader.load_state(progress["loader"])
        step, skipped, minutes_before = progress["step"], progress["skipped"], progress["minutes"]
        sums.update(progress["sums"] if ranks.rank == 0 else {})

    def prepared():
        """(micro-batches, their examples, the FLOPs these take, the loader's state after them) of each step."""
        for micro_batches in loader.batches():
            examples = [example_of(batch) for batch in micro_batches]
            counted = examples if peak else []
            flops = sum(train_flops(config, e.layout, int((e.weights > 0).sum())) for e in counted)
            if ranks.device.type == "cuda":
                examples = [example.map(Tensor.pin_memory) for example in examples]
            yield micro_batches, examples, flops, loader.state

    batches = data.ahead(prepared, AHEAD[ranks.device.type])
    upcoming = itertools.chain([next(batches)], batches)  # what is read gives a batch, or says so before all is written
    if begin_at is None and ranks.rank == 0:
        for path in held_run(output, True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    barrier()
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        with naming_file(output / ARGS):
            (output / ARGS).write_text(json.dumps(asdict(args), indent=2) + "\n")

    log = Log(output, step, steps, silent=ranks.rank > 0, wandb=wandb)
    log.tell(describe(args, model, about_data, steps, ranks, compute_dtype))
    if begin_at is not None:
        log.tell(f"resume {begin_at}")
    else:
        log.write(0, **{f"rows {name}": count for name, count in counts.items()})
    began, first_step = time.perf_counter() - 60 * minutes_before, step
    save_dtype = getattr(torch, args.save_dtype or config.dtype)

    def minutes() -> float:
        return (time.perf_counter() - began) / 60

    def run_evaluation() -> bool:
        """Whether --stop_at_eval_loss is reached."""
        nats = evaluate(engine, model, held, collate, batch_size=args.per_device_eval_batch_size, ranks=ranks)
        perplexity = math.exp(min(nats, 700))
        log.write(step, eval_loss=nats, eval_perplexity=perplexity, minutes=minutes())
        log.tell(f"step {step}: evaluation {nats:.4f} nats per token, perplexity {perplexity:.4g}")
        return step > 0 and args.stop_at_eval_loss is not None and nats <= args.stop_at_eval_loss

    def write_metrics() -> None:
        metrics = summarize(sums, ranks, peak)
        shown = {"loss": metrics.pop("loss"), "learning_rate": rate, "grad_norm": norm}
        shown["tokens_per_second"] = metrics.pop("tokens_per_second")
        left = (minutes() - minutes_before) / (step - first_step) * (steps - step)
        left = left if args.max_minutes is None else min(left, max(0.0, args.max_minutes - minutes()))
        log.write(step, epoch=epoch + 1, **shown, **metrics, minutes=minutes(), minutes_left=left)
        log.show(step, left, **shown)
        sums.clear()

    def save() -> Path:
        path = output / f"checkpoint-{step}"
        totals = dict(zip(SUMS, ranks.sum(*(sums[name] for name in SUMS))))
        progress = {"step": step, "skipped": skipped, "minutes": minutes(), "settings": settings}
        progress |= {"config": config_dict(config), "loader": ranks.gather(reached), "sums": totals}
        save_training(path, model, optimizers, progress, dtype=save_dtype, tokenizer=tokenizer)
        if ranks.rank == 0:
            kept = [path for path in checkpoints(output) if _number(path) <= step]
            for old in kept[:-2]:
                drop_training(old)
            for old in kept[: -args.save_total_limit] if args.save_total_limit else []:
                remove(old)
        return path

    def save_final() -> None:
        save_whole(model, output / FINAL, save_dtype, tokenizer, ranks)

    def end_early() -> None:
        log.tell(f"step {step}: the evaluated bound is at most {args.stop_at_eval_loss}; the run ends")
        save_final()

    stopped, signals.steps = False, True
    # at the start; resumed, where the evaluation that follows a save did not come about
    evaluated = any(row["step"] == step and "eval_loss" in row for row in log.past)
    if held is not None and ranks.gather(step % eval_every == 0 and not evaluated)[0] and run_evaluation():
        end_early()
        steps = step
    while step < steps:
        step_began = time.perf_counter()
        micro_batches, examples, flops, reached = next(upcoming)
        epoch = micro_batches[0]["epoch"]
        mine = sum(example.denominator for example in examples)
        denominator, signalled, spent = ranks.sum(mine, signals.number > 0, minutes() if ranks.rank == 0 else 0)
        progress = (step + 1) / (steps + 1)  # neither the first step nor the last is in vain
        if args.max_minutes is not None:
            progress = min(1.0, max(progress, spent / args.max_minutes))
        rate = learning_rate(progress, args)
        total, norm = gradients(engine, sync, model, examples, denominator, args.max_grad_norm, ranks)
        step += 1
        if math.isfinite(norm):
            update(optimizers, rate)
        else:
            skipped += 1
            samples = ranks.gather([n for batch in micro_batches for n in batch["sample"].tolist()])
            good = max(checkpoints(output), key=_number, default="none was written")
            text = f"step {step}: the loss or the gradient is not finite, on samples {samples} of epoch {epoch}"
            if skipped > args.skip_nonfinite:
                raise ValueError(f"{text}; last good checkpoint: {good}; --skip_nonfinite N leaves such steps out")
            log.tell(f"{text}; left out")
            model.zero_grad(set_to_none=True)
            total, mine = 0.0, 0
        log.update()
        sums["loss"] += float(total)
        sums["denominator"] += mine
        sums["tokens"] += sum(int((batch["document"] >= 0).sum()) for batch in micro_batches)
        sums["supervised"] += sum(int(batch["supervised"].sum()) for batch in micro_batches)
        sums["flops"] += flops
        sums["seconds"] += time.perf_counter() - step_began

        last = step == steps or (args.max_minutes is not None and spent >= args.max_minutes)
        stopped = signalled > 0 and not last
        if step % args.logging_steps == 0 or last:
            write_metrics()
        if (step % save_every == 0 and not last) or stopped:
            saved = save()
        if last:
            save_final()
        if held is not None and (step % eval_every == 0 or last) and not stopped and run_evaluation() and not last:
            end_early()
            last = True
            if step % args.logging_steps:
                write_metrics()
        if last or stopped:
            break
    batches.close()
    log.draw()
    log.close()
    if stopped:
        if ranks.rank == 0:
            print(f"stopped by a signal; wrote {saved}; the same command with --resume_from_checkpoint auto goes on")
        if signals.number in (signal.SIGTERM, signal.SIGUSR1):
            tell_stopped()
        return 130 if signals.number == signal.SIGINT else REQUEUE
    if ranks.rank == 0:
        print(f"wrote  {output / FINAL} after {minutes():.1f} minutes")
    return 0


def gradients(engine, sync, model, examples: list[Example], denominator: float, max_grad_norm: float, ranks: Ranks):
    """(summed loss of this rank, norm of the gradient) of a global batch, whose clipped gradient is then in the model.

    denominator: of the global batch. Gradients are averaged over ranks, hence the factor. Where a loss is not finite,
    nor is the gradient.
    """
    total = 0.0
    for n, example in enumerate(examples):
        sync(n == len(examples) - 1)
        value, _ = loss(engine, example.to(ranks.device))
        scale = torch.full_like(value, ranks.world_size / max(1, denominator))
        value.backward(torch.where(value.isfinite(), scale, math.nan))  # so that all ranks learn of it by the gradient
        total += value.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP
    return total.item(), norm.item()


def update(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def summarize(sums: Counter, ranks: Ranks, peak: float | None) -> dict:
    """Metrics of the steps since the last line of the log, over all ranks."""
    total = dict(zip(SUMS, ranks.sum(*(sums[name] for name in SUMS))))
    seconds = total["seconds"] / ranks.world_size
    metrics = {
        "loss": total["loss"] / max(1, total["denominator"]),
        "tokens_per_second": total["tokens"] / seconds,
        "tokens_per_second_per_process": total["tokens"] / seconds / ranks.world_size,
        "supervised_tokens_per_second": total["supervised"] / seconds,
        "tokens": total["tokens"],
        "supervised_tokens": total["supervised"],
    }
    if peak:  # model FLOPs utilization: those a step needs (model.train_flops), of those the devices could have done
        metrics["mfu"] = total["flops"] / seconds / (peak * ranks.world_size)
    if ranks.device.type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    else:  # of the whole process; in bytes on macOS, in kilobytes elsewhere
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metrics["peak_memory_gb"] = resident * (1 if sys.platform == "darwin" else 1024) / 1e9
    return metrics


def save_whole(model: LanguageModel, path: Path, dtype: torch.dtype, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """The model alone, gathered from all ranks, as a Hugging Face directory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks.rank == 0:
        save_model(model, path, dtype=dtype, tokenizer=tokenizer, state_dict=whole)
    barrier()


def _peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def describe(args: Settings, model: LanguageModel, about_data: str, steps: int, ranks: Ranks, dtype) -> str:
    """What the run begins with telling; dtype: of the computation."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    shift = ", right shift" if config.right_shift and config.objective != "ar" else ""
    block = f", block length {config.block_length}" if config.objective == "bd3lm" else ""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    kept = 12 if args.optim == "muon" else 16  # bytes a parameter: weight, gradient, one or two moments, float32
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kept /= {"ddp": 1, "hybrid": local}.get(args.parallel, ranks.world_size)
    if ranks.world_size > 1 and args.parallel == "zero2":
        kept += dtype.itemsize  # the weights as gathered
    if ranks.world_size > 1 and args.parallel != "ddp" and args.gradient_accumulation_steps > 1:
        kept += getattr(torch, args.reduce_dtype).itemsize  # the sum of the gradients so far, which is sharded at last
    length = args.pad_to or args.max_length
    streams = 2 if config.objective == "bd3lm" else 1
    fed = args.per_device_train_batch_size * length * streams * (1 + args.complementary_masks)
    activations = kept_bytes(config, fed, dtype.itemsize, args.checkpoint_activations)
    where = f"{ranks.world_size} x {ranks.device.type} ({args.parallel})" if ranks.world_size > 1 else ranks.device.type
    return (
        f"model  {args.model_name_or_path}: {config.model_type}, {parameters:,} parameters, as {config.objective}"
        f"{block}{shift}, on {where}\n"
        f"data   {about_data}\n"
        f"run    {steps:,} steps of {rows:,} rows, {'' if args.stage == 'pt' else 'at most '}{rows * length:,} tokens; "
        f"{args.optim}, learning rate {args.learning_rate:g}\n"
        f"memory {kept * parameters / 1e9:.2f} GB a process for weights, gradients and optimizer; about "
        f"{activations / 1e9:.2f} GB for activations, by count, with rows of {length} tokens"
    )


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()), key=_number)


MANUAL = """\
Train a causal, masked-diffusion (MDLM) or block-diffusion (BD3LM) language model.

  python convert.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir .models/a2d/Qwen3-0.6B
  python train.py --objective mdlm --stage pt --model_name_or_path .models/a2d/Qwen3-0.6B \\
      --dataset_args Trelis/tiny-shakespeare --text_field Text --insert_eos False --output_dir runs/shakespeare

Writes OUTPUT_DIR/checkpoint-N and checkpoint-final (Hugging Face directories: model and tokenizer), metrics.jsonl (one
line a log, one an evaluation), curves.png and args.json. Flags bear dLLM's names and defaults where it has them."""


def arguments() -> Parser:
    parser = Parser("train.py", MANUAL)
    add_flags(parser, Settings)
    return parser


def main(argv: list[str] | None = None) -> None:
    try:
        with one_line_errors("train.py"):
            args = Settings.parse(arguments(), argv)
            ranks = setup()  # where a rank may wait for others, deaf to signals: until then they do what they always do
            with Signals() as signals:
                status = train(args, ranks, signals)
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # to leave the group in order would be to wait for the others, and not to leave it may abort
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

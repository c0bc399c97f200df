"""Trains a language model as ar, mdlm or bd3lm, on plain text or chat. `python train.py --help` is the manual.

    Settings                        the flags, in groups; what must not differ in a resumed run
    build_model                     a checkpoint, checked against the settings
    Run                             a run in progress: what it holds, saves, logs, and where it resumes
    train                           the loop: read this first
    gradients, update               one optimizer step

Beside it: optim.py, likelihood.py (evaluation), loaders.py, resume.py (a run's directory), log.py, parallel.py.
"""

import itertools
import json
import math
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import card
import data
import log
import lora
import options
import resume
from checkpoint import DTYPES, PLAIN, barrier, config_dict, declare, load_model, resolve
from cli import encode_prompt, one_line_errors, sampler_options
from diffusion import Batch, Example, Noising, Sampling, denoise, losses, training_example
from files import replacing_file
from graphs import later, use_cudnn
from likelihood import evaluate
from loaders import Batching, ChatBatching, Workers, build_loaders, longest_answer, prefetch
from model import CONTEXTS, OBJECTIVES, Config, LanguageModel
from optim import Optimization, build_optimizers, learning_rate
from options import Count, Directory, Model, Natural, NonNegative, Options, Positive, Rows, block_lengths, flags, growth
from parallel import REQUEUE, USR1, Parallel, Ranks, Signals, mark_stopped, parallelize, setup
from tokenizer import Tokenizer

TINY = "builtin/tiny"
PREFETCH = {"cpu": 0, "cuda": 2}  # steps whose examples a thread makes ahead; a CPU is busy with the step itself
UNREAD = {"cpu": 0, "cuda": 1}  # steps whose loss is read only when so many more are under way: a GPU never idles


# ---------------------------------------------------------------------------------------------------------------------
# The settings. They bear dLLM's names and defaults where it has them.


@dataclass(kw_only=True)
class Source(Options):
    "model"

    model_name_or_path: Model
    """a directory (also under $BASE_MODELS_DIR) or a Hub id, converted by convert.py for mdlm and bd3lm; or
    builtin/tiny: random weights in a small Qwen3 shape, with a tokenizer trained on the data"""


@dataclass(kw_only=True)
class Target(Options):
    "model"

    objective: Literal[*OBJECTIVES] | None = None
    """what to train it as (default: what the checkpoint declares, else mdlm)"""
    block_size: Annotated[str, block_lengths, "K|K,K,..."] | None = None
    """bd3lm's block length. 1,2,4,8: it grows over the run, in equal parts, or 1:0.1,2:0.2,4:0.3,8:0.4; each divides
    the last, which the checkpoint declares and evaluations use (default: the checkpoint's)"""
    context: Literal[*CONTEXTS] | None = None
    """what clean tokens see, for bd3lm. block: their whole block. causal: only what is before them: the model is then
    an ar model, too, and can verify its own drafts (default: what the checkpoint declares, else block)"""
    ar_weight: NonNegative | None = None
    """with causal context, add so many times the next-token loss of the clean tokens (default: 0.3)"""
    right_shift_logits: bool | None = None
    """position i predicts token i + 1, as in the AR model (default: what the checkpoint declares, else False)"""


@dataclass(kw_only=True)
class Output(options.FromFile, card.Publishing):
    "output: evaluation, saving, logging, and when to stop"

    output_dir: Directory  # directory of this run; one that holds a run is refused
    overwrite: bool = False
    """replace the run in --output_dir at the first save; until then this one is in OUTPUT_DIR/.overwriting"""
    save_dtype: Literal[*list(DTYPES)[:3]] | None = None  # of the saved weights (default: that of the source)
    eval_strategy: Literal["steps", "epoch", "no"] = "steps"
    """evaluate on the set's validation split, else its test split, else 5 % held out: the likelihood bound in nats per
    token and its perplexity, unbiased, with fixed noise"""
    eval_steps: Annotated[Positive, "N"] = 0.1
    """evaluate every so many optimizer steps; below 1, a part of the run (with --max_minutes, of the time too)"""
    eval_rows: Rows | None = None  # evaluate on the split's first rows alone, so many of them (default: all)
    sample_prompt: Annotated[str, "TEXT"] | None = None
    """at each evaluation, show what the model answers to it (--stage pt: how it goes on with it), greedily, a token a
    forward, at most 64: on the terminal, in metrics.jsonl and in curves.html (default: none)"""
    stop_at_eval_loss: Annotated[float, "NATS"] | None = None  # end the run at this bound (default: never)
    save_steps: Annotated[NonNegative, "N"] = 0.1
    """save every so many optimizer steps; below 1, a part of the run (with --max_minutes, of the time too); 0: at the
    end only"""
    save_total_limit: Count | None = None  # keep the last N checkpoint-N (default: all)
    resume_from_checkpoint: Annotated[str, "auto|DIR"] | None = None
    """go on from a checkpoint-N, on any number of processes; auto: the newest in --output_dir that is not damaged, or
    from the start where there is none; a complete run goes on with more --max_steps, --num_train_epochs or
    --max_minutes, on their learning rate schedule. A checkpoint-N is a model; the two newest also hold what resuming
    takes (default: begin anew)"""
    max_minutes: Annotated[Positive, "MINUTES"] | None = None
    """end the run after so much training, evaluations and saves not counted; the learning rate's schedule ends with it
    (default: no limit)"""
    skip_nonfinite: Natural = 0
    """leave out up to N steps whose loss or gradient is not finite; one more ends the run"""
    logging_steps: Count = 10  # a line in metrics.jsonl every so many steps
    report_to: Literal["none", *log.REPORTERS] = "none"  # also to Weights & Biases, or to OUTPUT_DIR/tensorboard


@dataclass(kw_only=True)
class Settings(
    Source, Target, data.DataSet, Batching, data.Reading, ChatBatching, Noising, Optimization, Workers, Parallel, Output
):
    """Train a causal, masked-diffusion (MDLM) or block-diffusion (BD3LM) language model.

      python convert.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir .models/a2d/Qwen3-0.6B
      python train.py --objective mdlm --stage pt --model_name_or_path .models/a2d/Qwen3-0.6B \\
          --dataset_args Trelis/tiny-shakespeare --text_field Text --insert_eos False --output_dir runs/shakespeare

    Writes OUTPUT_DIR/checkpoint-N and checkpoint-final (Hugging Face directories: model and tokenizer), metrics.jsonl
    (one line a log, one an evaluation), curves.png, with --sample_prompt curves.html, and args.json. Flags bear dLLM's
    names and defaults where it has them."""

    prog: ClassVar[str] = "train.py"

    def __post_init__(self):
        super().__post_init__()
        if self.packing and self.stage == "pt":
            raise ValueError("--packing is for --stage sft; plain text is always packed")
        if self.streaming and self.load_preprocessed_data:
            raise ValueError("--streaming and --load_preprocessed_data contradict each other; leave one out")
        if self.load_preprocessed_data and self.model_name_or_path == TINY:
            raise ValueError(f"--load_preprocessed_data holds tokens; {TINY} makes its own of text; leave one out")
        for name in ("stop_at_eval_loss", "eval_rows", "sample_prompt"):
            if getattr(self, name) is not None and self.eval_strategy == "no":
                raise ValueError(f"--{name} needs evaluations; leave out --eval_strategy no")

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> "Settings":
        """The settings of a command line, which may name no flag of the other stage."""
        args = super().parse(argv)
        other, groups = {"pt": ("sft", (data.Chat, ChatBatching)), "sft": ("pt", (data.PlainText,))}[args.stage]
        for name in args.given & {name for group in groups for name in flags(group)}:
            raise ValueError(f"--{name} is for --stage {other}; leave it out of --stage {args.stage}")
        return args

    def beside(self, config: Config) -> float:
        """How many times the AR loss is added: with causal context alone."""
        if config.objective != "bd3lm" or config.context != "causal":
            return 0.0
        return 0.3 if self.ar_weight is None else self.ar_weight

    def check_objective(self, config: Config) -> None:
        """Refuses what the objective, once the checkpoint has declared it, has no use for."""
        if self.ar_weight and not self.beside(config):
            raise ValueError(f"--ar_weight {self.ar_weight}: only bd3lm with causal context has an AR loss, too")
        if config.objective != "ar":
            return
        for name in self.given & flags(Noising).keys():
            raise ValueError(f"--{name} {getattr(self, name)}: ar has no noise; leave it out, or pass --objective")

    @property
    def learned(self) -> dict:
        """What decides the weights, and so must not differ in a run that goes on with another."""
        free = {name for group in (Source, Workers, Parallel, Output) for name in flags(group)}
        return {name: value for name, value in asdict(self).items() if name not in free}


# ---------------------------------------------------------------------------------------------------------------------
# The model


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
    # An AR model is to become a diffusion model, unless it is said not to.
    declare(
        model.config,
        objective=args.objective or ("mdlm" if model.config.reason == PLAIN else None),
        block_length=args.block_size and growth(args.block_size)[-1][0],
        right_shift=args.right_shift_logits,
        mask_token_id=mask_id,
        context=args.context,
    )
    config = model.config
    tokenizer.fit(config.vocab_size, mask=config.objective != "ar")
    model.known_ids = tokenizer.known_ids
    K = config.block_length if config.objective == "bd3lm" else 1
    if K > args.max_length:
        raise ValueError(f"block size {K} exceeds --max_length {args.max_length}; lower the one or raise the other")
    if args.packing and config.objective == "mdlm":
        raise ValueError("--packing: mdlm learns chat with its padding, which packed rows do not have; leave it out")
    # bd3lm fills chat rows up to whole blocks; plain text is cut at max_length.
    longest = -(-args.max_length // K) * K if args.stage == "sft" else args.max_length
    if args.pad_to is not None and args.pad_to < longest:
        raise ValueError(f"--pad_to {args.pad_to} is less than the longest row, {longest}; raise it, or leave it out")
    longest = args.pad_to or longest
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"rows of {longest} tokens exceed the model's context of {config.max_position_embeddings}; lower "
            "--max_length or --pad_to"
        )
    return lora.adapt(model.train(), args, args.model_name_or_path, args.seed), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# A run


class StepData(NamedTuple):
    """What one optimizer step takes of this rank: its micro-batches, the Examples made of them, the FLOPs that these
    take (0 where the device's peak is not known), and the loader's state after them."""

    micro_batches: list[dict]
    examples: list[Example]
    flops: int
    loader_state: dict

    @property
    def epoch(self) -> int:
        return self.micro_batches[0]["epoch"]

    @property
    def denominator(self) -> float:
        """Of this rank's part of the loss."""
        return sum(example.denominator for example in self.examples)


class StepTaken(NamedTuple):
    """An optimizer step whose loss and gradient's norm the GPU may not have computed yet."""

    step: int
    data: StepData
    rate: float  # the learning rate
    figures: Callable[[], list[float]]  # waits for (loss, its AR part, norm)
    logged: bool  # a line of the log follows it


class Run:
    """A run in progress: model, optimizers, data and log, and how far it is. Every rank has one."""

    def __init__(self, args: Settings, ranks: Ranks, start: resume.Start):
        """Nothing is written before all that can be refused has been."""
        self.args, self.ranks, self.output, self.directory = args, ranks, Path(args.output_dir), start.directory
        report = log.import_reporter(args.report_to)
        with ranks.first_on_node():
            self.model, self.tokenizer = build_model(args)
            args.check_objective(self.model.config)
            if start.checkpoints:
                resume.check_resumed(start, args, self.model.config, ranks.world_size)
            self.loaders = build_loaders(args, self.model.config, self.tokenizer, ranks)
            self.model.config.answer_length = longest_answer(args, self.model.config, self.loaders.train)
        self.prompt = None if args.sample_prompt is None else encode_prompt(args, self.model, self.tokenizer)
        known = None if args.model_name_or_path == TINY else self.tokenizer  # which builtin/tiny makes of the data
        self.fingerprints = resume.fingerprints(self.loaders, known, lora.digest(self.model))
        self._plan(start.done)
        self.save_dtype = getattr(torch, args.save_dtype or self.model.config.dtype)
        use_cudnn(args.stage == "pt" or args.pad_to is not None)
        log.check_memory(args, self.model, ranks)
        self.engine, self.sync = parallelize(self.model, args, ranks)
        self.optimizers = build_optimizers(self.model, args)
        self.peak = log.peak_flops(ranks.device)

        # How far it is, and the sums since the last line of the log.
        self.step, self.skipped, self.minutes_before, self.sums = 0, 0, 0.0, Counter()
        begin_at, past = self._restore(start.checkpoints) if start.checkpoints else (None, [])
        self.first_step = self.step
        self.unread: deque[StepTaken] = deque()

        # The first step's data is read here, so that what cannot be read is refused before anything is written.
        self.began = time.perf_counter() - 60 * self.minutes_before
        self.prefetched = prefetch(self._prepare_steps(), PREFETCH[ranks.device.type])
        self.steps_data = itertools.chain([next(self.prefetched)], self.prefetched)
        card.check_hub(args.push_to_hub if ranks.rank == 0 else None)
        self._prepare_directory(start)
        steps = None if args.max_minutes else self.steps
        self.log = log.Log(self.output, self.directory, past, report, self.step, steps, silent=ranks.rank > 0)
        self.log.print(log.describe(args, self.model, self.loaders.about, self.steps, ranks))
        if begin_at is not None:
            self.log.print(f"resume {begin_at}{', on the longer learning rate schedule' if start.done else ''}")
        else:
            self.log.write(0, **{f"rows {name}": count for name, count in self.loaders.counts.items()})
        self.began = time.perf_counter() - 60 * self.minutes_before
        self.counted = self.minutes_before  # minutes up to the last step that was counted

    def _plan(self, done: int) -> None:
        """How many steps, and every how many of them it evaluates. done: steps of a complete run that is to be
        longer."""
        args, epoch = self.args, self.loaders.train.steps_per_epoch
        if args.max_steps is None and epoch is None:
            raise ValueError("--streaming has no epochs; pass --max_steps")
        if args.eval_strategy == "epoch" and epoch is None:
            raise ValueError("--eval_strategy epoch: --streaming has no epochs; pass --eval_strategy steps or no")
        self.steps = args.max_steps or math.ceil(args.num_train_epochs * epoch)
        self.eval_every = epoch if args.eval_strategy == "epoch" else args.eval_steps
        if self.steps <= done:
            raise ValueError(f"{self.output} holds a complete run of {done} steps; to prolong it pass more --max_steps")

    def _restore(self, checkpoints: list[Path]) -> tuple[Path, list[dict]]:
        """Loads the first of `checkpoints` that is not damaged; returns it, and the lines of the log up to it."""
        begin_at, progress = resume.load_newest(checkpoints, self.model, self.optimizers, self.ranks.rank)
        resume.check_fingerprints(begin_at, progress, self.fingerprints)
        self.loaders.train.load_state(progress["loader"])
        self.step, self.skipped, self.minutes_before = progress["step"], progress["skipped"], progress["minutes"]
        self.sums.update(progress["sums"] if self.ranks.rank == 0 else {})  # they are those of all ranks
        rows = log.past_rows(self.directory) if self.ranks.rank == 0 else []
        return begin_at, [row for row in rows if row["step"] <= self.step]  # later ones are of steps to be done again

    def _prepare_steps(self):
        """Iterator over the StepData of each step; on CUDA a thread runs it while the GPU computes."""
        args, config = self.args, self.model.config
        options = {"seed": args.seed, "norm_type": args.loss_norm_type, "ar_weight": args.beside(config)}
        growing = growth(args.block_size) if args.block_size else []
        for step, micro_batches in enumerate(self.loaders.train.batches(), self.step):
            now = self.progress(self.minutes, step)
            options["block_length"] = next((K for K, end in growing if now < end), config.block_length)
            examples = [training_example(Batch(**batch), config, args, **options) for batch in micro_batches]
            counted = examples if self.peak else []
            flops = sum(log.train_flops(config, e.layout, int((e.weights > 0).sum())) for e in counted)
            if self.ranks.device.type == "cuda":
                examples = [example.map(Tensor.pin_memory) for example in examples]
            yield StepData(micro_batches, examples, flops, self.loaders.train.state)

    def _prepare_directory(self, start: resume.Start) -> None:
        """The directory and args.json."""
        if self.ranks.rank == 0:
            resume.prepare(self.output, start)
            with replacing_file(self.directory / log.ARGS) as file:
                file.write_text(json.dumps(asdict(self.args), indent=2) + "\n")
        barrier()

    def _settle(self) -> None:
        """After a save: now a run that overwrites another takes its place."""
        if self.directory != self.output and self.ranks.rank == 0:
            resume.settle(self.output)
        barrier()
        self.directory = self.log.directory = self.output

    @property
    def minutes(self) -> float:
        """Of training, without evaluations, saves, and the time between a stop and a resumption."""
        return (time.perf_counter() - self.began) / 60

    @contextmanager
    def clock_stopped(self):
        """What is inside is no training: it counts neither for --max_minutes nor for the time that is left."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped
        self.log.forget_pause()

    def progress(self, minutes: float, steps: int) -> float:
        """How much of the run, 0 to 1, so many steps are, or that time is where --max_minutes ends the run earlier."""
        return max(steps / self.steps, 0.0 if self.args.max_minutes is None else minutes / self.args.max_minutes)

    def due(self, interval: float, before: float, now: float) -> bool:
        """After a step, whether it is time again: every `interval` steps, or below 1 every such part of the run, whose
        progress was `before` the step and is `now`."""
        if interval >= 1 or self.args.max_minutes is None:
            return self.step % every(interval, self.steps) == 0
        return int(now / interval) > int(before / interval)

    def read(self, ahead: int = 0) -> None:
        """Waits for the loss of all steps but the newest `ahead`, and counts and logs them; ValueError where one is not
        finite, as `skip` has it."""
        while len(self.unread) > ahead:
            taken = self.unread.popleft()
            total, ar, norm = taken.figures()
            if math.isfinite(norm):
                self.count(taken.data, total, ar, taken.data.denominator)
            else:
                self.skip(taken)
                self.count(taken.data, 0.0, 0.0, 0)
            self.newest = taken, norm
            if taken.logged:
                self.write_metrics()

    def count(self, done: StepData, total: float, ar: float, denominator: float) -> None:
        """Adds a step, and the time since the one before, to the sums of the log's next line. total: the loss, of which
        `ar` is the AR loss's part."""
        self.sums["loss"] += total - ar
        self.sums["ar_loss"] += ar
        beside = [e.weights[e.next_token] for e in done.examples if e.next_token is not None and denominator]
        self.sums["ar_weight"] += sum(float(weights.sum()) for weights in beside)
        self.sums["denominator"] += denominator
        self.sums["tokens"] += sum(int((batch["document"] >= 0).sum()) for batch in done.micro_batches)
        self.sums["supervised"] += sum(int(batch["supervised"].sum()) for batch in done.micro_batches)
        self.sums["flops"] += done.flops
        self.sums["seconds"] += 60 * ((now := self.minutes) - self.counted)
        self.counted = now
        self.log.advance()

    def skip(self, taken: StepTaken) -> None:
        """Tells of a step that was left out; ValueError where --skip_nonfinite allows no more of them."""
        self.skipped += 1
        samples = self.ranks.gather([n for batch in taken.data.micro_batches for n in batch["sample"].tolist()])
        where = f"on samples {samples} of epoch {taken.data.epoch}"
        text = f"step {taken.step}: the loss or the gradient is not finite, {where}"
        if self.skipped > self.args.skip_nonfinite:
            good = max(resume.checkpoints(self.directory), key=resume.number_of, default="none was written")
            raise ValueError(f"{text}; last good checkpoint: {good}; --skip_nonfinite N leaves such steps out")
        self.log.print(f"{text}; left out")

    def write_metrics(self) -> None:
        """A line in the log about the steps that were read since the last one."""
        taken, norm = self.newest
        metrics = log.summarize(self.sums, self.ranks, self.peak)
        shown = {"loss": metrics.pop("loss"), "learning_rate": taken.rate, "grad_norm": norm}
        shown |= {name: metrics.pop(name) for name in ("ar_loss", "tokens_per_second") if name in metrics}
        pace = (self.minutes - self.minutes_before) / (taken.step - self.first_step)
        left = min(pace * (self.steps - taken.step), max(0.0, (self.args.max_minutes or math.inf) - self.minutes))
        epoch = taken.data.epoch + 1
        self.log.write(taken.step, epoch=epoch, **shown, **metrics, minutes=self.minutes, minutes_left=left)
        self.log.show(taken.step, taken.step + round(left / pace), left, **shown)
        self.sums.clear()

    def evaluate(self) -> bool:
        """Logs the bound on the rows to evaluate on, and the answer to --sample_prompt; True where the bound reaches
        --stop_at_eval_loss."""
        self.read()
        goal, rows, collate = self.args.stop_at_eval_loss, self.loaders.eval_rows, self.loaders.collate
        how = {"batch_size": self.args.per_device_eval_batch_size, "first_rows": self.args.eval_rows}
        with self.clock_stopped():
            nats, ar = evaluate(self.engine, self.model, rows, collate, ranks=self.ranks, **how)
            if not math.isfinite(nats):
                why = "the weights are damaged, or --compute_dtype too narrow for them"
                raise ValueError(f"step {self.step}: the evaluated bound is {nats}; {why}")
            prompt, answer = self.args.sample_prompt, None if self.prompt is None else self.answer()
        perplexity = math.exp(min(nats, 700))
        beside, as_ar = ({}, "") if ar is None else ({"eval_ar_loss": ar}, f"; as ar {ar:.4f}")
        beside |= {} if answer is None else {"sample_prompt": prompt, "sample": answer}
        self.log.write(self.step, eval_loss=nats, **beside, eval_perplexity=perplexity, minutes=self.minutes)
        shown = f"{nats:.4f} nats per token, perplexity {log.readable(perplexity)}"
        self.log.print(f"step {self.step}: evaluation {shown}{as_ar}")
        if answer is not None:
            self.log.print(f"step {self.step}: sample {prompt} -> {answer}".replace("\n", "↵"))
            with self.clock_stopped():
                self.log.draw()
        return self.step > 0 and goal is not None and nats <= goal

    def answer(self) -> str:
        """What the model writes after --sample_prompt, up to an end token; called by all ranks."""
        (prompt, new), ends = self.prompt, self.tokenizer.end_ids
        options = sampler_options(Sampling(max_new_tokens=new, steps=new), self.model.config.objective)
        # All ranks of a sharded model take as many forwards, since each gathers weights: none stops at an end token.
        if self.ranks.world_size == 1 or self.args.parallel == "ddp":
            options["end_ids"] = tuple(ends)
        self.model.eval()
        # Nothing is compiled or recorded for the sampler's shapes, which are others than those of training.
        with torch.compiler.set_stance("force_eager") if self.args.compiles_on(self.ranks.device) else nullcontext():
            *_, last = denoise(self.model, [prompt], **options, static=False)
        self.model.train()
        tokens = last.tokens[0, len(prompt) :].tolist()
        return self.tokenizer.decode(list(itertools.takewhile(lambda token: token not in ends, tokens)))

    def evaluation_is_due(self) -> bool:
        """Before the first step here: at the start of a run, or where a save was not followed by its evaluation."""
        evaluated = any(row["step"] == self.step and "eval_loss" in row for row in self.log.past)
        by_steps = self.eval_every >= 1 or self.args.max_minutes is None
        due = self.step == 0 or (by_steps and self.step % every(self.eval_every, self.steps) == 0)
        due = due and not evaluated
        return self.loaders.eval_rows is not None and self.ranks.gather(due)[0]  # rank 0 alone has the log

    def save(self, loader_state: dict) -> Path:
        """Writes checkpoint-N, from which the run can be resumed; older ones lose that, or go, as the flags say."""
        self.read()
        name = f"checkpoint-{self.step}"
        progress = {
            "step": self.step,
            "skipped": self.skipped,
            "minutes": self.minutes,
            "settings": self.args.learned,
            "config": config_dict(self.model.config),
            "fingerprints": self.fingerprints,
            "loader": self.ranks.gather(loader_state),
            "sums": dict(zip(log.SUMS, self.ranks.sum(*(self.sums[name] for name in log.SUMS)))),
        }
        saved = {"dtype": self.save_dtype, "tokenizer": self.tokenizer}
        with self.clock_stopped():
            resume.save_training(self.directory / name, self.model, self.optimizers, progress, **saved)
            self._settle()
            if self.ranks.rank == 0:
                resume.prune(self.output, self.step, self.args.save_total_limit)
        return self.output / name

    def save_final(self) -> None:
        self.read()
        resume.save_whole(self.model, self.directory / resume.FINAL, self.save_dtype, self.tokenizer, self.ranks)
        self._settle()

    def end_early(self) -> bool:
        goal = self.args.stop_at_eval_loss
        self.log.print(f"step {self.step}: the evaluated bound is at most {goal}; the run ends")
        self.save_final()
        return True

    def close(self) -> None:
        self.prefetched.close()
        self.log.close()


def every(interval: float, steps: int) -> int:
    """Steps: the interval itself, or below 1 that part of the run."""
    return max(1, math.ceil(round(steps * interval, 6))) if interval < 1 else int(interval)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(args: Settings, ranks: Ranks, signals: Signals) -> int:
    """The exit status: 0, or where a signal ended the run after a step and a save, REQUEUE (130 for SIGINT)."""
    output = Path(args.output_dir)
    resume.check_ranks_agree(args, ranks)
    if resume.is_complete(args, output, ranks):
        return 0
    run = Run(args, ranks, resume.resume_point(args, output, ranks))

    # From here on a signal ends the run after its step, with a save. First evaluate the model as it came.
    signals.steps = True
    ended = stopped = False
    now = run.progress(run.minutes_before, run.step)
    if run.evaluation_is_due() and run.evaluate():
        ended = run.end_early()

    while not ended and run.step < run.steps:
        batch = next(run.steps_data)

        # The loss is divided by a count over the GLOBAL batch (supervised tokens, by default): the ranks add theirs up
        # before the first backward pass. With it travel signals, so that all stop at the same step, and rank 0's clock.
        clock = run.minutes if ranks.rank == 0 else 0
        denominator, signalled, minutes = ranks.sum(batch.denominator, signals.number > 0, clock)

        # The learning rate follows the steps or, where --max_minutes ends the run earlier, the time; with steps counted
        # so that neither the first nor the last has rate 0 (but for one that ends at the time's cap).
        spent = 0.0 if args.max_minutes is None else minutes / args.max_minutes
        rate = learning_rate(min(1.0, max((run.step + 1) / (run.steps + 1), spent)), args)

        # A loss that is not finite on one rank makes the gradient so on all of them, and all leave the step out.
        lora.begin_step(run.model, run.step)
        engine, sync, examples = run.engine, run.sync, batch.examples
        totals, norm = gradients(engine, sync, run.model, examples, denominator, args.max_grad_norm, ranks)
        update(run.optimizers, rate, norm)
        run.step += 1

        # The last step logs, saves and evaluates, others once in a while; a signal saves.
        ended = run.step == run.steps or (args.max_minutes is not None and minutes >= args.max_minutes)
        stopped = signalled > 0 and not ended
        before, now = now, run.progress(minutes, run.step)
        logged = run.step % args.logging_steps == 0 or ended
        run.unread.append(StepTaken(run.step, batch, rate, later(torch.cat([totals, norm[None]])), logged))
        run.read(ahead=UNREAD[ranks.device.type])
        if (args.save_steps and run.due(args.save_steps, before, now) and not ended) or stopped:
            saved = run.save(batch.loader_state)
        if ended:
            run.save_final()
        if stopped:
            break
        due = run.loaders.eval_rows is not None and (run.due(run.eval_every, before, now) or ended)
        if due and run.evaluate() and not ended:
            ended = run.end_early()
            if run.step % args.logging_steps:
                run.write_metrics()

    run.close()
    if stopped:
        if ranks.rank == 0:
            print(f"stopped by a signal; wrote {saved}; the same command with --resume_from_checkpoint auto goes on")
        if signals.number in (signal.SIGTERM, USR1):
            mark_stopped()
        return 130 if signals.number == signal.SIGINT else REQUEUE
    if ranks.rank == 0:
        print(f"wrote  {output / resume.FINAL} after {run.minutes:.1f} minutes")
        card.publish(output / resume.FINAL, args, output)
    return 0


def gradients(engine, sync, model, examples: list[Example], denominator: float, max_grad_norm: float, ranks: Ranks):
    """Leaves the clipped gradient of a global batch in the model; returns (this rank's sums (2,) of `diffusion.losses`,
    the gradient's norm () before clipping), both on the device: nothing here waits for them.

    denominator: of the global batch. DDP and FSDP average over ranks, hence the factor world_size. Where a loss is not
    finite, neither is the gradient.
    """
    total = 0.0
    for n, example in enumerate(examples):
        sync(n == len(examples) - 1)
        value, ar = losses(engine, example.to(ranks.device))
        scale = torch.full_like(value, ranks.world_size / max(1, denominator))
        value.backward(torch.where(value.isfinite(), scale, math.nan))  # so that all ranks learn of it by the gradient
        total += torch.stack([value.detach(), ar])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return total, norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP


def update(optimizers: list[torch.optim.Optimizer], rate: float, norm: Tensor) -> None:
    """A step of the optimizers at that learning rate, which changes nothing where the gradient's norm () is not finite;
    the gradients are freed."""
    for optimizer in optimizers:
        optimizer.found_inf = (~norm.isfinite()).float()  # read on the device, where the host would have to wait
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(argv: list[str] | None = None) -> None:
    try:
        with one_line_errors("train.py"):
            args = Settings.parse(argv)
            ranks = setup()  # may block, waiting for other ranks; so our signal handlers are installed after it
            with Signals() as signals, resume.sole_run(args, ranks):
                status = train(args, ranks, signals)
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # destroy_process_group would wait for the other ranks; an exit without it may abort
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

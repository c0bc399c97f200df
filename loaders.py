"""Rows in, batches out: a loader of rows that are there, one of a stream, and the one that a run's options ask for."""

import itertools
import math
import multiprocessing
import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch

import data
import stream
from data import filled
from model import Config
from options import Count, Natural, Options, Rows, Seed
from parallel import Ranks
from tokenizer import Tokenizer

# ---------------------------------------------------------------- options


@dataclass(kw_only=True)
class Batching(Options):
    "data"

    pad_to: Annotated[int, "TOKENS"] | None = None
    """pad every batch to this length, at least max_length (default: to the global batch's longest row). For MDLM chat
    training the model also learns the padding; that is how it learns to stop early"""
    load_preprocessed_data: bool = False  # --dataset_args is a directory that python data.py wrote
    streaming: bool = False
    """read and tokenise while training runs, without end (give --max_steps); canvases are --max_length long"""
    shuffle_buffer: Rows = 2000  # with --streaming: rows shuffled among them
    seed: Seed = 42  # of the order of rows, the noise and random weights


@dataclass(kw_only=True)
class ChatBatching(Options):
    "data: chat (--stage sft)"

    group_by_length: bool = True  # rows of like length share a batch
    packing: bool = False
    """ar or bd3lm: several chats to a row of --max_length (or --pad_to), which do not see each other; the loss is that
    of the same chats padded"""


@dataclass(kw_only=True)
class Workers(data.Workers):
    "processes, memory, speed: what changes no result but by rounding (many processes: start them by torchrun)"

    per_device_train_batch_size: Rows = 16  # rows of a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches of an optimizer step
    per_device_eval_batch_size: Rows = 16  # rows of an evaluation batch
    dataloader_num_workers: Natural = 0  # with --streaming: processes of each rank that tokenise; 0: a thread


# ---------------------------------------------------------------- rows to a batch

# Chat canvases are so many tokens or a multiple of it: a GPU's kernels, and its memory, are then for few shapes. Not
# where padding is learnt. On a CPU a padded column costs more than a new shape.
MULTIPLE = {"cpu": 1, "cuda": 32}


def collate(
    rows, *, pad_id: int, train_on_padding=False, block_length=None, eos_id=None, length=None, longest=0, multiple=1
) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right: tokens, document, position (B, T) int64, supervised, fill (B, T) bool.

    T: `length`, else the longest row, here or in the rest of the global batch (`longest` tokens), rounded up to a
    `multiple`. document: 0, in a packed row the number of its row, padding -1. Padding is not supervised. Two ways to
    learn where an answer ends:
    train_on_padding: padding is supervised and visible (document 0), so that a row tells where in a canvas it ends;
    block_length: each row is first extended by supervised eos_id to a multiple of it, which `fill` tells from its own.
    """
    assert not (train_on_padding and block_length), "padding is trained on, or rows fill their blocks: not both"
    assert not (train_on_padding and any("document" in row for row in rows)), "packed rows have no padding to train on"

    # A row that is not packed becomes a packed row of one; the longest sets the canvas's length
    rows = [row if "document" in row else data.join([row], block_length, eos_id) for row in rows]
    most = max(len(row["tokens"]) for row in rows)
    B, T = len(rows), filled(max(most, filled(longest, block_length)), multiple) if length is None else length
    if most > T:
        raise ValueError(f"a row of {most} tokens exceeds the canvas of {T}; lower max_length or raise --pad_to")

    # A canvas of padding alone, then the rows
    tokens, supervised = torch.full((B, T), pad_id), torch.full((B, T), train_on_padding)
    document, position = torch.full((B, T), 0 if train_on_padding else -1), torch.arange(T).repeat(B, 1)
    batch = {"tokens": tokens, "supervised": supervised, "document": document, "position": position}
    batch["fill"] = torch.zeros(B, T, dtype=torch.bool)
    for b, row in enumerate(rows):
        for name in batch:
            batch[name][b, : len(row[name])] = torch.from_numpy(row[name])
    return batch


def collate_for(args, config: Config, tokenizer: Tokenizer, device="cpu") -> Callable:
    """collate as the stage and the objective want it: see its docstring for the two ways to fill a chat row.
    args: train.Settings; device: the type of that which computes."""
    chat, objective = args.stage == "sft", config.objective
    block_length = config.block_length if chat and objective == "bd3lm" else None
    canvas = {"length": args.pad_to, "train_on_padding": chat and objective == "mdlm", "block_length": block_length}
    canvas["multiple"] = MULTIPLE[device] if chat and objective != "mdlm" else 1
    # Padding that nobody learns may be any token, but what ends an answer may not
    pad_id, learnt = tokenizer.pad_id, {"mdlm": tokenizer.pad_id, "bd3lm": tokenizer.eos_id}
    if chat and learnt.get(objective, 0) is None:
        way_out = "name an eos_token in its tokenizer_config.json"
        raise ValueError(f"{objective} learns from EOS where an answer ends, and the tokenizer has none; {way_out}")
    return partial(collate, pad_id=0 if pad_id is None else pad_id, eos_id=tokenizer.eos_id, **canvas)


# ---------------------------------------------------------------- loaders


@dataclass(kw_only=True)
class Batches:
    """What both loaders share. A global batch has micro_batch_size * accumulation * world_size slots, a row in each.

    `batches` is an endless iterator over optimizer steps, from `state` on, which it moves along. A step is a list of
    micro-batches: what `collate` gives, and "sample" (B,) int64, the rows' places in the order of all, and "epoch".
    """

    micro_batch_size: int
    accumulation: int
    seed: int
    collate: Callable  # from a list of rows and `longest` to a batch, such as partial(collate, pad_id=...)
    shuffle: bool = True
    rank: int = 0
    world_size: int = 1
    prefetch: int = 0  # steps that are made ahead

    def __post_init__(self):
        B, accumulation = self.micro_batch_size, self.accumulation
        if B < 1 or accumulation < 1:
            raise ValueError(f"batch size {B}, accumulation {accumulation}: both must be at least 1")
        self.global_batch_size = B * accumulation * self.world_size

    def micro_batches(self, slots: int) -> list[range]:
        """This rank's micro-batches of the first `slots` slots; some may be empty."""
        # In every round rank 0 takes the first micro_batch_size slots that are left, rank 1 the next, and so on: what a
        # step holds does not depend on how many ranks there are, and every rank has as many micro-batches
        B = self.micro_batch_size
        rounds = -(-slots // (B * self.world_size))
        firsts = ((turn * self.world_size + self.rank) * B for turn in range(rounds))
        return [range(first, max(first, min(first + B, slots))) for first in firsts]

    def load_state(self, states: dict | list[dict]) -> None:
        """Goes on after a `state`, or those of all ranks of a run, on however many ranks there are now."""
        states = states if isinstance(states, list) else [states]
        for state in states:
            # They must be of this run's data, and all of one step
            for name, value in {**self.settings, "step": states[0]["step"]}.items():
                if state.get(name) != value:
                    name, saved = name.replace("_", " "), f"the state to resume from was saved with {state.get(name)}"
                    way_out = "resume with the settings of the run that saved it"
                    raise ValueError(f"the data's {name} is {value}, but {saved}; {way_out}")
        self.go_on(states)


@dataclass
class Loader(Batches):
    """Batches of rows, epoch by epoch; an epoch's last step takes what is left. Its whole state is (epoch, step)."""

    rows: data.Rows | data.Packed
    group_by_length: bool = False  # within stretches of 50 global batches, long rows come first

    def __post_init__(self):
        super().__post_init__()
        self.steps_per_epoch = -(-len(self.rows) // self.global_batch_size)
        self.reached = (0, 0)  # epoch, steps of it that `batches` has given

    def order(self, epoch: int) -> np.ndarray:
        """(n,) The rows' numbers as that epoch visits them."""
        n = len(self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(n) if self.shuffle else np.arange(n)
        if self.group_by_length:
            # By stretches, so that the first rows of an epoch are a sample of all
            stretch = 50 * self.global_batch_size
            stretches = [order[i : i + stretch] for i in range(0, n, stretch)]
            order = np.concatenate([s[np.argsort(-self.rows.lengths[s], kind="stable")] for s in stretches])
        return order

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[dict]]:
        """The optimizer steps of that epoch from step `start` on."""
        order = self.order(epoch)
        for begin in range(start * self.global_batch_size, len(order), self.global_batch_size):
            # The rows of all ranks: the canvas is as long as their longest, however the batch is cut
            rows = order[begin : begin + self.global_batch_size]
            longest = int(self.rows.lengths[rows].max())

            # One of this rank's micro-batches may be empty. It repeats the first row, unsupervised: that weighs nothing
            # and is no row to count
            step = []
            for slots in self.micro_batches(len(rows)):
                batch = self.collate([self.rows[rows[slot]] for slot in slots or [0]], longest=longest)
                batch["supervised"] &= len(slots) > 0
                step.append(batch | {"sample": begin + torch.tensor(slots or [0]), "epoch": epoch})
            yield step

    def __iter__(self) -> Iterator[list[dict]]:
        """One pass: epoch 0."""
        return self.epoch(0)

    def batches(self) -> Iterator[list[dict]]:
        for reached, step in prefetch(self._numbered_steps(), self.prefetch):
            self.reached = reached
            yield step

    def _numbered_steps(self):
        # The first epoch may begin in its middle, the others do not
        first, start = self.reached
        for epoch in itertools.count(first):
            for done, step in enumerate(self.epoch(epoch, start), start + 1):
                yield (epoch, done), step
            start = 0

    @property
    def settings(self) -> dict:
        return {"rows": len(self.rows), "global_batch_size": self.global_batch_size, "seed": self.seed}

    @property
    def state(self) -> dict:
        """All it takes to go on after the last step that `batches` gave, on any number of ranks; JSON."""
        return {"epoch": self.reached[0], "step": self.reached[1], **self.settings}

    def go_on(self, states: list[dict]) -> None:
        self.reached = states[0]["epoch"], states[0]["step"]  # every rank has the same

    def useful_share(self, block_length: int | None = None, length: int | None = None) -> float:
        """Of the cells of the first epoch's canvases, the share that holds the rows' own tokens; the rest is padding,
        or fills a row's last block. block_length, length: as collate has them."""
        order, G = self.order(0), self.global_batch_size
        batches = [self.rows.lengths[order[begin : begin + G]] for begin in range(0, len(order), G)]
        cells = sum(len(lengths) * (length or int(filled(lengths.max(), block_length))) for lengths in batches)
        return self.rows.useful / cells


@dataclass
class StreamLoader(Batches):
    """Batches of a stream, without end: "sample" counts on, and "epoch" is 0. `state` is of this rank's slots alone."""

    stream: stream.Stream
    shuffle_buffer: int = 2000  # rows of a window (see SlotRows), of all ranks
    workers: int = 0  # processes that share this rank's slots, instead of a thread; they change no batch
    steps_per_epoch: ClassVar[None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle buffer {self.shuffle_buffer}: expected at least 1 row")
        self.slots = list(itertools.chain(*self.micro_batches(self.global_batch_size)))  # this rank's
        self.step, self.progress = 0, merged([])
        self.counts = Counter()  # of the rows that this rank has read since it started

    def batches(self) -> Iterator[list[dict]]:
        # Each worker, or else one thread, makes the rows of a share of this rank's slots
        parts, shares = [], min(self.workers, len(self.slots)) or 1
        order = {"seed": self.seed, "shuffle": self.shuffle, "window_size": self.shuffle_buffer}
        for n in range(shares):
            slots = self.slots[n::shares]
            rows = stream.SlotRows(self.stream, slots, self.global_batch_size, state=self.progress, **order)
            parts.append(prefetch(in_process(rows) if self.workers else iter(rows), self.prefetch))

        # A step takes what they give together
        for part in zip(*parts):
            rows_of_parts, states, outcomes = zip(*part)
            rows = {slot: row for rows_of_part in rows_of_parts for slot, row in rows_of_part.items()}

            # Canvases are as long as the stream's rows may be, so that no rank asks another for its longest row
            step = []
            for slots in self.micro_batches(self.global_batch_size):
                batch = self.collate([rows[slot] for slot in slots], longest=self.stream.longest)
                sample = self.step * self.global_batch_size + torch.tensor(slots)
                step.append(batch | {"sample": sample, "epoch": 0})
            self.step, self.progress = self.step + 1, merged(states)
            self.counts = data.tally(sum(outcomes, Counter()))
            yield step

    @property
    def settings(self) -> dict:
        stream = self.stream
        reading = {"set": stream.name, "stage": stream.reading.stage, "max_length": stream.reading.max_length}
        batching = {"packing": [stream.pack_length, stream.block_length], "global_batch_size": self.global_batch_size}
        order = {"seed": self.seed, "shuffle_buffer": self.shuffle_buffer if self.shuffle else None}
        return reading | batching | order

    @property
    def state(self) -> dict:
        """What this rank adds to what it takes to go on after the last step that `batches` gave; JSON."""
        return {"step": self.step, **self.progress, **self.settings}

    def go_on(self, states: list[dict]) -> None:
        # Each rank's state has its own slots, and there may be fewer or more ranks now: we need all of ours
        self.step, self.progress = states[0]["step"], merged(states)
        missing = [slot for slot in self.slots if str(slot) not in self.progress["slots"]]
        if self.step and missing:
            raise ValueError(f"the state of a stream lacks slots {missing[:4]}: load the states of all its ranks")


def merged(states) -> dict:
    """Several states of SlotRows as one."""
    return {name: {key: state[name][key] for state in states for key in state[name]} for name in ("windows", "slots")}


# ---------------------------------------------------------------- ahead of time: a thread, a process


def prefetch(items: Iterator, depth: int) -> Iterator:
    """Iterator over `items`, of which a thread makes `depth` ahead; 0: no thread. What fails there is raised here."""
    if depth < 1:
        yield from items
        return
    pool, end = ThreadPoolExecutor(1), object()
    try:
        # For each item that is taken another is begun
        ahead = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def in_process(rows: stream.SlotRows) -> Iterator:
    """Iterator over `rows`, which a process of its own makes. What fails there is raised here."""
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs CUDA or threads is not safe
    receiving, sending = context.Pipe(duplex=False)
    worker = context.Process(target=_send_all, args=(rows, sending), daemon=True)
    worker.start()
    sending.close()  # ours: only the worker has the pipe open now, and so it ends with the worker
    try:
        while not isinstance(item := receiving.recv(), Exception):
            yield item
        raise item
    except EOFError:
        raise RuntimeError("the process that reads the data has died; was it killed for memory?") from None
    finally:
        worker.terminate()


def _send_all(rows: stream.SlotRows, pipe) -> None:
    os.setsid()  # a signal to the parent's group, as torchrun and Ctrl-C send, is the parent's to answer
    try:
        for item in rows:
            pipe.send(item)
    except BrokenPipeError:
        pass  # the parent has ended, perhaps killed
    except Exception as error:
        known = type(error) in (ValueError, FileNotFoundError, ConnectionError)
        pipe.send(error if known else RuntimeError(traceback.format_exc()))


# ---------------------------------------------------------------- what a run reads


def longest_answer(args, config: Config, loader) -> int | None:
    """Tokens of the longest answer that mdlm learns, which sampling needs a canvas for; None: not known, or no mdlm."""
    if args.stage != "sft" or args.streaming or config.objective != "mdlm":
        return None
    longest = 0
    for learnt in loader.rows.supervised:
        borders = np.flatnonzero(np.diff(np.r_[False, np.asarray(learnt, bool), False]))  # begin, end, begin, end, ...
        longest = max(longest, int((borders[1::2] - borders[::2]).max(initial=0)))
    return min(longest, int(loader.rows.lengths.max())) or None


class Loaders(NamedTuple):
    train: Loader | StreamLoader
    eval_rows: data.Rows | None  # None: no evaluation
    collate: Callable  # from rows to a batch
    counts: Counter  # of the rows read
    about: str  # a line about all that


def build_loaders(args, config: Config, tokenizer: Tokenizer, ranks: Ranks) -> Loaders:
    """What a training run reads. args: train.Settings."""
    reading, hold_out = data.Reading(**args.only(data.Reading)), args.eval_strategy != "no"
    collate = collate_for(args, config, tokenizer, ranks.device.type)

    def load(split: str) -> data.Rows:
        if args.load_preprocessed_data:
            return data.load_preprocessed(args.dataset_args, split, tokenizer, reading)
        rows_of = stream.load_split if args.streaming else data.load_split
        how = {"num_proc": args.num_proc, "rows_of": rows_of, "hold_out": hold_out}
        return data.load(args.dataset_args, split, tokenizer, reading, **how)

    # The rows to evaluate on are few: those of a stream are a list, too
    eval_rows = load("validation") if hold_out else None
    about_eval = "no evaluation"
    if eval_rows is not None:
        first = "" if args.eval_rows is None else f"the first {min(args.eval_rows, len(eval_rows)):,} of "
        about_eval = f"{first}{len(eval_rows):,} rows to evaluate on"

    # What both loaders need
    batches = {"seed": args.seed, "collate": collate, "rank": ranks.rank, "world_size": ranks.world_size, "prefetch": 2}
    batches["micro_batch_size"] = args.per_device_train_batch_size
    batches["accumulation"] = args.gradient_accumulation_steps

    # bd3lm fills every packed document up to whole blocks, with EOS
    blocks = {"block_length": config.block_length, "eos_id": tokenizer.eos_id} if config.objective == "bd3lm" else {}
    pack_length = args.pad_to or filled(args.max_length, config.block_length if blocks else None)

    # A stream reads while training runs
    if args.streaming:
        packing = {"pack_length": pack_length, **blocks} if args.packing else {}
        endless = stream.Stream(args.dataset_args, tokenizer, reading, hold_out=hold_out, **packing)
        shuffling = {"shuffle_buffer": args.shuffle_buffer, "workers": args.dataloader_num_workers}
        loader = StreamLoader(stream=endless, **shuffling, **batches)
        about = f"{args.dataset_args}: streamed; {about_eval}"
        return Loaders(loader, eval_rows, collate, Counter(), about)

    # Else all rows are there. How much of a batch is padding, and how much packing leaves of it
    batches["group_by_length"] = args.stage == "sft" and args.group_by_length
    loader = Loader(rows=load("train"), **batches)
    multiple = math.lcm(collate.keywords["block_length"] or 1, collate.keywords["multiple"])
    canvas = {"block_length": multiple, "length": args.pad_to}
    padding = f"{1 - loader.useful_share(**canvas):.0%} of each batch is padding"
    if args.packing:
        loader = Loader(rows=data.Packed(loader.rows, pack_length, **blocks), **batches)
        padding += f", packed {1 - loader.useful_share(**canvas):.0%}"

    # A line that says so
    rows = loader.rows
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items())
    about = f"{args.dataset_args}: {len(rows):,} rows of {rows.lengths.mean():.0f} tokens on average ({counts}); "
    return Loaders(loader, eval_rows, collate, rows.counts, f"{about}{padding}; {about_eval}")

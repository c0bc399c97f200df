"""What a training run reads: the loader that its options ask for, and how rows become a batch for its objective."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np

import data
import stream
from model import Config
from options import Count, Natural, Options, Rows, Seed
from parallel import Ranks
from tokenizer import Tokenizer


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


def collate_for(args, config: Config, tokenizer: Tokenizer):
    """data.collate as the stage and the objective want it: see its docstring for the two ways to fill a chat row.
    args: train.Settings."""
    chat = args.stage == "sft"
    end_id = tokenizer.pad_id if config.objective == "mdlm" else tokenizer.eos_id
    if chat and config.objective != "ar" and end_id is None:
        way_out = "name an eos_token of its vocabulary in tokenizer_config.json"
        raise ValueError(f"{config.objective} fills up answers with EOS, and the tokenizer has none; {way_out}")
    options = {
        "pad_id": tokenizer.pad_id or 0,  # any id pads, where none is learnt
        "train_on_padding": chat and config.objective == "mdlm",
        "block_length": config.block_length if chat and config.objective == "bd3lm" else None,
        "eos_id": tokenizer.eos_id,
        "length": args.pad_to,
    }
    return lambda rows, longest=0: data.collate(rows, longest=longest, **options)


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
    """What a run reads: batches to train on, rows to evaluate on (None: no evaluation), how rows become a batch, counts
    of the rows read, and a line about all that."""

    train: data.Loader | stream.StreamLoader
    eval_rows: data.Rows | None
    collate: Callable
    counts: Counter
    about: str


def build_loaders(args, config: Config, tokenizer: Tokenizer, ranks: Ranks) -> Loaders:
    """args: train.Settings."""
    reading = data.Reading(**args.only(data.Reading))
    collate = collate_for(args, config, tokenizer)
    batches = {
        "micro_batch_size": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "collate": collate,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "prefetch": 2,
    }

    def load(split: str) -> data.Rows:
        if args.load_preprocessed_data:
            return data.load_preprocessed(args.dataset_args, split, tokenizer, reading)
        rows_of = stream.load_split if args.streaming else data.load_split
        return data.load(args.dataset_args, split, tokenizer, reading, num_proc=args.num_proc, rows_of=rows_of)

    eval_rows = None if args.eval_strategy == "no" else load("validation")
    about_eval = "no evaluation" if eval_rows is None else f"{len(eval_rows):,} rows to evaluate on"

    # bd3lm fills every packed document up to whole blocks, with EOS.
    blocks = {"block_length": config.block_length, "eos_id": tokenizer.eos_id} if config.objective == "bd3lm" else {}
    pack_length = (args.pad_to or args.max_length) if args.packing else None
    if args.streaming:
        packing = {"pack_length": pack_length, **blocks} if args.packing else {}
        source = stream.Stream(args.dataset_args, tokenizer, reading, **packing)
        workers = {"shuffle_buffer": args.shuffle_buffer, "workers": args.dataloader_num_workers}
        loader = stream.StreamLoader(source, **workers, **batches)
        return Loaders(loader, eval_rows, collate, Counter(), f"{args.dataset_args}: streamed; {about_eval}")

    batches["group_by_length"] = args.stage == "sft" and args.group_by_length
    loader = data.Loader(load("train"), **batches)
    canvas = {"block_length": blocks.get("block_length"), "length": args.pad_to}
    padding = [f"{1 - loader.useful_share(**canvas):.0%} of each batch is padding"]
    if args.packing:
        loader = data.Loader(data.Packed(loader.rows, pack_length, **blocks), **batches)
        padding.append(f"packed {1 - loader.useful_share(**canvas):.0%}")
    rows = loader.rows
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.counts.items())
    about = f"{args.dataset_args}: {len(rows):,} rows of {rows.lengths.mean():.0f} tokens on average ({counts}); "
    return Loaders(loader, eval_rows, collate, rows.counts, f"{about}{', '.join(padding)}; {about_eval}")

"""Data: a dataset spec in, padded batches of tokens out. Knows nothing of noise, objectives or models.

    parse_specs -> load_split -> tokenize (chat or plain text) -> Rows -> Loader, which collates

A dataset spec is `name[key:value,...]`, several of them joined by `+` or `|`. A name is a dataset on the Hub, a local
file (.jsonl .json .txt .parquet) or directory, looked up as it stands and under $BASE_DATASETS_DIR, or a builtin set,
which needs no network: `builtin/sums` (chat), `builtin/stdlib` (plain text). Keys:

    train:5000       at most so many rows of a split (train, validation, test); without a number all of them
    name:CONFIG      the configuration of a Hub dataset
    lang:LANGUAGE    rows in this programming language
"""

import inspect
import os
import random
import re
import sysconfig
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------- specs


class Spec(NamedTuple):
    name: str
    config: str | None
    lang: str | None
    limits: dict[str, int | None]  # split -> row limit; None: all rows


def parse_specs(text: str) -> list[Spec]:
    """The sets that a dataset spec names, in its order. ValueError on bad grammar."""
    specs = []
    for part in re.split(r"[+|](?![^\[]*\])", text):  # not where the next bracket closes: that is inside [...]
        match = re.fullmatch(r"\s*([^\[\]]*[^\[\]\s])\s*(?:\[([^\[\]]*)\]\s*)?", part)
        if not match:
            raise ValueError(f"dataset spec {part!r} in {text!r} is not of the form name[key:value,...]")
        name, items = match[1], [item.strip() for item in match[2].split(",")] if match[2] else []
        options, limits = {}, {}
        for item in items:
            key, _, value = (piece.strip() for piece in item.partition(":"))
            if key in options or key in limits:
                raise ValueError(f"{key!r} occurs twice in dataset spec {part!r}")
            if key in ("name", "lang") and value:
                options[key] = value
            elif key in SPLITS and item == key:
                limits[key] = None
            elif key in SPLITS and re.fullmatch(r"[1-9](_?[0-9])*", value):
                limits[key] = int(value)
            else:
                raise ValueError(
                    f"{item!r} in dataset spec {part!r}: expected train, validation or test, alone or with :ROWS "
                    "(at least 1), or name:CONFIG, or lang:LANGUAGE"
                )
        specs.append(Spec(name, options.get("name"), options.get("lang"), limits))
    return specs


# ---------------------------------------------------------------- row sources: a list of dicts or a datasets.Dataset


def load_split(spec: Spec, split: str):
    """The rows of one split: a list of dicts (builtin sets) or a `datasets.Dataset`, cut to the spec's limit.

    validation and test stand in for each other. Where a set has neither, a random 5 % of its training rows are both,
    and are held out of train. The draw is part of the set's identity: no seed of a run enters, so what one program
    trained on no other takes for test. Limits apply after it.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if spec.lang is not None:
        raise ValueError(f"{spec.name}[lang:{spec.lang}]: the lang filter is not supported yet; leave it out")
    found = split
    if spec.name.startswith("builtin/"):
        if spec.name not in BUILTIN:
            raise ValueError(f"unknown dataset {spec.name}; the builtin sets are {', '.join(BUILTIN)}")
        if spec.config is not None:
            raise ValueError(f"{spec.name} has no configurations; leave name:{spec.config} out")
        rows = BUILTIN[spec.name](split)
    else:
        splits = _load_dataset(spec)
        if "train" in splits and splits.keys().isdisjoint(SPLITS[1:]):
            if len(splits["train"]) < 2:
                raise ValueError(f"{spec.name} has no test split, and with {len(splits['train'])} row none can be made")
            splits = splits["train"].train_test_split(test_size=0.05, seed=42)
        candidates = ("train",) if split == "train" else (split, "validation", "test")
        found = next((name for name in candidates if name in splits), None)
        if found is None:
            raise ValueError(f"{spec.name} has no split {split} (it has {', '.join(splits)})")
        rows = splits[found]
    if len(rows) == 0:
        raise ValueError(f"{spec.name} has no rows in its split {found}")
    limit = spec.limits.get(split, spec.limits.get(found))
    if limit is None or limit >= len(rows):
        return rows
    return rows[:limit] if isinstance(rows, list) else rows.select(range(limit))


def _load_dataset(spec: Spec):
    """datasets.DatasetDict of all splits of a Hub dataset, a local file (one split, train) or a local directory."""
    import datasets  # here, not above: it takes a second, and the builtin sets do not need it

    builders = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
    places = [Path(root, spec.name).expanduser() for root in ("", os.environ.get("BASE_DATASETS_DIR", ""))]
    path = next((place for place in places if place.exists()), None)
    if path is None and (Path(spec.name).suffix in builders or spec.name[0] in "./~"):
        raise FileNotFoundError(f"no data at {' or '.join(dict.fromkeys(map(str, places)))}")
    if path is not None and path.is_file():
        if path.suffix not in builders:
            raise ValueError(f"cannot read {path}: expected one of {' '.join(builders)}")
        if spec.config is not None:
            raise ValueError(f"{path} is a file and has no configurations; leave name:{spec.config} out")
        lines = {"keep_linebreaks": True} if path.suffix == ".txt" else {}  # a row is a line, with its end
        return datasets.load_dataset(builders[path.suffix], data_files=str(path), **lines)
    try:
        return datasets.load_dataset(str(path or spec.name), spec.config)
    except ValueError as error:  # such as a configuration that is missing or unknown
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load {spec.name}: {reason}; a config is named by {spec.name}[name:CONFIG]") from error


def _columns(rows) -> list[str]:
    return list(rows[0]) if isinstance(rows, list) else rows.column_names


# ---------------------------------------------------------------- builtin sets


def stdlib_rows(split: str) -> list[dict]:
    """Plain text: the source files of the running Python's standard library, in order of path; every 20th is test."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [path for path in paths if skip.isdisjoint(path.split("/"))]
    rows = []
    for i, path in enumerate(paths):
        if split == {19: "test", 9: "validation"}.get(i % 20, "train"):
            try:
                rows.append({"text": (root / path).read_text(encoding="utf-8")})
            except UnicodeDecodeError:
                continue
    return rows


SUMS = {"train": 60_000, "validation": 500, "test": 2_000}  # rows
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # capitals: merges learnt from the questions' wording never touch the payload


def _word(rng) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))


def _add(rng):
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{min(a, b)}+{max(a, b)}", f"What is {a} + {b}?", str(a + b)


def _reverse(rng):
    word = _word(rng)
    return word, f"Reverse the word {word}.", word[::-1]


def _sort(rng):
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    answer = "".join(sorted(digits))
    return answer, f"Sort the digits {digits}.", answer


def _count(rng):
    letter, n = rng.choice(LETTERS), rng.randint(3, 6)
    places = rng.sample(range(n), rng.choice((0, 1, 1, 2, 2, 3)))  # 0 to 3 times, seldom 0
    others = LETTERS.replace(letter, "")
    word = "".join(letter if i in places else rng.choice(others) for i in range(n))
    return word, f"How many times does {letter} occur in {word}?", str(len(places))


def _largest(rng):
    a, b, c = (rng.randrange(100) for _ in range(3))
    return str(sorted((a, b, c))), f"Which is the largest of {a}, {b} and {c}?", str(max(a, b, c))


# Of a generator of random numbers, (key, question, answer). Questions that share a key share a split.
TASKS = {"add": _add, "reverse": _reverse, "sort": _sort, "count": _count, "largest": _largest}


def sums_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"} of five small tasks in turn; the same at every call.

    A hash of a question's key decides its split (10 % test, 2 % validation), so no question, nor its mirror image
    (b + a; the same digits or numbers in another order; a word, in reverse and count alike), is in two splits. In
    validation and test no question occurs twice.
    """
    rng = random.Random(f"sums {split}")
    rows, seen, tasks = [], set(), list(TASKS)
    while len(rows) < SUMS[split]:
        task = tasks[len(rows) % len(tasks)]
        key, question, answer = TASKS[task](rng)
        bucket = zlib.crc32(key.encode()) % 50
        if split != ("test" if bucket < 5 else "validation" if bucket == 5 else "train"):
            continue
        if split != "train":
            if question in seen:
                continue
            seen.add(question)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"task": task, "messages": messages})
    return rows


BUILTIN = {"builtin/sums": sums_rows, "builtin/stdlib": stdlib_rows}


# ---------------------------------------------------------------- from a row to messages or text


def _exchange(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _alpaca(row) -> list[dict]:
    instruction, context, output = ((row[key] or "").strip() for key in ("instruction", "input", "output"))
    return _exchange(f"{instruction}\n\n{context}" if context else instruction, output)


# By the columns they need; the first that a set has all of is its format.
TO_MESSAGES = {
    ("messages",): lambda row: row["messages"],
    ("instruction", "input", "output"): _alpaca,
    ("instruction", "output"): lambda row: _exchange(row["instruction"], row["output"]),
    ("question", "answer"): lambda row: _exchange(row["question"], row["answer"]),
}


def _to_messages(rows):
    """The function from a row to its messages, or None where the set is no chat."""
    return next((to for needed, to in TO_MESSAGES.items() if set(needed) <= set(_columns(rows))), None)


def _content(spec: Spec, rows, stage: str, text_field: str):
    """The function from a row to what `stage` trains on: text (pt) or messages (sft)."""
    present = ", ".join(_columns(rows))
    if stage == "pt":
        if text_field not in _columns(rows):
            way = "it is chat, for --stage sft" if _to_messages(rows) else "name one by --text_field"
            raise ValueError(f"{spec.name} has no column {text_field!r} (it has {present}); {way}")
        return lambda row: row[text_field]
    if stage != "sft":
        raise ValueError(f"stage {stage!r}: expected pt (plain text) or sft (chat)")
    to_messages = _to_messages(rows)
    if to_messages is None:
        known = " or ".join("/".join(needed) for needed in TO_MESSAGES)
        raise ValueError(
            f"{spec.name} has no column 'messages' (it has {present}); sft needs {known}; plain text is for --stage pt"
        )
    return to_messages


def raw(dataset_args: str, split: str):
    """Iterator over a split's rows as dicts: chat with `messages`, whatever its columns were, plain text as it is."""
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, split)
        to_messages = _to_messages(rows)
        for row in rows:
            yield {**row, "messages": to_messages(row)} if to_messages else dict(row)


def texts(dataset_args: str, stage: str, text_field: str = "text"):
    """Iterator over the training split's strings, texts (pt) or messages' contents (sft), to train a tokenizer on."""
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, "train")
        content = _content(spec, rows, stage, text_field)
        for row in rows:
            yield from [content(row)] if stage == "pt" else (message["content"] for message in content(row))


# ---------------------------------------------------------------- tokens


class Encoded(NamedTuple):
    tokens: list[int]  # empty where the row is dropped
    supervised: list[bool]
    outcome: str  # kept, cut, or dropped:REASON


def tokenize_chat(messages, tokenizer, *, max_length, truncation="right", mask_prompt_loss=True) -> Encoded:
    """One conversation under the chat template; only the last assistant turn is supervised, or everything.

    A row longer than max_length is cut on the right, or dropped (truncation filter). One that then has nothing to
    learn, because its prompt alone fills max_length, is dropped.
    """
    if not messages or messages[-1]["role"] != "assistant":
        return Encoded([], [], "dropped:no assistant turn at the end")
    tokens, supervised = tokenizer.render(messages)
    if not mask_prompt_loss:
        supervised = [True] * len(tokens)
    if len(tokens) <= max_length:
        return Encoded(tokens, supervised, "kept")
    if truncation == "filter":
        return Encoded([], [], "dropped:longer than max_length")
    if not any(supervised[:max_length]):
        return Encoded([], [], "dropped:prompt fills max_length")
    return Encoded(tokens[:max_length], supervised[:max_length], "cut")


def tokenize_text(text, tokenizer, *, insert_eos=True) -> Encoded:
    """One text, all of it supervised, ending in EOS if wanted (not in two, where the text ends in one itself)."""
    if text is None:
        return Encoded([], [], "dropped:no text")
    tokens = tokenizer.encode(text)
    if insert_eos and tokens[-1:] != [tokenizer.eos_id]:
        tokens.append(tokenizer.eos_id)
    return Encoded(tokens, [True] * len(tokens), "kept")


class Rows:
    """Rows of tokens, `rows[i]` = {"tokens": (T,) int64, "supervised": (T,) bool} as numpy arrays.

    All rows are slices of one stream, whose chunks lie where they were read (for a `datasets.Dataset` in its
    memory-mapped cache); a chat row is a whole conversation, a row of plain text a piece across the texts' borders.
    `lengths` (n,) int64. `counts`: read, kept, cut and dropped:REASON in rows of the source; tail tokens dropped.
    """

    def __init__(self, tokens: list[np.ndarray], supervised: list[np.ndarray], bounds: np.ndarray, counts: Counter):
        """tokens, supervised: the stream's chunks; bounds (n + 1,): row i is stream[bounds[i]:bounds[i + 1]]."""
        self.tokens, self.supervised, self.bounds, self.counts = tokens, supervised, bounds, counts
        self.lengths = np.diff(bounds)
        self.starts = np.cumsum([0, *map(len, tokens)])[:-1]  # where in the stream each chunk starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        begin, end = self.bounds[:-1][i], self.bounds[1:][i]
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right") - 1
        slices = [(c, slice(max(begin - self.starts[c], 0), end - self.starts[c])) for c in range(first, last + 1)]
        return {
            "tokens": np.concatenate([self.tokens[c][s] for c, s in slices]).astype(np.int64),
            "supervised": np.concatenate([self.supervised[c][s] for c, s in slices]).astype(np.bool_),
        }


def load(
    dataset_args: str,
    *,
    stage: str,
    split: str,
    tokenizer,
    max_length: int,
    text_field: str = "text",
    insert_eos: bool = True,
    drop_tail: bool = True,
    truncation: str = "right",
    mask_prompt_loss: bool = True,
    num_proc: int = 1,
) -> Rows:
    """The rows of one split of all sets of a spec, one after another, none longer than max_length.

    pt reads plain text (text_field, insert_eos, drop_tail): texts are joined over the whole spec and cut into pieces of
    max_length; only the last may be shorter, and drop_tail drops it. sft reads chat (truncation, mask_prompt_loss).
    num_proc processes tokenise what comes through `datasets`, which keeps the result in its cache.
    """
    if max_length < 1:
        raise ValueError(f"max_length {max_length}: expected at least 1")
    if truncation not in ("right", "filter"):
        raise ValueError(f"truncation {truncation!r}: expected right (cut) or filter (drop)")
    if stage == "pt" and insert_eos and tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no EOS token to put between texts; pass --insert_eos False")

    if stage == "pt":
        encode = partial(tokenize_text, tokenizer=tokenizer, insert_eos=insert_eos)
    else:
        options = {"max_length": max_length, "truncation": truncation, "mask_prompt_loss": mask_prompt_loss}
        encode = partial(tokenize_chat, tokenizer=tokenizer, **options)
    # The cache of `datasets` knows functions by name alone; given their source as an argument, it notices an edit.
    sources = [inspect.getsource(inspect.getmodule(thing)) for thing in (load, type(tokenizer))]

    counts, tokens, supervised, lengths = Counter(), [], [], []
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, split)
        content = _content(spec, rows, stage, text_field)
        whole = partial(_encode, content=content, encode=encode, sources=sources)
        for chunk, mask, sizes, outcomes in _encoded(rows, whole, num_proc):
            tokens.append(chunk)
            supervised.append(mask)
            lengths.append(sizes)
            counts.update(outcomes)
    counts["read"] = counts.total()
    counts["kept"] += counts["cut"]

    lengths = np.concatenate(lengths)
    bounds = np.cumsum([0, *lengths[lengths > 0]])
    if stage == "pt":
        total = bounds[-1]
        bounds = np.append(np.arange(0, total, max_length), total)
        if drop_tail and total % max_length:
            counts["tail tokens dropped"] = int(total - bounds[-2])
            bounds = bounds[:-1]
    if len(bounds) == 1:
        why = ", ".join(f"{reason} {n}" for reason, n in counts.items())
        raise ValueError(f"{dataset_args} leaves no row to {split} with max_length {max_length}: {why}")
    return Rows(tokens, supervised, bounds, counts)


def _encode(row, *, content, encode, sources) -> dict:
    tokens, supervised, outcome = encode(content(row))
    return {"tokens": np.array(tokens, np.int32), "supervised": np.array(supervised, np.uint8), "outcome": outcome}


def _encoded(rows, encode, num_proc: int):
    """Iterator over chunks of encoded rows: (tokens, supervised: end to end; the rows' lengths, the rows' outcomes)."""
    if isinstance(rows, list):
        encoded = [encode(row) for row in rows]
        flat = [np.concatenate([row[key] for row in encoded]) for key in ("tokens", "supervised")]
        yield *flat, np.array([len(row["tokens"]) for row in encoded]), [row["outcome"] for row in encoded]
        return
    from datasets import Features, Sequence, Value

    features = {"tokens": Sequence(Value("int32")), "supervised": Sequence(Value("uint8")), "outcome": Value("string")}
    encoded = rows.map(
        encode,
        features=Features(features),
        remove_columns=rows.column_names,
        num_proc=num_proc if num_proc > 1 else None,
        desc="tokenize",
    )
    for batch in encoded.data.to_batches():
        tokens, supervised, outcomes = (batch.column(key) for key in features)
        sizes = tokens.value_lengths().to_numpy()
        yield tokens.flatten().to_numpy(), supervised.flatten().to_numpy(), sizes, outcomes.to_pylist()


# ---------------------------------------------------------------- batches


def collate(
    rows, *, pad_id: int, train_on_padding=False, block_length=None, eos_id=None, length=None
) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right: tokens, document, position (B, T) int64, supervised (B, T) bool.

    T: the longest row, or `length`. document: 0, padding -1. Padding is not supervised, but for
    train_on_padding: padding is supervised and visible (document 0), which teaches where in a canvas an answer ends;
    block_length: each row is first extended by supervised eos_id to a multiple of it.
    """
    assert not (train_on_padding and block_length), "padding is trained on, or rows fill their blocks: not both"
    sizes = [len(row["tokens"]) for row in rows]
    filled = [-(-size // block_length) * block_length for size in sizes] if block_length else sizes
    T = max(filled) if length is None else length
    if max(filled) > T:
        raise ValueError(f"a row of {max(filled)} tokens exceeds the canvas of {T}; lower max_length or raise --pad_to")
    tokens = torch.full((len(rows), T), pad_id)  # (B, T)
    supervised = torch.full((len(rows), T), train_on_padding)  # (B, T)
    document = torch.full((len(rows), T), 0 if train_on_padding else -1)  # (B, T)
    for b, (row, size, end) in enumerate(zip(rows, sizes, filled)):
        tokens[b, :size] = torch.from_numpy(row["tokens"])
        supervised[b, :size] = torch.from_numpy(row["supervised"])
        document[b, :end] = 0
        if end > size:
            tokens[b, size:end] = eos_id
            supervised[b, size:end] = True
    position = torch.arange(T).repeat(len(rows), 1)  # (B, T)
    return {"tokens": tokens, "supervised": supervised, "document": document, "position": position}


class Loader:
    """Batches of `rows`, epoch by epoch. Its whole state is (epoch, step): nothing else is needed to resume.

    An optimizer step takes a global batch of micro_batch_size * accumulation rows, the epoch's last step what is left.
    The global batch is collated at once, so that its canvas does not depend on how it is cut into micro-batches (nor
    will it on how many ranks share them). group_by_length: within stretches of 50 global batches, long rows come first.
    """

    def __init__(
        self,
        rows,
        *,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool = True,
        group_by_length: bool = False,
        collate,
    ):
        """collate: a function of a list of rows, such as functools.partial(data.collate, pad_id=...)."""
        if micro_batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch size {micro_batch_size}, accumulation {accumulation}: both must be at least 1")
        self.rows, self.collate = rows, collate
        self.micro_batch_size, self.global_batch_size = micro_batch_size, micro_batch_size * accumulation
        self.seed, self.shuffle, self.group_by_length = seed, shuffle, group_by_length
        self.steps_per_epoch = -(-len(rows) // self.global_batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) The rows' numbers as that epoch visits them."""
        n = len(self.rows)
        order = np.random.default_rng((self.seed, epoch)).permutation(n) if self.shuffle else np.arange(n)
        if self.group_by_length:
            stretch = 50 * self.global_batch_size
            stretches = [order[i : i + stretch] for i in range(0, n, stretch)]
            order = np.concatenate([s[np.argsort(-self.rows.lengths[s], kind="stable")] for s in stretches])
        return order

    def epoch(self, epoch: int, start: int = 0):
        """Iterator over that epoch's optimizer steps from step `start` on; a step is a list of micro-batches.

        A micro-batch is a dict as collate gives, and "sample" (B,) int64, each row's place in the epoch's order, and
        "epoch", an int.
        """
        order = self.order(epoch)
        for begin in range(start * self.global_batch_size, len(order), self.global_batch_size):
            picked = order[begin : begin + self.global_batch_size]
            batch = self.collate([self.rows[i] for i in picked])
            batch["sample"] = torch.arange(begin, begin + len(picked))
            cuts = range(0, len(picked), self.micro_batch_size)
            yield [{k: v[i : i + self.micro_batch_size] for k, v in batch.items()} | {"epoch": epoch} for i in cuts]

    def __iter__(self):
        """One pass: epoch 0."""
        return self.epoch(0)

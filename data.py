"""Data: a dataset spec in, padded batches of tokens out. Knows nothing of noise, objectives or models.

    parse_specs -> load_split -> tokenize (chat or plain text) -> Rows (-> Packed) -> Loader, which collates

stream.py does the same without end, for sets that are read and tokenised while training runs.

A dataset spec is `name[key:value,...]`, several of them joined by `+` or `|`. A name is a dataset on the Hub, a local
file (.jsonl .json .txt .parquet) or directory, looked up as it stands and under $BASE_DATASETS_DIR, or a builtin set,
which needs no network: `builtin/sums` (chat), `builtin/stdlib` (plain text). A name or value that holds one of
`+ | [ ] ,` is put in quotes: `'runs/a+b.jsonl'[train:10]`. Keys:

    train:5000       at most so many rows of a split (train, validation, test); without a number all of them
    name:CONFIG      the configuration of a Hub dataset
    lang:LANGUAGE    chat rows whose answer contains this word, as an answer with a ```python block does

`python data.py --help`: tokenise a set once, for many runs, and look at it.
"""

from cli import Parser, check_place, one_line_errors, place, switch

import argparse
import glob
import hashlib
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import queue
import random
import re
import sys
import sysconfig
import threading
import traceback
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tokenizer import Tokenizer, why_invalid

SPLITS = ("train", "validation", "test")
SPEC_HELP = (  # of every program's --dataset_args
    'data set, name[key:value,...], several joined by "+": Hub ids, local files (.jsonl .json .txt .parquet), '
    "builtin/sums (chat), builtin/stdlib (text). Keys: train:5000 (row limit of a split), name:CONFIG, lang:LANGUAGE"
)


# ---------------------------------------------------------------- specs


class Spec(NamedTuple):
    name: str
    config: str | None
    lang: str | None
    limits: dict[str, int | None]  # split -> row limit; None: all rows


QUOTED = r"""(?:"[^"]*"|'[^']*')"""
PART = re.compile(  # a name, perhaps items in brackets, and what follows it: a sign that joins, or the end
    rf"""\s*({QUOTED}|[^\[\]+|\s"'](?:[^\[\]+|]*[^\[\]+|\s])?)\s*(?:\[((?:{QUOTED}|[^\[\]"'])*)\]\s*)?([+|]|$)"""
)


def parse_specs(text: str) -> list[Spec]:
    """The sets that a dataset spec names, in its order. ValueError on bad grammar."""
    specs, joined, end = [], True, 0
    while joined:
        match = PART.match(text, end)
        if not match:
            raise ValueError(
                f"dataset spec {text[end:]!r} in {text!r} is not of the form name[key:value,...]; a name that holds "
                "one of + | [ ] goes in quotes"
            )
        part, joined, end = match[0], match[3], match.end()
        items = [item.strip() for item in re.split(rf",(?=(?:{QUOTED}|[^\"'])*$)", match[2])] if match[2] else []
        options, limits = {}, {}
        for item in items:
            key, _, value = (piece.strip() for piece in item.partition(":"))
            if key in options or key in limits:
                raise ValueError(f"{key!r} occurs twice in dataset spec {part!r}")
            if key in ("name", "lang") and _unquoted(value):
                options[key] = _unquoted(value)
            elif key in SPLITS and item == key:
                limits[key] = None
            elif key in SPLITS and re.fullmatch(r"[1-9](_?[0-9])*", value):
                limits[key] = int(value)
            else:
                raise ValueError(
                    f"{item!r} in dataset spec {part!r}: expected train, validation or test, alone or with :ROWS "
                    "(at least 1), or name:CONFIG, or lang:LANGUAGE"
                )
        if not (name := _unquoted(match[1])):
            raise ValueError(f"dataset spec {part!r} has an empty name")
        specs.append(Spec(name, options.get("name"), options.get("lang"), limits))
    if len(specs) > 1 and Path(text).exists():
        raise ValueError(
            f"{text} is there, but reads as {len(specs)} data sets; put quotes around it, within the shell's"
        )
    return specs


def _unquoted(text: str) -> str:
    return text[1:-1] if re.fullmatch(QUOTED, text) else text


# ---------------------------------------------------------------- row sources: a list of dicts or a datasets.Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
# Of sets with several configurations, by the last part of their names: what is read where a spec names none.
DEFAULT_CONFIG = {"smoltalk": "all"}
ALL_CONFIGS = ("opc-sft-stage1", "opc-sft-stage2")


def load_split(spec: Spec, split: str, *, num_proc: int = 1):
    """The rows of one split: a list of dicts (builtin sets) or a `datasets.Dataset`, cut to the spec's limit.

    validation and test stand in for each other. Where a set has neither, a random 5 % of its training rows are both,
    and are held out of train. The draw is part of the set's identity: no seed of a run enters, so what one program
    trained on no other takes for test. lang filters what is left, and limits apply after that.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    found = split
    if spec.name.startswith("builtin/"):
        rows = builtin_rows(spec, split)
    else:
        import datasets  # here, not above: it takes a second, and the builtin sets do not need it

        parts = load_splits(spec, streaming=False)
        splits = {name: datasets.concatenate_datasets(sets) for name, sets in parts.items()}
        if lacks_test(splits):
            if len(splits["train"]) < 2:
                raise ValueError(f"{spec.name} has no test split, and with {len(splits['train'])} row none can be made")
            splits = splits["train"].train_test_split(test_size=0.05, seed=42)
        found = find_split(spec, splits, split)
        rows = splits[found]
    if len(rows) == 0:
        raise ValueError(f"{spec.name} has no rows in its split {found}; name a set that has some")
    if spec.lang is not None:
        says = answer_filter(spec, _columns(rows))
        if isinstance(rows, list):
            rows = [row for row in rows if says(row)]
        else:
            rows = rows.filter(says, num_proc=num_proc if num_proc > 1 else None, desc=f"lang:{spec.lang}")
        if len(rows) == 0:
            raise ValueError(f"{spec.name}[lang:{spec.lang}] has no rows: no answer in {found} contains {spec.lang!r}")
    limit = limit_of(spec, split, found)
    if limit is None or limit >= len(rows):
        return rows
    return rows[:limit] if isinstance(rows, list) else rows.select(range(limit))


def builtin_rows(spec: Spec, split: str) -> list[dict]:
    if spec.name not in BUILTIN:
        raise ValueError(f"unknown dataset {spec.name}; the builtin sets are {', '.join(BUILTIN)}")
    if spec.config is not None:
        raise ValueError(f"{spec.name} has no configurations; leave name:{spec.config} out")
    return BUILTIN[spec.name](split)


def lacks_test(splits) -> bool:
    """Whether rows must be held out: there is train, and nothing to test on."""
    return "train" in splits and splits.keys().isdisjoint(SPLITS[1:])


def find_split(spec: Spec, splits, split: str) -> str:
    """The split of a set that serves as `split`."""
    candidates = ("train",) if split == "train" else (split, "validation", "test")
    found = next((name for name in candidates if name in splits), None)
    if found is None:
        raise ValueError(f"{spec.name} has no split {split} (it has {', '.join(splits)})")
    return found


def limit_of(spec: Spec, split: str, found: str) -> int | None:
    return spec.limits.get(split, spec.limits.get(found))


def load_splits(spec: Spec, *, streaming: bool) -> dict[str, list]:
    """The splits of a Hub dataset, a local file (one split, train) or directory: of each, what `datasets` loads of
    every configuration asked for. Splits that are named train_sft and test_sft are train and test."""
    import datasets

    places = [Path(root, spec.name).expanduser() for root in ("", os.environ.get("BASE_DATASETS_DIR", ""))]
    path = next((place for place in places if place.exists()), None)
    if path is None and (Path(spec.name).suffix in BUILDERS or spec.name[0] in "./~"):
        raise FileNotFoundError(
            f"no data at {' or '.join(dict.fromkeys(map(str, places)))}; expected a file, a directory, a Hub id or a "
            f"builtin set ({', '.join(BUILTIN)})"
        )
    load = partial(datasets.load_dataset, streaming=streaming)
    if path is not None and path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"cannot read {path}: expected one of {' '.join(BUILDERS)}")
        if spec.config is not None:
            raise ValueError(f"{path} is a file and has no configurations; leave name:{spec.config} out")
        load, configs = partial(load, BUILDERS[path.suffix], data_files=glob.escape(str(path))), [None]
    elif path is not None and re.search(r"[*?\[]", str(path)):
        raise ValueError(f"the directory {path} has one of * ? [ in its name; rename it, or name a file in it")
    elif path is not None and spec.config is None and _suffixes(path) == {".txt"}:
        load, configs = partial(load, "text", data_dir=str(path)), [None]
    else:
        source, short = str(path or spec.name), Path(spec.name).name
        load, configs = partial(load, source), [spec.config or DEFAULT_CONFIG.get(short)]
        if spec.config is None and short in ALL_CONFIGS:
            with told(spec.name):
                configs = datasets.get_dataset_config_names(source)
    if load.args[0] == "text":
        load = partial(load, keep_linebreaks=True)  # a row is a line, with its end
    with told(spec.name), silent("datasets"):
        loaded = [load(name=config) for config in configs]
        if len(loaded) > 1:  # configurations differ in their columns
            shared = set.intersection(*(set(_columns(rows)) for part in loaded for rows in part.values()))
            loaded = [{name: rows.select_columns(sorted(shared)) for name, rows in part.items()} for part in loaded]
    splits = {}
    for part in loaded:
        for name, rows in part.items():
            splits.setdefault(name.removesuffix("_sft"), []).append(rows)
    return splits


def _suffixes(directory: Path) -> set[str]:
    return {file.suffix for file in directory.rglob("*")} & BUILDERS.keys()


@contextmanager
def silent(name: str):
    """Keeps a package from logging what it then raises."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def told(name: str):
    """Tells what `datasets` and what it calls raise while they read a set as one line that names the set."""
    try:
        yield
    except StopIteration:
        raise ValueError(f"{name} has no rows; name a set that has some") from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which `datasets` loses while it ends its processes
            raise KeyboardInterrupt from None
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = " ".join(str(cause).split())
        if isinstance(cause, UnicodeDecodeError):
            raise ValueError(f"{name} is not UTF-8 text: {reason}; write it anew as UTF-8") from error
        if type(cause).__name__ == "DatasetNotFoundError":
            base = os.environ.get("BASE_DATASETS_DIR")
            under = f" or under {base}" if base else ""
            raise FileNotFoundError(f"{name}: no such file or directory here{under}, and {reason}") from error
        if isinstance(cause, ConnectionError):
            raise ConnectionError(
                f"cannot load {name}: {reason}; a local path or a builtin set needs no network"
            ) from error
        if isinstance(cause, ValueError) and "onfig" in reason:  # a configuration that is missing or unknown
            reason += f"; a config is named by {name}[name:CONFIG]"
        elif not isinstance(cause, (ValueError, OSError)):
            reason = f"{type(cause).__name__}: {reason}"
        kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else ValueError
        raise kind(f"cannot load {name}: {reason}") from error


def _columns(rows) -> list[str]:
    """Column names of a list of rows or a `datasets` set; of a stream that declares none, those of its first row."""
    names = None if isinstance(rows, list) else rows.column_names
    return list(next(iter(rows))) if names is None else names


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
    word = _word(rng)
    return word, f"How many letters are in {word}?", str(len(word))


def _largest(rng):
    a, b, c = (rng.randrange(100) for _ in range(3))
    return str(sorted((a, b, c))), f"Which is the largest of {a}, {b} and {c}?", str(max(a, b, c))


# Of a generator of random numbers, (key, question, answer). Questions that share a key share a split.
TASKS = {"add": _add, "reverse": _reverse, "sort": _sort, "count": _count, "largest": _largest}
SHARES = {"add": 5, "reverse": 1, "sort": 1, "count": 1, "largest": 2}  # of training rows: what is hard, more often


def sums_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"} of five small tasks, in turn or, to train on, by SHARES; the same at every call.

    A hash of a question's key decides its split (10 % test, 2 % validation), so no question, nor its mirror image
    (b + a; the same digits or numbers in another order; a word, in reverse and count alike), is in two splits. In
    validation and test no question occurs twice.
    """
    rng = random.Random(f"sums {split}")
    rows, seen, tasks = [], set(), list(TASKS)
    if split == "train":
        tasks = [task for task in TASKS for _ in range(SHARES[task])]
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


def _of_messages(row) -> list[dict]:
    return row.get("messages")


def _of_alpaca(row) -> list[dict]:
    fields = [row.get(key) for key in ("instruction", "input", "output")]
    instruction, context, output = (field.strip() if isinstance(field, str) else field for field in fields)
    both = isinstance(instruction, str) and context
    return _exchange(f"{instruction}\n\n{context}" if both else instruction, output)


def _of_instruction(row) -> list[dict]:
    return _exchange(row.get("instruction"), row.get("output"))


def _of_question(row) -> list[dict]:
    return _exchange(row.get("question"), row.get("answer"))


# By the columns they need; the first that a set has all of is its format.
TO_MESSAGES = {
    ("messages",): _of_messages,
    ("instruction", "input", "output"): _of_alpaca,
    ("instruction", "output"): _of_instruction,
    ("question", "answer"): _of_question,
}


def _to_messages(columns: list[str]):
    """The function from a row to its messages, or None where the set is no chat."""
    return next((to for needed, to in TO_MESSAGES.items() if set(needed) <= set(columns)), None)


def answer_filter(spec: Spec, columns: list[str]):
    """The predicate of a row that the spec's lang means."""
    to_messages = _to_messages(columns)
    if to_messages is None:
        raise ValueError(
            f"{spec.name}[lang:{spec.lang}]: lang looks into the answers of a chat, and this set is none (it has "
            f"{', '.join(columns)}); leave it out"
        )
    return partial(_answer_contains, to_messages=to_messages, word=spec.lang, sources=_sources(why_invalid))


def _answer_contains(row, *, to_messages, word: str, sources) -> bool:
    messages = to_messages(row)
    return why_invalid(messages, answered=True) is None and word in messages[-1]["content"]


def _sources(*others) -> list[str]:
    """The source of this module and those of `others`. The cache of `datasets` knows functions by name alone; given
    their source as an argument, it notices an edit."""
    return [inspect.getsource(inspect.getmodule(thing)) for thing in (_sources, *others)]


def _text(row, *, field: str):
    return row.get(field)


def content_of(spec: Spec, columns: list[str], stage: str, text_field: str):
    """The function from a row to what `stage` trains on: text (pt) or messages (sft)."""
    present = ", ".join(columns)
    to_messages = _to_messages(columns)
    if stage == "pt":
        if text_field not in columns:
            way = "it is chat, for --stage sft" if to_messages else "name one by --text_field"
            raise ValueError(f"{spec.name} has no column {text_field!r} (it has {present}); {way}")
        return partial(_text, field=text_field)
    if stage != "sft":
        raise ValueError(f"stage {stage!r}: expected pt (plain text) or sft (chat)")
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
        to_messages = _to_messages(_columns(rows))
        with told(spec.name):
            for row in rows:
                yield {**row, "messages": to_messages(row)} if to_messages else dict(row)


def texts(dataset_args: str, stage: str, text_field: str = "text"):
    """Iterator over the training split's strings, texts (pt) or roles and contents (sft), to train a tokenizer on."""
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, "train")
        content = content_of(spec, _columns(rows), stage, text_field)
        with told(spec.name):
            for found in map(content, rows):
                if stage == "pt" and isinstance(found, str):
                    yield found
                elif stage == "sft" and why_invalid(found, answered=True) is None:
                    yield from (text for message in found for text in (message["role"], message["content"]))


# ---------------------------------------------------------------- tokens


class Encoded(NamedTuple):
    tokens: list[int]  # empty where the row is dropped
    supervised: list[bool]
    outcome: str  # kept, cut, or dropped:REASON


def tokenize_chat(
    messages, tokenizer, *, max_length, truncation="right", mask_prompt_loss=True, train_on="last"
) -> Encoded:
    """One conversation under the chat template; the last or all assistant turns are supervised, or everything.

    A row longer than max_length is cut on the right, or dropped (truncation filter). One that then has nothing to
    learn, because its prompt alone fills max_length, is dropped, and so is one that the template does not take.
    """
    if reason := why_invalid(messages, answered=True):
        return Encoded([], [], f"dropped:{reason}")
    try:
        tokens, supervised = tokenizer.render(messages, train_on=train_on)
    except ValueError as error:
        reason = re.sub(r" \(.*?\)(?=;|$)", "", str(error))  # what is in brackets differs from row to row
        return Encoded([], [], f"dropped:{reason:.100}")
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
    if not isinstance(text, str):
        return Encoded([], [], "dropped:no text" if text is None else "dropped:not text")
    tokens = tokenizer.encode(text)
    if insert_eos and tokens[-1:] != [tokenizer.eos_id]:
        tokens.append(tokenizer.eos_id)
    return Encoded(tokens, [True] * len(tokens), "kept" if text else "empty")


PROBE = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]


def encoder(*, stage, tokenizer, max_length, insert_eos, truncation, mask_prompt_loss, train_on):
    """The function from what a row holds, text (pt) or messages (sft), to Encoded. ValueError on settings that no row
    could satisfy."""
    if max_length < 1:
        raise ValueError(f"max_length {max_length}: expected at least 1")
    if truncation not in ("right", "filter"):
        raise ValueError(f"truncation {truncation!r}: expected right (cut) or filter (drop)")
    if train_on not in ("last", "all"):
        raise ValueError(f"train_on {train_on!r}: expected last or all (assistant turns)")
    if stage == "pt":
        if insert_eos and tokenizer.eos_id is None:
            raise ValueError("the tokenizer has no EOS token to put between texts; pass --insert_eos False")
        return partial(tokenize_text, tokenizer=tokenizer, insert_eos=insert_eos)
    if tokenizer.template is None or train_on == "all":
        try:
            tokenizer.render(PROBE, train_on=train_on)
        except ValueError as error:
            raise ValueError(f"--stage sft --train_on {train_on}: {error}") from error
    return partial(
        tokenize_chat,
        tokenizer=tokenizer,
        max_length=max_length,
        truncation=truncation,
        mask_prompt_loss=mask_prompt_loss,
        train_on=train_on,
    )


def tally(outcomes: Counter) -> Counter:
    """Outcomes of rows as counts: rows read and kept besides."""
    counts = Counter(outcomes)
    counts["read"] = outcomes.total()
    counts["kept"] += outcomes["cut"] + outcomes["empty"]
    return counts


def nothing_learnt(name: str, split: str, max_length: int, counts: Counter) -> ValueError:
    why = ", ".join(f"{reason} {n}" for reason, n in counts.items())
    return ValueError(f"{name} leaves no row to {split} with max_length {max_length}: {why}")


class Rows:
    """Rows of tokens, `rows[i]` = {"tokens": (T,) int64, "supervised": (T,) bool} as numpy arrays.

    All rows are slices of one stream, whose chunks lie where they were read (for a `datasets.Dataset` in its
    memory-mapped cache); a chat row is a whole conversation, a row of plain text a piece across the texts' borders.
    `lengths` (n,) int64. `counts`: read, kept, cut, empty (kept, though it held no text) and dropped:REASON in rows of
    the source; tail tokens dropped. `useful`: tokens in all.
    """

    def __init__(self, tokens: list[np.ndarray], supervised: list[np.ndarray], bounds: np.ndarray, counts: Counter):
        """tokens, supervised: the stream's chunks; bounds (n + 1,): row i is stream[bounds[i]:bounds[i + 1]]."""
        self.tokens, self.supervised, self.bounds, self.counts = tokens, supervised, bounds, counts
        self.lengths, self.useful = np.diff(bounds), int(bounds[-1] - bounds[0])
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
    train_on: str = "last",
    num_proc: int = 1,
    rows_of=load_split,
) -> Rows:
    """The rows of one split of all sets of a spec, one after another, none longer than max_length.

    pt reads plain text (text_field, insert_eos, drop_tail): texts are joined over the whole spec and cut into pieces of
    max_length; only the last may be shorter, and drop_tail drops it. sft reads chat (truncation, mask_prompt_loss,
    train_on). num_proc processes tokenise what comes through `datasets`, which keeps the result in its cache.
    rows_of: what gives the rows of a set; stream.load_split for those that a stream leaves to evaluate on.
    """
    encode = encoder(
        stage=stage,
        tokenizer=tokenizer,
        max_length=max_length,
        insert_eos=insert_eos,
        truncation=truncation,
        mask_prompt_loss=mask_prompt_loss,
        train_on=train_on,
    )
    outcomes, tokens, supervised, lengths = Counter(), [], [], []
    for spec in parse_specs(dataset_args):
        rows = rows_of(spec, split, num_proc=num_proc)
        content = content_of(spec, _columns(rows), stage, text_field)
        whole = partial(_encode, content=content, encode=encode, sources=_sources(type(tokenizer)))
        of_set = Counter()
        with told(spec.name):
            for chunk, mask, sizes, ends in _encoded(rows, whole, num_proc):
                tokens.append(chunk)
                supervised.append(mask)
                lengths.append(sizes)
                of_set.update(ends)
        if not of_set["kept"] + of_set["cut"]:
            raise nothing_learnt(spec.name, split, max_length, tally(of_set))
        outcomes += of_set
    counts = tally(outcomes)

    lengths = np.concatenate(lengths)
    bounds = np.cumsum([0, *lengths[lengths > 0]])
    if stage == "pt":
        total = bounds[-1]
        bounds = np.append(np.arange(0, total, max_length), total)
        if drop_tail and total % max_length:
            counts["tail tokens dropped"] = int(total - bounds[-2])
            bounds = bounds[:-1]
    if len(bounds) == 1:
        raise nothing_learnt(dataset_args, split, max_length, counts)
    return Rows(tokens, supervised, bounds, counts)


def _encode(row, *, content, encode, sources=None) -> dict:
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


# ---------------------------------------------------------------- rows that were tokenised before


def fingerprint(tokenizer) -> str:
    """What a tokenizer makes of text and chat, as a hash; it does not matter whether its files hold the mask token."""
    core = json.loads(tokenizer.core.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] != tokenizer.mask_id]
    known = json.dumps([core, tokenizer.template, tokenizer.eos_id], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _made_with(
    *,
    stage,
    tokenizer,
    max_length,
    insert_eos=True,
    drop_tail=True,
    truncation="right",
    mask_prompt_loss=True,
    train_on="last",
) -> dict:
    """The settings that decide what rows a set gives; those of `load` that its stage reads."""
    settings = {"stage": stage, "max_length": max_length, "tokenizer": fingerprint(tokenizer)}
    if stage == "pt":
        return settings | {"insert_eos": insert_eos, "drop_tail": drop_tail}
    return settings | {"truncation": truncation, "mask_prompt_loss": mask_prompt_loss, "train_on": train_on}


def save_preprocessed(directory: Path, splits: dict[str, Rows], dataset_args: str, settings: dict) -> None:
    """Writes what load_preprocessed reads into an existing directory: of each split, its stream and its bounds."""
    from tqdm import tqdm

    for split, rows in splits.items():
        place = directory / split
        place.mkdir()
        np.save(place / "bounds.npy", rows.bounds)
        total, dtypes = int(rows.bounds[-1]), {"tokens": np.int32, "supervised": np.uint8}
        with tqdm(total=total, unit="token", unit_scale=True, desc=f"write {split}") as bar:
            for (name, dtype), chunks in zip(dtypes.items(), (rows.tokens, rows.supervised)):
                about = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (total,)}
                with (place / f"{name}.npy").open("wb") as file:  # a full disk would kill who writes to a memory map
                    np.lib.format.write_array_header_1_0(file, about)
                    for chunk, left in zip(chunks, total - np.cumsum([0, *map(len, chunks)])):
                        chunk = np.ascontiguousarray(chunk[:left], dtype)
                        file.write(chunk)
                        bar.update(len(chunk) / 2)
    made = {"dataset_args": dataset_args, **settings, "counts": {split: rows.counts for split, rows in splits.items()}}
    (directory / "preprocessed.json").write_text(json.dumps(made, indent=2) + "\n")


def load_preprocessed(
    directory: str | Path,
    *,
    stage: str,
    split: str,
    tokenizer,
    max_length: int,
    insert_eos: bool = True,
    drop_tail: bool = True,
    truncation: str = "right",
    mask_prompt_loss: bool = True,
    train_on: str = "last",
) -> Rows:
    """The rows that `python data.py` wrote, memory-mapped. ValueError unless it made them with these settings."""
    places = [Path(root, directory).expanduser() for root in ("", os.environ.get("BASE_DATASETS_DIR", ""))]
    place = next((place for place in places if (place / "preprocessed.json").is_file()), None)
    if place is None:
        raise FileNotFoundError(
            f"{directory} holds no preprocessed.json; python data.py --output_dir writes such a set"
        )
    damaged = f"{place} is damaged; make the set anew by data.py"
    try:
        made = json.loads((place / "preprocessed.json").read_bytes())
        counts = {split: Counter(kept) for split, kept in made["counts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{damaged} (preprocessed.json: {error!r})") from error
    wanted = _made_with(
        stage=stage,
        tokenizer=tokenizer,
        max_length=max_length,
        insert_eos=insert_eos,
        drop_tail=drop_tail,
        truncation=truncation,
        mask_prompt_loss=mask_prompt_loss,
        train_on=train_on,
    )
    for name, value in wanted.items():
        if made.get(name) != value:
            raise ValueError(
                f"{place} was made with {name} {made.get(name)}, this run has {value}; "
                "make the set anew by data.py, or change the run"
            )
    found = find_split(Spec(str(place), None, None, {}), counts, split)
    try:
        tokens, supervised, bounds = (
            np.load(place / found / f"{name}.npy", mmap_mode="r") for name in ("tokens", "supervised", "bounds")
        )
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{damaged} ({found}: {error})") from error
    return Rows([tokens], [supervised], np.asarray(bounds), counts[found])


# ---------------------------------------------------------------- packing


def pack(lengths, room: int) -> list[list[int]]:
    """Groups of numbers of rows whose lengths fit into `room` together: best fit, long rows first. O(rows).

    ValueError where a row is longer than that.
    """
    if len(lengths) and max(lengths) > room:
        raise ValueError(
            f"a row of {max(lengths)} tokens exceeds the canvas of {room}; lower max_length or pack longer"
        )
    groups, by_room, open_rooms = [], {}, 0  # open_rooms: bit r is set where a group has r tokens of room left
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[i])
        fitting = open_rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1  # the least room that is enough
            group = by_room[left].pop()
            open_rooms ^= (not by_room[left]) << left
        else:
            left, group = room, len(groups)
            groups.append([])
        groups[group].append(i)
        by_room.setdefault(left - length, []).append(group)
        open_rooms |= 1 << (left - length)
    return groups


def filled(lengths, block_length: int | None):
    """Lengths, an int or an array, rounded up to full blocks."""
    return -(-lengths // block_length) * block_length if block_length else lengths


def join(rows: list[dict], block_length: int | None = None, eos_id: int | None = None) -> dict[str, np.ndarray]:
    """Several rows as one: besides tokens and supervised, "document" numbers them, and "position" restarts at each.

    block_length: every row is extended by supervised eos_id to a multiple of it, as collate extends a single one.
    """
    parts = {"tokens": [], "supervised": [], "document": [], "position": []}
    for number, row in enumerate(rows):
        size = len(row["tokens"])
        end = filled(size, block_length)
        parts["tokens"] += row["tokens"], np.full(end - size, eos_id if end > size else 0)
        parts["supervised"] += row["supervised"], np.ones(end - size, bool)
        parts["document"].append(np.full(end, number))
        parts["position"].append(np.arange(end))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class Packed:
    """Rows of several `rows` each, which do not see each other; as Rows, with "document" and "position" in a row.

    For an objective that does not train on padding: bd3lm (block_length, eos_id: see join) and ar. Which rows share a
    canvas is set by their lengths alone. `counts` adds the number of canvases.
    """

    def __init__(self, rows: Rows, length: int, *, block_length: int | None = None, eos_id: int | None = None):
        """length: of the canvas."""
        self.rows, self.block_length, self.eos_id = rows, block_length, eos_id
        lengths = filled(rows.lengths, block_length)
        self.groups = pack(lengths, length)
        self.lengths = np.array([lengths[group].sum() for group in self.groups])
        self.useful = rows.useful
        self.counts = Counter(rows.counts)
        self.counts["packed canvases"] = len(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return join([self.rows[n] for n in self.groups[i]], self.block_length, self.eos_id)


# ---------------------------------------------------------------- batches


def collate(
    rows, *, pad_id: int, train_on_padding=False, block_length=None, eos_id=None, length=None, longest=0
) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right: tokens, document, position (B, T) int64, supervised (B, T) bool.

    T: that of the longest row, be it among these or one of `longest` tokens elsewhere in the global batch; or `length`.
    document: 0, or what a packed row says, padding -1. Padding is not supervised, but for
    train_on_padding: padding is supervised and visible (document 0), which teaches where in a canvas an answer ends;
    block_length: each row is first extended by supervised eos_id to a multiple of it.
    """
    assert not (train_on_padding and block_length), "padding is trained on, or rows fill their blocks: not both"
    assert not (train_on_padding and any("document" in row for row in rows)), "packed rows have no padding to train on"
    sizes = [len(row["tokens"]) for row in rows]
    ends = [filled(size, block_length) for size in sizes]
    T = max(*ends, filled(longest, block_length)) if length is None else length
    if max(ends) > T:
        raise ValueError(f"a row of {max(ends)} tokens exceeds the canvas of {T}; lower max_length or raise --pad_to")
    tokens = torch.full((len(rows), T), pad_id)  # (B, T)
    supervised = torch.full((len(rows), T), train_on_padding)  # (B, T)
    document = torch.full((len(rows), T), 0 if train_on_padding else -1)  # (B, T)
    position = torch.arange(T).repeat(len(rows), 1)  # (B, T)
    for b, (row, size, end) in enumerate(zip(rows, sizes, ends)):
        tokens[b, :size] = torch.from_numpy(row["tokens"])
        supervised[b, :size] = torch.from_numpy(row["supervised"])
        document[b, :end] = 0
        if "document" in row:
            document[b, :size] = torch.from_numpy(row["document"])
            position[b, :size] = torch.from_numpy(row["position"])
        if end > size:
            tokens[b, size:end] = eos_id
            supervised[b, size:end] = True
    return {"tokens": tokens, "supervised": supervised, "document": document, "position": position}


class Batches:
    """How a global batch is cut, the same for both loaders.

    It has micro_batch_size * accumulation * world_size slots. In every round of micro-batches rank 0 takes the first
    micro_batch_size slots that are left, rank 1 the next, and so on. Every rank has the same number of micro-batches.
    """

    def __init__(self, micro_batch_size: int, accumulation: int, rank: int, world_size: int):
        if micro_batch_size < 1 or accumulation < 1:
            raise ValueError(f"batch size {micro_batch_size}, accumulation {accumulation}: both must be at least 1")
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.global_batch_size = micro_batch_size * accumulation * world_size

    def own(self, slots: int) -> list[range]:
        """This rank's micro-batches of the first `slots` slots; some may be empty."""
        B = self.micro_batch_size
        rounds = -(-slots // (B * self.world_size))
        firsts = ((turn * self.world_size + self.rank) * B for turn in range(rounds))
        return [range(first, max(first, min(first + B, slots))) for first in firsts]

    def check(self, saved: dict, now: dict) -> None:
        for name, value in now.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"the data's {name.replace('_', ' ')} is {value}, but the state to resume from was saved with "
                    f"{saved.get(name)}; resume with the settings of the run that saved it"
                )


class Loader(Batches):
    """Batches of `rows`, epoch by epoch. Its whole state is (epoch, step): nothing else is needed to resume.

    An optimizer step takes a global batch of rows, the epoch's last step what is left; of that, each of world_size
    ranks reads its own share (see Batches). The canvas is that of the global batch's longest row, so it does not
    depend on how the batch is cut. Where the epoch's last rows leave a rank without any, its micro-batch repeats one of
    them with nothing supervised: it weighs nothing, and must not be counted as a row.

    group_by_length: within stretches of 50 global batches, long rows come first.
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
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 0,
    ):
        """collate: a function of a list of rows and `longest`, such as functools.partial(data.collate, pad_id=...).
        prefetch: steps that a thread makes ahead for `batches`."""
        super().__init__(micro_batch_size, accumulation, rank, world_size)
        self.rows, self.collate, self.prefetch = rows, collate, prefetch
        self.seed, self.shuffle, self.group_by_length = seed, shuffle, group_by_length
        self.steps_per_epoch = -(-len(rows) // self.global_batch_size)
        self.at = (0, 0)  # epoch, steps of it that `batches` has given

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
            longest = int(self.rows.lengths[picked].max())
            step = []
            for slots in self.own(len(picked)):
                batch = self.collate([self.rows[picked[slot]] for slot in slots or [0]], longest=longest)
                batch["supervised"] &= len(slots) > 0
                step.append(batch | {"sample": begin + torch.tensor(slots or [0]), "epoch": epoch})
            yield step

    def __iter__(self):
        """One pass: epoch 0."""
        return self.epoch(0)

    def batches(self):
        """Endless iterator over optimizer steps, epoch after epoch, from `state` on, which it moves along."""
        for at, step in ahead(self._numbered, self.prefetch):
            self.at = at
            yield step

    def _numbered(self):
        first, start = self.at
        for epoch in itertools.count(first):
            for done, step in enumerate(self.epoch(epoch, start), start + 1):
                yield (epoch, done), step
            start = 0

    @property
    def state(self) -> dict:
        """All it takes to go on after the last step that `batches` gave, on any number of ranks; JSON."""
        return {"epoch": self.at[0], "step": self.at[1]} | self._settings()

    def _settings(self) -> dict:
        return {"rows": len(self.rows), "global_batch_size": self.global_batch_size, "seed": self.seed}

    def load_state(self, state: dict | list[dict]) -> None:
        """Takes a rank's `state`, or those of all ranks, which for this loader are the same."""
        state = state[0] if isinstance(state, list) else state
        self.check(state, self._settings())
        self.at = state["epoch"], state["step"]

    def useful_share(self, block_length: int | None = None, length: int | None = None) -> float:
        """Of the cells of the first epoch's canvases, the share that holds the rows' own tokens; the rest is padding,
        or fills a row's last block. block_length, length: as collate has them."""
        order, G = self.order(0), self.global_batch_size
        batches = [self.rows.lengths[order[begin : begin + G]] for begin in range(0, len(order), G)]
        cells = sum(len(lengths) * (length or int(filled(lengths.max(), block_length))) for lengths in batches)
        return self.rows.useful / cells


def ahead(make, depth: int, *, process: bool = False):
    """Iterator over the items of the iterator `make()`, of which a thread, or a process, has up to `depth` ready."""
    if depth < 1:
        yield from make()
        return
    if process:
        context = multiprocessing.get_context("spawn")  # a fork of a process that runs CUDA or threads is not safe
        box, stop, kind = context.Queue(depth), context.Event(), context.Process
    else:
        box, stop, kind = queue.Queue(depth), threading.Event(), threading.Thread
    worker = kind(target=_make_ahead, args=(make, box, stop, process), daemon=True)
    worker.start()
    try:
        while True:
            try:
                what, item = box.get(timeout=1)
            except queue.Empty:
                if not worker.is_alive() and box.empty():
                    raise RuntimeError("the process that reads the data has died; was it killed for memory?") from None
                continue
            if what == "error":
                raise item
            if what == "end":
                return
            yield item
    finally:
        stop.set()
        with suppress(queue.Empty):  # it may be waiting for room
            while True:
                box.get_nowait()
        worker.join(5)
        if process:
            worker.terminate()


def _make_ahead(make, box, stop, process: bool) -> None:
    parent = multiprocessing.parent_process() if process else None
    if process:
        os.setsid()  # a signal to the parent's group, as torchrun and Ctrl-C send, is the parent's to answer

    def put(what, item=None) -> bool:
        while not stop.is_set() and (parent is None or parent.is_alive()):
            try:
                box.put((what, item), timeout=1)
                return True
            except queue.Full:
                pass
        if parent is not None:
            box.cancel_join_thread()  # nobody reads what is left
        return False

    try:
        if all(put("item", item) for item in make()):
            put("end")
    except Exception as error:
        known = type(error) in (ValueError, FileNotFoundError, ConnectionError) or parent is None
        put("error", error if known else RuntimeError(traceback.format_exc()))


# ---------------------------------------------------------------- the program: tokenise once, and look


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        "data.py",
        """\
Tokenise a data set once, for many runs, and look at a few of its rows.

What it writes is read by train.py --load_preprocessed_data True --dataset_args DIR, which refuses it unless stage,
max_length, tokenizer and the settings below are those it was made with. Without --output_dir it only shows rows.""",
    )
    add = parser.add_argument_group("what to read").add_argument
    add("--dataset_args", required=True, metavar="SPEC", help=SPEC_HELP)
    add(
        "--model_name_or_path",
        type=place,
        required=True,
        help="whose tokenizer: a directory (also under $BASE_MODELS_DIR) or a Hub id",
    )
    add("--stage", choices=["pt", "sft"], default="pt", help="pt: plain text in full pieces. sft: chat")
    add("--text_field", default="text", metavar="COLUMN", help="pt: the column with the text")
    add("--num_proc", type=int, default=8, metavar="N", help="processes that tokenise what is not builtin")
    add = parser.add_argument_group("how rows are made of it (as train.py's flags)").add_argument
    add("--max_length", type=int, metavar="TOKENS", help="longest row (default: pt 128, sft 512)")
    switch(add, "--insert_eos", True, "pt: end each text in EOS")
    switch(add, "--drop_tail", True, "pt: drop the last, shorter piece")
    add("--truncation", choices=["right", "filter"], default="right", help="sft: cut rows that are too long, or drop")
    switch(add, "--mask_prompt_loss", True, "sft: learn the assistant's turns only, not the whole chat")
    add("--train_on", choices=["last", "all"], default="last", help="sft: which of the assistant's turns are learnt")
    add = parser.add_argument_group("what to write and show").add_argument
    add(
        "--output_dir",
        type=place,
        metavar="DIR",
        help="directory to write; it appears when it is complete (default: none)",
    )
    switch(add, "--overwrite", False, "replace the set in --output_dir")
    add("--show", type=int, default=3, metavar="ROWS", help="rows of each split to look at")
    return parser


def look(row: dict, tokenizer, *, colour: bool) -> str:
    """A row's text with its special tokens; what is supervised is green, or in ⟦brackets⟧ where colour is False."""
    marks = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    parts, pairs = [], zip(row["supervised"].tolist(), row["tokens"].tolist())
    for learnt, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in run], skip_special_tokens=False)
        parts.append(f"{marks[0]}{text}{marks[1]}" if learnt else text)
    return "".join(parts)


def prepare(args: argparse.Namespace) -> None:

    from checkpoint import replacing, resolve

    for name, least in (("max_length", 1), ("num_proc", 1), ("show", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")
    output = args.output_dir and Path(args.output_dir)
    if output and output.exists():
        held = list(output.iterdir()) if output.is_dir() else [output]
        ours = (output / "preprocessed.json").is_file()
        if held and not (ours and args.overwrite):
            way = "choose another" + (", or pass --overwrite" if ours else "")
            raise ValueError(f"--output_dir {output} holds {'a preprocessed set' if ours else 'other files'}; {way}")
    if output:
        check_place("--output_dir", output.parent)
    tokenizer = Tokenizer(resolve(args.model_name_or_path))
    options = {name: getattr(args, name) for name in ("stage", "insert_eos", "drop_tail", "truncation")}
    options |= {name: getattr(args, name) for name in ("mask_prompt_loss", "train_on")}
    options |= {"tokenizer": tokenizer, "max_length": args.max_length or {"pt": 128, "sft": 512}[args.stage]}
    splits = {}
    for split in ("train", "test"):
        rows = load(args.dataset_args, split=split, text_field=args.text_field, num_proc=args.num_proc, **options)
        splits[split] = rows
        counts = ", ".join(f"{name} {n:,}" for name, n in rows.counts.items())
        learnt = sum(int(chunk.sum(dtype=np.int64)) for chunk in rows.supervised)
        print(f"{split}: {len(rows):,} rows of {rows.lengths.mean():.1f} tokens ({counts})")
        print(f"{split}: {rows.useful:,} tokens, {learnt / sum(map(len, rows.supervised)):.1%} of them supervised")
        for i in range(min(args.show, len(rows))):
            row = rows[i]
            print(f"--- {split} row {i}: {len(row['tokens'])} tokens, {row['supervised'].sum()} supervised")
            print(look(row, tokenizer, colour=sys.stdout.isatty()))
    if output:
        with replacing(output) as directory:
            save_preprocessed(directory, splits, args.dataset_args, _made_with(**options))
        print(f"wrote  {output}")


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        prepare(args)


if __name__ == "__main__":
    main(sys.argv[1:])

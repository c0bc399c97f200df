"""Data: a dataset spec in, rows of tokens out. Knows nothing of noise, objectives or models.

    parse_specs -> load_split -> RowEncoder (chat or plain text) -> Rows (-> Packed), for loaders.py

A dataset spec is `name[key:value,...]`, several of them joined by `+` or `|`. A name is a dataset on the Hub, a local
file (.jsonl .json .csv .txt .parquet, also .gz and so on) or directory, here or under $BASE_DATASETS_DIR, or a builtin
set, which needs no network: `builtin/sums`, `builtin/chats`, `builtin/repeats` (chat), `builtin/stdlib` (plain text).
A name or value that holds one of `+ | [ ] ,` is put in quotes: `'runs/a+b.jsonl'[train:10]`. Keys:

    train:5000       at most so many rows of a split (train, validation, test); without a number all of them
    whole            each .txt file is one text; without it each line is
    name:CONFIG      the configuration of a Hub dataset
    lang:LANGUAGE    chat rows whose answer contains this word, as an answer with a ```python block does

`python data.py --help`: tokenise a set once, for many runs, and show some of its rows.
"""

import codecs
import copy
import csv
import glob
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np

from checkpoint import resolve
from cli import one_line_errors
from display import printable
from files import check_directory, replacing, sole_user
from options import Count, Directory, Model, Natural, Options, Tokens
from tasks.builtin import BUILTIN
from templates import render
from tokenizer import Tokenizer, function_of, reasoning, why_invalid

SPLITS = ("train", "validation", "test")
PROCESSES = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


# ---------------------------------------------------------------- options


@dataclass(kw_only=True)
class DataSet(Options):
    "data"

    dataset_args: Annotated[str, "SPEC"]
    """data set, name[key:value,...], several joined by "+": Hub ids, local files (.jsonl .json .csv .txt .parquet, also
    .gz), builtin/sums, builtin/chats and builtin/repeats (chat), builtin/stdlib (text). Keys: train:5000,
    validation:200 (row limits), name:CONFIG, lang:LANGUAGE, whole (of a .txt file the whole is one text, not each
    line)"""


@dataclass(kw_only=True)
class Workers(Options):
    "data"

    num_proc: Count = PROCESSES
    """processes that tokenise what is not builtin, at most one for 2,000 rows (default: 8, or as many as cores)"""


@dataclass(kw_only=True)
class Stage(Options):
    "data"

    stage: Literal["pt", "sft"] = "pt"  # pt: plain text in full pieces. sft: chat
    max_length: Tokens | None = None  # longest row (default: pt 128, sft 512)


@dataclass(kw_only=True)
class PlainText(Options):
    "data: plain text (--stage pt)"

    text_field: Annotated[str, "COLUMN"] = "text"  # the column with the text
    insert_eos: bool = True  # end each text in EOS
    drop_tail: bool = True  # drop the last, shorter piece


@dataclass(kw_only=True)
class Chat(Options):
    "data: chat (--stage sft)"

    truncation: Literal["right", "filter"] = "right"  # cut rows that are too long, or drop them
    mask_prompt_loss: bool = True  # learn the assistant's turns only (which: --train_on), not the whole chat
    train_on: Literal["last", "all"] = "last"
    """which of the assistant's turns are learnt; all only where the chat template lets the turns be told apart"""


@dataclass(kw_only=True)
class Reading(Stage, PlainText, Chat):
    """How the rows of a set become rows of tokens. A stage reads its own group of these options only."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_length is None:
            self.max_length = {"pt": 128, "sft": 512}[self.stage]


# ---------------------------------------------------------------- specs


class Spec(NamedTuple):
    name: str
    config: str | None
    lang: str | None
    limits: dict[str, int | None]  # split -> row limit; None: all rows
    whole: bool = False


QUOTED = r"""(?:"[^"]*"|'[^']*')"""
PART = re.compile(  # a name, perhaps items in brackets, and what follows it: a sign that joins, or the end
    rf"""\s*({QUOTED}|[^\[\]+|\s"'](?:[^\[\]+|]*[^\[\]+|\s])?)\s*(?:\[((?:{QUOTED}|[^\[\]"'])*)\]\s*)?([+|]|$)"""
)


def parse_specs(text: str) -> list[Spec]:
    """The sets that a dataset spec names, in its order. ValueError on bad grammar."""
    specs, joined, end = [], True, 0
    while joined:
        # The next part of the text: one set, up to the sign that joins another
        match = PART.match(text, end)
        if not match:
            wanted = "name[key:value,...], where a name that holds one of + | [ ] is in quotes"
            raise ValueError(f"dataset spec {text[end:]!r:.99} in {text!r:.99} is not of the form {wanted}")
        part, joined, end = match[0], match[3], match.end()

        # Its items, which commas outside of quotes separate: at most one of each key
        split = re.sub(rf"({QUOTED})|,", lambda found: found[1] or "\0", match[2] or "").split("\0")
        items = [item.strip() for item in split] if match[2] else []
        options, limits = {}, {}
        for item in items:
            key, _, value = (piece.strip() for piece in item.partition(":"))
            if key in options or key in limits:
                raise ValueError(f"{key!r:.99} occurs twice in dataset spec {part!r:.99}")
            if key in ("name", "lang") and unquoted(value):
                options[key] = unquoted(value)
            elif item == "whole":
                options[key] = True
            elif key in SPLITS and item == key:
                limits[key] = None
            elif key in SPLITS and re.fullmatch(r"[1-9](_?[0-9])*", value):
                limits[key] = int(value)
            else:
                wanted = (
                    "train, validation or test, alone or with :ROWS (at least 1), name:CONFIG, lang:LANGUAGE, whole"
                )
                raise ValueError(f"{item!r:.99} in dataset spec {part!r:.99}: expected {wanted}")

        # Its name
        if not (name := unquoted(match[1])):
            raise ValueError(f"dataset spec {part!r:.99} has an empty name")
        specs.append(Spec(name, options.get("name"), options.get("lang"), limits, "whole" in options))

    # A file whose name holds a + was probably meant as one set
    n = len(specs)
    if n > 1 and os.path.exists(text):
        raise ValueError(f"{text} is there, but reads as {n} data sets; put quotes around it, within the shell's")
    return specs


def unquoted(text: str) -> str:
    return text[1:-1] if re.fullmatch(QUOTED, text) else text


# ---------------------------------------------------------------- row sources: a list of dicts or a datasets.Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}  # the modules that open them
HEAD = 1 << 22  # bytes of a JSON file that are checked before `datasets` reads it
# A JSON object that has its rows in a list `data`, perhaps after other fields
WRAPPED = re.compile(rb'\{(?:\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,)*\s*"data"\s*:\s*\[')
# Of sets with several configurations, by the last part of their names: what is read where a spec names none
DEFAULT_CONFIG = {"smoltalk": "all"}
ALL_CONFIGS = ("opc-sft-stage1", "opc-sft-stage2")


def library():
    """The module `datasets`, silent; it takes a second to import, and the builtin sets do not need it."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it then raises
    # Without a terminal a bar would be a line at every step; the library's own variable has the last word
    if not sys.stderr.isatty() and "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ:
        datasets.disable_progress_bars()
    return datasets


def processes(rows, num_proc: int) -> int | None:
    """How many processes `datasets` is to start; for few rows it is quicker to start none."""
    n = min(num_proc, -(-len(rows) // 2000))
    return n if n > 1 else None


def load_split(spec: Spec, split: str, *, num_proc: int = 1, hold_out: bool = True):
    """The rows of one split: a list of dicts (builtin sets) or a `datasets.Dataset`, cut to the spec's limit.

    validation and test stand in for each other. Where a set has neither, a random 5 % of its training rows are both,
    and are left out of train: the same whatever a run's seed, so no program tests on rows that another has trained on.
    hold_out False: train has them, too, for a run that evaluates on nothing.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")

    # All rows that there are of it; where the set has train alone, those of a random part
    found, parts, whole = open_split(spec, split, streaming=False)
    rows, builtin = parts[0], isinstance(parts[0], list)
    if not builtin:
        rows = library().concatenate_datasets(parts)
    if whole and (hold_out or split != "train"):
        if len(rows) < 2:
            way_out = "name a set with more, or train with --eval_strategy no"
            raise ValueError(f"{spec.name} has no test split, and with {len(rows)} row none can be made; {way_out}")
        rows = rows.train_test_split(test_size=0.05, seed=42)[found]
    if len(rows) == 0:
        raise ValueError(f"{spec.name} has no rows in its split {found}; name a set that has some")

    # First the filter, then the limit, so that a limit counts rows that are used
    if spec.lang:
        keep_row = AnswerContains(spec, columns_of(rows))
        if builtin:
            rows = [row for row in rows if keep_row(row)]
        else:
            rows = rows.filter(keep_row, num_proc=processes(rows, num_proc), desc=f"lang:{spec.lang}")
        if len(rows) == 0:
            raise ValueError(f"{spec.name}[lang:{spec.lang}] has no rows: no answer in {found} contains {spec.lang!r}")
    # A limit is given for the split asked for, or for the one that serves as it
    limit = spec.limits.get(split, spec.limits.get(found))
    if limit is None or limit >= len(rows):
        return rows
    return rows[:limit] if builtin else rows.select(range(limit))


def open_split(spec: Spec, split: str, *, streaming: bool) -> tuple[str, list, bool]:
    """(The split that serves as `split`, "test" say; its rows, in parts, lists or of `datasets`; whether the set has
    train alone, so that the caller must draw from its rows which are to test on.)"""
    if spec.name.startswith("builtin/"):
        if spec.name not in BUILTIN:
            raise ValueError(f"unknown dataset {spec.name}; the builtin sets are {', '.join(BUILTIN)}")
        if spec.config is not None:
            raise ValueError(f"{spec.name} has no configurations; leave name:{spec.config} out")
        return split, [BUILTIN[spec.name](split)], False
    splits = load_splits(spec, streaming=streaming)
    if "train" in splits and splits.keys().isdisjoint(SPLITS[1:]):
        return "train" if split == "train" else "test", splits["train"], True
    found = find_split(spec.name, splits, split)
    return found, splits[found], False


def find_split(name: str, splits, split: str) -> str:
    """The split of a set that serves as `split`."""
    candidates = ("train",) if split == "train" else (split, "validation", "test")
    found = next((candidate for candidate in candidates if candidate in splits), None)
    if found is None:
        raise ValueError(f"{name} has no split {split} (it has {', '.join(splits)})")
    return found


def local_paths(name: str | Path) -> list[Path]:
    """Where a local set of this name may be."""
    return [Path(root, name).expanduser() for root in ("", os.environ.get("BASE_DATASETS_DIR", ""))]


def load_splits(spec: Spec, *, streaming: bool) -> dict[str, list]:
    """The splits of a set that is not builtin: of each, what `datasets` loads of every configuration asked for.

    A local file has one, train. Splits that are named train_sft and test_sft are train and test.
    """
    datasets = library()

    # A local path, or else an id on the Hub, unless the name can only be a path
    paths, short = local_paths(spec.name), Path(spec.name).name
    path = next((path for path in paths if os.path.exists(path)), None)
    if path is None and (builder_of(Path(spec.name)) or spec.name[0] in "./~"):
        wanted = f"a file, a directory, a Hub id or a builtin set ({', '.join(BUILTIN)})"
        raise FileNotFoundError(f"no data at {' or '.join(dict.fromkeys(map(str, paths)))}; expected {wanted}")

    # What `datasets` is to load
    source, options = local_source(spec, path) if path else (spec.name, {})
    configs = [spec.config or DEFAULT_CONFIG.get(short)]
    if spec.config is None and short in ALL_CONFIGS and source == str(path or spec.name):
        with naming_errors(spec.name):
            configs = datasets.get_dataset_config_names(source)
    if spec.whole and source != "text":
        raise ValueError(f"{spec.name}[whole]: only .txt files are texts as a whole; leave it out")

    # Configurations may differ in their columns: what they share remains
    with naming_errors(spec.name):
        loaded = []
        for config in configs:
            builder = datasets.load_dataset_builder(source, name=config, **options)
            check_inside(path, builder.config.data_files or {})
            if not streaming:
                try_apart(builder)
                builder.download_and_prepare()
            loaded.append(builder.as_streaming_dataset() if streaming else builder.as_dataset())
        if len(loaded) > 1:
            shared = set.intersection(*(set(columns_of(rows)) for part in loaded for rows in part.values()))
            loaded = [{name: rows.select_columns(sorted(shared)) for name, rows in part.items()} for part in loaded]

    # One list for each split, whichever configurations have it
    splits = {}
    for part in loaded:
        for name, rows in part.items():
            splits.setdefault(name.removesuffix("_sft"), []).append(rows)
    return splits


def try_apart(builder) -> None:
    """Has a process of its own prepare the set first: some files end the reader of `datasets`, which is no Python, and
    with it the process, without a word. ValueError then; what Python raises is raised again where it counts."""

    def prepare() -> None:
        with suppress(BaseException):  # Ctrl-C too, which comes to both
            builder.download_and_prepare()

    if sys.platform == "linux" and not os.path.isdir(builder.cache_dir):
        process = multiprocessing.get_context("fork").Process(target=prepare)
        process.start()
        process.join()
        if process.exitcode < 0:
            number = signal.Signals(-process.exitcode).name
            raise ValueError(
                f"its reader has ended ({number}): is it damaged, deeply nested, or larger than the memory?"
            )


def builder_of(path: Path) -> str | None:
    """The builder of `datasets` for a file of that name, compressed or not."""
    return BUILDERS.get(path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix)


def local_source(spec: Spec, path: Path) -> tuple[str, dict]:
    """What `datasets` is to load of a local file or directory, and its options."""
    if path.is_file():
        if not builder_of(path):
            endings = f"{' '.join(BUILDERS)}, perhaps followed by {' '.join(COMPRESSED)}"
            raise ValueError(f"cannot read {path}: expected one of {endings}")
        if spec.config is not None:
            raise ValueError(f"{path} is a file and has no configurations; leave name:{spec.config} out")
    elif not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a directory; name one")
    elif re.search(r"[*?\[]", str(path)):
        raise ValueError(f"the directory {path} has one of * ? [ in its name; rename it, or name a file in it")

    # What `datasets` does not find out by itself: the list that a JSON file has its rows in; that what a CSV file has
    # is text, even 007 or NA; and that a row of text is a line, with its end
    files, options = [file for file in (path, *path.rglob("*")) if file.is_file() and builder_of(file)], {}
    builders = {builder_of(file) for file in files}
    fields = {json_field(file) for file in files if builder_of(file) == "json"}
    if builders == {"json"} and fields == {"data"}:
        options = {"field": "data"}
    elif builders == {"csv"}:
        with naming_errors(str(files[0])), opened(files[0]) as file:
            lines = csv.reader(io.TextIOWrapper(file, "utf-8-sig"))
            columns, first = next(lines, []), next(lines, [])
        if len(first) > len(columns):  # else the first field would be taken for a name of the row
            raise ValueError(f"{files[0]}: {len(first)} fields in a row, of {len(columns)} columns; quote its commas")
        texts = library().Features(dict.fromkeys(columns, library().Value("string")))
        options = {"features": texts, "keep_default_na": False, "encoding": "utf-8-sig"}
    elif builders == {"text"}:
        options = {"sample_by": "document"} if spec.whole else {"keep_linebreaks": True}
    if path.is_file():
        return builders.pop(), {"data_files": glob.escape(str(path)), **options}
    card = path / "README.md"
    configured = builders != {"text"} and card.is_file() and b"configs:" in card.read_bytes()
    if options and spec.config is None and not configured:
        return builders.pop(), {"data_dir": str(path), **options}
    return str(path), {}


def opened(path: Path):
    """A file open for reading its bytes, uncompressed."""
    try:
        return importlib.import_module(COMPRESSED.get(path.suffix, "io")).open(path, "rb")
    except ImportError:
        raise ValueError(f"pip install {COMPRESSED[path.suffix]} to read it, or uncompress it") from None


def json_field(path: Path) -> str | None:
    """ "data" where a JSON file is an object with its rows in a list of that name, else None. ValueError for what would
    end `datasets`, and us, without a word: null as a row, and brackets nested by the thousand."""
    with naming_errors(str(path)), opened(path) as file:
        head = file.read(HEAD).removeprefix(codecs.BOM_UTF8).strip()
    first, *rest = (line.strip() for line in head.split(b"\n"))
    try:
        try:
            json.loads(first)
        except json.JSONDecodeError:  # the file is not a value a line, but one in all
            first, rest = head, []
            json.loads(head)
        for line in rest:
            if line.count(b"[") + line.count(b"{") > 500:
                json.loads(line)
    except RecursionError:
        raise ValueError(f"{path}: brackets are nested too deep; expected rows of text or messages") from None
    except ValueError:
        pass  # `datasets` says what is wrong, or the head ends within a value
    if b"null" in (first, *rest):
        number = [first, *rest].index(b"null") + 1
        raise ValueError(f"{path}: row {number} is null; expected an object a line, or a list of objects")
    return "data" if not rest and WRAPPED.match(head) else None


def check_inside(path: Path | None, data_files: dict[str, list[str]]) -> None:
    """ValueError where the README.md of a set names files outside the set: of this machine, which is not to be read."""
    for file in map(str, itertools.chain(*data_files.values())):
        if path:
            inside = any(Path(os.path.abspath(file)).is_relative_to(root) for root in (path.absolute(), path.resolve()))
        else:
            inside = file.startswith(("hf://", "https://", "http://"))
        if not inside:
            raise ValueError(f"its README.md names {file}, which is outside the set; put it inside")


@contextmanager
def naming_errors(name: str):
    """Turns what `datasets`, and what it calls, raise while they read a set into one line that names the set."""
    try:
        yield
    except StopIteration:
        raise ValueError(f"{name} has no rows; name a set that has some") from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which `datasets` loses while it ends its processes
            raise KeyboardInterrupt from None

        # The reason is the error beneath that of `datasets`
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        name, reason, kind = name[:300], " ".join(str(cause).split())[:600], type(cause).__name__

        # What users often meet gets a way out
        message = f"cannot load {name}: {reason}"
        if isinstance(cause, UnicodeDecodeError):
            message = f"{name} is not UTF-8 text: {reason}; write it anew as UTF-8"
        elif kind == "DatasetNotFoundError":
            base = os.environ.get("BASE_DATASETS_DIR")
            message = f"{name}: no such file or directory here{f' or under {base}' if base else ''}, and {reason}"
        elif isinstance(cause, ConnectionError):
            message += "; a local path or a builtin set needs no network"
        elif isinstance(cause, ValueError) and "onfig" in reason:  # a configuration that is missing or unknown
            message += f"; a config is named by {name}[name:CONFIG]"
        elif not isinstance(cause, (ValueError, OSError)):
            message = f"cannot load {name}: {kind}: {reason}"

        # What cannot be found or reached stays so, all else is a ValueError
        known = (FileNotFoundError, ConnectionError)
        raise next((type for type in known if isinstance(cause, type)), ValueError)(message) from error


def columns_of(rows) -> list[str]:
    """Column names of a list of rows or a `datasets` set; of a stream that declares none, those of its first row."""
    names = None if isinstance(rows, list) else rows.column_names
    return list(next(iter(rows))) if names is None else names


# ---------------------------------------------------------------- from a row to messages or text


# The columns of a chat: messages, or what the user says, perhaps a context, and the answer, each a text or messages. A
# set is read by the first of these that it has whole
CHATS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("question", "answer"),
)
ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system"}
ROLE_NAMES |= {"function": "tool", "observation": "tool", "ipython": "tool"}


def without_none(value):
    """A value without the None that Arrow puts where a row lacks a field that others have."""
    if isinstance(value, dict):
        return {key: without_none(field) for key, field in value.items() if field is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def from_json(value):
    """What a JSON text holds; all else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


# What some sets call a message's fields
FIELD_NAMES = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}


def message_of(turn):
    """A turn with role and content, whatever they are called in the set, and what else it has; parts of text joined."""
    if not isinstance(turn, dict):
        return turn
    message = {FIELD_NAMES.get(key, key): field for key, field in turn.items()}
    role, content, calls = message.get("role"), message.get("content"), from_json(message.get("tool_calls"))
    if call := from_json(message.pop("function_call", None)):  # as chats had it before tool_calls
        calls = [call]
    message["role"] = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(calls, list) and calls:
        functions = [function_of(call) for call in calls]
        functions = [function | {"arguments": from_json(function.get("arguments", {}))} for function in functions]
        calls = [call if isinstance(call, dict) and "function" in call else {"type": "function"} for call in calls]
        message["tool_calls"] = [call | {"function": function} for call, function in zip(calls, functions)]
        content = "" if content is None else content
    return message | {"content": content}


class Content:
    """What a row has to encode, as arguments of an encoder: the text of one column, or (messages, tools)."""

    def __init__(self, *columns: str, chat: bool):
        self.columns, self.chat = columns, chat

    def __call__(self, row) -> tuple:
        fields = [row.get(column) for column in self.columns]
        if not self.chat:
            return (fields[0],)

        # A context follows what the user says, and then all are stripped
        if len(fields) == 3:
            user, context, answer = (field.strip() if isinstance(field, str) else field for field in fields)
            fields = f"{user}\n\n{context}" if isinstance(user, str) and context else user, answer
        if len(fields) == 1:
            turns = from_json(fields[0])
        else:
            pairs = zip(("user", "assistant"), fields)
            turns = [field if isinstance(field, list) else [{"role": role, "content": field}] for role, field in pairs]
            turns = turns[0] + turns[1]

        turns = [message_of(turn) for turn in without_none(turns)] if isinstance(turns, list) else None

        # The system's message may have a column of its own
        system = row.get("system") or row.get("system_prompt")
        if isinstance(system, str) and system.strip() and turns:
            turns = [{"role": "system", "content": system}, *turns]
        return turns, without_none(from_json(row.get("tools") or row.get("functions"))) or None


def chat_format(columns: list[str]) -> Content | None:
    """What makes messages of a row, or None where the set is no chat."""
    return next((Content(*needed, chat=True) for needed in CHATS if set(needed) <= set(columns)), None)


def content_of(spec: Spec, columns: list[str], stage: str, text_field: str) -> Content:
    """What makes of a row what `stage` trains on: text (pt) or messages (sft)."""
    to_messages, present = chat_format(columns), ", ".join(columns)
    if stage not in ENCODERS:
        raise ValueError(f"stage {stage!r}: expected pt (plain text) or sft (chat)")
    if stage == "pt" and text_field not in columns:
        way_out = "it is chat, for --stage sft" if to_messages else "name one by --text_field"
        raise ValueError(f"{spec.name} has no column {text_field!r} (it has {present}); {way_out}")
    if stage == "sft" and to_messages is None:
        way_out = f"sft needs {' or '.join('/'.join(needed) for needed in CHATS)}; plain text is for --stage pt"
        raise ValueError(f"{spec.name} has no column 'messages' (it has {present}); {way_out}")
    return Content(text_field, chat=False) if stage == "pt" else to_messages


def source_code() -> list[str]:
    """The source of this module, of the tokenizer's and of the templates'."""
    # The cache of `datasets` knows an object by its class's name and its attributes. One that has its source among them
    # is computed anew after an edit
    return [inspect.getsource(inspect.getmodule(thing)) for thing in (source_code, Tokenizer, render)]


class AnswerContains:
    """Whether the last answer of a chat row contains the word that a spec gives as lang."""

    def __init__(self, spec: Spec, columns: list[str]):
        self.to_messages, self.word, self.source = chat_format(columns), spec.lang, source_code()
        if self.to_messages is None:
            why = f"lang looks into the answers of a chat, and this set is none (it has {', '.join(columns)})"
            raise ValueError(f"{spec.name}[lang:{spec.lang}]: {why}; leave it out")

    def __call__(self, row) -> bool:
        messages, _ = self.to_messages(row)
        return why_invalid(messages, answered=True) is None and self.word in messages[-1]["content"]


def raw(dataset_args: str, split: str):
    """Iterator over a split's rows as dicts: chat with `messages`, whatever its columns were, plain text as it is."""
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, split)
        to_messages = chat_format(columns_of(rows))
        with naming_errors(spec.name):
            for row in rows:
                found = dict(row)
                if to_messages:
                    messages, tools = to_messages(row)
                    found |= {"messages": messages} | ({"tools": tools} if tools or "tools" in row else {})
                yield found


def texts(dataset_args: str, stage: str, text_field: str = "text"):
    """Iterator over the training split's strings, texts (pt) or roles and contents (sft), to train a tokenizer on."""
    for spec in parse_specs(dataset_args):
        rows = load_split(spec, "train")
        content = content_of(spec, columns_of(rows), stage, text_field)
        with naming_errors(spec.name):
            for found, *_ in map(content, rows):
                if stage == "pt" and isinstance(found, str):
                    yield found
                elif stage == "sft" and why_invalid(found, answered=True) is None:
                    yield from (text for message in found for text in (message["role"], message["content"]))


# ---------------------------------------------------------------- tokens


class Encoded(NamedTuple):
    tokens: list[int]  # empty where the row is dropped
    supervised: list[bool]
    outcome: str  # kept, cut, empty, or dropped:REASON


# An encoder copies the options that it reads: `datasets` tokenises a set anew when an attribute of it changes


class TextEncoder:
    """Makes Encoded of a text, all of it supervised, with EOS at its end if wanted (once, where it has one already)."""

    def __init__(self, tokenizer, reading: Reading):
        self.tokenizer, self.insert_eos = tokenizer, reading.insert_eos
        if reading.insert_eos and tokenizer.eos_id is None:
            raise ValueError("the tokenizer has no EOS token to put between texts; pass --insert_eos False")

    def __call__(self, text) -> Encoded:
        if not isinstance(text, str):
            return Encoded([], [], "dropped:no text" if text is None else "dropped:not text")
        tokens = self.tokenizer.encode(text)
        if self.tokenizer.mask_id in tokens:
            return Encoded([], [], f"dropped:{self.tokenizer.mask_token} in the text")
        if self.insert_eos and tokens[-1:] != [self.tokenizer.eos_id]:
            tokens.append(self.tokenizer.eos_id)
        return Encoded(tokens, [True] * len(tokens), "kept" if text else "empty")


def left_out(tokenizer, messages: list[dict], tools: list | None, train_on: str) -> str | None:
    """What of a chat the template leaves out of the text, or None. Of what the assistant thinks, what is learnt counts:
    the thinking in earlier turns is left out on purpose."""
    kinds, (chat, functions) = [], copy.deepcopy((messages, tools or []))

    def mark(kind: str) -> str:
        kinds.append(kind)
        return f"Mark{len(kinds)}x"

    # Every part gets a mark at its end; which of them are in the text?
    for i, message in enumerate(chat):
        if message["content"]:
            message["content"] += mark(f"{message['role']} content")
        if message["role"] == "assistant" and (train_on == "all" or i == len(chat) - 1) and reasoning(message):
            if message.get("reasoning_content"):
                message["reasoning_content"] += mark("reasoning")
            else:
                message["content"] = message["content"].replace("</think>", mark("reasoning") + "</think>", 1)
        for function in map(function_of, message.get("tool_calls", [])):
            function["name"] += mark("tool calls")
            if isinstance(function.get("arguments"), dict):
                function["arguments"]["mark"] = mark("tool calls")
            elif isinstance(function.get("arguments"), str):
                function["arguments"] += mark("tool calls")
    for function in map(function_of, functions):
        function["name"] += mark("tools")
    text = tokenizer.text(chat, thinking=bool(reasoning(messages[-1])), tools=functions or None)
    found = set(re.findall(r"Mark(\d+)x", text))
    missing = (kind for n, kind in enumerate(kinds, 1) if str(n) not in found)
    return next((f"{kind} not rendered by the template" for kind in missing), None)


class ChatEncoder:
    """Makes Encoded of a conversation, which is dropped if that leaves it nothing to learn; see the options of Chat."""

    def __init__(self, tokenizer, reading: Reading):
        self.tokenizer, self.max_length, self.truncation = tokenizer, reading.max_length, reading.truncation
        self.mask_prompt_loss, self.train_on = reading.mask_prompt_loss, reading.train_on
        if tokenizer.template is None or self.train_on == "all":
            probe = [{"role": role, "content": role} for role in ("user", "assistant") * 2]
            try:
                tokenizer.render(probe, train_on=self.train_on)
            except ValueError as error:
                raise ValueError(f"--stage sft --train_on {self.train_on}: {error}") from error

    def __call__(self, messages, tools: list | None = None) -> Encoded:
        # What is no chat, or none that the template renders whole, is dropped
        if not (reason := why_invalid(messages, tools, answered=True)):
            try:
                tokens, supervised = self.tokenizer.render(messages, tools=tools, train_on=self.train_on)
                reason = left_out(self.tokenizer, messages, tools, self.train_on)
            except ValueError as error:
                reason = re.sub(r" \(.*?\)(?=;|$)", "", str(error))  # what is in brackets differs from row to row
        if reason:
            return Encoded([], [], f"dropped:{reason:.100}")
        if self.tokenizer.mask_id in tokens:
            return Encoded([], [], f"dropped:{self.tokenizer.mask_token} in the text")
        if not self.mask_prompt_loss:
            supervised = [True] * len(tokens)

        # What is short enough stays whole; the rest is cut on the right, if some of the answer is left then, or dropped
        if len(tokens) <= self.max_length:
            return Encoded(tokens, supervised, "kept")
        if self.truncation == "filter":
            return Encoded([], [], "dropped:longer than max_length")
        if not any(supervised[: self.max_length]):
            return Encoded([], [], "dropped:prompt fills max_length")
        return Encoded(tokens[: self.max_length], supervised[: self.max_length], "cut")


ENCODERS = {"pt": TextEncoder, "sft": ChatEncoder}


class RowEncoder:
    """Makes of a row of a set what `datasets` stores: tokens, supervised and outcome, as Encoded has them."""

    def __init__(self, content: Content, encode: TextEncoder | ChatEncoder):
        self.content, self.encode, self.source = content, encode, source_code()

    def __call__(self, row) -> dict:
        tokens, supervised, outcome = self.encode(*self.content(row))
        return {"tokens": np.array(tokens, np.int32), "supervised": np.array(supervised, np.uint8), "outcome": outcome}


def tally(outcomes: Counter) -> Counter:
    """Outcomes of rows as counts: rows read and kept besides."""
    counts = Counter(outcomes)
    counts["read"] = outcomes.total()
    counts["kept"] += outcomes["cut"] + outcomes["empty"]
    return counts


def no_rows_left(name: str, split: str, max_length: int, counts: Counter) -> ValueError:
    why = ", ".join(f"{reason} {n}" for reason, n in counts.items())
    return ValueError(f"{name} leaves no row to {split} with max_length {max_length}: {why}")


class Rows:
    """Rows of tokens, `rows[i]` = {"tokens": (T,) int64, "supervised": (T,) bool} as numpy arrays.

    All are slices of one stream, whose chunks stay where they were read (in the memory-mapped cache of `datasets`): a
    chat row is a conversation, a row of text a piece across the texts' borders. `lengths` (n,) int64. `useful`: tokens
    in all. `counts`, in rows of the source: read, kept (cut and empty ones too), dropped:REASON; tail tokens dropped.
    """

    def __init__(self, tokens: list[np.ndarray], supervised: list[np.ndarray], bounds: np.ndarray, counts: Counter):
        """tokens, supervised: the stream's chunks; bounds (n + 1,): row i is stream[bounds[i]:bounds[i + 1]]."""
        self.tokens, self.supervised, self.bounds, self.counts = tokens, supervised, bounds, counts
        self.lengths, self.useful = np.diff(bounds), int(bounds[-1] - bounds[0])
        self.starts = np.cumsum([0, *map(len, tokens)])[:-1]  # where in the stream each chunk starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        # A row may lie across several chunks
        begin, end = self.bounds[:-1][i], self.bounds[1:][i]
        first, last = np.searchsorted(self.starts, (begin, end - 1), side="right") - 1
        slices = [(c, slice(max(begin - self.starts[c], 0), end - self.starts[c])) for c in range(first, last + 1)]
        tokens = np.concatenate([self.tokens[c][s] for c, s in slices]).astype(np.int64)
        return {"tokens": tokens, "supervised": np.concatenate([self.supervised[c][s] for c, s in slices]).astype(bool)}


def load(
    dataset_args: str, split: str, tokenizer, reading: Reading, *, num_proc=1, rows_of=load_split, hold_out=True
) -> Rows:
    """The rows of one split of all sets of a spec, one after another, none longer than max_length.

    num_proc processes tokenise what comes through `datasets`, which stores the result in its cache. rows_of gives the
    rows of a set: load_split, or that of stream.py. hold_out: see there.
    """
    encode = ENCODERS[reading.stage](tokenizer, reading)

    # All sets end to end, as chunks of one stream; a set that gives nothing is refused even if others give rows
    chunks = []
    for spec in parse_specs(dataset_args):
        rows = rows_of(spec, split, num_proc=num_proc, hold_out=hold_out)
        content = content_of(spec, columns_of(rows), reading.stage, reading.text_field)
        with naming_errors(spec.name):
            of_set = list(encoded_chunks(rows, RowEncoder(content, encode), num_proc))
        outcomes = sum((ends for *_, ends in of_set), Counter())
        if not outcomes["kept"] + outcomes["cut"]:
            raise no_rows_left(spec.name, split, reading.max_length, tally(outcomes))
        chunks += of_set
    tokens, supervised, lengths, outcomes = zip(*chunks)
    counts = tally(sum(outcomes, Counter()))

    # A conversation begins where the one before it ends; those that were dropped have no tokens
    lengths = np.concatenate(lengths)
    bounds = np.cumsum([0, *lengths[lengths > 0]])
    if reading.stage == "pt":
        # Texts are joined over all sets and cut into pieces of max_length. Only the last may be shorter
        total = bounds[-1]
        bounds = np.append(np.arange(0, total, reading.max_length), total)
        if reading.drop_tail and total % reading.max_length:
            counts["tail tokens dropped"] = int(total - bounds[-2])
            bounds = bounds[:-1]
    if len(bounds) == 1:
        raise no_rows_left(dataset_args, split, reading.max_length, counts)
    return Rows(list(tokens), list(supervised), bounds, counts)


def encoded_chunks(rows, encode: RowEncoder, num_proc: int):
    """Iterator over chunks of encoded rows: (tokens, supervised: end to end; the rows' lengths; their outcomes)."""
    # A builtin set is one chunk
    if isinstance(rows, list):
        encoded = [encode(row) for row in rows]
        flat = [np.concatenate([row[key] for row in encoded]) for key in ("tokens", "supervised")]
        yield *flat, np.array([len(row["tokens"]) for row in encoded]), Counter(row["outcome"] for row in encoded)
        return
    from datasets import Features, Sequence, Value

    # `datasets` maps the rows, or finds them in its cache; its Arrow columns are read where they lie
    features = {"tokens": Sequence(Value("int32")), "supervised": Sequence(Value("uint8")), "outcome": Value("string")}
    options = {"remove_columns": rows.column_names, "num_proc": processes(rows, num_proc)}
    encoded = rows.map(encode, features=Features(features), desc="tokenize", **options)
    for batch in encoded.data.to_batches():
        tokens, supervised, outcomes = (batch.column(key) for key in features)
        sizes = tokens.value_lengths().to_numpy()
        yield tokens.flatten().to_numpy(), supervised.flatten().to_numpy(), sizes, Counter(outcomes.to_pylist())


# ---------------------------------------------------------------- rows that were tokenised before


def fingerprint(tokenizer) -> str:
    """A hash of how a tokenizer encodes text and chat; it does not matter whether its files hold the mask token."""
    # All that tokenizer.json holds but the mask, the chat template and EOS
    core = json.loads(tokenizer.core.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] != tokenizer.mask_id]
    known = json.dumps([core, tokenizer.template, tokenizer.eos_id], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def settings_of(tokenizer, reading: Reading) -> dict:
    """The settings that decide what rows a set gives: those that its stage reads."""
    of_stage = {"pt": ("insert_eos", "drop_tail"), "sft": ("truncation", "mask_prompt_loss", "train_on")}
    settings = {"stage": reading.stage, "max_length": reading.max_length, "tokenizer": fingerprint(tokenizer)}
    return settings | {name: getattr(reading, name) for name in of_stage[reading.stage]}


def save_preprocessed(directory: Path, splits: dict[str, Rows], dataset_args: str, settings: dict) -> None:
    """Writes what load_preprocessed reads into an existing directory: of each split, its stream and its bounds."""
    for split, rows in splits.items():
        path, total = directory / split, int(rows.bounds[-1])
        path.mkdir()
        np.save(path / "bounds.npy", rows.bounds)

        # Chunk by chunk, as the stream may not fit into memory; no memory map, by which a full disk would kill us
        for name, dtype, chunks in (("tokens", np.int32, rows.tokens), ("supervised", np.uint8, rows.supervised)):
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (total,)}
            with (path / f"{name}.npy").open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for chunk, start in zip(chunks, rows.starts):
                    file.write(np.ascontiguousarray(chunk[: max(total - start, 0)], dtype))
    made = {"dataset_args": dataset_args, **settings, "counts": {split: rows.counts for split, rows in splits.items()}}
    (directory / "preprocessed.json").write_text(json.dumps(made, indent=2) + "\n")


def load_preprocessed(directory: str | Path, split: str, tokenizer, reading: Reading) -> Rows:
    """The rows that `python data.py` wrote, memory-mapped. ValueError unless it made them with these settings."""
    path = next((path for path in local_paths(directory) if (path / "preprocessed.json").is_file()), None)
    if path is None:
        way_out = "python data.py --output_dir writes such a set"
        raise FileNotFoundError(f"{directory} holds no preprocessed.json; {way_out}")

    # How it was made, and of each split the stream, one chunk that stays on disk, and its bounds
    arrays, damaged = {}, f"{path} is damaged; make the set anew by data.py"
    try:
        made = json.loads((path / "preprocessed.json").read_bytes())
        counts = {name: Counter(made["counts"][name]) for name in SPLITS if name in made["counts"]}
        for name in counts:
            files = [path / name / f"{array}.npy" for array in ("tokens", "supervised", "bounds")]
            arrays[name] = [np.load(file, mmap_mode="r") for file in files]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, RecursionError) as error:
        raise ValueError(f"{damaged} ({error!r:.200})") from error

    # It must have been made as this run would make it
    for name, value in settings_of(tokenizer, reading).items():
        if made.get(name) != value:
            differs = f"was made with {name} {made.get(name)}, this run has {value}"
            raise ValueError(f"{path} {differs}; make the set anew by data.py, or change the run")

    # The split that serves
    found = find_split(str(path), counts, split)
    last_id = max(i for i in tokenizer.ids if i != tokenizer.mask_id)
    if reason := why_no_rows(*arrays[found], last_id, reading.max_length):
        raise ValueError(f"{damaged} ({reason})")
    if not all(isinstance(count, int) for count in counts[found].values()):
        raise ValueError(f"{damaged} (its counts are no numbers)")
    tokens, supervised, bounds = arrays[found]
    return Rows([tokens], [supervised], np.asarray(bounds), counts[found])


def why_no_rows(tokens, supervised, bounds, last_id: int, max_length: int) -> str | None:
    """Why the arrays are no stream of ids up to last_id with the bounds of rows in it, or None."""
    for name, array, kinds in (("tokens", tokens, "iu"), ("supervised", supervised, "iub"), ("bounds", bounds, "iu")):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            return f"{name} have {array.ndim} dimensions and type {array.dtype}"
    lengths = np.diff(bounds.astype(np.int64))
    if not len(lengths) or bounds[0] < 0 or bounds[-1] > len(tokens) or lengths.min() < 1 or lengths.max() > max_length:
        return f"bounds are not those of rows of 1 to {max_length} of {len(tokens)} tokens"
    if len(supervised) != len(tokens):
        return f"{len(supervised)} tokens are supervised or not, of {len(tokens)}"
    if tokens.min() < 0 or tokens.max() > last_id:
        return f"token ids are {tokens.min()} to {tokens.max()}, the tokenizer's 0 to {last_id}"
    return None


# ---------------------------------------------------------------- packing


def pack(lengths, room: int) -> list[list[int]]:
    """Groups of numbers of rows whose lengths fit into `room` together: best fit, long rows first. O(rows)."""
    longest = max(lengths, default=0)
    if longest > room:
        raise ValueError(f"a row of {longest} tokens exceeds the canvas of {room}; lower max_length or pack longer")

    # groups_by_room[r]: the groups with r tokens of room left. Bit r of `rooms` is set where there is one
    groups, groups_by_room, rooms = [], {}, 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[i])
        fitting = rooms >> length
        if fitting:
            # The lowest bit that is set is the least room that is enough
            left = length + (fitting & -fitting).bit_length() - 1
            group = groups_by_room[left].pop()
            rooms ^= (not groups_by_room[left]) << left
        else:
            left, group = room, len(groups)
            groups.append([])

        # The row goes into that group, which then has less room
        groups[group].append(i)
        groups_by_room.setdefault(left - length, []).append(group)
        rooms |= 1 << (left - length)
    return groups


def filled(lengths, block_length: int | None):
    """Lengths, an int or an array, rounded up to full blocks."""
    return -(-lengths // block_length) * block_length if block_length else lengths


def join(rows: list[dict], block_length: int | None = None, eos_id: int | None = None) -> dict[str, np.ndarray]:
    """Several rows as one: besides tokens and supervised, "document" numbers them, "position" restarts at each, and
    "fill" tells what is none of their own."""
    # Every row is first extended by supervised EOS to a multiple of block_length
    parts = {"tokens": [], "supervised": [], "document": [], "position": [], "fill": []}
    for number, row in enumerate(rows):
        size = len(row["tokens"])
        end = filled(size, block_length)
        parts["tokens"] += row["tokens"], np.full(end - size, eos_id if end > size else 0)
        parts["supervised"] += row["supervised"], np.ones(end - size, bool)
        parts["document"].append(np.full(end, number))
        parts["position"].append(np.arange(end))
        parts["fill"].append(np.arange(end) >= size)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


class Packed:
    """Rows of several `rows` each, which do not see each other; as Rows, with "document" and "position" in a row.

    For an objective that does not train on padding: ar, and bd3lm (block_length, eos_id: see join).
    """

    def __init__(self, rows: Rows, length: int, *, block_length: int | None = None, eos_id: int | None = None):
        # Which rows share a canvas of that length is set by their lengths alone
        self.rows, self.block_length, self.eos_id = rows, block_length, eos_id
        lengths = filled(rows.lengths, block_length)
        self.groups = pack(lengths, length)
        self.lengths = np.array([lengths[group].sum() for group in self.groups])
        self.useful, self.counts = rows.useful, rows.counts + Counter({"packed canvases": len(self.groups)})

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return join([self.rows[n] for n in self.groups[i]], self.block_length, self.eos_id)


# ---------------------------------------------------------------- the program: tokenise once, and show rows


@dataclass(kw_only=True)
class Output(Options):
    "tokenizer and output"

    model_name_or_path: Model
    """whose tokenizer: a directory (also under $BASE_MODELS_DIR) or a Hub id"""
    output_dir: Directory | None = None  # directory to write; it appears when it is complete (default: none)
    overwrite: bool = False  # replace the set in --output_dir
    show: Annotated[Natural, "ROWS"] = 3  # rows of each split to show


@dataclass(kw_only=True)
class Prepare(DataSet, Workers, Reading, Output):
    """Tokenise a data set once, for many runs, and show a few of its rows.

    What it writes is read by train.py --load_preprocessed_data True --dataset_args DIR, which refuses it unless stage,
    max_length, tokenizer and the settings below are those it was made with. Without --output_dir it only shows rows."""

    prog: ClassVar[str] = "data.py"


def marked_text(row: dict, tokenizer, *, colour: bool) -> str:
    """A row's text with its special tokens; what is supervised is green, or in ⟦brackets⟧ where colour is False."""
    marks = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    parts, pairs = [], zip(row["supervised"].tolist(), row["tokens"].tolist())
    for learnt, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        text = printable(tokenizer.decode([token for _, token in run], skip_special_tokens=False))
        parts.append(f"{marks[0]}{text}{marks[1]}" if learnt else text)
    return "".join(parts)


def check_output(output: Path, overwrite: bool) -> None:
    """ValueError where `output` has files that must stay, or cannot be written."""
    ours = (output / "preprocessed.json").is_file()
    if ours and not overwrite:
        raise ValueError(f"--output_dir {output} holds a preprocessed set; choose another, or pass --overwrite")
    replaced = {"preprocessed.json", *SPLITS} if ours else set()
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= replaced):
        raise ValueError(f"--output_dir {output} holds other files; choose another")
    check_directory("--output_dir", output.parent)


def prepare(args: Prepare) -> None:
    output = args.output_dir and Path(args.output_dir)
    if output:
        check_output(output, args.overwrite)
    tokenizer = Tokenizer(resolve(args.model_name_or_path))
    splits = {}
    for split in ("train", "test"):
        # Every row is made, shown or not: the counts say how many were dropped, and why
        splits[split] = rows = load(args.dataset_args, split, tokenizer, args, num_proc=args.num_proc)

        # How many there are, and how much of them is learnt
        counts = ", ".join(f"{name} {n:,}" for name, n in rows.counts.items())
        learnt = sum(int(chunk.sum(dtype=np.int64)) for chunk in rows.supervised)
        print(printable(f"{split}: {len(rows):,} rows of {rows.lengths.mean():.1f} tokens ({counts})"))
        print(f"{split}: {rows.useful:,} tokens, {learnt / sum(map(len, rows.supervised)):.1%} of them supervised")

        # What a model will see of the first rows
        for i in range(min(args.show, len(rows))):
            row = rows[i]
            print(f"--- {split} row {i}: {len(row['tokens'])} tokens, {row['supervised'].sum()} supervised")
            print(marked_text(row, tokenizer, colour=sys.stdout.isatty()))
    # Whole or not at all
    if output:
        with sole_user(output.resolve(), whole=True), replacing(output) as directory:
            save_preprocessed(directory, splits, args.dataset_args, settings_of(tokenizer, args))
        print(f"wrote  {output}")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("data.py"):
        prepare(Prepare.parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])

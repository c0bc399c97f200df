"""Options as typed dataclasses: a field is a flag, its type its bounds, the comment beside it its line in `--help`.

    @dataclass(kw_only=True)
    class Optimization(Options):
        "optimization"                            # the title of this group in --help

        optim: Literal["adamw", "muon"] = "adamw" # muon: Muon on the layers' matrices, AdamW on the rest
        learning_rate: Positive = 1e-4
        \"\"\"or, where a line is too short, a string below the field\"\"\"

A program inherits its groups, and adds its manual as a docstring and its name as `prog`; `parse` then reads a command
line. In Python the same fields are keyword arguments, with the same checks: a bad value is a ValueError of one line.
"""

import argparse
import ast
import difflib
import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

from files import read_json

# ---------------------------------------------------------------------------------------------------------------------
# Types of values. In an Annotated type a Bound limits the value, a string names it in --help, a function reads it. A
# tuple without a function takes several values.


class Bound(NamedTuple):
    """A condition on a value, and what an error says was expected."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(n: int) -> Bound:
    return Bound(lambda x: x >= n, f"at least {n}")


def path(text: str) -> str:
    """A path or a Hub id. An empty one, which a shell makes of an unset variable, would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a directory")
    return text


def seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2**63 - 1")
    return int(text)


def ids(text: str) -> tuple[int, ...]:
    """Token ids separated by commas, with or without brackets around them."""
    parts = [part for part in re.split(r"[\s,]+", text.strip("[]() ")) if part]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected token ids separated by commas, such as 151643,151645")
    return tuple(map(int, parts))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() == "true"


def growth(text: str) -> list[tuple[int, float]]:
    """--block_size as (block length, the part of the run at which it ends), in order; ValueError for what is none."""
    parts = [part.partition(":") for part in text.split(",")]
    lengths = [int(K) for K, _, _ in parts]
    shares = [float(share) if colon else 1 / len(parts) for _, colon, share in parts]
    if min(lengths) < 1 or any(lengths[-1] % K for K in lengths) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(text)
    return list(zip(lengths, itertools.accumulate(shares)))


def block_lengths(text: str) -> str:
    try:
        growth(text)
    except ValueError:
        expected = "at least 1, or numbers that each divide the last, as 1,2,4,8 or 1:0.25,4:0.75, in parts of 1"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from None
    return text


EXPECTED = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", tuple: "token ids"}
LARGEST = 10**9  # of any number but a seed: what is beyond overflows somewhere, or fills the memory
Count = Annotated[int, at_least(1), "N"]
Steps = Annotated[Count, Bound(lambda x: x <= 10**6, "at most 1,000,000")]
Natural = Annotated[int, at_least(0), "N"]
NonNegative = Annotated[float, at_least(0), "X"]
Positive = Annotated[float, Bound(lambda x: x > 0, "more than 0"), "X"]
Decay = Annotated[float, at_least(0), Bound(lambda x: x < 1, "less than 1"), "BETA"]
Share = Annotated[float, Bound(lambda x: 0 <= x <= 1, "0 to 1, a part of the run"), "PART"]
Tokens, Rows = Annotated[Count, "TOKENS"], Annotated[Count, "ROWS"]
Directory = Annotated[str, path, Bound(str.strip, "the name of a directory"), "DIR"]
Model = Annotated[Directory, "DIR|ID"]
Seed = Annotated[int, seed, Bound(lambda n: 0 <= n < 2**63, "0 to 2**63 - 1"), "N"]
Ids = Annotated[tuple[int, ...], ids, "ID,ID,..."]
Words = tuple[str, ...]  # arguments without a flag


# ---------------------------------------------------------------------------------------------------------------------
# Classes of options


class Flag(NamedTuple):
    """What a command line must know of a field."""

    kind: type  # of a value; of several, of each
    optional: bool  # it may be None
    read: Callable[[str], Any]  # a value from its text
    several: bool  # any number of values, as a tuple
    choices: tuple
    bounds: tuple[Bound, ...]
    metavar: str | None
    default: Any  # MISSING: it must be given
    help: str
    group: str  # the first line of the class that declares it


@functools.cache
def flags(cls: type) -> dict[str, Flag]:
    """The fields by name, group by group in the order that `cls` inherits them."""
    found, hints = {}, get_type_hints(cls, include_extras=True)
    defaults = {field.name: field.default for field in fields(cls)}  # without ClassVars
    for name, (help, group) in _manual(cls).items():
        if name not in defaults:
            continue

        # The type of one value, and its marks: of X | None those of X, of a tuple those of its items.
        hint = hints[name]
        optional = NoneType in get_args(hint)
        if get_origin(hint) in (Union, UnionType):
            (hint,) = (part for part in get_args(hint) if part is not NoneType)
        kind, marks = _unpacked(hint)
        read = next((mark for mark in marks if inspect.isfunction(mark)), None)
        several = get_origin(kind) is tuple and read is None
        if several:
            kind, of_each = _unpacked(get_args(kind)[0])
            marks = (*of_each, *marks)

        # How it is read and checked. The last name wins: Annotated[Count, "ROWS"] has two.
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        read = read or (type(choices[0]) if choices else boolean if kind is bool else kind)
        bounds = tuple(mark for mark in marks if isinstance(mark, Bound))
        metavar = next((mark for mark in reversed(marks) if isinstance(mark, str)), None)
        kind = type(choices[0]) if choices else get_origin(kind) or kind
        found[name] = Flag(kind, optional, read, several, choices, bounds, metavar, defaults[name], help, group)
    return found


def _manual(cls: type) -> dict[str, tuple[str, str]]:
    """(help, group) of each name that `cls` and the classes it inherits annotate."""
    found = {}
    for owner in cls.__mro__[:-1]:
        lines, classes = _source(owner.__module__)
        tree = classes[owner.__name__]
        title = None if "prog" in vars(owner) else ast.get_docstring(tree)
        group = title.splitlines()[0] if title else "options"

        # Comments and the strings below fields are in the source alone, so that is what we read.
        for statement, after in zip(tree.body, [*tree.body[1:], None]):
            if isinstance(statement, ast.AnnAssign):
                line = lines[statement.end_lineno - 1].encode()  # columns count bytes
                comment = line[statement.end_col_offset :].decode().partition("# ")[2]
                string = " ".join(after.value.value.split()) if isinstance(after, ast.Expr) else None

                # A field that a subclass declares again stays in its group, and keeps its help if it gets no other.
                help, _ = found.pop(statement.target.id, ("", None))
                found[statement.target.id] = help or string or comment, group
    return found


@functools.cache
def _source(module: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """A module's lines, and its classes by name."""
    text = inspect.getsource(sys.modules[module])
    return text.splitlines(), {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}


def _unpacked(hint) -> tuple[Any, tuple]:
    """(type, marks) of Annotated[type, *marks], or of a type without marks."""
    marks = getattr(hint, "__metadata__", ())
    return get_args(hint)[0] if marks else hint, marks


def fits(value, flag: Flag) -> bool:
    """Whether `value` is of the flag's type; an int is a float, too, but a bool is no int."""
    if flag.kind is tuple:
        return isinstance(value, tuple | list) and (flag.read is not ids or all(type(item) is int for item in value))
    return type(value) is flag.kind or (flag.kind is float and type(value) is int)


@dataclass(kw_only=True)
class Options:
    prog: ClassVar[str] = "python"
    given: ClassVar[frozenset[str]] = frozenset()  # the names that a command line set

    def __post_init__(self):
        for name, flag in flags(type(self)).items():
            given = getattr(self, name)
            if given is None and flag.optional:
                continue
            for value in given if flag.several and isinstance(given, tuple | list) else (given,):
                if not fits(value, flag):
                    raise ValueError(f"--{name} {value!r:.60}: expected {EXPECTED[flag.kind]}")
                if flag.choices and value not in flag.choices:
                    *others, last = flag.choices
                    raise ValueError(f"--{name} {value!r} is unknown; expected {', '.join(others)} or {last}")
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"--{name} {value}: expected a number")
                if isinstance(value, int | float) and flag.read is not seed and abs(value) > LARGEST:
                    raise ValueError(f"--{name} {value}: expected a number of at most {LARGEST:,}")
                for bound in flag.bounds:
                    if not bound.holds(value):
                        raise ValueError(f"--{name} {value}: expected {bound.expected}")

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> Self:
        """These options by name; ValueError, which says `where` they are, for a name that is none."""
        cls.check_names(values, where)
        return cls(**values)

    @classmethod
    def check_names(cls, names: Iterable[str], where: str) -> None:
        for name in names:
            if name not in flags(cls):
                way_out = f"python {cls.prog} --help lists them"
                near = nearest(f"--{name}", [f"--{known}" for known in flags(cls)], way_out)
                raise ValueError(f"{where}: unknown option {name}; {near.replace('mean --', 'mean ')}")

    @classmethod
    def defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What each option is where it is not given, as its group works that out, by what `values` choose (--stage,
        which decides on --max_length); MISSING: it must be given."""
        found = {name: flag.default for name, flag in flags(cls).items()}
        chosen = {name: values[name] for name, flag in flags(cls).items() if values.get(name) in (flag.choices or ())}
        for group in cls.__mro__[:-1]:
            declared = {name: flag.default for name, flag in flags(group).items()}
            if MISSING not in declared.values():
                beside = {name: chosen[name] for name in chosen.keys() & declared if declared[name] is not None}
                found |= {name: value for name, value in vars(group(**beside)).items() if found[name] is None}
        return found

    @classmethod
    def parser(cls) -> "Parser":
        return Parser(cls)

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Self:
        """The options that a command line sets, the others at their defaults; ValueError for what is wrong with it."""
        given = vars(cls.parser().parse_args(argv))
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        options = cls(**given)
        options.given = frozenset(given)
        return options

    def only(self, cls: type) -> dict[str, Any]:
        """The options that are fields of `cls`, a class that this one inherits."""
        return {name: value for name, value in asdict(self).items() if name in flags(cls)}


OF_ITS_RUN = ("config", "overwrite", "resume_from_checkpoint", "push_to_hub")  # flags that are not taken from a file


@dataclass(kw_only=True)
class FromFile(Options):
    "flags from a file"

    config: Annotated[str, "FILE"] | None = None
    """take flags from an args.json, which every run writes, or from one like it; those on the command line win, and
    --overwrite, --resume_from_checkpoint and --push_to_hub are never taken (default: none)"""

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Self:
        argv = list(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & {*argv} or "config" not in (found := Parser(FromFile).parse_known_args(argv)[0]):
            return super().parse(argv)

        # Its values become flags before those of the command line, which so win. Values at their defaults are left out:
        # a file has all of them, and most of them nobody gave.
        values = read_json(Path(found.config), "name an args.json")
        cls.check_names(values, found.config)
        defaults = cls.defaults(values)
        known = {name: value for name, value in values.items() if value not in (defaults[name], None)}
        known = {name: value for name, value in known.items() if name not in OF_ITS_RUN}
        return super().parse([*(f"--{name}={value}" for name, value in known.items()), *argv])


# ---------------------------------------------------------------------------------------------------------------------
# The command line

# What other programs call a flag: what it is called here.
ELSEWHERE = {"--model": "--model_name_or_path", "--dataset": "--dataset_args", "--prompt": "PROMPT"}
ELSEWHERE |= {"--lr": "--learning_rate", "--epochs": "--num_train_epochs", "--block_length": "--block_size"}
ELSEWHERE |= {"--batch_size": "--per_device_train_batch_size", "--grad_accum": "--gradient_accumulation_steps"}
ELSEWHERE |= dict.fromkeys(["--gen_length", "--max_tokens"], "--max_new_tokens")


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The way out of an unknown name: the known one that it resembles, else what `otherwise` says."""
    known = list(known)
    here = ELSEWHERE.get(name)
    near = [here] if here in known else difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


class Parser(argparse.ArgumentParser):
    """argparse for a class of options; whatever is wrong is a ValueError. What is not given, the result lacks."""

    def __init__(self, cls: type):
        form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog=cls.prog, description=inspect.getdoc(cls) if "prog" in vars(cls) else None, **form)

        # A group for each class that `cls` inherits, after argparse's own with --help.
        groups = {"options": self._optionals}
        for name, flag in flags(cls).items():
            help, required, positional = flag.help, flag.default is MISSING, flag.several and flag.read is str
            if flag.default not in (None, MISSING, (), "") and "default" not in help:
                shown = " ".join(map(str, flag.default)) if flag.several else flag.default
                help += f" (default: {shown})"

            # What argparse wants to know of it.
            how = {"type": flag.read, "metavar": flag.metavar, "help": help.replace("%", "%%")}
            if flag.choices:
                how["choices"] = flag.choices
            if flag.read is boolean:
                how |= {"nargs": "?", "const": True, "metavar": "True|False"}  # alone it means True
            if flag.several:
                how["nargs"] = "*" if positional and not required else "+"
            if not positional:
                name, how["required"] = f"--{name}", required
            if flag.group not in groups:
                groups[flag.group] = self.add_argument_group(flag.group)
            groups[flag.group].add_argument(name, default=argparse.SUPPRESS, **how)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        # A flag that does not exist has a nearest one that does.
        args = list(sys.argv[1:] if args is None else args)
        before = list(itertools.takewhile(lambda argument: argument != "--", args))
        positional = [action.metavar for action in self._get_positional_actions()]
        for flag in (argument.partition("=")[0] for argument in before if argument.startswith("--")):
            if flag not in self._option_string_actions:
                way_out = f"python {self.prog} --help lists them"
                known = [*self._option_string_actions, *positional]
                raise ValueError(f"unknown flag {flag}; {nearest(flag, known, way_out)}")

        # A boolean that stands alone does not take the argument after it, a prompt say, for its value.
        if not positional:
            return super().parse_args(args, namespace)
        for i, (flag, after) in enumerate(itertools.zip_longest(before, before[1:], fillvalue="")):
            action = self._option_string_actions.get(flag)
            if action is not None and action.type is boolean and after.lower() not in ("true", "false"):
                args[i] = f"{flag}=True"
        return self.parse_intermixed_args(args, namespace)

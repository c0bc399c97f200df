"""Options as dataclasses: the same fields are flags with a manual, and keyword arguments with the same checks."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pytest

import card
from options import Bound, Count, Directory, FromFile, Ids, Natural, Options, Positive, Rows, Seed, Share, Words, flags
from train import Settings


@dataclass(kw_only=True)
class Source(Options):
    """where from

    What follows the first line is no title.
    """

    model_name_or_path: Directory  # a directory
    kind: Literal["small", "large"] | None = None  # what to make of it (default: what it is)


@dataclass(kw_only=True)
class Optimization(Options):
    "optimization"

    learning_rate: Positive = 1e-4
    """peak, in 100 % of the
    runs"""
    rows: Natural = 3  # rows # of a batch
    share: Share = 0.1  # part of the run
    even: Annotated[int, Bound(lambda n: n % 2 == 0, "an even number"), "EVEN"] | None = None  # or none (default: none)
    loud: bool = False  # say more
    quiet: bool | None = None  # say less (default: as the terminal is)
    batch: tuple[Rows, ...] = (1, 4)  # rows, one measurement each
    suppress: Ids = ()  # never generated (default: none)
    seed: Seed = 42  # of all that is random


@dataclass(kw_only=True)
class Program(Source, Optimization):
    """Does something.

    The second paragraph of the manual.
    """

    prog: ClassVar[str] = "program.py"
    rows: Natural = 8
    own: str = ""  # a field of the program itself


@dataclass(kw_only=True)
class Prompts(Options):
    "prompts"

    prompts: Annotated[Words, "PROMPT"] = ()  # what to continue
    max_new_tokens: Count = 8  # tokens of the answer
    stop: bool = False  # at the first


@dataclass(kw_only=True)
class Sampler(Prompts, Source):
    """Samples."""

    prog: ClassVar[str] = "sampler.py"


@dataclass(kw_only=True)
class Runs(Options):
    """Needs arguments."""

    prog: ClassVar[str] = "runs.py"
    runs: Annotated[Words, "RUN"]  # directories


FROM = ["--model_name_or_path", "m"]


def parse(*flags: str, cls=Program):
    return cls.parse([*FROM, *flags])


@pytest.fixture
def manual(monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    return Program.parser().format_help()


# ---------------------------------------------------------------------------------------------------------------------
# The manual


def test_the_manual_comes_before_the_groups_and_groups_in_the_order_they_are_inherited(manual):
    assert manual.startswith("usage: program.py ")
    assert "Does something.\n\nThe second paragraph of the manual.\n\noptions:\n" in manual
    assert re.findall(r"^(\S.*):$", manual, flags=re.MULTILINE) == ["options", "where from", "optimization"]
    assert list(flags(Program))[:3] == ["own", "model_name_or_path", "kind"]  # as are the names in errors
    with pytest.raises(ValueError, match=r"required: --model_name_or_path$"):
        Program.parse([])


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("own", r"--own OWN +a field of the program itself"),
        ("model_name_or_path", r"--model_name_or_path DIR +a directory"),
        ("kind", r"--kind \{small,large\} +what to make of it \(default: what it is\)"),
        ("learning_rate", r"--learning_rate X +peak, in 100 % of the runs \(default: 0\.0001\)"),
        ("share", r"--share PART +part of the run \(default: 0\.1\)"),
        ("even", r"--even EVEN +or none \(default: none\)"),
        ("loud", r"--loud \[True\|False\] +say more \(default: False\)"),
        ("batch", r"--batch ROWS \[ROWS \.\.\.\] +rows, one measurement each \(default: 1 4\)"),
        ("suppress", r"--suppress ID,ID,\.\.\. +never generated \(default: none\)"),
        ("seed", r"--seed N +of all that is random \(default: 42\)"),
    ],
)
def test_a_field_is_a_flag_with_its_help_its_default_and_its_unit(flag, line, manual):
    assert flag in flags(Program)
    assert re.search(rf"^  {line}$", re.sub(r"\n {10,}", "  ", manual), flags=re.MULTILINE), manual


def test_a_field_declared_again_stays_in_its_group_with_its_help_and_its_new_default(manual):
    assert re.search(r"--rows N +rows # of a batch \(default: 8\)", manual)
    assert flags(Program)["rows"].group == "optimization"
    assert (Program(model_name_or_path="m").rows, Optimization().rows) == (8, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("line", "value"),
    [("", False), ("--loud", True), ("--loud True", True), ("--loud=true", True), ("--loud FALSE", False)],
)
def test_a_boolean_is_true_alone_and_takes_true_and_false(line, value):
    for cls in (Program, Optimization):
        assert cls.parse([*(FROM if cls is Program else []), *line.split()]).loud is value
    assert parse(*line.replace("loud", "quiet").split()).quiet is (value if line else None)


def test_a_boolean_before_arguments_leaves_them_alone():
    for line in (["--stop", "hi"], ["hi", "--stop"], ["--stop=True", "hi"], ["--stop", "true", "hi"]):
        options = parse(*line, cls=Sampler)
        assert (options.stop, options.prompts) == (True, ("hi",))
    assert parse("--stop", "False", cls=Sampler).prompts == ()
    assert parse("a", "--stop", "--", "--b", "--stop", cls=Sampler).prompts == ("a", "--b", "--stop")


def test_arguments_may_stand_anywhere_and_are_required_where_they_have_no_default():
    assert parse("a", "--max_new_tokens", "3", "b", cls=Sampler).prompts == ("a", "b")
    assert parse(cls=Sampler).prompts == ()
    assert Runs.parse(["a", "b"]).runs == ("a", "b")
    with pytest.raises(ValueError, match="required: RUN"):
        Runs.parse([])


def test_several_values_are_a_tuple_and_each_is_checked():
    assert (parse().batch, parse("--batch", "2").batch, parse("--batch", "2", "3").batch) == ((1, 4), (2,), (2, 3))
    for make in (lambda: parse("--batch", "2", "0"), lambda: Optimization(batch=(2, 0))):
        with pytest.raises(ValueError, match=r"^--batch 0: expected at least 1$"):
            make()


def test_what_is_not_given_is_none_where_that_is_the_default():
    options = parse()
    assert (options.kind, options.even, options.quiet) == (None, None, None)
    assert parse("--even", "2").even == 2


def test_ids_are_read_with_or_without_brackets():
    for text in ("3,14", "[3, 14]", "(3 14)"):
        assert parse("--suppress", text).suppress == (3, 14)
    assert parse("--suppress", "").suppress == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--rows -1", "--rows -1: expected at least 0"),
        ("--rows x", "argument --rows: invalid int value: 'x'"),
        ("--learning_rate 0", "--learning_rate 0.0: expected more than 0"),
        ("--learning_rate nan", "--learning_rate nan: expected a number"),
        ("--share 1.5", "--share 1.5: expected 0 to 1, a part of the run"),
        ("--even 3", "--even 3: expected an even number"),
        ("--kind huge", "argument --kind: invalid choice: 'huge' (choose from 'small', 'large')"),
        ("--loud maybe", "argument --loud: 'maybe': expected True or False"),
        ("--seed -1", "argument --seed: '-1': expected a whole number from 0 to 2**63 - 1"),
        ("--suppress a", "argument --suppress: 'a': expected token ids separated by commas"),
        ("--model_name_or_path=", "argument --model_name_or_path: '': expected the name of a directory"),
        ("stray", "unrecognized arguments: stray"),
        ("--learn 1", "unknown flag --learn; did you mean --learning_rate?"),  # no abbreviations
        ("--learning_rates=1", "unknown flag --learning_rates; did you mean --learning_rate?"),
        ("--zzz", "unknown flag --zzz; python program.py --help lists them"),
    ],
)
def test_a_bad_command_line_is_a_value_error_of_one_line(line, words):
    with pytest.raises(ValueError) as error:
        parse(*line.split())
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": -1}, "--rows -1: expected at least 0"),
        ({"learning_rate": float("inf")}, "--learning_rate inf: expected a number"),
        ({"share": -0.1}, "--share -0.1: expected 0 to 1, a part of the run"),
        ({"even": 3}, "--even 3: expected an even number"),
        ({"kind": "huge"}, "--kind 'huge' is unknown; expected small or large"),
    ],
)
def test_a_bad_value_in_python_is_a_value_error_of_one_line(options, words):
    with pytest.raises(ValueError) as error:
        Program(model_name_or_path="m", **options)
    assert str(error.value) == words


def test_given_names_what_the_command_line_set_even_to_the_default():
    assert parse("--rows", "8", "--loud").given == {"model_name_or_path", "rows", "loud"}
    assert parse("hi", cls=Sampler).given == {"model_name_or_path", "prompts"}
    assert Program(model_name_or_path="m", rows=8).given == frozenset()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "3"}, "--rows '3': expected a whole number"),
        ({"rows": True}, "--rows True: expected a whole number"),
        ({"rows": None}, "--rows None: expected a whole number"),
        ({"share": "much"}, "--share 'much': expected a number"),
        ({"loud": 1}, "--loud 1: expected True or False"),
        ({"own": 3}, "--own 3: expected a string"),
        ({"suppress": ("a",)}, "--suppress ('a',): expected token ids"),
        ({"suppress": 3}, "--suppress 3: expected token ids"),
        ({"batch": (1, "2")}, "--batch '2': expected a whole number"),
        ({"batch": 2.5}, "--batch 2.5: expected a whole number"),
        ({"seed": -1}, "--seed -1: expected 0 to 2**63 - 1"),
    ],
)
def test_a_value_of_another_type_in_python_is_a_value_error_of_one_line(options, words):
    with pytest.raises(ValueError) as error:
        Program(model_name_or_path="m", **options)
    assert str(error.value) == words
    assert Program(model_name_or_path="m", share=1, even=None, batch=[1, 2], suppress=[3]).share == 1


def test_options_by_name_refuse_a_name_that_is_none():
    assert Program.of({"model_name_or_path": "m", "rows": 3}, "here") == Program(model_name_or_path="m", rows=3)
    with pytest.raises(ValueError, match=r"^here: unknown option row; did you mean rows\?$"):
        Program.of({"row": 3}, "here")
    with pytest.raises(ValueError, match=r"^here: unknown option zzz; python program\.py --help lists them$"):
        Program.of({"zzz": 3}, "here")


def test_only_gives_the_options_of_one_inherited_class():
    options = parse("--share", "0.5", "--rows", "9")
    assert options.only(Source) == {"model_name_or_path": "m", "kind": None}
    assert Optimization(**options.only(Optimization)) == Optimization(share=0.5, rows=9)


def test_help_prints_the_manual_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        Program.parse(["--help"])
    assert stop.value.code == 0 and capsys.readouterr().out == Program.parser().format_help()


# ---------------------------------------------------------------------------------------------------------------------
# Flags from a file


@dataclass(kw_only=True)
class Run(FromFile, Program):
    """Runs."""

    prog: ClassVar[str] = "run.py"
    overwrite: bool = False  # replace what is there


@pytest.fixture
def file(tmp_path):
    """Writes an object of JSON, and gives its path."""

    def write(**values) -> str:
        path = tmp_path / "args.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_a_file_gives_flags_and_the_command_line_wins(file):
    path = file(model_name_or_path="-m", rows=3, share=0.25, loud=True, kind="large", suppress=[1, 2], even=None)
    options = Run.parse(["--config", path, "--rows", "4", "--loud", "False"])
    assert (options.model_name_or_path, options.rows, options.share, options.loud) == ("-m", 4, 0.25, False)
    assert (options.kind, options.suppress, options.even, options.config) == ("large", (1, 2), None, path)
    assert Run.parse([f"--config={path}"]).rows == 3
    with pytest.raises(ValueError, match="required: --model_name_or_path"):
        Run.parse(["--config", file(rows=3)])


def test_what_a_file_has_at_its_default_was_not_given(file):
    path = file(model_name_or_path="m", rows=8, share=0.2, loud=False)
    assert Run.parse(["--config", path]).given == {"config", "model_name_or_path", "share"}
    assert "loud" in Run.parse(["--config", path, "--loud", "False"]).given


def test_what_a_choice_of_the_file_decides_is_told_from_what_was_given(file):
    """128 is the length of plain text, so for a chat somebody gave it."""
    for stage, length in (("sft", 128), ("pt", 512)):
        path = file(model_name_or_path="m", dataset_args="d", output_dir="o", stage=stage, max_length=length)
        assert Settings.parse(["--config", path]).max_length == length
        assert "max_length" in Settings.parse(["--config", path]).given
        assert f"--max_length {length} " in card.recipe(Settings.parse(["--config", path])) + " "
    path = file(model_name_or_path="m", dataset_args="d", output_dir="o", stage="sft", max_length=512)
    assert "max_length" not in Settings.parse(["--config", path]).given


def test_a_run_started_from_anothers_file_is_neither_pushed_nor_resumed(file):
    of_its_run = {"push_to_hub": "a/b", "resume_from_checkpoint": "auto", "overwrite": True}
    path = file(model_name_or_path="m", dataset_args="d", output_dir="o", **of_its_run)
    options = Settings.parse(["--config", path])
    assert (options.push_to_hub, options.resume_from_checkpoint, options.overwrite) == (None, None, False)


def test_a_file_does_not_overwrite_nor_name_another_file(file):
    options = Run.parse(["--config", file(model_name_or_path="m", overwrite=True, config="other.json")])
    assert not options.overwrite and options.config.endswith("args.json")
    assert Run.parse(["--config", options.config, "--overwrite"]).overwrite


def test_a_file_is_checked_as_a_command_line_is(file, tmp_path, capsys):
    for values, words in (
        ({"row": 3}, r"args\.json: unknown option row; did you mean rows\?$"),
        ({"zzz": 3}, r"args\.json: unknown option zzz; python run\.py --help lists them$"),
        ({"rows": "many"}, "^argument --rows: invalid int value: 'many'$"),
        ({"rows": 2.5}, "^argument --rows: invalid int value: '2.5'$"),
        ({"rows": -1}, "^--rows -1: expected at least 0$"),
    ):
        with pytest.raises(ValueError, match=words):
            Run.parse(["--config", file(model_name_or_path="m", **values)])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json is damaged: \[\], expected an object; name an args\.json$"):
        Run.parse(["--config", str(tmp_path / "list.json")])
    with pytest.raises(OSError, match=r"nowhere\.json"):
        Run.parse(["--config", str(tmp_path / "nowhere.json")])
    with pytest.raises(ValueError, match=r"^argument --config: expected one argument$"):
        Run.parse(["--config"])
    with pytest.raises(SystemExit):
        Run.parse(["--config", "nowhere", "--help"])
    assert "Runs." in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Names from other programs


@dataclass(kw_only=True)
class Trainer(Options):
    """Trains."""

    prog: ClassVar[str] = "trainer.py"
    model_name_or_path: str = "m"
    learning_rate: float = 1.0
    per_device_train_batch_size: int = 1
    num_train_epochs: int = 1


@dataclass(kw_only=True)
class Evaluator(Options):
    """Evaluates."""

    prog: ClassVar[str] = "evaluator.py"
    batch_size: int = 1
    model: str = "a2d"


@pytest.mark.parametrize(
    ("cls", "flag", "here"),
    [
        (Trainer, "--model", "--model_name_or_path"),
        (Trainer, "--lr", "--learning_rate"),
        (Trainer, "--batch_size", "--per_device_train_batch_size"),
        (Trainer, "--epochs", "--num_train_epochs"),
        (Sampler, "--gen_length", "--max_new_tokens"),
        (Sampler, "--max_tokens", "--max_new_tokens"),
        (Sampler, "--prompt", "PROMPT"),
        (Sampler, "--max_new_token", "--max_new_tokens"),  # nobody's name, but near
    ],
)
def test_a_name_of_another_program_is_answered_by_the_one_here(cls, flag, here):
    for line in ([flag, "1"], [f"{flag}=1"]):
        with pytest.raises(ValueError, match=rf"^unknown flag {flag}; did you mean {re.escape(here)}\?$"):
            cls.parse(line)


def test_a_name_of_another_program_is_no_answer_where_the_program_lacks_it_or_has_the_other():
    with pytest.raises(ValueError, match=r"^unknown flag --gen_length; python trainer\.py --help lists them$"):
        Trainer.parse(["--gen_length", "8"])
    options = Evaluator.parse(["--batch_size", "4", "--model", "b"])
    assert (options.batch_size, options.model) == (4, "b")

"""What cannot be used, every program refuses alike: one line, exit status 2, and nothing is written or replaced.

Mistakes that only one program knows are in that program's own tests.
"""

import errno
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import checkpoint, tokenizer
from conftest import tiny

import bench
import chat
import checkpoint as checkpoints
import convert
import data
import log
import sample
import train
from tasks import builtin

try:
    import evaluate
except ModuleNotFoundError:
    evaluate = None

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {
    "train": train,
    "sample": sample,
    "chat": chat,
    "convert": convert,
    "data": data,
    "evaluate": evaluate,
    "bench": bench,
}
SAMPLERS = ("sample", "chat", "evaluate")
LOADERS = ("train", *SAMPLERS, "convert")
ALL = (*LOADERS, "data")
FOLDER = tempfile.TemporaryDirectory()


def command(program: str, model: str, *more: str, objective: str = "mdlm") -> list[str]:
    """A command that works, with a good model; of evaluate `more` are model_args."""
    named, into = ("--model_name_or_path", str(model)), ("--output_dir", "out")
    chats = ("--dataset_args", "builtin/sums", "--stage", "sft", "--max_length", "64")
    short = ("--max_new_tokens", "8", "--steps", "8")
    if program == "evaluate":
        model_args = ",".join([f"pretrained={model}", *more])
        named, more = ("--model", f"a2d_{objective}", "--model_args", model_args), ("--tasks", "sums")
        into = ("--output_path", "out")
    return {
        "train": [*named, *into, *chats, "--max_steps", "2", *more],
        "sample": ["hi", *named, *short, "--output", "out.jsonl", *more],
        "chat": [*named, *short, *more],
        "convert": [*named, *into, *more],
        "data": [*named, *into, *chats, "--show", "0", *more],
        "evaluate": [*named, *into, *more],
    }[program]


def contents(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a program in an empty directory, without a network: run(program, arguments) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(FOLDER.name, "datasets"))
    monkeypatch.setattr(builtin, "SUMS", {"train": 60, "validation": 20, "test": 20})
    monkeypatch.setattr(log, "curves", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [])  # which evaluate.py sets
    if evaluate is not None:
        monkeypatch.setattr("lm_eval.utils.setup_logging", lambda *_: None)

    def call(program: str, arguments: list[str], stdin: bytes = b"hi\n"):
        if PROGRAMS[program] is None:
            pytest.skip("needs lm-eval")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status = 0
        try:
            PROGRAMS[program].main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run, tmp_path):
    """The same for a command that must fail, with what it must say."""

    def call(program: str, arguments: list[str], words: str, **options) -> None:
        before = contents(tmp_path)
        status, _, err = run(program, arguments, **options)
        *progress, said = err.splitlines()
        assert status == 2, err
        assert re.match(rf"{program}\.py( \w+)?: ", said) and re.search(words, said), said
        assert all(re.search(r"examples|^$", line) for line in progress), err  # bars of `datasets`
        assert contents(tmp_path) == before

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Models


@functools.cache
def damaged(name: str) -> Path:
    """A directory that MODELS says something about."""
    path = Path(FOLDER.name, "models", name)
    path.parent.mkdir(exist_ok=True)
    if name == "empty":
        path.mkdir()
    elif name == "unfit":
        model = tiny(objective="ar", mask_token_id=None)
        checkpoints.save_model(model, path, tokenizer=tokenizer())
    elif name.startswith("shard") or name.startswith("index"):
        whole, checkpoints.SHARD_BYTES = checkpoints.SHARD_BYTES, 100_000
        try:
            checkpoints.save_model(checkpoints.load_model(checkpoint("mdlm")), path, tokenizer=tokenizer())
        finally:
            checkpoints.SHARD_BYTES = whole
    else:
        shutil.copytree(checkpoint("mdlm"), path)
    index, config = path / "model.safetensors.index.json", path / "config.json"
    first, second, *_ = [*sorted(path.glob("model-*.safetensors")), None, None]
    match name:
        case "truncated":
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:5000])
        case "weightless":
            (path / "model.safetensors").unlink()
        case "shard.missing":
            second.unlink()
        case "shard.truncated":
            second.write_bytes(second.read_bytes()[:5000])
        case "shard.other":
            shutil.copy(first, second)
        case "index.empty":
            index.write_text("{}")
        case "index.torn":
            index.write_text(index.read_text()[:50])
        case "config.torn":
            config.write_text(config.read_text()[:50])
        case "config.list":
            config.write_text("[]")
        case "tokenizer.torn":
            (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text()[:500])
        case "tokenizer_config.list":
            (path / "tokenizer_config.json").write_text("[]")
        case "template.latin":
            (path / "chat_template.jinja").write_bytes(b"\xff")
    if name in FIELDS:
        config.write_text(json.dumps(json.loads(config.read_bytes()) | FIELDS[name][0]))
    return path


FIELDS = {  # of config.json, and what is said of them
    "another family": ({"model_type": "mamba"}, "model_type 'mamba': expected qwen3, qwen2, llama"),
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window true is not supported"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling .*yarn.* is not supported"),
    "another size": ({"hidden_size": 64}, r"disagree: model.embed_tokens.weight is \[448, 32\], expected \[448, 64\]"),
    "a size as text": ({"hidden_size": "64"}, 'hidden_size "64": expected int'),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0: expected more"),
    "a switch as a number": ({"tie_word_embeddings": 1}, "tie_word_embeddings 1: expected bool"),
    "scaling by a number": ({"rope_scaling": 5}, "rope_scaling 5: expected dict"),
    "a negative context": ({"max_position_embeddings": -1}, "max_position_embeddings -1: expected more"),
    "uneven heads": ({"num_key_value_heads": 3}, "4 heads of 16 for 3 of keys and values: expected a multiple"),
    "an odd head": ({"head_dim": 15}, "an even head_dim"),
}
WEIGHTS = {
    "truncated": "model.safetensors is truncated or no safetensors file .*; fetch it again",
    "weightless": "holds no model.safetensors; expected that or its index and shards",
    "shard.missing": "model-00002-of-00003.safetensors, which .*index.json names, is missing; fetch the model again",
    "shard.truncated": "model-00002-of-00003.safetensors is truncated .*; fetch it again",
    "shard.other": r"weights and config.json disagree: model\.layers\.\S+ is missing.* and \d+ more",
    "index.empty": r"model.safetensors.index.json names no shards.*weight_map.*; fetch the model again",
    "index.torn": r"model.safetensors.index.json is damaged: .*; fetch it again",
    "config.torn": "config.json is damaged: .*; fetch it again",
    "config.list": r"config.json is damaged: \[\], expected an object",
    **{name: words for name, (_, words) in FIELDS.items()},
}
PLACES = {
    "./nowhere": "./nowhere is neither a directory nor a Hub id within reach",
    "nobody/nothing": "nobody/nothing is neither a directory nor a Hub id within reach: .* outgoing traffic has been",
}
TOKENIZERS = {
    "empty": "holds no (config.json; expected a Hugging Face|tokenizer.json; transformers writes one)",
    "tokenizer.torn": "tokenizer.json is damaged: .*; fetch it again",
    "tokenizer_config.list": r"tokenizer_config.json is damaged: \[\], expected an object; fetch it again",
    "template.latin": "chat_template.jinja is damaged: 'utf-8' codec.*; fetch it again",
}


@pytest.mark.parametrize("program", ALL)
@pytest.mark.parametrize("name", [*PLACES, *TOKENIZERS])
def test_what_is_no_checkpoint_or_has_no_tokenizer_is_refused(refused, program, name):
    model = name if name in PLACES else damaged(name)
    refused(program, command(program, model), (PLACES | TOKENIZERS)[name])


@pytest.mark.parametrize("program", ALL)
def test_a_file_of_a_checkpoint_is_not_taken_for_it(refused, program):
    file = Path(checkpoint("mdlm"), "config.json")
    refused(program, command(program, file), "config.json is a file; name the checkpoint's directory")


@pytest.mark.parametrize("program", LOADERS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_and_unsupported_models_are_refused(refused, program, name):
    refused(program, command(program, damaged(name)), WEIGHTS[name])


@pytest.mark.parametrize("program", LOADERS)
def test_a_tokenizer_and_an_embedding_that_do_not_fit_are_refused(refused, program):
    words = "the tokenizer has token id 310 and the embedding 40 rows, so they are not of one model; fetch"
    refused(program, command(program, damaged("unfit"), objective="ar"), words)


@pytest.mark.parametrize("program", ("train", *SAMPLERS))
def test_a_model_without_a_mask_token_is_sent_to_convert(refused, program):
    words = "run convert.py on it first" if program == "train" else "has no mask token; make .* with convert.py"
    objective = ("--objective", "mdlm") if program in ("sample", "chat") else ()
    refused(program, command(program, checkpoint("plain"), *objective), words)


@pytest.mark.parametrize("what", ["model", pytest.param("data set", marks=pytest.mark.slow)])  # `datasets` tries long
def test_without_a_network_models_and_data_sets_are_told_to_be_out_of_reach(tmp_path, what):
    """Where connections are refused, as where a server or a cable is missing."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    good = command("data", checkpoint("mdlm"), "--dataset_args", "nobody/nothing")
    words = "cannot load nobody/nothing: .*; a local path or a builtin set needs no network"
    if what == "model":
        good, words = (
            command("data", "nobody/nothing"),
            "nobody/nothing is neither a directory nor a Hub id within reach",
        )
    argv = [sys.executable, str(ROOT / "data.py"), *good]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    *tries, said = done.stderr.splitlines()  # `datasets` says that it tries again
    assert done.returncode == 2 and re.match(rf"data\.py: {words}", said) and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert not tries or what == "data set"
    assert not (tmp_path / "out").exists()


BROKEN = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% if %}": "Expected an expression",
    "{{ messages[0].content + 1 }}": "TypeError",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_chat_template_that_fails_is_told(refused, tmp_path, template):
    model = tmp_path.parent / f"{tmp_path.name}.model"
    shutil.copytree(checkpoint("mdlm"), model)
    (model / "chat_template.jinja").write_text(template)
    for program in ("train", "sample", "chat", "data"):
        refused(program, command(program, model), f"the chat template refuses these messages: .*{BROKEN[template]}")
    if evaluate is not None:
        with pytest.raises(ValueError, match=BROKEN[template]):
            evaluate.models()["a2d_mdlm"](pretrained=str(model)).apply_chat_template([{"role": "user", "content": "a"}])


# ---------------------------------------------------------------------------------------------------------------------
# Options


def given(program: str, **options: str) -> list[str]:
    """As flags, or for evaluate as model_args."""
    if program == "evaluate":
        return [f"{name}={value}" for name, value in options.items()]
    return [word for name, value in options.items() for word in (f"--{name}", value)]


SAMPLER = {
    ("steps", "0"): "steps 0: expected at least 1",
    ("steps", "many"): "steps: invalid int value: 'many'",
    ("steps_per_block", "0"): "steps_per_block 0: expected at least 1",
    ("stpes", "4"): "stpes; did you mean (--)?steps?",
    ("temprature", "1"): "temprature; did you mean (--)?temperature?",
    ("remaskin", "p2"): "remaskin; did you mean (--)?remasking?",
    ("block_size", "0"): "block_size 0: expected at least 1",
    ("temperature", "-1"): r"temperature -1\.0: expected 0 \(the likeliest token\) or more",
    ("temperature", "nan"): "temperature nan: expected a number",
    ("cfg_scale", "nan"): "cfg_scale nan: expected a number",
    ("top_p", "0"): "top_p 0.0: expected above 0",
    ("threshold", "2"): "threshold 2.0: expected a probability",
    ("entropy", "-1"): "entropy -1.0: expected",
    ("factor", "0"): "factor 0.0: expected",
    ("max_new_tokens", "-1"): "max_new_tokens(: invalid int value: '-1.0'| -1: expected at least 0)",
    ("max_new_tokens", "1000"): "exceed the model's context of 256",
    ("remasking", "lowest"): "remasking: invalid choice: 'lowest' .*low_confidence",
    ("suppress_tokens", "9999"): "suppress_tokens: token id 9999 is outside the vocabulary",
    ("seed", "-1"): r"seed: '-1(\.0)?': expected a whole number from 0 to 2\*\*63 - 1",
    ("dtype", "int8"): "dtype: invalid choice: 'int8'",
}


@pytest.mark.parametrize("program", SAMPLERS)
@pytest.mark.parametrize("option", SAMPLER, ids=" ".join)
def test_sampler_options_out_of_range_or_misspelt_are_refused(refused, program, option):
    name, value = option
    refused(program, command(program, checkpoint("mdlm"), *given(program, **{name: value})), SAMPLER[option])


@pytest.mark.parametrize("program", ("train", *SAMPLERS))
def test_a_block_size_unlike_the_checkpoints_is_refused(refused, program):
    words = "--block_size 8 contradicts the checkpoint, which declares block_length 4; leave it at that, or declare it"
    refused(program, command(program, checkpoint("bd3lm"), *given(program, block_size="8"), objective="bd3lm"), words)


@pytest.mark.parametrize("program", ("sample", "chat"))
def test_a_block_longer_than_the_answer_is_refused(refused, program):
    words = "block_size 64 exceeds the 8 tokens of max_new_tokens; pass at most 8"
    refused(program, command(program, checkpoint("mdlm"), "--block_size", "64"), words)


def test_blocks_longer_than_rows_or_of_no_token_are_refused(refused):
    sizes = {"0": "--block_size: '0': expected at least 1", "65": "block size 65 exceeds --max_length 64"}
    for size, words in sizes.items():
        block = ("--objective", "bd3lm", "--block_size", size)
        refused("train", command("train", checkpoint("undeclared"), *block), words)
    block = ("--objective", "bd3lm", "--block_size", "0")
    refused("convert", command("convert", checkpoint("plain"), *block), "--block_size 0: bd3lm needs one of at least 1")


@pytest.mark.parametrize("program", ("sample", "chat"))
def test_more_steps_than_tokens_are_allowed_and_said(run, program):
    status, out, err = run(program, command(program, checkpoint("mdlm"), "--steps", "500"))
    said = out if program == "sample" else err
    assert status == 0 and ", 8 forwards," in said
    assert "steps 500 for at most 8 tokens: those that would reveal none are left out" in said
    status, out, err = run(program, command(program, checkpoint("mdlm"), *(["--overwrite"] * (program == "sample"))))
    assert status == 0 and "for at most" not in out + err


FLAGS = {
    "train": ("--max_stpes", "--max_steps"),
    "sample": ("--tempreature", "--temperature"),
    "chat": ("--histroy_file", "--history_file"),
    "convert": ("--objectiv", "--objective"),
    "data": ("--max_lenght", "--max_length"),
    "evaluate": ("--outptu_path", "--output_path"),
    "bench": ("--bacth", "--batch"),
}


@pytest.mark.parametrize("program", FLAGS)
def test_an_unknown_flag_is_told_with_the_nearest_name(refused, program):
    wrong, near = FLAGS[program]
    base = ["train"] if program == "bench" else command(program, checkpoint("mdlm"))
    refused(program, [*base, wrong, "1"], rf"unknown flag {wrong}; did you mean {near}\?")
    refused(program, [*base, f"{wrong}=1"], rf"unknown flag {wrong}; did you mean {near}\?")
    refused(program, [*base, "--zzz", "1"], r"unknown flag --zzz; python .*--help.* lists? ")


@pytest.mark.parametrize("program", ("train", "sample", "chat", "convert"))
def test_seeds_that_no_generator_takes_are_refused(refused, program):
    for text in ("-1", str(2**63), "x"):
        refused(program, command(program, checkpoint("mdlm"), "--seed", text), f"argument --seed: '{text}': expected")


NUMBERS = {  # of train.py and data.py
    "train --max_steps 0": "--max_steps 0: expected at least 1",
    "train --learning_rate nan": "--learning_rate nan: expected a number",
    "train --max_grad_norm inf": "--max_grad_norm inf: expected a number",
    "train --num_train_epochs 0": "--num_train_epochs 0.0: expected more than 0",
    "train --weight_decay -1": "--weight_decay -1.0: expected at least 0",
    "train --adam_beta1 1": "--adam_beta1 1.0: expected less than 1",
    "train --adam_beta2 -0.5": "--adam_beta2 -0.5: expected at least 0",
    "train --pad_to 8": "--pad_to 8 is less than the longest row, 64",
    "train --max_length 0": "--max_length 0: expected at least 1",
    "data --max_length 0": "--max_length 0: expected at least 1",
    "data --num_proc 0": "--num_proc 0: expected at least 1",
    "data --show -1": "--show -1: expected at least 0",
}


@pytest.mark.parametrize("line", NUMBERS)
def test_numbers_out_of_range_are_refused(refused, line):
    program, *flags = line.split()
    refused(program, command(program, checkpoint("mdlm"), *flags), NUMBERS[line])


@pytest.mark.parametrize("program", ("train", "convert", "data"))
def test_a_directory_without_a_name_is_not_taken_for_the_working_directory(refused, program):
    for flag in ("--output_dir", "--model_name_or_path"):
        words = f"argument {flag}: '': expected the name of a directory"
        refused(program, command(program, checkpoint("mdlm"), flag, ""), words)


MISSING = {
    "train": "required: --model_name_or_path, --dataset_args, --output_dir",
    "sample": "required: --model_name_or_path",
    "chat": "required: --model_name_or_path",
    "convert": "required: --output_dir",
    "data": "required: --dataset_args, --model_name_or_path",
}


@pytest.mark.parametrize("program", MISSING)
def test_what_is_required_is_named(refused, program):
    refused(program, [], MISSING[program])


def test_lm_evals_own_flags_are_refused_in_one_line_too(refused, tmp_path):
    good = command("evaluate", checkpoint("mdlm"))
    for flags, words in (
        (["--model", "a2d_mdlm", "--tasks", "sums"], "model_args lack pretrained; expected pretrained=CHECKPOINT"),
        (["--model", "a2d_mdlm", "--model_args", "pretrained", "--tasks", "sums"], "expected `key=value`"),
        ([*good, "--limit", "x"], "invalid float value: 'x'"),
        ([*good, "--batch_size", "0"], "--batch_size 0: expected a number or auto"),
        ([*good, "--device", "tpu9"], "--device tpu9 is not available here"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--table", "nowhere"], "no manifest_.*json below nowhere; --output_path makes them"),
    ):
        refused("evaluate", flags, words)
    (tmp_path / "manifest_a.json").write_text("{}")
    refused("evaluate", ["--table", "."], "manifest_a.json is no manifest of evaluate.py .*'date'.*; remove it")


# ---------------------------------------------------------------------------------------------------------------------
# What is there already


def test_what_is_there_is_not_replaced_unless_told(refused, tmp_path):
    for path in ("run", "set", "model"):
        (tmp_path / path).mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    (tmp_path / "set/preprocessed.json").write_text("{}")
    (tmp_path / "model/config.json").write_text("{}")
    shutil.copytree(tmp_path / "set", tmp_path / "noted")
    (tmp_path / "noted/NOTES.md").write_text("hours of work")
    (tmp_path / "thesis.jsonl").write_text("years of work")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/a.tex").write_text("years of work")
    good = checkpoint("mdlm")
    for program, flags, words in (
        ("train", ("--output_dir", "run"), r"holds a run \(metrics.jsonl\); choose another, or pass --overwrite"),
        (
            "train",
            ("--output_dir", "thesis.jsonl"),
            "--output_dir thesis.jsonl: .*thesis.jsonl is no directory to write to; choose another",
        ),
        ("data", ("--output_dir", "set"), "set holds a preprocessed set; choose another, or pass --overwrite"),
        ("data", ("--output_dir", "noted", "--overwrite"), "noted holds other files; choose another"),
        ("data", ("--output_dir", "thesis", "--overwrite"), "thesis holds other files; choose another"),
        ("data", ("--output_dir", "thesis.jsonl", "--overwrite"), "thesis.jsonl holds other files; choose another"),
        ("convert", ("--output_dir", "model"), "model is not empty; choose another or pass --overwrite"),
        ("convert", ("--output_dir", "thesis", "--overwrite"), "thesis exists and is no checkpoint, or holds"),
        ("convert", ("--output_dir", "thesis.jsonl", "--overwrite"), "thesis.jsonl exists and is no checkpoint"),
        ("sample", ("--output", "thesis.jsonl"), "thesis.jsonl exists; choose another name or pass --overwrite"),
    ):
        refused(program, command(program, good, *flags), words)
    refused("chat", command("chat", good), "thesis.jsonl exists and is not this", stdin=b"/save thesis.jsonl\n")
    words = "--output_path thesis.jsonl: .*/thesis.jsonl is no directory to write to; choose another"
    refused("evaluate", [*command("evaluate", good), "--output_path", "thesis.jsonl"], words)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


MESSAGES = {  # rows of a chat, and what is said of them
    "an unknown role": ([{"role": "wizard", "content": "a"}, assistant("b")], "unknown role 'wizard'"),
    "no assistant turn": ([user("a")], "no assistant turn at the end"),
    "content that is no string": ([user("a"), assistant(["b"])], "content that is no string"),
    "no messages": ([], "no messages"),
}
FILES = {  # content of a file, stage, and what is said of it
    "a.jsonl": (lines([{"body": "x"}] * 40), "pt", r"has no column 'text' \(it has body\); name one by --text_field"),
    "b.jsonl": (lines([{"body": "x"}] * 40), "sft", r"has no column 'messages' \(it has body\); sft needs messages or"),
    "c.jsonl": (lines([{"text": ""}] * 40), "pt", r"leaves no row to \w+ with max_length 64: empty \d+"),
    "d.jsonl": (lines([{"text": 5}] * 40), "pt", r"leaves no row to \w+ with max_length 64: dropped:not text \d+"),
    "e.jsonl": (b"", "pt", "e.jsonl has no rows; name a set that has some"),
    "f.jsonl": (b'{"text": "a"', "pt", "cannot load .*f.jsonl: .*JSON"),
    "g.txt": (b"good\n\xff\xfe\n" * 40, "pt", "g.txt is not UTF-8 text: .*byte 0xff.*; write it anew as UTF-8"),
    "h.xlsx": (b"text\na\n", "pt", "cannot read .*h.xlsx: expected one of .jsonl .json .csv .txt .parquet"),
    **{
        f"{name.replace(' ', '_')}.jsonl": (lines([{"messages": messages}] * 40), "sft", f"leaves no row .*{reason}")
        for name, (messages, reason) in MESSAGES.items()
    },
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_nothing_can_be_learnt_from_are_refused(refused, tmp_path, name):
    content, stage, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    for program in ("train", "data"):
        flags = ("--dataset_args", name, "--stage", stage, "--num_proc", "1")
        refused(program, command(program, checkpoint("mdlm"), *flags), words)


def test_a_stream_that_gives_no_row_is_refused_before_anything_is_replaced(refused, run, tmp_path):
    for name, (messages, reason) in MESSAGES.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"messages": messages}] * 40))
        flags = ("--streaming", "--eval_strategy", "no", "--overwrite", "--dataset_args", f"{name}.jsonl")
        run("train", command("train", checkpoint("undeclared"), "--overwrite", "--eval_strategy", "no"))
        assert (tmp_path / "out/checkpoint-final").is_dir()
        refused("train", command("train", checkpoint("undeclared"), *flags), f"leaves no row to train .*{reason} 100")


def test_a_damaged_preprocessed_set_is_refused(run, refused, tmp_path):
    good = checkpoint("mdlm")
    assert run("data", [*command("data", good), "--output_dir", "whole"])[0] == 0
    flags = ("--load_preprocessed_data", "--dataset_args")
    for file, damage in (
        ("preprocessed.json", lambda content: content[:20]),
        ("preprocessed.json", lambda content: b"{}"),
        ("test/tokens.npy", lambda content: content[:200]),
        ("train/tokens.npy", lambda content: content[:200]),
        ("train/bounds.npy", lambda content: b""),
        ("train/supervised.npy", None),
    ):
        shutil.rmtree(tmp_path / "torn", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "torn")
        path = tmp_path / "torn" / file
        content = path.read_bytes()
        path.write_bytes(damage(content)) if damage else path.unlink()
        refused(
            "train", command("train", good, *flags, "torn"), "^train.py: torn is damaged; make the set anew by data.py"
        )
    refused("train", command("train", good, *flags, "nowhere"), "nowhere holds no preprocessed.json; python data.py")
    words = "whole was made with max_length 64, this run has 32; make the set anew by data.py, or change the run"
    refused("train", command("train", good, *flags, "whole", "--max_length", "32"), words)


SPECS = {
    "builtin/sum": "unknown dataset builtin/sum; the builtin sets are builtin/sums, builtin/chats, builtin/",
    "builtin/sums[name:x]": "builtin/sums has no configurations; leave name:x out",
    "builtin/sums[dev:5]": "'dev:5' in dataset spec .*: expected train, validation or test",
    "builtin/sums[train:0]": r"'train:0' in dataset spec .*ROWS \(at least 1\)",
    "builtin/sums[train:5": r"is not of the form name\[key:value,...\]",
    "builtin/sums[lang:zzz]": "has no rows: no answer in .* contains 'zzz'",
    "./none.jsonl": "no data at none.jsonl; expected a file, a directory, a Hub id or a builtin set",
    "nobody/nothing": "cannot load nobody/nothing: .*; a local path or a builtin set needs no network",
    "set[name:zz]": r"cannot load set: BuilderConfig 'zz' not found.*; a config is named by set\[name:CONFIG\]",
    "lone.jsonl": "lone.jsonl has no test split, and with 1 row none can be made",
}


def test_a_name_that_reads_as_two_sets_is_told_to_need_quotes(refused, tmp_path):
    (tmp_path / "a+b.jsonl").write_bytes(lines([{"messages": [user("a"), assistant("b")]}] * 40))
    for program in ("train", "data"):
        words = r"a\+b.jsonl is there, but reads as 2 data sets; put quotes around it"
        refused(program, command(program, checkpoint("mdlm"), "--dataset_args", "a+b.jsonl"), words)


@pytest.mark.parametrize("spec", SPECS)
def test_specs_of_nothing_are_refused(refused, tmp_path, spec):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/rows.jsonl").write_bytes(lines([{"messages": [user("a"), assistant("b")]}] * 40))
    (tmp_path / "lone.jsonl").write_bytes(lines([{"messages": [user("a"), assistant("b")]}]))
    for program in ("train", "data"):
        refused(program, command(program, checkpoint("mdlm"), "--dataset_args", spec), SPECS[spec])
    scoring = command("sample", checkpoint("mdlm"), "--dataset_args", spec)[1:]  # without the prompt
    refused("sample", scoring, SPECS[spec])


def test_rows_that_cannot_be_scored_are_refused(refused, tmp_path):
    scoring = command("sample", checkpoint("mdlm"), "--dataset_args", "rows.jsonl")[1:]
    rows = {name: [{"messages": messages}] for name, (messages, _) in MESSAGES.items()}
    words = {name: f"rows.jsonl: {reason} in .*; expected a list" for name, (_, reason) in MESSAGES.items()}
    rows |= {"text": [{"body": "a"}], "an answer alone": [{"messages": [assistant("a")]}]}
    words |= {"text": r"is no chat \(it has body\)", "an answer alone": "scoring needs a turn before it"}
    for name in rows:
        (tmp_path / "rows.jsonl").write_bytes(lines(rows[name] * 40))
        refused("sample", scoring, words[name])
    refused(
        "sample", [*scoring, "--min_exact_match", "101"], "--min_exact_match 101.0: expected a percentage, 0 to 100"
    )
    refused("sample", [*scoring, "--split", "dev"], "split 'dev': expected one of train, validation, test")


def test_text_that_is_no_utf8_is_refused(refused, tmp_path):
    latin = "\udce9"  # what Python makes of the byte e9 on a command line
    good = checkpoint("mdlm")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused("sample", [latin, *command("sample", good)[1:]], r"udce9.* is no UTF-8 text; convert it")
    refused("sample", [*command("sample", good)[1:], "--input", "latin.txt"], r"latin.txt is not UTF-8 text \(byte 3\)")
    refused("sample", command("sample", good)[1:], "standard input is not UTF-8 text", stdin=b"caf\xe9\n")
    refused("chat", command("chat", good), "'utf-8' codec can't decode byte 0xe9", stdin=b"caf\xe9\n")
    for program in ("sample", "chat"):
        refused(program, command(program, good, "--system", latin), r"udce9.* is no UTF-8 text; convert it")


def test_prompts_longer_than_the_context_are_refused(refused):
    long = "What is 1 + 2? " * 100
    good = checkpoint("mdlm")
    words = r"its \d+ tokens and (max_new_tokens 8|8 new ones) exceed the (model's )?context of 256; shorten it or"
    refused("sample", [long, *command("sample", good)[1:]], words)
    refused("chat", command("chat", good), words, stdin=long.encode() + b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, and standard streams that are closed or that nothing reads


@pytest.mark.parametrize("program", ALL)
def test_ctrl_c_while_a_program_loads_ends_it_in_one_line(run, tmp_path, monkeypatch, program):
    def interrupt(*_):
        raise KeyboardInterrupt

    arguments = command(program, checkpoint("mdlm"))
    monkeypatch.setattr("tokenizer.Tokenizer.__init__", interrupt)
    status, _, err = run(program, arguments)
    assert status == 130 and re.fullmatch(rf"{program}\.py: interrupted.*", err.splitlines()[-1]), err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_the_processes_that_tokenise_without_a_word_of_theirs(tmp_path):
    rows = lines([{"messages": [user("a"), assistant(str(n))]} for n in range(20_000)])
    (tmp_path / "rows.jsonl").write_bytes(rows)
    flags = command("data", checkpoint("mdlm"), "--dataset_args", "rows.jsonl", "--num_proc", "2")
    bars = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "0"}  # they tell that the processes are at work
    for n in range(5):  # on a busy machine all is done before the signal comes: then once more
        with subprocess.Popen(
            [sys.executable, str(ROOT / "data.py"), *flags, "--output_dir", f"out{n}"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", **bars},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as child:
            said = b""
            while b"tokenize" not in said:
                piece = os.read(child.stderr.fileno(), 10_000)
                assert piece, said
                said += piece
            os.killpg(child.pid, signal.SIGINT)
            said += child.stderr.read()
        if child.returncode:
            break
    assert child.returncode == 130 and said.endswith(b"data.py: interrupted\n"), said
    assert b"Traceback" not in said and not (tmp_path / f"out{n}").exists()


@pytest.mark.parametrize("program", ("sample", "chat", "data", "convert"))
def test_a_closed_standard_stream_is_an_empty_one(run, monkeypatch, program):
    """As `<&- >&- 2>&-` of a shell and some service managers leave them: Python then has None for each."""
    arguments = command(program, checkpoint("mdlm"))
    if program == "sample":
        arguments = arguments[1:]  # the prompt, which is then to come from standard input
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    status = 0
    try:
        PROGRAMS[program].main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == (2 if program == "sample" else 0)


def test_an_output_that_lacks_a_sign_shows_another(run, monkeypatch):
    """data.py's rows have brackets that few encodings know, and lm-eval's tables arrows."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    data.main([str(argument) for argument in command("data", checkpoint("mdlm"), "--show", "1")])
    assert b"?" in written.getvalue() and b"wrote" in written.getvalue()


def test_output_that_nothing_reads_ends_a_program_in_one_line(tmp_path):
    flags = command("data", checkpoint("mdlm"), "--show", "500")
    with subprocess.Popen(
        [sys.executable, str(ROOT / "data.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        child.stdout.close()
        said = child.stderr.read().decode()
    assert child.returncode == 2 and said == "data.py: what read the output has ended, and so does this\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ALL)
def test_places_that_cannot_be_written_to_are_refused_before_any_work(refused, tmp_path, program):
    (tmp_path / "file").touch()
    (tmp_path / "folder.jsonl").mkdir()
    flag = {"sample": "--output", "evaluate": "--output_path"}.get(program, "--output_dir")
    place = "file/a.jsonl" if program == "sample" else "file/a"
    if program != "chat":
        arguments = [*command(program, checkpoint("mdlm")), flag, place]
        refused(program, arguments, rf"{flag} file(/a)?: .*/file is no directory to write to; choose another")
    if program == "sample":
        words = "--output folder.jsonl is a directory; name a file"
        refused(program, command(program, checkpoint("mdlm"), "--output", "folder.jsonl", "--overwrite"), words)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@contextmanager
def small_files(size: int):
    """Inside, a file that grows beyond `size` bytes fails, as on a full disk; no longer, since pytest writes too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = re.escape(os.strerror(errno.EFBIG))


@pytest.mark.parametrize("size", [100, 3_000, 100_000])  # bytes: into config.json, the tokenizer and the weights
def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_of_a_new_one(run, refused, tmp_path, size):
    good = checkpoint("undeclared")
    assert run("convert", command("convert", good))[0] == 0
    flags = ("--objective", "bd3lm", "--block_size", "4")
    with small_files(size):
        refused("convert", command("convert", good, "--overwrite", *flags), FULL)
        refused("convert", [*command("convert", good), "--output_dir", "new"], FULL)


def test_a_full_disk_leaves_no_half_of_a_trained_model_a_set_or_a_talk(run, tmp_path):
    good = checkpoint("undeclared")
    assert run("chat", command("chat", good), stdin=b"hi\n/save talk.jsonl\n")[0] == 0
    before = contents(tmp_path)
    longer = b"/load talk.jsonl\n" + b"hi\n" * 5 + b"/save talk.jsonl\n"
    for program, arguments, stdin, size in (
        ("train", command("train", good, "--eval_strategy", "no", "--save_steps", "0"), b"", 20_000),
        ("data", [*command("data", good), "--output_dir", "set"], b"", 2_000),
        ("chat", command("chat", good), longer, 100),
        ("sample", [*command("sample", good), "--output", "answers.jsonl"], b"", 20),
        ("sample", [*command("sample", good), "--output", "b.jsonl", "--picture", "p.png"], b"", 2_000),
    ):
        with small_files(size):
            status, _, err = run(program, arguments, stdin=stdin)
        said = err.splitlines()[-1]
        assert status == 2 and said.startswith(f"{program}.py: ") and re.search(FULL, said), err
        assert "Traceback" not in err
    left = {path: content for path, content in contents(tmp_path).items() if path not in before}
    assert {Path(path).name for path in left} == {"out", "args.json", "metrics.jsonl"}  # the log of the run
    assert before.items() <= contents(tmp_path).items()


def test_results_that_lm_eval_could_not_write_are_told(tmp_path):
    """Of a full disk it warns only, and leaves a file that is empty or torn."""
    if evaluate is None:
        pytest.skip("needs lm-eval")
    (tmp_path / "model").mkdir()
    for content, words in ((None, "its results to"), ("", "its results to"), ("{", "all of")):
        if content is not None:
            (tmp_path / "model/results_1.json").write_text(content)
        with pytest.raises(OSError, match=f"lm-eval could not write {words} .*; make room there"):
            evaluate.write_manifest(None, None, str(tmp_path), [], 0)


def own_mounts() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-rm", "true"]).returncode


@pytest.mark.skipif(not own_mounts(), reason="needs a kernel that lets users mount")
def test_a_disk_that_is_really_full_ends_a_program_in_one_line(tmp_path):
    """A file system of 200 kB: memory that is mapped to a file would end the process by a signal."""
    program = [sys.executable, str(ROOT / "data.py"), "--output_dir", str(tmp_path / "disk/set")]
    flags = ["--model_name_or_path", checkpoint("mdlm"), "--dataset_args", "builtin/sums[train:8000]"]
    script = 'mount -t tmpfs -o size=200k none "$0" && "$@"; status=$?; ls -A "$0"; exit $status'
    (tmp_path / "disk").mkdir()
    argv = ["unshare", "-rm", "sh", "-c", script, str(tmp_path / "disk"), *program, *flags, "--stage", "sft"]
    done = subprocess.run([*argv, "--show", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    *_, said = done.stderr.splitlines()
    assert said == f"data.py: [Errno 28] No space left on device; make room there: '{tmp_path}/disk/set'"
    assert done.stdout.splitlines()[-1].startswith("test: ")  # and no file is left


@pytest.mark.slow
@pytest.mark.skipif(not own_mounts(), reason="needs a kernel that lets users mount")
def test_a_run_that_meets_a_full_disk_at_any_point_of_a_save_goes_on_to_the_same_end():
    said = subprocess.run([sys.executable, str(ROOT / "tests/full_disk.py")], capture_output=True, text=True)
    print(said.stdout)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("20 full disks")

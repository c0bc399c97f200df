"""What goes wrong at a keyboard: absurd numbers, files without an end, hostile text, weights that are not numbers."""

import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import checkpoint, tokenizer
from conftest import tiny
from terminal import ROOT, Terminal

import chat
import checkpoint as checkpoints
import cli
import data
import display
import files
import sample
import train
from diffusion import denoise, reveal_schedule
from likelihood import log_likelihood
from options import Count, Options, Positive, Seed

HOSTILE = "\x1b]0;pwn\x07\x1b[2J\x9b31m\u202e"
RAW = re.compile("[\x07\x1b\x9b\u202e]")
NEW = ("--max_new_tokens", "8", "--steps", "8")
PROGRAMS = {"sample": sample, "chat": chat, "train": train, "data": data}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a program in an empty directory: run(program, argument, ..., stdin=b"hi\n") -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def call(program: str, *argv, stdin: bytes = b"hi\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        status = 0
        try:
            PROGRAMS[program].main([str(argument) for argument in argv])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def sampled(run):
    return lambda *argv, name="mdlm", **options: run(
        "sample", "--model_name_or_path", checkpoint(name), *NEW, *argv, **options
    )


def talk(**options) -> chat.Conversation:
    args = chat.Chat(model_name_or_path=checkpoint("mdlm"), max_new_tokens=8, steps=8, **options)
    return chat.Conversation(args, *cli.open_model(args, args.block_size))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

HUGE = ("--steps", 10**9), ("--steps", 2**70), ("--steps_per_block", 10**12), ("--block_size", 2**70)
HUGE += ("--max_new_tokens", 10**12), ("--cfg_scale", "1e300"), ("--batch_size", 2**70)


@pytest.mark.parametrize("flag", HUGE, ids=str)
def test_absurd_numbers_are_refused_in_one_line(sampled, flag):
    status, _, err = sampled("hi", *flag, "--block_align", "sequence")
    assert status == 2 and re.fullmatch(rf"sample\.py: {flag[0]} .*: expected .*at most .*\n", err), err


@dataclass
class Numbers(Options):
    n: Count = 1  # a count
    x: Positive = 1.0  # a number
    seed: Seed = 0  # a seed


def test_every_number_but_a_seed_has_a_bound():
    assert Numbers(n=10**9, x=1e9, seed=2**63 - 1).n == 10**9
    for given in ({"n": 10**9 + 1}, {"n": 2**70}, {"x": 1e308}, {"x": 2.0**70}):
        with pytest.raises(ValueError, match="expected a number of at most 1,000,000,000"):
            Numbers(**given)


@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
@pytest.mark.parametrize("steps", (1, 7, 50, 400))
def test_a_narrow_schedule_is_the_wide_one_without_its_zeros(scheduler, steps, rng):
    masks = torch.tensor([[0, 1, 2, 31], [32, 5, 0, 9]])
    for stochastic in (False, True):
        state = rng.get_state()
        wide = reveal_schedule(masks, steps, scheduler, stochastic=stochastic, generator=rng)
        narrow = reveal_schedule(
            masks, steps, scheduler, width=min(steps, 32), stochastic=stochastic, generator=rng.set_state(state)
        )
        assert wide.shape[-1] == steps and torch.equal(narrow, wide[..., :32]) and not wide[..., 32:].any()


def test_a_million_steps_cost_no_more_than_the_masks(rng):
    model = tiny(objective="mdlm")
    *_, last = denoise(model, [[1, 2]] * 8, max_new_tokens=64, block_size=8, steps_per_block=10**6)
    assert last.forwards == 64 and not last.masked.any()


ERRORS = {
    "memory": (MemoryError(), "out of memory; lower the batch size"),
    "numpy": (np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("u1")), "no room for 1.00 TiB; lower"),
    "torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16000000000 bytes."),
        "no room for 16000000000 bytes; lower",
    ),
    "gpu": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "no room for 20.00 MiB"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "overflow": (OverflowError("int too big to convert"), "a number is too large .int too big to convert."),
    "escapes": (ValueError(f"no column {HOSTILE}\nat all"), "no column \ufffd.*at all"),
    "surrogate": (OSError("no \udcff"), "no \ufffd"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_user_can_cause_is_one_printable_line(name, capsys):
    error, words = ERRORS[name]
    with pytest.raises(SystemExit) as exit, cli.one_line_errors("x.py"):
        raise error
    err = capsys.readouterr().err
    assert exit.value.code == 2 and re.fullmatch(f"x.py: .*{words}.*\n", err) and not RAW.search(err)


@pytest.mark.parametrize("error", (RuntimeError("shapes differ"), KeyError("x"), AssertionError()), ids=repr)
def test_faults_of_ours_are_not_hidden(error):
    with pytest.raises(type(error)), cli.one_line_errors("x.py"):
        raise error


# ---------------------------------------------------------------------------------------------------------------------
# Files

SEPARATORS = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c")


@pytest.mark.parametrize("end", ("\n", "\r\n", "\r"), ids=repr)
def test_only_line_ends_separate_prompts(sampled, tmp_path, end):
    prompts = [f"a{separator}b" for separator in SEPARATORS]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    Path("p.jsonl").write_bytes(b"\xef\xbb\xbf" + end.join([*lines, ""]).encode())
    assert sampled("--input", "p.jsonl", "--output", "o.jsonl")[0] == 0
    assert [json.loads(line)["prompt"] for line in files.read_text("o.jsonl").split("\n")[:-1]] == prompts
    Path("p.txt").write_bytes(end.join(["a\u2028b", "", "c"]).encode())
    assert sampled("--input", "p.txt", "--output", "t.jsonl")[0] == 0
    assert [json.loads(line)["prompt"] for line in files.read_text("t.jsonl").split("\n")[:-1]] == ["a\u2028b", "c"]
    # What it wrote can be its input, and so can what /save writes.
    assert sampled("--input", "o.jsonl")[0] == 0


@pytest.fixture
def endless(monkeypatch, tmp_path):
    """Files that cannot be read, by name."""
    monkeypatch.setattr(files, "LARGEST", 2**20)
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "]" * 200_000)
    (tmp_path / "deeper.jsonl").write_text('{"a":' * 100_000)
    (tmp_path / "long.jsonl").write_bytes(b" " * (2**20 + 1))
    (tmp_path / "folder.jsonl").mkdir()
    return {
        "fifo.jsonl": "holds no prompt|holds no conversation",
        "zero.jsonl": "is larger than 1 MiB",
        "deep.jsonl": "recursion depth exceeded",
        "deeper.jsonl": "recursion depth exceeded",
        "long.jsonl": "is larger than 1 MiB",
        "folder.jsonl": "Is a directory",
    }


def test_files_without_an_end_or_nested_deeply_are_refused(sampled, endless):
    said = talk()
    for name, words in endless.items():
        status, _, err = sampled("--input", name)
        assert status == 2 and re.fullmatch(rf"sample\.py: .*{name}.*\n", err) and re.search(words, err), err
        with pytest.raises((ValueError, OSError), match=words) as refused:
            said.obey(f"/load {name}")
        assert name in str(refused.value)
    status, _, err = sampled(stdin=b" " * (2**20 + 1))
    assert status == 2 and "standard input is larger than 1 MiB" in err


def test_a_pipe_that_is_written_to_is_read_to_its_end(run, tmp_path):
    read, write = os.pipe()
    os.write(write, b"one\ntwo\n")
    os.close(write)
    assert files.read_text(f"/dev/fd/{read}") == "one\ntwo\n"
    os.close(read)


def test_a_task_column_of_other_things_than_texts_is_named_in_the_table(sampled):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for tasks in ([1, 2, None], [f"{HOSTILE}a\nb", "c", None], [True, False, None]):
        rows = [json.dumps({"messages": messages, "task": task}) for task in tasks]
        Path("d.jsonl").write_text("\n".join(rows * 4))
        status, out, err = sampled("--dataset_args", "d.jsonl", "--split", "train")
        assert status == 0 and not RAW.search(out), err
        names = [row.split()[0] for row in out.splitlines()[1:]]
        assert names[: names.index("all")] == sorted(display.one_line(str(task)).split()[0] for task in tasks[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Text that a terminal would obey


def hostile(tmp_path: Path) -> str:
    """A checkpoint whose template refuses every chat in words that a terminal would obey."""
    path = tmp_path / "hostile"
    checkpoints.save_model(checkpoints.load_model(checkpoint("mdlm")), path, tokenizer=tokenizer())
    (path / "chat_template.jinja").write_text("{{ raise_exception('" + HOSTILE + "') }}")
    return str(path)


def test_no_text_of_others_reaches_the_terminal_as_it_is(run, tmp_path, monkeypatch):
    status, _, err = run("sample", "hi", "--model_name_or_path", hostile(tmp_path), *NEW)
    assert status == 2 and "refuses these messages" in err and not RAW.search(err)
    messages = [{"role": "user", "content": f"q{HOSTILE}"}, {"role": "assistant", "content": f"a{HOSTILE}\r\nb"}]
    Path("d.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages}) + "\n")
    spec = ("--dataset_args", "d.jsonl", "--model_name_or_path", checkpoint("mdlm"), "--stage", "sft")
    status, out, err = run("data", *spec, "--num_proc", "1")
    assert status == 0 and "]0;pwn" in out and not RAW.search(out), err
    Path("h.jsonl").write_text((json.dumps({HOSTILE: "x"}) + "\n") * 3)
    status, _, err = run("data", "--dataset_args", "h.jsonl", *spec[2:], "--num_proc", "1")
    assert status == 2 and "has no column" in err and not RAW.search(err)
    assert display.printable("日本\u3000語 a\u00a0b \u0645\u06cc\u200c") == "日本\u3000語 a\u00a0b \u0645\u06cc\u200c"


# ---------------------------------------------------------------------------------------------------------------------
# Chat


def test_a_talk_at_a_terminal_survives_every_error(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.json")
    lines = {
        "/save ~nosuchuser/x": "no such user",
        "/set steps 1000000000000": "at most",
        "/set max_new_tokens 1000000000": "context of 256",
        f"/load {tmp_path}/deep.json": "recursion depth",
        f"/load {tmp_path}/fifo.json": "no conversation",
        f"/load {tmp_path}/zero.json": "larger than",
        "/load ~nosuchuser/x": "no such user",
    }
    flags = ("--model_name_or_path", hostile(tmp_path), *NEW, "--history_file", "")
    with Terminal("chat.py", *flags, columns=200, lines=50) as window:
        window.until(">")
        for line, words in lines.items():
            errors = window.text.count("error: ")
            window.send(line + "\n")
            text = window.until(lambda text, errors=errors: text.count("error: ") > errors and text.endswith(">"))
            assert words in text.rpartition("error: ")[2].replace("\n", ""), text  # a long line was wrapped
        window.send("hi\n")
        window.until("refuses these messages")
        assert b"]0;pwn\x07" not in window.raw
        window.send("/quit\n")
        assert window.end() == 0


def test_an_error_of_ours_does_not_end_a_talk_either(monkeypatch, capsys):
    lines = iter(["hi", "again"])
    said = talk()
    monkeypatch.setattr(said, "say", lambda text: {}[text])

    def typed(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed)
    with pytest.raises(EOFError):
        chat.talk(said, True)
    assert capsys.readouterr().out == "error: KeyError('hi')\nerror: KeyError('again')\n"


def test_save_replaces_only_what_this_conversation_left_there(run, tmp_path):
    said = talk()
    said.obey("hi")
    said.obey("/save a.jsonl")
    said.obey("/save a.jsonl")
    rows = files.read_text("a.jsonl")
    for content in (rows + rows, "other\n", ""):  # more conversations, or changed since
        Path("a.jsonl").write_text(content)
        with pytest.raises(ValueError, match="exists and is not this conversation's"):
            said.obey("/save a.jsonl")
    Path("a.jsonl").write_text(rows + rows)
    said.obey("/load a.jsonl")
    with pytest.raises(ValueError, match="exists and is not this conversation's"):
        said.obey("/save a.jsonl")
    assert files.read_text("a.jsonl") == rows + rows


@pytest.mark.parametrize(
    ("name", "shown"),
    (("mdlm", ("32", "prompt")), ("bd3lm", ("4", "sequence")), ("ar", ("None", "None"))),
)
def test_set_shows_what_is_in_force(run, capsys, name, shown):
    args = chat.Chat(model_name_or_path=checkpoint(name))
    said = chat.Conversation(args, *cli.open_model(args, args.block_size))
    said.obey("/set")
    found = dict(line.split(" ", 1) for line in capsys.readouterr().err.splitlines())
    assert (found["block_size"], found["block_align"]) == shown


def test_history_is_no_device(tmp_path):
    pytest.importorskip("readline")
    os.mkfifo(tmp_path / "fifo")
    for file in ("/dev/zero", str(tmp_path / "fifo")):
        chat.recall(file)
        chat.recall(file, save=True)
    with pytest.raises(ValueError, match="no such user"):
        chat.recall("~nosuchuser/x")


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are none


def blank(monkeypatch) -> None:
    monkeypatch.setattr(cli.Answers, "final", lambda self: [cli.Answer(" \n", [], 1, 1) for _ in self.columns])


def test_a_blank_answer_comes_with_a_hint(run, sampled, monkeypatch, capsys):
    hint = "blank: an end token at once, or white space; ask as in training"
    assert hint not in sampled("hi", name="ar")[1]
    blank(monkeypatch)
    assert f"2 of 2 answers {hint}" in sampled("hi", "you")[1]
    talk().obey("hi")
    assert hint in capsys.readouterr().err


def not_numbers(name: str):
    model = checkpoints.load_model(checkpoint(name))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize("name", ("ar", "mdlm", "bd3lm"))
def test_weights_that_are_not_numbers_end_a_program_in_one_line(run, name):
    model = not_numbers(name)
    with pytest.raises(ValueError, match="is not a number"):
        log_likelihood(model, [[1, 2]], [[3, 4]])
    checkpoints.save_model(model, "nan", tokenizer=tokenizer())
    for program, prompt in (("sample", ["hi"]), ("chat", [])):
        status, _, err = run(program, *prompt, "--model_name_or_path", "nan", *NEW)
        assert status == 2 and re.fullmatch(rf"{program}\.py: the model's output is not a number.*\n", err), err


def test_weights_that_are_not_numbers_get_no_score(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    from lm_eval.api.instance import Instance

    checkpoints.save_model(not_numbers("mdlm"), tmp_path / "nan", tokenizer=tokenizer())
    lm = evaluate.models()["a2d_mdlm"](pretrained=str(tmp_path / "nan"), max_new_tokens=4)
    for kind, args in (
        ("loglikelihood", ("a", " b")),
        ("loglikelihood_rolling", ("a",)),
        ("generate_until", ("a", {})),
    ):
        with pytest.raises(ValueError, match="is not a number"):
            getattr(lm, kind)([Instance(kind, {}, args, 0, metadata=("t", 0, 1))], disable_tqdm=True)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def test_a_newline_does_not_break_a_row(capsys, monkeypatch):
    rows = [[("a\nb", "")], [(display.MASK, display.MASKED), ("\n", "")]]
    sample.Watch(live=False).show(rows, 8)
    assert capsys.readouterr().out == "forward 8, row 1: a↵b\nforward 8, row 2: ░↵\n"


def test_the_signs_are_explained(capsys):
    talk().obey("/help")
    assert display.LEGEND in capsys.readouterr().err and display.END in display.LEGEND
    for program in (sample.Sample, chat.Chat):
        assert display.END in program.parser().format_help()


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def test_a_cache_is_of_one_checkpoint_and_one_sampler(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    from report import cache_key

    alive = []  # no two of them at one address

    def key(name: str, objective: str = "mdlm", **changes) -> str:
        alive.append(lm := evaluate.A2D.__new__(evaluate.models()[f"a2d_{objective}"]))
        lm.options = evaluate.Evaluation(pretrained=checkpoint(name), **changes)
        return cache_key(lm)

    same = [key("mdlm"), key("mdlm")]
    others = [key("mdlm", **{name: value}) for name, value in (("steps", 4), ("seed", 1), ("right_shift_logits", True))]
    assert same[0] == same[1] and len({same[0], *others, key("mdlm.shift"), key("mdlm", "ar")}) == 6


DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\ndoc_to_text: q\n"
CHOICE = "output_type: multiple_choice\ndoc_to_choice: ['x', 'y']\ndoc_to_target: 0\n"
TASK = (
    "task: {}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {}}}}}\ntest_split: test\ndoc_to_text: q\n{}"
)


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ("{max_gen_toks: 9000, until: []}", "task T: an answer of 9000 tokens"),
        ("{beams: 4, until: []}", "task T: generation option beams is unknown"),
        ("{num_beams: 4, until: []}", "task T: generation option num_beams is unknown"),
        ("{max_gen_toks: 4, do_sample: true, temperature: 1.0, top_k: 0}", "task T: --top_k 0: expected at least 1"),
        ("{max_gen_toks: 4, num_beams: 1, repetition_penalty: 1.0, until: []}", None),
    ),
)
def test_every_task_is_checked_before_the_first_forward(monkeypatch, tmp_path, options, words):
    evaluate = pytest.importorskip("evaluate")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file, write = tmp_path / "d.jsonl", "output_type: generate_until\ndoc_to_target: a\ngeneration_kwargs: "
    file.write_text('{"q": "a", "a": "b"}\n')
    (tmp_path / "G.yaml").write_text(TASK.format("G", file, CHOICE))
    (tmp_path / "T.yaml").write_text(TASK.format("T", file, write + options))
    lm, forwards = evaluate.models()["a2d_mdlm"](pretrained=checkpoint("mdlm"), mc_num=2), []
    lm.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    manager = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    try:
        with evaluate.checked_tasks(lm):
            simple_evaluate(lm, tasks=["G", "T"], task_manager=manager, bootstrap_iters=0)
    except ValueError as error:
        assert words and words in str(error) and not forwards
    else:
        assert words is None and forwards


def test_the_quickstart_ends_with_commands_that_need_no_flags():
    last = (ROOT / "recipes" / "quickstart.sh").read_text()[-500:]
    assert re.search(r"chat\.py --model_name_or_path \S+/checkpoint-final\\n", last)

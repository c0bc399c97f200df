"""sample.py: its answers are the sampler's, every flag, scoring, what it shows and writes, and mistakes in one line."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import checkpoint, opened, tokenizer
from conftest import GOLDEN, golden_json, golden_model, tiny

import checkpoint as checkpoints
import cli
import data
import display
import sample
from diffusion import Step, denoise
from tasks.builtin import TASKS
from tokenizer import Tokenizer

OBJECTIVES = ("ar", "mdlm", "bd3lm")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
PROMPTS = ["What is 17 + 25?", "Reverse the word ABC.", "hi"]
NEW = ("--max_new_tokens", "12", "--steps", "12")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the program in an empty directory: run(flag, ...) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "FRAME", 0)

    def call(*argv: str, stdin: bytes | None = None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            sample.main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def answers(run, *argv) -> list[str]:
    status, _, err = run(*argv, *NEW, "--output", "rows.jsonl", "--overwrite")
    assert status == 0, err
    return [row["answer"] for row in rows_of("rows.jsonl")]


def expected(objective: str, ids: list[int], **options) -> tuple[list[int], int]:
    """(answer up to its first end token, forwards) of the sampler alone."""
    model = opened(objective)
    if objective == "mdlm":
        options = {"block_size": 32} | options
    options = {"max_new_tokens": 12, "steps": 12, "end_ids": tuple(tokenizer().end_ids)} | options
    *_, last = denoise(model, [ids], **options)
    answer = last.tokens[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(answer) if token in options["end_ids"]), len(answer))
    return answer[:end], last.forwards


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and answers


@each_objective
def test_answers_are_the_samplers_whatever_the_batch(run, objective):
    chats = [tokenizer().render([{"role": "user", "content": prompt}], reply=True)[0] for prompt in PROMPTS]
    alone = [expected(objective, ids) for ids in chats]
    texts = [tokenizer().decode(answer) for answer, _ in alone]
    for size in ("1", "2", "16"):
        assert answers(run, *PROMPTS, "--model_name_or_path", checkpoint(objective), "--batch_size", size) == texts
        assert [row["forwards"] for row in rows_of("rows.jsonl")] == [forwards for _, forwards in alone]


@each_objective
def test_without_the_template_a_prompt_is_continued(run, objective):
    texts = [tokenizer().decode(expected(objective, tokenizer().encode(prompt))[0]) for prompt in PROMPTS]
    flags = ("--model_name_or_path", checkpoint(objective), "--chat_template", "False")
    assert answers(run, *PROMPTS, *flags) == texts
    untemplated = ("--model_name_or_path", checkpoint(objective, template=False))
    assert answers(run, *PROMPTS, *untemplated) == texts


def test_a_system_message_precedes_each_prompt(run):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}]
    answer, _ = expected("mdlm", tokenizer().render(messages, reply=True)[0])
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--system", "Add.")
    assert answers(run, "1 + 2", *flags) == [tokenizer().decode(answer)]


@pytest.mark.parametrize(("objective", "begin"), [("ar", [0]), ("mdlm", []), ("bd3lm", []), ("mdlm.shift", [0])])
def test_an_empty_prompt_generates_from_scratch_and_says_after_what(run, objective, begin):
    flags = ("--model_name_or_path", checkpoint(objective))
    block = {"block_size": 32} if "mdlm" in objective else {}
    assert answers(run, "", *flags) == [tokenizer().decode(expected(objective, begin, **block)[0])]
    _, out, _ = run("", *flags, *NEW)
    assert ("(from scratch, after <|endoftext|>)" if begin else "(from scratch)") in out


def test_prompts_come_from_arguments_files_or_standard_input(run, tmp_path):
    flags = ("--model_name_or_path", checkpoint("bd3lm"))
    wanted = answers(run, *flags, "--", *PROMPTS)
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    rows = [{"prompt": PROMPTS[0]}, *({"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS[1:])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    piped = "\n".join(PROMPTS).encode()
    assert answers(run, "--input", "prompts.txt", *flags) == wanted
    assert answers(run, "--input", "prompts.jsonl", *flags) == wanted
    for source in ((), ("-",), ("--input", "-")):
        status, _, err = run(*source, *flags, *NEW, "--output", "piped.jsonl", "--overwrite", stdin=piped)
        assert status == 0, err
        assert [row["answer"] for row in rows_of("piped.jsonl")] == wanted


def test_prompts_before_and_after_flags_and_behind_a_double_dash(run):
    _, out, _ = run("one", "--model_name_or_path", checkpoint("ar"), "two", *NEW, "--", "--three", "-4")
    assert re.findall(r"\[\d/4\] (.*)", out) == ["one", "two", "--three", "-4"]


def test_a_switch_alone_takes_no_prompt_for_its_value(run):
    for shown in (("--show",), ("--show", "True"), ("--show=true",)):
        _, out, _ = run(
            "--model_name_or_path", checkpoint("ar"), *NEW, *shown, "one", "--overwrite", "two", "--show", "--"
        )
        assert re.findall(r"\[\d/2\] (.*)", out) == ["one", "two"] and "forward 8, row 2" in out
    _, out, _ = run("--model_name_or_path", checkpoint("ar"), *NEW, "--show", "False", "one")
    assert re.findall(r"\[\d/1\] (.*)", out) == ["one"] and "forward 8" not in out


# Infilling

HOLE = "<|mask|>"


@each_objective
def test_infilling_keeps_what_is_given_and_fills_each_mask(run, objective):
    text = f"What is {HOLE}{HOLE} + 25{HOLE} yes?"
    ids = tokenizer().encode(text)
    holes = [token == tokenizer().mask_id for token in ids]
    model, options = opened(objective), {"block_size": 32} if objective == "mdlm" else {}
    given = [0 if hole else token for token, hole in zip(ids, holes)]
    options |= {"max_new_tokens": 0, "steps": 12}
    *_, last = denoise(model, [given], canvas_masks=[holes], **options)
    argv = (text, "no masks", "--model_name_or_path", checkpoint(objective), "--steps", "12")
    status, out, err = run(*argv, "--output", "rows.jsonl")
    assert status == 0, err
    filled, other = rows_of("rows.jsonl")
    assert filled["answer"] == tokenizer().decode(last.tokens[0].tolist())
    assert filled["answer"].startswith("What is ") and " + 25" in filled["answer"]
    assert (filled["tokens"], filled["max_new_tokens"], other["max_new_tokens"]) == (3, 0, 128)
    assert display.printable(filled["answer"]) in out


def test_infilling_ends_at_no_end_token(run, monkeypatch):
    def ending(model, prompts, **options):
        assert options["end_ids"] == ()
        tokens, masked = torch.tensor(prompts), torch.tensor(options["canvas_masks"])
        yield Step(tokens, masked, torch.tensor([False]), 0, torch.zeros(tokens.shape))
        tokens = tokens.masked_fill(masked, tokenizer().end_ids[0])
        yield Step(tokens, masked & False, torch.tensor([True]), 1, torch.ones(tokens.shape))

    monkeypatch.setattr(cli, "denoise", ending)
    assert answers(run, f"a{HOLE}b", "--model_name_or_path", checkpoint("mdlm")) == ["ab"]


def trimmed(monkeypatch, prompt: list[int], holes: list[bool] | None, canvas: list[int]) -> cli.Answer:
    """What becomes of a prompt of the golden tokenizer's whose canvas comes out as `canvas`."""
    tokens = torch.tensor([canvas])
    masked = torch.tensor([[i >= len(prompt) if holes is None else holes[i] for i in range(len(canvas))]])

    def known(model, prompts, **options):
        yield Step(tokens, masked, torch.tensor([False]), 0, torch.zeros(tokens.shape))
        yield Step(tokens, masked & False, torch.tensor([True]), 1, torch.ones(tokens.shape))

    monkeypatch.setattr(cli, "denoise", known)
    request, model = sample.Request("", ids=prompt, holes=holes), golden_model("qwen3")
    request.new = len(canvas) - len(prompt)
    sample.decode(model, Tokenizer(GOLDEN / "models/qwen3"), [request], options={}, generator=None, watch=False)
    return request.answer


def test_answers_end_where_the_references_do_but_at_an_end_of_text_too(monkeypatch):
    """Of the golden cases those that can be: no canvas here begins with padding, and no mask is ever chosen. In one the
    reference goes on behind <|endoftext|>, which is also its padding."""
    golden = golden_json("data")
    ended, _, beyond, *_ = golden["sample_trim"]
    assert trimmed(monkeypatch, ended["prompt"], None, ended["sequence"]).text == ended["text"] == "w20 w21"
    assert trimmed(monkeypatch, beyond["prompt"], None, beyond["sequence"]).text == "w30" != beyond["text"]
    case, mask = golden["infill_trim"][0], golden["special_ids"]["mask"]
    answer = trimmed(monkeypatch, case["prompt"], [token == mask for token in case["prompt"]], case["sequence"])
    assert "".join(text for text, style in answer.shown if style == display.FRESH).strip() == case["text"]
    assert answer.text == "w7 w8 w9 w20 w21" and answer.tokens == 3  # all of the canvas, not what was filled alone


def test_infilling_a_chat_takes_its_last_turn_as_it_stands(run, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{HOLE} yes {HOLE}"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    status, _, err = run("--input", "chat.jsonl", "--model_name_or_path", checkpoint("mdlm"), "--output", "o.jsonl")
    assert status == 0, err
    (row,) = rows_of("o.jsonl")
    assert row["tokens"] == 2 and " yes " in row["answer"] and row["prompt"] == chat


def test_infilling_and_more_tokens_after_it(run):
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--max_new_tokens", "5", "--output", "o.jsonl")
    assert run(f"a {HOLE} b", *flags)[0] == 0
    assert rows_of("o.jsonl")[0]["tokens"] == 6


@pytest.mark.parametrize("objective", ("ar", "mdlm.shift"))
def test_infilling_a_first_token_begins_with_bos_where_it_needs_a_predictor(run, objective):
    assert run(f"{HOLE} word", "--model_name_or_path", checkpoint(objective), "--output", "o.jsonl")[0] == 0
    assert rows_of("o.jsonl")[0]["answer"].endswith(" word")


# Flags

EVERY_FLAG = [
    ("--objective", "bd3lm", "--block_size", "3"),
    ("--right_shift_logits", "True"),
    ("--dtype", "float32", "--device", "cpu", "--seed", "7", "--torch_compile", "False"),
    ("--block_align", "sequence", "--block_size", "4", "--scheduler", "cosine"),
    ("--temperature", "1.0", "--top_k", "5", "--top_p", "0.9"),
    ("--remasking", "random", "--stochastic_transfer", "True"),
    ("--steps_per_block", "3"),
    ("--threshold", "0.3"),
    ("--entropy", "0.5"),
    ("--factor", "1.0"),
    ("--cfg_scale", "1.0", "--cfg_keep_tokens", "[3, 4]"),
    ("--suppress_tokens", "5,6", "--begin_suppress_tokens", "7"),
]
ELSEWHERE = {  # exercised by other tests of this file
    *("--model_name_or_path", "--input", "--chat_template", "--system", "--batch_size", "--max_new_tokens", "--steps"),
    "--speculate",  # of test_causal.py, with a checkpoint that can
    *("--show", "--output", "--overwrite", "--picture", "--dataset_args", "--split", "--min_exact_match"),
}


@pytest.mark.parametrize("flags", EVERY_FLAG, ids=" ".join)
def test_every_flag_is_taken_and_recorded(run, flags):
    status, _, err = run("hi", "--model_name_or_path", checkpoint("undeclared"), *NEW, *flags, "--output", "o.jsonl")
    assert status == 0, err
    (row,) = rows_of("o.jsonl")
    given = dict(zip(flags[::2], flags[1::2]))
    for flag, value in given.items():
        if flag[2:] in row:
            kept = row[flag[2:]]
            assert str(kept) in (value, value.strip("[]")) or kept == list(map(int, re.findall(r"\d+", value)))


def test_no_flag_is_left_untested():
    flags = {flag for flag in sample.Sample.parser()._option_string_actions if flag.startswith("--")}
    assert flags - {"--help"} == ELSEWHERE | {flag for flags in EVERY_FLAG for flag in flags if flag.startswith("--")}


def test_seeds_make_samples(run):
    flags = ("hi", "--model_name_or_path", checkpoint("mdlm"), "--temperature", "1.5")
    first, again, other = (answers(run, *flags, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_help_is_a_manual(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for said in ("bd3lm nothing to the right of its block", "generates from scratch", "(default: 42)", "at least one"):
        assert said in out


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def cheat(right: set[str]):
    """A `denoise` that answers the questions of `right` correctly, others almost; after the end comes more."""
    answers = {}
    for row in data.raw("builtin/sums[test:40]", "test"):
        question, answer = (message["content"] for message in row["messages"])
        ids = tokenizer().render(row["messages"][:1], reply=True)[0]
        answers[tuple(ids)] = answer if question in right else answer + "0"

    def denoise(model, prompts, *, max_new_tokens, **_):
        T = max(map(len, prompts)) + max_new_tokens
        tokens, masked = torch.zeros(len(prompts), T, dtype=torch.int64), torch.zeros(len(prompts), T, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            masked[row, len(prompt) : len(prompt) + max_new_tokens] = True
            answer = [*tokenizer().encode(" " + answers[tuple(prompt)]), tokenizer().eos_id]
            canvas = prompt + answer + tokenizer().encode("5") * max_new_tokens
            tokens[row, : len(prompt) + max_new_tokens] = torch.tensor(canvas[: len(prompt) + max_new_tokens])
        done = torch.zeros(len(prompts), dtype=torch.bool)
        yield Step(tokens.masked_fill(masked, tokenizer().mask_id), masked, done, 0, torch.zeros(tokens.shape))
        yield Step(tokens, masked & False, ~done, 1, torch.ones(tokens.shape))

    return denoise


def test_scoring_counts_what_is_right_by_task_and_pooled(run, monkeypatch):
    monkeypatch.setattr("tasks.builtin.SUMS", {"train": 60, "validation": 20, "test": 40})
    rows = list(data.raw("builtin/sums[test:40]", "test"))
    right = {row["messages"][0]["content"] for i, row in enumerate(rows) if i % 4 == 0 or row["task"] == "add"}
    monkeypatch.setattr(cli, "denoise", cheat(right))
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--dataset_args", "builtin/sums[test:40]", "--batch_size", "7")
    status, out, err = run(*flags, "--max_new_tokens", "16", "--output", "o.jsonl", "--min_exact_match", "30")
    assert status == 0, err
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:7]}
    for task in TASKS:
        of = [row["messages"][0]["content"] in right for row in rows if row["task"] == task]
        assert float(table[task][0]) == 100 * sum(of) / len(of) and int(table[task][1]) == len(of) == 8
    assert float(table["all"][0]) == pytest.approx(100 * len(right) / 40, abs=0.05) and table["all"][1] == "40"
    written = rows_of("o.jsonl")
    assert [row["correct"] for row in written] == [row["messages"][0]["content"] in right for row in rows]
    assert [row["expected"] for row in written] == [row["messages"][-1]["content"] for row in rows]
    assert all(row["tokens"] == len(tokenizer().encode(row["answer"])) + 1 for row in written)


def test_a_score_below_the_least_ends_with_status_1_and_one_line(run):
    flags = ("--model_name_or_path", checkpoint("bd3lm"), "--dataset_args", "builtin/sums", "--split", "validation")
    flags = (
        *flags[:3],
        "builtin/sums[validation:5]",
        *flags[4:],
        *NEW,
        "--min_exact_match",
        "99.5",
        "--threshold",
        "0.9",
    )
    status, out, err = run(*flags, "--output", "o.jsonl")
    assert status == 1 and err == "sample.py: exact match 0.0 % is below --min_exact_match 99.5\n"
    assert "tokens/s" in out and len(rows_of("o.jsonl")) == 5


def test_scoring_takes_a_chat_without_tasks(run, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for _ in range(3)))
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--dataset_args", "chat.jsonl", "--split", "train")
    status, out, err = run(*flags, *NEW)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["task", "all"]


# ---------------------------------------------------------------------------------------------------------------------
# What it shows and writes


def test_the_end_tells_tokens_time_and_forwards(run):
    _, out, _ = run(*PROMPTS, "--model_name_or_path", checkpoint("ar"), *NEW)
    tokens, forwards = map(
        int, re.search(r"(\d+) tokens in .* s, .* tokens/s, (\d+) forwards, 1.00 tokens", out).groups()
    )
    assert tokens == forwards <= 36


def test_show_without_a_terminal_prints_lines_and_no_escape_codes(run):
    status, out, _ = run("hi", "--model_name_or_path", checkpoint("mdlm"), *NEW, "--show")
    assert status == 0 and "\033" not in out
    assert re.findall(r"forward (\d+), row 1: ", out) == ["0", "8"]
    assert display.MASK * 12 in out


def test_existing_files_are_kept_unless_told(run, tmp_path):
    for name, flag in (("o.jsonl", "--output"), ("p.png", "--picture")):
        (tmp_path / name).write_text("mine")
        flags = ("hi", "--model_name_or_path", checkpoint("mdlm"), *NEW, flag, name)
        status, _, err = run(*flags)
        assert status == 2 and "exists; choose another name or pass --overwrite" in err
        assert (tmp_path / name).read_text() == "mine"
        assert run(*flags, "--overwrite")[0] == 0
        assert (tmp_path / name).read_bytes() != b"mine"


def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch):
    (tmp_path / "o.jsonl").write_text("mine")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    flags = ("hi", "--model_name_or_path", checkpoint("mdlm"), *NEW, "--output", "o.jsonl", "--overwrite")
    status, _, err = run(*flags)
    assert status == 2 and err == "sample.py: [Errno 28] No space left on device\n"
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"] and (tmp_path / "o.jsonl").read_text() == "mine"


def test_ctrl_c_ends_with_status_130_and_no_traceback(run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(cli, "denoise", interrupted)
    status, _, err = run("hi", "--model_name_or_path", checkpoint("mdlm"), "--output", "o.jsonl")
    assert status == 130 and err == "sample.py: interrupted; nothing was written\n" and not list(tmp_path.iterdir())


def test_it_runs_as_a_program(tmp_path):
    program = Path(sample.__file__)
    command = [sys.executable, str(program), "--model_name_or_path", checkpoint("bd3lm"), *NEW, "--threshold", "0.9"]
    done = subprocess.run(command, input="hi\nyou\n", capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "[2/2] you" in done.stdout and not done.stderr


# Tokens as text

TEXTS = ["What is 17 + 25?\nSort 312.", "Grüße, 世界 🙂👩‍👩‍👧 ok", "", "   \n\n x"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_split_no_character(text):
    ids = tokenizer().encode(text)
    parts = display.pieces(tokenizer(), ids, [False] * len(ids))
    assert "".join(parts) == text and len(parts) == len(ids) and "\ufffd" not in "".join(parts)


def test_a_token_whose_text_depends_on_the_one_before_has_the_text_it_adds():
    words = Tokenizer(GOLDEN / "models" / "qwen3")  # which puts a space between two, and none before the first
    assert display.pieces(words, words.encode("w1 w2 w3"), [False] * 3) == ["w1", " w2", " w3"]


def test_pieces_of_a_masked_token_are_empty_and_of_its_neighbours_their_own():
    ids = tokenizer().encode("What is the word?")
    masked = [i == 2 for i in range(len(ids))]
    parts = display.pieces(tokenizer(), ids, masked)
    assert parts[2] == "" and "".join(parts) == tokenizer().decode(ids[:2]) + tokenizer().decode(ids[3:])


@pytest.mark.parametrize("width", (1, 7, 20, 79))
@pytest.mark.parametrize("text", [*TEXTS, "word " * 30, "x" * 50, "a\033[31mb\tc", f"a{display.MASK * 40}b"])
def test_wrap_loses_no_character_and_exceeds_no_line(text, width):
    lines = display.wrap([(text[:3], "1"), (text[3:], "")], width)
    joined = "".join(character for line in lines for character, _ in line)
    assert joined == display.printable(text).replace("\t", " ") and "\033" not in joined
    for line in lines:
        visible = "".join(character for character, _ in line).rstrip("\n")
        assert display.cell_len(visible) <= max(width + visible.endswith(" "), 2)


def test_wrap_breaks_after_a_space_or_a_mask_if_it_can():
    def lines(text, width):
        return ["".join(character for character, _ in line) for line in display.wrap([(text, "")], width)]

    assert lines("one two", 3) == lines("one two", 5) == ["one ", "two"]  # the space may hang over
    assert lines("one  two", 3) == ["one ", " ", "two"] and lines("one two", 7) == ["one two"]
    assert lines(f"ab{display.MASK}cde", 5) == [f"ab{display.MASK}", "cde"] and lines("abcdef", 5) == ["abcde", "f"]


def test_an_end_token_closes_an_answer_unless_masks_are_before_it():
    ids = tokenizer().encode("ab")
    (end,) = tokenizer().encode("<|im_end|>")
    ids, fresh = [ids[0], ids[-1], end, ids[0]], [False, False, True, False]
    shown = display.spans(tokenizer(), ids, [False] * 4, fresh, end_ids=(end,))
    assert display.plain(shown) == tokenizer().decode(ids[:2])
    shown = display.spans(tokenizer(), ids, [False, True, False, False], fresh, end_ids=(end,))
    assert [text for text, _ in shown[1:3]] == [display.MASK, display.END] and len(shown) == 4
    assert shown[2][1] == display.FRESH


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: one line, status 2, nothing written


def written_model(tmp_path, **changes) -> str:
    """A copy of a checkpoint to be damaged, with `changes` in its config.json."""
    path = tmp_path.parent / f"{tmp_path.name}.damaged"
    checkpoints.save_model(tiny(objective="ar", mask_token_id=None), path, tokenizer=tokenizer())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return str(path)


MISTAKES = {  # flags after a prompt and the model: what is said
    ("--stpes", "4"): r"unknown flag --stpes; did you mean --steps\?",
    ("--steps", "0"): "steps 0: expected at least 1",
    ("--steps", "many"): "argument --steps: invalid int value: 'many'",
    ("--block_size", "0"): "block_size 0: expected at least 1",
    ("--block_size", "64", "--max_new_tokens", "32"): "block_size 64 exceeds the 32 tokens.*at most 32",
    ("--steps_per_block", "0"): "steps_per_block 0: expected at least 1",
    ("--temperature", "-1"): "temperature -1.0: expected 0",
    ("--top_k", "3"): "top_k 3 changes nothing at temperature 0; raise --temperature",
    ("--top_p", "1.5", "--temperature", "1"): "top_p 1.5: expected above 0",
    ("--threshold", "2"): "threshold 2.0: expected a probability",
    ("--threshold", "0.5", "--stochastic_transfer"): "which stochastic_transfer is about; drop one",
    ("--remasking", "lowest"): r"argument --remasking: invalid choice: 'lowest' \(choose from 'low_confidence'",
    ("--suppress_tokens", "9999"): "suppress_tokens: token id 9999 is outside the vocabulary; expected 0 to 447",
    ("--cfg_keep_tokens", "a,b"): "'a,b': expected token ids separated by commas",
    ("--max_new_tokens", "-3"): "max_new_tokens -3: expected at least 0",
    (
        "--max_new_tokens",
        "500",
    ): "prompt 1: its .* tokens and 500 new ones exceed the model's context of 256; shorten it",
    ("--batch_size", "0"): "--batch_size 0: expected at least 1",
    ("--device", "tpu9"): "--device tpu9 is not available here; expected cpu",
    ("--objective", "bd3lm"): "--objective bd3lm contradicts the checkpoint, which declares objective mdlm",
    ("--right_shift_logits", "True"): "--right_shift_logits True contradicts the checkpoint",
    ("--show=maybe",): "'maybe': expected True or False",
    ("--output", "o.txt"): "--output o.txt: expected a name that ends in .jsonl",
    ("--picture", "p.jpg"): "--picture p.jpg: expected a name that ends in .png or .gif or .html",
    ("--min_exact_match", "5"): "--min_exact_match needs answers to compare with; add --dataset_args",
    ("--dataset_args", "builtin/sums"): "prompts come from PROMPT and --dataset_args; expected one source",
}


@pytest.mark.parametrize("flags", MISTAKES, ids=" ".join)
def test_mistaken_flags_end_in_one_line(run, tmp_path, flags):
    wanted = ("--output", "o.jsonl") if "--output" not in flags else ()
    status, out, err = run("hi", "--model_name_or_path", checkpoint("mdlm"), *wanted, *flags)
    assert status == 2 and not out
    assert re.fullmatch(rf"sample\.py: .*{MISTAKES[flags]}.*\n", err), err
    assert not list(tmp_path.iterdir())


def complain(run, tmp_path, message: str, *argv, stdin=None) -> None:
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    status, out, err = run(*argv, "--output", "o.jsonl", stdin=stdin)
    assert status == 2 and not out
    assert re.fullmatch(rf"sample\.py: .*{message}.*\n", err), err
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_block_sizes_that_contradict_the_checkpoint_are_refused(run, tmp_path):
    for name, size, said in (
        ("bd3lm", "8", "--block_size 8 contradicts the checkpoint, which declares block_length 4"),
        ("ar", "8", "block_size 8: an ar model decodes token by token; leave --block_size out"),
        ("undeclared", "0", "block_size 0: expected at least 1"),
    ):
        complain(run, tmp_path, said, "hi", "--model_name_or_path", checkpoint(name), "--block_size", size)
    undeclared = ("hi", "--model_name_or_path", checkpoint("undeclared"), "--objective", "bd3lm")
    complain(run, tmp_path, "bd3lm needs a block length.*pass --block_size", *undeclared)


def test_models_that_cannot_be_used_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    complain(
        run,
        tmp_path,
        "some/model is neither a directory nor a Hub id within reach",
        "hi",
        "--model_name_or_path",
        "some/model",
    )
    (tmp_path / "empty").mkdir()
    complain(run, tmp_path, "holds no config.json", "hi", "--model_name_or_path", "empty")
    (tmp_path / "empty").rmdir()
    plain = checkpoint("plain")
    tokens = json.loads(Path(plain, "tokenizer.json").read_text())
    assert HOLE not in [token["content"] for token in tokens["added_tokens"]]
    complain(
        run,
        tmp_path,
        "has no mask token; make a diffusion checkpoint.*or pass --objective ar",
        "hi",
        *("--objective", "mdlm", "--model_name_or_path"),
        plain,
    )
    assert run("hi", "--model_name_or_path", plain, "--objective", "ar", *NEW)[0] == 0
    assert run("hi", "--model_name_or_path", plain, *NEW)[0] == 0
    for changes, said in (
        ({"model_type": "mamba"}, "model_type 'mamba': expected qwen3, qwen2, llama"),
        ({"use_sliding_window": True}, "use_sliding_window true is not supported"),
        ({"hidden_size": 64}, "weights and config.json disagree"),
        ({}, "the tokenizer has token id .* and the embedding 40 rows"),
    ):
        damaged = written_model(tmp_path, **changes)
        if not changes.get("hidden_size"):
            complain(run, tmp_path, said, "hi", "--model_name_or_path", damaged)
    weights = Path(damaged, "model.safetensors")
    wide = checkpoint("mdlm", vocab_size=512)
    copy = tmp_path.parent / f"{tmp_path.name}.copy"
    copy.mkdir()
    for file in Path(wide).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = (copy / weights.name).read_bytes()
    (copy / weights.name).write_bytes(whole[: len(whole) // 2])
    complain(
        run, tmp_path, "is truncated or no safetensors file.*fetch it again", "hi", "--model_name_or_path", str(copy)
    )
    (copy / weights.name).unlink()
    complain(run, tmp_path, "holds no model.safetensors", "hi", "--model_name_or_path", str(copy))


INPUTS = {
    ("p.txt", b""): "p.txt holds no prompt; expected one a line",
    ("p.txt", b"ok\n\xff\xfe"): r"p.txt is not UTF-8 text \(byte 3\); convert it",
    ("p.jsonl", b"{"): "p.jsonl, line 1 is no JSON .*expected an object a line",
    (
        "p.jsonl",
        b'{"prompt": "a"}\n{"text": "b"}',
    ): 'p.jsonl, line 2: expected an object with either "prompt" or "messages"',
    ("p.jsonl", b'{"prompt": 5}'): "line 1: the prompt is a int; expected a string",
    ("p.jsonl", b'{"messages": []}'): r"line 1: no messages in \[\]; expected a list of messages",
    ("p.jsonl", b'{"messages": [{"role": "wizard", "content": "a"}]}'): "unknown role 'wizard' in .*expected",
    (
        "p.jsonl",
        b'{"messages": [{"role": "user", "content": ["a"]}]}',
    ): "content that is no string in .*expected .* with a role .* and a content that is a string",
    ("p.jsonl", b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'): (
        "prompt 1 ends in the assistant's turn; leave that out"
    ),
}


@pytest.mark.parametrize("file", INPUTS, ids=str)
def test_unreadable_prompts_are_refused(run, tmp_path, file):
    (tmp_path / file[0]).write_bytes(file[1])
    complain(run, tmp_path, INPUTS[file], "--input", file[0], "--model_name_or_path", checkpoint("mdlm"))


def test_contradictory_and_missing_prompts_are_refused(run, tmp_path, monkeypatch):
    model = ("--model_name_or_path", checkpoint("mdlm"))
    (tmp_path / "p.txt").write_text("hi")
    complain(
        run, tmp_path, "prompts come from PROMPT and --input; expected one source", "hi", "--input", "p.txt", *model
    )
    complain(run, tmp_path, "No such file or directory: 'none.txt'", "--input", "none.txt", *model)
    complain(run, tmp_path, "standard input holds no prompt", *model, stdin=b"\n")
    complain(run, tmp_path, "standard input is not UTF-8", *model, stdin=b"\xff")
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    complain(run, tmp_path, "no prompt; give some as arguments", *model)
    complain(
        run, tmp_path, "prompt 1 has masks.*leave --chat_template True out", HOLE, *model, "--chat_template", "True"
    )
    complain(run, tmp_path, "prompt 1 has masks.*leave --system out", HOLE, *model, "--system", "x")
    untemplated = ("--model_name_or_path", checkpoint("mdlm", template=False))
    complain(run, tmp_path, "has no chat template; pass False", "hi", *untemplated, "--chat_template", "True")
    complain(run, tmp_path, "--system Add. needs a chat template", "hi", *untemplated, "--system", "Add.")
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    complain(run, tmp_path, "prompt 1 is a chat, which needs a chat template", "--input", "c.jsonl", *untemplated)


def test_data_sets_that_cannot_be_scored_are_refused(run, tmp_path):
    model = ("--model_name_or_path", checkpoint("mdlm"))
    complain(run, tmp_path, "builtin/none", *model, "--dataset_args", "builtin/none")
    complain(run, tmp_path, "expected train, validation or test", *model, "--dataset_args", "builtin/sums[tset:5]")
    complain(run, tmp_path, r"builtin/stdlib\[test:1\] is no chat", *model, "--dataset_args", "builtin/stdlib[test:1]")
    complain(run, tmp_path, "split 'dev'", *model, "--dataset_args", "builtin/sums", "--split", "dev")


def test_a_template_that_fails_is_told(run, tmp_path, monkeypatch):
    broken = "{{ raise_exception('roles must alternate') }}"
    real = cli.open_model

    def opened(*args):
        model, tok = real(*args)
        tok.template = broken
        return model, tok

    monkeypatch.setattr(sample, "open_model", opened)
    said = "the chat template refuses these messages: roles must alternate"
    complain(run, tmp_path, said, "hi", "--model_name_or_path", checkpoint("mdlm"))

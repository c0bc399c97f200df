"""chat.py: turns, commands, a cache kept from turn to turn, a full context; driven on a pipe and in a terminal."""

import io
import itertools
import json
import os
import re
import subprocess
import sys

import pyte
import pytest
import torch
from checkpoints import checkpoint, opened, tokenizer
from terminal import ROOT, Terminal

import chat
import cli
import display
from diffusion import denoise

OBJECTIVES = ("ar", "mdlm", "bd3lm")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
NEW = ("--max_new_tokens", "12", "--steps", "12")
NOTE = (
    r"\[\d+ tokens in .* s, .* tokens/s, \d+ forwards, .* tokens per forward(; \d+ of \d+ prompt tokens kept)?"
    r"(; steps \d+ for at most .*)?\]"
)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the program on a pipe: run(objective, line, ..., flags=(...)) -> (status, what the model said, the rest)."""
    monkeypatch.chdir(tmp_path)

    def call(objective: str, *lines: str | bytes, flags=NEW, **changes):
        text = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        capsys.readouterr()
        status = 0
        try:
            chat.main(["--model_name_or_path", checkpoint(objective, **changes), *flags])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def session(objective: str, *flags: str, **changes) -> chat.Conversation:
    args = chat.Chat.parse(["--model_name_or_path", checkpoint(objective, **changes), *NEW, *flags])
    return chat.Conversation(args, *chat.open_model(args, args.block_size))


def answer_to(objective: str, messages: list[dict], **options) -> str:
    """What the sampler alone says, with no cache of earlier turns."""
    ids, _ = tokenizer().render(messages, reply=True)
    block = {"block_size": 32} if objective == "mdlm" else {}
    options = {"max_new_tokens": 12, "steps": 12, "end_ids": tuple(tokenizer().end_ids)} | block | options
    *_, last = denoise(opened(objective), [ids], **options)
    answer = last.tokens[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(answer) if token in tokenizer().end_ids), len(answer))
    return tokenizer().decode(answer[:end])


def whole(text: str) -> str:
    """Without the bytes that are no UTF-8, of which a token alone shows more than its whole text does."""
    return text.replace("\ufffd", "")


def turns(*texts: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


SAID = ["What is 1 + 2?", "Reverse the word ABC.", "hi"]


# ---------------------------------------------------------------------------------------------------------------------
# Turns


@each_objective
def test_each_turn_is_answered_as_if_from_a_fresh_start(run, objective):
    talk = session(objective)
    for n, text in enumerate(SAID):
        talk.say(text)
        assert len(talk.messages) == 2 * n + 2
        assert talk.messages[-1]["content"] == answer_to(objective, talk.messages[:-1])
    assert bool(talk.prefix.tokens) == (objective != "mdlm")


@pytest.mark.parametrize("objective", ("ar", "bd3lm"))
def test_a_conversation_computes_only_what_is_new(run, objective, capsys):
    talk, widths = session(objective), []
    talk.model.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    talk.say("What is the largest of 1, 2 and 3? " * 4)
    first = widths[0]
    widths.clear()
    talk.say("hi")
    ids, _ = tokenizer().render(talk.messages[:-1], reply=True)
    kept = int(re.search(r"; (\d+) of (\d+) prompt tokens kept", capsys.readouterr().err)[1])
    assert kept >= first - 4 and kept % (talk.model.config.block_length or 1) == 0
    assert widths[0] <= len(ids) - kept + 4


@pytest.mark.parametrize("flags", (("--cfg_scale", "0.5"), ("--block_align", "prompt")))
def test_options_that_change_what_is_seen_keep_no_cache(run, flags, capsys):
    talk = session("bd3lm", *flags)
    options = {"cfg_scale": 0.5} if "--cfg_scale" in flags else {"block_align": "prompt"}
    for text in SAID[:2]:
        talk.say(text)
        assert talk.messages[-1]["content"] == answer_to("bd3lm", talk.messages[:-1], **options)
    assert "kept" not in capsys.readouterr().err


@each_objective
def test_on_a_pipe_answers_go_to_standard_output_and_nothing_else(run, objective):
    status, out, err = run(objective, *SAID)
    talk = session(objective)
    for text in SAID:
        talk.say(text)
    said = "".join(display.printable(message["content"]) + "\n" for message in talk.messages[1::2])
    assert status == 0 and whole(out) == whole(said) and "\033" not in out
    assert len(re.findall(NOTE, err)) == 3


def test_the_system_message_comes_first(run):
    talk = session("mdlm", "--system", "Add.")
    talk.say("1 + 2")
    assert talk.messages[-1]["content"] == answer_to("mdlm", [{"role": "system", "content": "Add."}, *turns("1 + 2")])
    talk.obey("/system Subtract.")
    talk.say("3")
    system = [{"role": "system", "content": "Subtract."}]
    assert talk.messages[-1]["content"] == answer_to("mdlm", system + talk.messages[:-1])
    talk.obey("/system")
    talk.say("4")
    assert talk.messages[-1]["content"] == answer_to("mdlm", talk.messages[:-1])


@pytest.mark.parametrize(("objective", "begin"), [("ar", [0]), ("mdlm", []), ("bd3lm", [])])
def test_without_the_template_each_message_is_continued_by_itself(run, objective, begin):
    talk = session(objective, "--chat_template", "False")
    for text in ("What is", "", "What is"):
        talk.say(text)
        ids, options = tokenizer().encode(text) or begin, {"block_size": 32} if objective == "mdlm" else {}
        options |= {"max_new_tokens": 12, "steps": 12, "end_ids": tuple(tokenizer().end_ids)}
        *_, last = denoise(talk.model, [ids], **options)
        answer = last.tokens[0, len(ids) :].tolist()
        assert tokenizer().decode(answer).startswith(talk.messages[-1]["content"])
    assert talk.messages[-1] == talk.messages[1]


def test_an_empty_message_is_no_turn(run):
    status, out, err = run("mdlm", "", "")
    assert (status, out, err) == (0, "", "")


# Commands


def test_reset_undo_and_retry(run):
    talk = session("bd3lm")
    for text in SAID:
        talk.say(text)
    before = list(talk.messages)
    talk.obey("/undo")
    assert talk.messages == before[:4]
    talk.say(SAID[2])
    assert talk.messages == before
    talk.obey("/retry")
    assert talk.messages == before
    talk.obey("/set temperature 2")
    talk.obey("/retry")
    assert talk.messages[:-1] == before[:-1] and talk.messages[-1] != before[-1]
    talk.obey("/reset")
    assert talk.messages == [] and talk.options.temperature == 2.0
    for command in ("/undo", "/retry"):
        with pytest.raises(ValueError, match=f"nothing to {command[1:]}; the conversation is empty"):
            talk.obey(command)


def test_two_slashes_begin_a_message_that_begins_with_one(run):
    talk = session("mdlm")
    talk.obey("//help me")
    assert talk.messages[0]["content"] == "/help me"


@each_objective
def test_infill_fills_in_outside_of_the_conversation(run, objective, capsys):
    talk = session(objective)
    talk.say("hi")
    before, kept = list(talk.messages), list(talk.prefix.tokens)
    capsys.readouterr()
    talk.obey("/infill What is <|mask|><|mask|> + 25?")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"What is .* \+ 25\?\n", out, re.DOTALL) and err.startswith("[2 tokens")
    assert talk.messages == before and talk.prefix.tokens == kept
    with pytest.raises(ValueError, match=r"/infill nothing: expected a text with <\|mask\|>"):
        talk.obey("/infill nothing")
    capsys.readouterr()
    talk.say("What is 1 + 2?")
    assert not capsys.readouterr().err.startswith("[0 tokens") and talk.options.max_new_tokens == 12


def test_save_and_load_give_the_conversation_back_as_a_row_of_training_data(run, tmp_path, capsys):
    talk = session("ar", "--system", "Add. 🙂")
    for text in SAID:
        talk.say(text)
    talk.obey("/save talk.jsonl")
    talk.obey("/save talk.jsonl")  # its own
    row = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert row["messages"] == [{"role": "system", "content": "Add. 🙂"}, *talk.messages]
    other = session("ar")
    other.obey("/load talk.jsonl")
    assert other.messages == talk.messages and other.system_message == "Add. 🙂"
    assert f"user: {SAID[0]}" in capsys.readouterr().err
    other.say("more")
    talk.say("more")
    assert other.messages == talk.messages
    other.obey("/save talk.jsonl")
    with pytest.raises(ValueError, match=r"talk\.jsonl exists and is not this conversation's"):
        session("ar").obey("/save talk.jsonl")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["talk.jsonl"]


SETTINGS = {
    "max_new_tokens": "5",
    "steps": "64",
    "block_size": "8",
    "steps_per_block": "3",
    "block_align": "sequence",
    "scheduler": "cosine",
    "temperature": "0.7",
    "top_k": "9",
    "top_p": "0.8",
    "remasking": "random",
    "stochastic_transfer": "True",
    "threshold": "0.9",
    "entropy": "0.1",
    "factor": "1.0",
    "speculate": "3",
    "cfg_scale": "1.5",
    "cfg_keep_tokens": "3,4",
    "suppress_tokens": "5",
    "begin_suppress_tokens": "6",
    "visualize": "False",
    "seed": "7",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_can_be_set_and_unset_and_given_as_a_flag(run, name, capsys):
    of = "causal" if name == "speculate" else "undeclared"
    talk = session(of, *(("--temperature", "1") if name.startswith("top_") else ()))
    before = talk.options
    capsys.readouterr()
    talk.obey(f"/set {name} {SETTINGS[name]}")
    told = capsys.readouterr().err
    assert told.startswith(f"{name} ")
    assert getattr(talk.options, name) != getattr(before, name)
    talk.say("hi")
    talk.obey(f"/set {name} none")
    if name not in ("max_new_tokens", "steps"):
        assert talk.options == before
    temperature = ("--temperature", "1") if name.startswith("top_") else ()
    status, _, err = run(of, "hi", flags=(*NEW, f"--{name}", SETTINGS[name], *temperature))
    assert status == 0 and re.search(NOTE, err)


def test_set_lists_all_options_and_none_is_left_untested(run, capsys):
    session("mdlm").obey("/set")
    assert {line.split()[0] for line in capsys.readouterr().err.splitlines()} == set(SETTINGS)
    flags = {flag[2:] for flag in chat.Chat.parser()._option_string_actions if flag.startswith("--")}
    elsewhere = {"help", "model_name_or_path", "system", "chat_template", "history_file"}
    model = {"objective", "right_shift_logits", "dtype", "device", "torch_compile"}
    assert flags == set(SETTINGS) | elsewhere | model
    flags = (
        "--objective",
        "bd3lm",
        "--right_shift_logits",
        "True",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--torch_compile",
        "False",
    )
    assert run("undeclared", "hi", flags=(*NEW, *flags, "--block_size", "3"))[0] == 0


# What is refused


MISTAKES = {
    "/stpes": "unknown command /stpes; did you mean /save?|unknown command /stpes; /help lists the commands",
    "/undoo": r"unknown command /undoo; did you mean /undo\?",
    "/set stpes 4": r"unknown option stpes; did you mean steps\?",
    "/set steps 0": "steps 0: expected at least 1",
    "/set steps four": "steps: invalid int value: 'four'",
    "/set remasking lowest": r"remasking: invalid choice: 'lowest' \(choose from",
    "/set temperature -1": "temperature -1.0: expected 0",
    "/set top_k 3": "top_k 3 changes nothing at temperature 0",
    "/set block_size 0": "block_size 0: expected at least 1",
    "/set threshold 1.5": "threshold 1.5: expected a probability",
    "/set max_new_tokens 500": "exceed the model's context of 256",
    "/save": "/save: expected the name of a file",
    "/save /dev/null/x": "Not a directory|File exists",
    "/load none.jsonl": "there is no file none.jsonl",
    "/load bad.jsonl": "bad.jsonl holds no conversation",
    "/load latin.jsonl": "latin.jsonl holds no conversation",
    "/load system.jsonl": "expected turns of user and assistant, one after the other",
    "/load wizard.jsonl": "unknown role 'wizard' in .*expected",
}


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "\xe9"}')
    (tmp_path / "system.jsonl").write_text(json.dumps({"messages": turns("a", "b", "c")}))
    (tmp_path / "wizard.jsonl").write_text(json.dumps({"messages": [{"role": "wizard", "content": "a"}]}))


@pytest.mark.parametrize("line", MISTAKES)
def test_mistaken_commands_are_told_in_one_line_and_change_nothing(run, tmp_path, bad_files, line):
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    status, out, err = run("mdlm", line)
    assert status == 2 and not out
    assert re.fullmatch(rf"chat\.py: .*({MISTAKES[line]}).*\n", err), err
    talk = session("mdlm")
    before = talk.options
    with pytest.raises((ValueError, OSError)):
        talk.obey(line)
    assert talk.options == before and talk.messages == []
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


FLAGS = {
    ("--stpes", "4"): r"unknown flag --stpes; did you mean --steps\?",
    ("--block_size", "0"): "block_size 0: expected at least 1",
    ("--steps", "0"): "steps 0: expected at least 1",
    ("--temperature", "-1"): "temperature -1.0: expected 0",
    ("--max_new_tokens", "300"): "exceed the model's context of 256; .*lower --max_new_tokens",
    ("--device", "tpu9"): "--device tpu9 is not available here",
    ("--objective", "ar"): "--objective ar contradicts the checkpoint",
    ("--system", "x", "--chat_template", "False"): "--system x needs a chat template",
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_mistaken_flags_end_in_one_line(run, tmp_path, flags):
    status, out, err = run("mdlm", "hi", flags=flags)
    assert status == 2 and not out and not list(tmp_path.iterdir())
    assert re.fullmatch(rf"chat\.py: .*{FLAGS[flags]}.*\n", err), err


def test_models_and_templates_that_cannot_be_used_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, flags, said in (
        ("mdlm", ("--model_name_or_path", "some/model"), "neither a directory nor a Hub id within reach"),
        ("plain", ("--objective", "mdlm"), "has no mask token; make a diffusion checkpoint.*--objective ar"),
        ("ar", ("--block_size", "4"), "block_size 4: an ar model decodes token by token"),
        ("bd3lm", ("--block_size", "8"), "--block_size 8 contradicts the checkpoint"),
    ):
        status, out, err = run(name, "hi", flags=flags)
        assert status == 2 and not out and re.fullmatch(rf"chat\.py: .*{said}.*\n", err), err
    untemplated = checkpoint("mdlm", template=False)
    with pytest.raises(SystemExit, match="2"):
        chat.main(["--model_name_or_path", untemplated, "--chat_template", "True"])
    status, out, err = run("mdlm", "hi", template=False)
    assert status == 0 and out  # it continues text


def test_text_that_is_no_utf8_is_refused(run):
    status, _, err = run("mdlm", b"\xff\xfe")
    assert status == 2 and re.fullmatch(r"chat\.py: .*'utf-8' codec can't decode byte 0xff.*\n", err)


def test_a_message_longer_than_the_context_is_refused_and_not_kept(run):
    talk = session("mdlm")
    talk.say("hi")
    before = list(talk.messages)
    said = r"message was not taken: its \d+ tokens and max_new_tokens 12 exceed the context of 256; shorten it or /set"
    with pytest.raises(ValueError, match=said):
        talk.say("What is this? " * 100)
    assert talk.messages == before


@pytest.mark.parametrize("objective", ("ar", "mdlm", "bd3lm"))
def test_a_full_context_leaves_out_the_oldest_exchanges_and_says_so(run, objective, capsys):
    talk, told = session(objective, "--system", "Add."), []
    for n in range(10):
        capsys.readouterr()
        talk.say("What is the largest of 1, 2 and 3?")
        err = capsys.readouterr().err
        match = re.search(
            r"context of 256 tokens is full: the model no longer sees the oldest (\d+) of (\d+) exchanges", err
        )
        told.append(int(match[1]) if match else 0)
        assert not match or int(match[2]) == n + 1
        seen = [{"role": "system", "content": "Add."}, *talk.messages[2 * max(told) : -1]]
        assert talk.messages[-1]["content"] == answer_to(objective, seen)
    assert told[0] == 0 and max(told) > 1 and len(talk.messages) == 20


def test_a_masked_text_to_continue_is_refused(run):
    with pytest.raises(ValueError, match="/infill fills it in"):
        session("mdlm", "--chat_template", "False").say("a <|mask|>")


# Stopping an answer


def interrupted(after: int):
    def steps(*args, **options):
        for step in denoise(*args, **options):
            if step.forwards == after:
                raise KeyboardInterrupt
            yield step

    return steps


@each_objective
def test_a_stopped_answer_keeps_what_had_settled_and_the_cache_stays_right(run, objective, monkeypatch, capsys):
    talk = session(objective)
    monkeypatch.setattr(cli, "denoise", interrupted(7))
    options = () if objective == "ar" else ("/set suppress_tokens none",)
    for line in options:
        talk.obey(line)
    talk.say("hi")
    err = capsys.readouterr().err
    assert "stopped" in err
    if talk.messages:
        assert whole(answer_to(objective, talk.messages[:1])).startswith(whole(talk.messages[1]["content"]))
    monkeypatch.setattr(cli, "denoise", denoise)
    talk.say("again")
    assert talk.messages[-1]["content"] == answer_to(objective, talk.messages[:-1])


def test_an_answer_stopped_before_anything_settled_takes_the_message_back(run, monkeypatch, capsys):
    talk = session("mdlm")
    talk.say("hi")
    before = list(talk.messages)
    monkeypatch.setattr(cli, "denoise", interrupted(0))
    talk.say("more")
    assert talk.messages == before and "took back: more" in capsys.readouterr().err
    talk.obey("/retry")
    assert talk.messages == before and "the earlier answer stays" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# In a terminal

LONG = {"max_position_embeddings": 4096, "dtype": torch.float32}


def words(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(("objective", "columns"), [("mdlm", 100), ("bd3lm", 24), ("ar", 60)])
def test_a_talk_in_a_terminal(tmp_path, objective, columns):
    flags = ("--model_name_or_path", checkpoint(objective, **LONG), "--history_file", tmp_path / "history")
    fresh = session(objective, **LONG)

    def answered(n: int):
        return lambda text: len(re.findall(r"tokensperforward", words(text))) == n and text.endswith("\n>")

    with Terminal("chat.py", *flags, *NEW, columns=columns, lines=30) as window:
        window.until(lambda text: text.endswith("\n>"))
        window.send("What is 1 + 2?\r")
        window.until(answered(1))
        window.send("hi\r")
        text = window.until(answered(2))
        for said in ("What is 1 + 2?", "hi"):
            fresh.say(said)
            assert whole(words(display.printable(fresh.messages[-1]["content"]))) in whole(words(text))
        window.send("/undo\r")
        assert "took back: hi" in window.until("took back")
        window.send("/set stpes 3\r")
        window.until(lambda text: "didyoumeansteps?" in words(text))
        window.send("/set steps 4\r")
        window.until("\nsteps 4\n")
        window.send("/infill What <|mask|> it?\r")
        text = window.until(answered(3))
        assert re.search(r"\nWhat .*it\?", text.replace("/infill What", ""))

        # An answer that is stopped, in a window that is made narrower and wider meanwhile.
        settings = ["max_new_tokens 1000", "steps 1000", *(["block_size 1000"] if objective == "mdlm" else [])]
        for setting in settings:
            window.send(f"/set {setting}\r")
            window.until(f"\n{setting}\n>")
        window.send("more\r")
        # What is drawn while the window changes may leave lines behind, as in any terminal.
        resized = objective == "mdlm"
        for size in (columns, columns // 2 + 8, columns) if resized else (columns,):
            window.resize(size, 30)
            window.seen.clear()
            window.until(lambda _: "green" in {colour for _, colour in window.seen})
            window.until(lambda _: (display.MASK, "default") in window.seen)
        window.send("\x03")
        stopped = ("stopped]", "tookback:more")
        text = window.until(lambda text: text.endswith("\n>") and any(said in words(text) for said in stopped))
        assert (resized or display.MASK not in text) and not window.screen.cursor.hidden

        window.send("\x03")  # at the prompt
        window.until(lambda text: "(Ctrl-Dor/quitleaves)" in words(text) and text.endswith("\n>"))
        told = f"\n{settings[-1]}\n>"
        before = window.text.count(told)
        window.send("\x1b[A\x1b[A\r")  # arrows up: what was typed before
        window.until(lambda text: text.count(told) == before + 1)
        window.send("\x04")
        assert window.end() == 0
    assert "Traceback" not in window.text
    assert (tmp_path / "history").read_text().splitlines()[-2:] == ["more", f"/set {settings[-1]}"]


def test_a_history_file_that_cannot_be_read_is_named(tmp_path):
    flags = ("--model_name_or_path", checkpoint("bd3lm"), "--history_file", tmp_path)
    with Terminal("chat.py", *flags, columns=200) as window:
        assert window.end() == 2
        assert re.search(r"\nchat.py: --history_file \S+: .*; name another file, or '' to keep nothing$", window.text)


def test_the_commands_in_a_terminal(tmp_path):
    flags = ("--model_name_or_path", checkpoint("bd3lm"), "--history_file", "", *NEW)
    saved = tmp_path / "talk.jsonl"

    def told(window, line: str, wanted: str) -> str:
        """What comes on the screen after a line is sent, once `wanted` is in it and the prompt is back."""
        before = len(window.text)
        window.send(line + "\r")
        return window.until(lambda text: wanted in text[before:] and text.endswith("\n>"))[before:]

    with Terminal("chat.py", *flags, columns=160, lines=50) as window:
        window.until(lambda text: text.endswith("\n>"))
        help = told(window, "/help", "/quit")
        for name in chat.COMMANDS:
            usage, _, meaning = getattr(chat.Conversation, name).__doc__.partition(": ")
            assert usage.startswith(f"/{name}") and re.search(rf"\n{re.escape(usage)}  +{re.escape(meaning)}", help)
        told(window, "/system Add.", "\nsystem message: Add.\n")
        first = told(window, "What is 1 + 2?", "tokens per forward")
        again = told(window, "/retry", "tokens per forward")
        answers = [re.search(r"\n((?:.|\n)*?)\n\[\d+ tokens", text)[1] for text in (first, again)]
        assert answers[0] == answers[1] and answers[0].strip()
        told(window, f"/save {saved}", f"\nsaved 2 messages to {saved}\n")
        told(window, "/reset", "\na new conversation\n")
        told(window, "/undo", "\nerror: nothing to undo; the conversation is empty\n")
        told(window, "/retry", "\nerror: nothing to retry; the conversation is empty\n")
        loaded = told(window, f"/load {saved}", "\nassistant: ")
        assert "\nuser: What is 1 + 2?\n" in loaded
        long = "What is the largest of 1, 2 and 3? " * 4
        told(window, long, "tokens per forward")
        full = told(window, long, "tokens per forward")
        assert re.search(r"\nthe context of 256 tokens is full: the model no longer sees the oldest \d of 3 exch", full)
        told(window, long * 4, "\nerror: the message was not taken: ")
        told(window, "hi", "tokens per forward")  # the talk goes on
        window.send("/quit\r")
        assert window.end() == 0
    system, *messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert system == {"role": "system", "content": "Add."} and [m["role"] for m in messages] == ["user", "assistant"]


def test_text_is_continued_in_a_terminal_and_an_empty_line_begins_from_scratch():
    flags = ("--model_name_or_path", checkpoint("mdlm"), "--chat_template", "False", *NEW)
    fresh = session("mdlm", "--chat_template", "False")
    with Terminal("chat.py", *flags, "--history_file", "", columns=120) as window:
        window.until(lambda text: text.endswith("\n>"))
        for n, line in enumerate(("", "What is", "")):
            window.send(line + "\r")
            text = window.until(lambda text, n=n: text.count("tokens per forward") == n + 1 and text.endswith("\n>"))
            fresh.say(line)
            assert whole(words(display.printable(fresh.messages[-1]["content"]))) in whole(words(text))
        window.send("/system Add.\r")
        window.until("error: a system message needs a chat template, and here text is continued")
        window.send("\x04")
        assert window.end() == 0


def test_on_a_real_pipe_only_answers_are_written_and_a_mistake_ends_it(tmp_path):
    command = [sys.executable, "chat.py", "--model_name_or_path", checkpoint("mdlm"), *NEW]
    done = subprocess.run(command, cwd=ROOT, input=b"hi\n/set steps 4\n\nhi\n/stpes\nhi\n", capture_output=True)
    first, second, *rest = done.stdout.decode().splitlines()
    assert first.strip() and second.strip() and not rest and b"\033" not in done.stdout
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2 and len(lines) == 4 and lines[1] == "steps 4"
    assert re.fullmatch(NOTE, lines[0]) and re.fullmatch(NOTE, lines[2])
    assert lines[3] == "chat.py: unknown command /stpes; /help lists the commands"


class Window(io.StringIO):
    """What a terminal of a size that can be changed is sent."""

    encoding = "utf-8"

    def isatty(self):
        return True

    def fileno(self):
        return 0


def test_a_region_is_erased_by_the_rows_it_takes_in_a_narrower_window(monkeypatch):
    size, window = [40, 10], Window()
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size(size))
    region = display.Region(window)
    region.draw(display.wrap([("x" * 60, "")], region.width))
    assert window.getvalue() == "\r\033[J" + "x" * 39 + "\r\n" + "x" * 21 + "\r"
    size[0] = 20
    window.truncate(0)
    region.draw([])
    assert window.getvalue().lstrip("\0") == "\r\033[3A\033[J\r"  # 2 rows each
    region.draw(display.wrap([("y " * 200, "")], region.width))
    assert len(region.drawn) == 9 and "more lines" in window.getvalue()


def lines_of(window: Window) -> list[str]:
    """What stands on a screen of 12 columns in the end."""
    screen = pyte.Screen(12, 30)
    pyte.Stream(screen).feed(window.getvalue().replace("\r\n", "\n").replace("\n", "\r\n"))
    return [line.strip() for line in screen.display if line.strip()]


def test_a_line_that_may_still_take_the_next_lines_first_word_does_not_scroll_away(monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((12, 10)))
    monkeypatch.setenv("TERM", "xterm")
    window = Window()
    with display.Stream(window) as stream:
        stream.show([("one two six", ""), (display.MASK, display.MASKED)])  # "six" and the mask on a line of their own
        stream.close([("one two six", ""), (" x", "")])
    assert lines_of(window) == ["one two six", "x"]


def test_settled_text_is_written_once_and_for_good(monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((12, 10)))
    monkeypatch.setenv("TERM", "xterm")
    text = "one two three four five six seven eight"
    ids = tokenizer().encode(text)
    for live in (True, False):
        window = Window()
        with display.Stream(window, live=live) as stream:
            for settled in range(len(ids) + 1):
                masked = [i >= settled for i in range(len(ids))]
                stream.show(display.spans(tokenizer(), ids, masked, [False] * len(ids)))
            stream.close(display.spans(tokenizer(), ids, [False] * len(ids), [False] * len(ids)))
        shown = lines_of(window)
        assert " ".join(shown) == text if live else words("".join(shown)) == words(text)
        assert ("\033" in window.getvalue()) == live and (live or window.getvalue() == text + "\n")


def test_a_character_of_several_tokens_is_written_once_it_is_whole():
    ids, window = tokenizer().encode("a🙂b"), io.StringIO()
    assert len(ids) > 4
    with display.Stream(window) as stream:
        for settled in range(len(ids) + 1):
            masked = [i >= settled for i in range(len(ids))]
            stream.show(display.spans(tokenizer(), ids, masked, [False] * len(ids)))
            assert "a🙂b".startswith(window.getvalue())
        stream.close(display.spans(tokenizer(), ids, [False] * len(ids), [False] * len(ids)))
    assert window.getvalue() == "a🙂b\n"


def test_what_may_be_masked_again_is_not_written_before_the_end():
    ids, window = tokenizer().encode("one two"), io.StringIO()
    with display.Stream(window, revocable=True) as stream:
        stream.show(display.spans(tokenizer(), ids, [False] * len(ids), [False] * len(ids)))
        assert not window.getvalue()
        stream.close(display.spans(tokenizer(), ids[:1], [False], [False]))
    assert window.getvalue() == tokenizer().decode(ids[:1]) + "\n"


def test_a_dumb_terminal_sees_no_escape_codes(tmp_path):
    flags = ("--model_name_or_path", checkpoint("bd3lm"), "--history_file", "", *NEW)
    with Terminal("chat.py", *flags, term="dumb") as window:
        window.until(lambda text: text.endswith("\n>"))
        before = len(window.raw)
        window.send("hi\r")
        window.until(lambda text: "tokens per forward" in text and text.endswith("\n>"))
        assert b"\033[" not in window.raw[before:].replace(b"\033[?2004h", b"").replace(b"\033[?2004l", b"")
        window.send("/quit\r")
        assert window.end() == 0


def test_sample_animates_in_a_terminal(tmp_path):
    flags = ("hi", "you", "--model_name_or_path", checkpoint("mdlm"), *NEW, "--show")
    with Terminal("sample.py", *flags, columns=50, lines=12) as window:
        window.until("[2/2] you")
        assert window.end() == 0
        assert {colour for character, colour in window.seen if character == display.MASK} == {"default"}
        assert any(colour == "green" for _, colour in window.seen)
        assert "forward" not in window.text.split("[1/2]")[0] and not window.screen.cursor.hidden
        assert display.MASK not in window.text and "tokensperforward" in words(window.text)

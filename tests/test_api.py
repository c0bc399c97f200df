"""nanoa2d.py: a checkpoint opened and asked in Python, with the answers of sample.py and errors of one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import checkpoint, tokenizer

import cli
import nanoa2d
import sample
from checkpoint import save_model
from nanoa2d import generate, load, stream

ROOT = Path(__file__).parents[1]
CHAT = [{"role": "user", "content": "Sort the digits of 12"}]


@pytest.fixture(scope="module")
def mdlm():
    return load(checkpoint("mdlm"))


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BASE", checkpoint("plain", dtype=torch.float32, max_position_embeddings=512))
    monkeypatch.setenv("MINUTES", "0.01")
    monkeypatch.chdir(tmp_path)
    names, cells = {}, json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert cell["outputs"] == []
        exec("".join(cell["source"]), names)
    assert len(names["answers"]) == 3 and (tmp_path / "runs/notebook/mdlm/curves.png").is_file()
    assert capsys.readouterr().out.count("sat on the mat.") == 2  # a prompt and what was filled into it


@pytest.mark.parametrize("name", ["ar", "mdlm", "bd3lm"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "drawn"])
def test_answers_are_those_of_sample_py(name, options, tmp_path):
    path, prompts, file = checkpoint(name), ["What is 1", "Sort", "The <|mask|> of"], tmp_path / "answers.jsonl"
    flags = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    with pytest.raises(SystemExit) as end:
        sample.main([*prompts, "--model_name_or_path", path, "--batch_size", "2", "--output", str(file), *flags])
    assert not end.value.code
    expected = [json.loads(line)["answer"] for line in file.read_text().splitlines()]
    model, tokenizer = load(path)
    assert generate(model, tokenizer, prompts, batch_size=2, **options) == expected and len(set(expected)) == 3


def test_a_prompt_is_answered_by_a_text_and_a_list_of_texts_and_chats_by_a_list(mdlm):
    short = {"max_new_tokens": 4}
    assert generate(*mdlm, CHAT, **short) == generate(*mdlm, CHAT[0]["content"], **short)
    assert generate(*mdlm, [CHAT], **short) == [generate(*mdlm, CHAT, **short)]
    both = generate(*mdlm, ("What is 1", CHAT), **short)
    assert both == [generate(*mdlm, prompt, **short) for prompt in ("What is 1", CHAT)]
    plain = generate(*mdlm, "Sort", chat_template=False, **short)
    assert len({plain, generate(*mdlm, "Sort", **short), generate(*mdlm, "Sort", system="Count", **short)}) > 1


@pytest.mark.parametrize("name", ["ar", "mdlm", "bd3lm"])
def test_the_steps_begin_with_masks_and_end_with_what_generate_says(name):
    model, tokenizer = load(checkpoint(name))
    first, *between, last = stream(model, tokenizer, "Reverse the word", max_new_tokens=6)
    assert (first.forwards, first.text, {state for _, state in first.tokens}) == (0, "░" * 6, {"masked"})
    assert [step.forwards for step in (*between, last)] == list(range(1, last.forwards + 1))
    assert all("░" in step.text for step in between)
    assert last.text == generate(model, tokenizer, "Reverse the word", max_new_tokens=6)


def test_device_and_dtype_are_names_or_torchs_own():
    for dtype in ("bfloat16", torch.bfloat16):
        model, _ = load(Path(checkpoint("mdlm")), device=torch.device("cpu"), dtype=dtype)
        assert model.head_weight.dtype == torch.bfloat16
    assert load(checkpoint("mdlm"), device="cpu")[0].head_weight.dtype == torch.float64  # as stored


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_without_bfloat16_computes_in_float32_unless_told_otherwise(monkeypatch, tmp_path, able):
    save_model(load(checkpoint("mdlm"))[0], tmp_path, dtype=torch.bfloat16, tokenizer=tokenizer())
    monkeypatch.setattr(cli, "has_bfloat16", lambda: able)
    assert load(tmp_path, device="cpu")[0].head_weight.dtype == (torch.bfloat16 if able else torch.float32)
    assert load(tmp_path, device="cpu", dtype="bfloat16")[0].head_weight.dtype == torch.bfloat16


WRONG = {
    "threshhold=0.9": "generate: unknown option threshhold; did you mean threshold?",
    "max_tokens=8": "generate: unknown option max_tokens; did you mean max_new_tokens?",
    "threshold='0.9'": "--threshold '0.9': expected a number",
    "threshold=3": "--threshold 3: expected a probability between 0 and 1, 0.9 say",
    "steps=True": "--steps True: expected a whole number",
    "steps=None": "--steps None: expected a whole number",
    "system=3": "--system 3: expected a string",
    "chat_template=1": "--chat_template 1: expected True or False",
    "suppress_tokens=['a']": "--suppress_tokens ['a']: expected token ids",
    "remasking='lowest'": "--remasking 'lowest' is unknown; expected low_confidence, random or p2",
    "seed=-1": "--seed -1: expected 0 to 2**63 - 1",
    "batch_size=0": "--batch_size 0: expected at least 1",
    "max_new_tokens=1000": "prompt 1: its 18 tokens and 1000 new ones exceed the model's context of 256; ",
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_a_value_error_of_one_line(option, mdlm):
    with pytest.raises(ValueError) as error:
        generate(*mdlm, "hi", **eval(f"dict({option})"))
    assert str(error.value).startswith(WRONG[option]) and "\n" not in str(error.value)
    if not option.startswith("batch_size"):
        with pytest.raises(ValueError, match=r"^\S"):
            stream(*mdlm, "hi", **eval(f"dict({option})"))  # at the call, before the first step


@pytest.mark.parametrize("prompt", [None, 3, b"hi", [], [3], [[]], [{"role": "x", "content": ""}]], ids=repr)
def test_what_is_no_prompt_is_refused_with_what_is_one(prompt, mdlm):
    with pytest.raises(ValueError, match=r"^prompt .* expected a (text|list of messages)"):
        generate(*mdlm, prompt)


def test_a_checkpoint_a_device_or_a_type_that_is_not_there_is_refused(mdlm):
    for options, words in {
        ("device", "gpu"): "--device gpu is not available here; expected cpu",
        ("device", "meta"): "--device meta is not available here; expected cpu",
        ("dtype", "bf16"): "--dtype 'bf16' is unknown; expected float32, bfloat16",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            load(checkpoint("mdlm"), **dict([options]))
    with pytest.raises(ValueError, match="expected the name of a directory"):
        load("")
    with pytest.raises(ValueError, match="stream: a list of 2; expected one prompt"):
        stream(*mdlm, ["a", "b"])


def test_the_module_gathers_what_is_public():
    assert nanoa2d.__all__ == ["Step", "generate", "load", "stream"]
    code = "import nanoa2d, sys; print(sorted({'datasets', 'matplotlib', 'lm_eval'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

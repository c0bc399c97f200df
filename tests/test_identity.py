"""What a checkpoint is taken for, by all programs alike: what it declares, else what it is known as, else a refusal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from checkpoints import checkpoint, tokenizer
from conftest import GOLDEN, golden_model, tiny
from safetensors.torch import load_file

import chat
import convert
import data
import loaders
import log
import sample
import train
from checkpoint import about, declare, identify, load_config, load_model, save_model
from diffusion import Sampling, denoise
from tokenizer import GENERATION, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BD3LM = "Qwen3-0.6B-diffusion-bd3lm-v0.1"
KNOWN = {
    BD3LM: ("bd3lm", 32, False),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": ("mdlm", None, False),
    "qwen2.5-coder-0.5b-instruct-DIFFUSION-BD3LM-v0.1": ("bd3lm", 32, False),
    "open-dcoder-0.5B": ("mdlm", None, True),
}


def edited(path: Path, name: str = "config.json", **changes) -> Path:
    """A checkpoint with fields of one of its files changed; None: removed."""
    file = path / name
    fields = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({field: value for field, value in fields.items() if value is not None}))
    return path


def published(folder: Path, name: str = BD3LM, **changes) -> Path:
    """As dLLM publishes one: its own architecture, a mask token in the tokenizer's files, and nothing declared."""
    shutil.copytree(checkpoint("undeclared", dtype=torch.float32), folder / name)
    return edited(folder / name, mask_token_id=None, **changes)


def tokens(model, **options) -> list[int]:
    *_, last = denoise(model, [[5, 6, 7]], max_new_tokens=8, steps=8, **options)
    return last.tokens[0].tolist()


def fails(program, *argv) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main([str(word) for word in argv])
    assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Known, plain, and neither


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("where", ["here", "snapshot", "link"])
def test_published_checkpoints_are_known_by_their_names(name, where, tmp_path):
    objective, block, shift = KNOWN[name]
    plain = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"} if "dcoder" in name else {}
    path = published(tmp_path, name, **plain)
    if where == "snapshot":
        path = shutil.copytree(path, tmp_path / f"models--someone--{name}" / "snapshots" / "0a1b")
    elif where == "link":
        (tmp_path / "model").symlink_to(path)
        path = tmp_path / "model"
    config = load_config(path)
    assert identify(config) == (objective, "known by name")
    assert (config.objective, config.block_length, config.right_shift) == (objective, block, shift)
    assert config.mask_token_id == tokenizer().mask_id


def test_python_decodes_a_published_checkpoint_as_what_it_is(tmp_path):
    found, made = load_model(published(tmp_path)), load_model(published(tmp_path / "other", "x"))
    declare(made.config, objective="bd3lm", block_length=32, mask_token_id=tokenizer().mask_id)
    assert tokens(found) == tokens(made)
    plain = load_model(GOLDEN / "models/qwen3")
    assert plain.config.objective == "ar"
    assert tokens(plain) == tokens(golden_model("qwen3", objective="ar"))


def test_flags_come_before_what_is_known_and_not_before_what_is_declared(tmp_path):
    path = published(tmp_path)
    config = declare(load_config(path), objective="bd3lm", block_length=8)
    assert (config.block_length, config.reason) == (8, "known by name")
    config = declare(load_config(path), objective="mdlm")
    assert (config.objective, config.block_length, config.reason) == ("mdlm", None, "by --objective")
    edited(path, objective="bd3lm", block_length=4)
    assert identify(load_config(path)) == ("bd3lm", "declared") and load_config(path).block_length == 4
    with pytest.raises(ValueError, match="contradicts"):
        declare(load_config(path), objective="mdlm")


@pytest.mark.parametrize("kind", ["an unknown name", "a plain architecture with a mask token", "ids alone"])
def test_what_nothing_tells_is_refused_with_the_flags_to_add(kind, tmp_path, capsys):
    path = published(tmp_path, "mine")
    if kind != "an unknown name":
        edited(path, architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    if kind == "ids alone":
        edited(path, mask_token_id=tokenizer().mask_id)
    for program in (sample, chat):
        fails(program, "--model_name_or_path", path, *(["hi"] if program is sample else []))
        said = capsys.readouterr().err
        assert "declares no objective; add --objective mdlm, or bd3lm with --block_size, or ar" in said, said
    ask = ["sh", str(ROOT / "recipes/eval.sh"), "--model_name_or_path", str(path)]
    done = subprocess.run(ask, env={"PYTHON": sys.executable, "PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 2 and "eval.sh: the checkpoint declares no objective; add --method" in done.stderr
    config = declare(load_config(path), objective="mdlm", mask_token_id=tokenizer().mask_id)
    assert config.objective == "mdlm"


def test_the_screen_says_what_was_decided_and_why(tmp_path, capsys):
    path = published(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        sample.main(["hi", "--model_name_or_path", str(path), "--max_new_tokens", "4"])
    assert f"{path}: bd3lm, block length 32 (known by name), context 256\n" in capsys.readouterr().err
    assert about("x", declare(load_config(checkpoint("mdlm.shift")))) == "x: mdlm, right shift (declared), context 256"
    config = declare(load_config(checkpoint("undeclared")))
    assert about("x", config).startswith("x: mdlm (by default, as it declares a mask token and no objective)")
    config = declare(load_config(checkpoint("plain")))
    assert about("x", config) == "x: ar (a plain causal model), context 256"


def test_training_takes_a_plain_model_for_no_ar_model_unless_asked(tmp_path, capsys):
    flags = ("--stage", "sft", "--dataset_args", "builtin/sums", "--output_dir", tmp_path / "out")
    fails(train, "--model_name_or_path", checkpoint("plain"), *flags)
    assert "mdlm needs a mask token and the checkpoint declares none; run convert.py" in capsys.readouterr().err


def test_a_tokenizer_opens_by_name_as_a_model_does(tmp_path, monkeypatch):
    published(tmp_path / "someone")
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path))
    assert Tokenizer(f"someone/{BD3LM}").mask_id == tokenizer().mask_id


# ---------------------------------------------------------------------------------------------------------------------
# There and back


def converted(source, target, *flags) -> str:
    """What convert.py printed."""
    args = convert.Convert.parse(["--model_name_or_path", str(source), "--output_dir", str(target), *flags])
    return "\n".join(f"{what} {value}" for what, value in convert.convert(args).items())


@pytest.mark.parametrize("more", [0, 3])  # tokens beyond the embedding
@pytest.mark.parametrize("tied", [True, False])
def test_back_is_the_source_rows_and_tokens_too(more, tied, tmp_path):
    tokens_file = GOLDEN / "models/llama/tokenizer.json"
    shutil.copytree(GOLDEN / "models/llama", tmp_path / "files")
    core = tokenizers.Tokenizer.from_file(str(tokens_file))
    rows = core.get_vocab_size()
    core.add_tokens([f"<extra {n}>" for n in range(more)])
    core.save(str(tmp_path / "files/tokenizer.json"))
    model = tiny("llama", dtype=torch.float32, vocab_size=rows, tie_word_embeddings=tied, mask_token_id=None)
    save_model(model, tmp_path / "ar", tokenizer=Tokenizer(tmp_path / "files"))
    if more:
        with pytest.raises(ValueError, match=r"embedding \d+ rows; convert\.py makes the embedding larger"):
            Tokenizer(tmp_path / "ar").fit(rows, mask=False)

    said = converted(tmp_path / "ar", tmp_path / "there")
    assert "recommended --right_shift_logits True" in said and f"embedding rows {rows} -> " in said
    there = load_model(tmp_path / "there")
    assert there.config.vocab_size % 64 == 0 and max(Tokenizer(tmp_path / "there").ids) < there.config.vocab_size

    assert "recommended" not in converted(tmp_path / "there", tmp_path / "back", "--to", "ar")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ar", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["objective"] == "ar" and config["vocab_size"] == rows
    assert "mask_token_id" not in config and "source_vocab_size" not in config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "ar" / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())
    assert identify(load_config(tmp_path / "back")) == ("ar", "declared")

    # And there again, where the mask's row is as new as at first.
    assert "set to the scaled mean row" in converted(tmp_path / "back", tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again").head_weight, there.head_weight)


def test_an_absurd_number_of_source_rows_is_refused(tmp_path):
    for rows in (-1, 0, 10**6, "9", [1], True):
        path = edited(published(tmp_path / str(rows)), source_vocab_size=rows)
        with pytest.raises(ValueError, match=r"source_vocab_size .*: expected a number up to 448"):
            converted(path, tmp_path / "out", "--to", "ar")


def test_an_ar_model_has_trained_no_mask_token_whatever_its_files_say(tmp_path):
    path = published(tmp_path, "back", architectures=["Qwen3ForCausalLM"], model_type="qwen3", objective="ar")
    assert "set to the scaled mean row" in converted(path, tmp_path / "out")
    assert "its row kept" in converted(published(tmp_path), tmp_path / "kept")
    assert load_config(tmp_path / "kept").block_length == 32  # as it is known


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_a_mask_token_has_no_other_use(token, tmp_path, capsys):
    fails(convert, "--model_name_or_path", checkpoint("plain"), "--output_dir", tmp_path / "x", "--mask_token", token)
    assert f"the mask token {token} is the tokenizer's end token; name another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    path = published(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edited(path, name, mask_token=token)
    fails(sample, "hi", "--model_name_or_path", path)
    assert "name another with convert.py --mask_token" in capsys.readouterr().err


def test_an_ordinary_word_as_the_mask_is_remarked_on(tmp_path):
    word = tokenizer().core.id_to_token(300)
    assert "it is an ordinary word" in converted(checkpoint("plain"), tmp_path / "out", "--mask_token", word)
    assert "ordinary word" not in converted(checkpoint("plain"), tmp_path / "mask")


def test_random_weights_beyond_the_machines_memory_are_refused(tmp_path, capsys):
    path = edited(published(tmp_path), intermediate_size=2**24, hidden_size=2**14)
    fails(convert, "--model_name_or_path", path, "--output_dir", tmp_path / "out", "--random_init")
    assert "--random_init: the weights take " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Answers: how long, and of which ids


def test_a_checkpoint_says_how_long_answers_it_was_trained_on(tmp_path, monkeypatch):
    model = tiny(vocab_size=448, mask_token_id=tokenizer().mask_id)
    declare(model.config, objective="mdlm").answer_length = 7
    save_model(model, tmp_path / "mdlm", tokenizer=tokenizer())
    assert json.loads((tmp_path / "mdlm" / GENERATION).read_text()) == {"max_new_tokens": 7}
    config = load_config(tmp_path / "mdlm")
    assert (config.answer_length, Sampling.default_length(config)) == (7, 7)
    assert about("x", declare(config)).endswith(", trained on answers of up to 7 tokens")

    # Chat and sample take it where no flag says otherwise.
    for flags, length in (((), 7), (("--max_new_tokens", "9"), 9)):
        args = chat.Chat.parse(["--model_name_or_path", str(tmp_path / "mdlm"), *flags])
        talk = chat.Conversation(args, *chat.open_model(args))
        assert talk.options.max_new_tokens == length
        args = sample.Sample.parse(["hi", "--model_name_or_path", str(tmp_path / "mdlm"), *flags])
        request = sample.Request("hi")
        sample.encode(request, 1, args, talk.model, talk.tokenizer, True)
        assert request.new == length
    talk.obey("/set max_new_tokens none")
    assert talk.options.max_new_tokens == 7

    # A longer one changes no default; another objective's, or a source's, is none; a wrong one is refused.
    assert Sampling.default_length(load_config(edited(tmp_path / "mdlm", GENERATION, max_new_tokens=999))) == 128
    for wrong in (0, -1, "8", [8], True, 1.5, 2**80):
        with pytest.raises(ValueError, match=r"max_new_tokens .*: expected at least 1"):
            load_config(edited(tmp_path / "mdlm", GENERATION, max_new_tokens=wrong))
    plain = shutil.copytree(checkpoint("plain"), tmp_path / "plain")
    converted(edited(plain, GENERATION, max_new_tokens=2048), tmp_path / "out", "--objective", "mdlm")
    assert "max_new_tokens" not in json.loads((tmp_path / "out" / GENERATION).read_text())


def test_training_measures_the_longest_answer():
    needed = ("--model_name_or_path", "--dataset_args", "--output_dir")
    args = train.Settings.parse(["--stage", "sft", *(word for name in needed for word in (name, "x"))])
    masks = [[False, True, True], [False, True, True, True, False], [True, False]]
    rows = data.Rows(masks, masks, data.np.array([0, 3, 7, 10]), data.Counter())

    class Loader:
        pass

    loader = Loader()
    loader.rows = rows
    config = load_config(checkpoint("mdlm"))
    assert loaders.longest_answer(args, config, loader) == 3
    assert loaders.longest_answer(args, load_config(checkpoint("ar")), loader) is None


@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_no_id_that_the_tokenizer_lacks_is_generated(objective):
    args = sample.Sample.parse(["hi", "--model_name_or_path", checkpoint(objective)])
    model, core = sample.open_model(args)
    block = {"block_size": 4} if objective == "mdlm" else {}
    options = {"temperature": 5.0, "max_new_tokens": 64, "steps": 16, **block}
    for more in ({}, {"top_k": 440}, {"top_p": 0.999}):
        *_, last = denoise(model, [[5]] * 4, generator=torch.Generator().manual_seed(1), **options, **more)
        assert last.tokens.max() < core.known_ids < model.config.vocab_size
        assert not (last.tokens == core.mask_id).any()


def test_a_tokenizer_without_special_tokens_trains_where_none_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "curves", lambda *_: None)
    path = published(tmp_path, "x-diffusion-mdlm")
    nothing = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    edited(edited(path, "tokenizer_config.json", **nothing), "special_tokens_map.json", **nothing)
    bare = Tokenizer(path)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, None)
    (tmp_path / "texts.txt").write_text("\n".join(["What is the number of 3, yes?"] * 60))
    flags = ["--model_name_or_path", path, "--overwrite", "--output_dir", tmp_path / "out", "--max_length", 16]
    text = ["--stage", "pt", "--dataset_args", tmp_path / "texts.txt", "--max_steps", 1, "--eval_strategy", "no"]
    fails(train, *flags, *text)
    assert "has no EOS token to put between texts; pass --insert_eos False" in capsys.readouterr().err
    train.main([str(word) for word in (*flags, *text, "--insert_eos", "False", "--drop_tail", "False")])
    for objective in (("bd3lm", "--block_size", 4), ("mdlm",)):
        fails(train, *flags, "--stage", "sft", "--dataset_args", "builtin/sums", "--objective", *objective)
        said = capsys.readouterr().err.splitlines()[-1]
        reason = "learns from EOS where an answer ends, and the tokenizer has none; name an eos_token"
        assert f"{objective[0]} {reason}" in said

"""Training: the curve belongs to data and seed, not to how a batch is cut; what is saved is what was trained."""

import functools
import io
import itertools
import json
import math
import re
import sys
import time
import types
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import tiny
from tqdm import tqdm

import card
import data
import loaders
import log
import parallel
import train
from checkpoint import load_config, load_model, save_model
from diffusion import Batch, ar_example, denoise
from model import Config, LanguageModel, Layout, visible
from tasks import builtin
from tokenizer import Tokenizer

ALONE = train.Ranks(0, 1, torch.device("cpu"))
ROWS = {"train": 60, "validation": 20, "test": 20}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(builtin, "SUMS", ROWS)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> str:
    """A tiny diffusion checkpoint that declares no objective, with a tokenizer of the sums."""
    path = tmp_path_factory.mktemp("source") / "model"
    texts = [message["content"] for row in builtin.sums_rows("validation") for message in row["messages"]]
    tokenizer = Tokenizer.train(texts, vocab_size=300)
    model = tiny(
        vocab_size=320,
        mask_token_id=tokenizer.mask_id,
        initializer_range=0.05,
        dtype=torch.float32,
        max_position_embeddings=1024,
    )
    save_model(model, path, tokenizer=tokenizer)
    return str(path)


SFT = ["--dataset_args", "builtin/sums", "--stage", "sft", "--max_steps", "2", "--per_device_train_batch_size", "8"]


def run(source, output, *flags: str) -> list[dict]:
    """The lines of metrics.jsonl of a short run."""
    train.main(["--model_name_or_path", source, "--output_dir", str(output), *SFT, *flags])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *argv: str) -> str:
    """What a command that must fail says, in one line."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("train.py: ") and said.count("\n") == 1
    return said


def examples_of(micro_batches: list[dict], config, args) -> list:
    options = {"seed": args.seed, "norm_type": args.loss_norm_type}
    return [train.training_example(Batch(**batch), config, args, **options) for batch in micro_batches]


def steps_of(metrics: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k in ("loss", "grad_norm", "learning_rate")}
        for row in metrics
        if "loss" in row
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Laws


@pytest.mark.parametrize("norm_type", ["token", "sequence", "batch"])
@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_accumulation_changes_neither_the_loss_nor_the_weights(source, objective, stage, norm_type):
    flags = [
        "--dataset_args",
        "builtin/sums",
        "--stage",
        stage,
        "--output_dir",
        "unused",
        "--model_name_or_path",
        source,
    ]
    flags += ["--objective", objective, "--loss_norm_type", norm_type, "--max_length", "48"]
    flags += ["--block_size", "4"] if objective == "bd3lm" else []
    results = []
    for micro, accumulation in ((8, 1), (4, 2), (1, 8), (3, 3)):
        args = train.Settings.parse(flags)
        model, tokenizer = train.build_model(args)
        args.check_objective(model.config)
        model.double()
        rows = data.load("builtin/sums", "train", tokenizer, data.Reading(stage="sft", max_length=48))
        collate = loaders.collate_for(args, model.config, tokenizer)
        loader = loaders.Loader(rows, micro_batch_size=micro, accumulation=accumulation, seed=1, collate=collate)
        if (micro, accumulation) == (3, 3):
            loader.global_batch_size = 8  # micro-batches of 3, 3 and 2
        optimizers, losses = train.build_optimizers(model, args), []
        for _, micro_batches in zip(range(3), loader.batches()):
            examples = examples_of(micro_batches, model.config, args)
            denominator = sum(example.denominator for example in examples)
            total, norm = train.gradients(model, lambda on: None, model, examples, denominator, 1.0, ALONE)
            train.update(optimizers, 1e-3, norm)
            losses += [total[0] / denominator, norm]
        results.append((torch.tensor(losses), torch.cat([p.detach().flatten() for p in model.parameters()])))
    for losses, weights in results[1:]:
        torch.testing.assert_close(losses, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(weights, results[0][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_a_chats_padding_is_learnt_by_mdlm_and_to_the_end_of_its_block_by_bd3lm(source, objective, stage):
    flags = ["--model_name_or_path", source, "--output_dir", "unused", "--dataset_args", "", "--stage", stage]
    args, tokenizer = train.Settings.parse(flags), Tokenizer(source)
    config = tiny(objective=objective, block_length=4 if objective == "bd3lm" else None).config
    rows = [{"tokens": np.full(n, 5), "supervised": np.ones(n, bool)} for n in (3, 6)]
    batch = loaders.collate_for(args, config, tokenizer)(rows)
    seen, learnt, T = {("mdlm", "sft"): (6, 6, 6), ("bd3lm", "sft"): (4, 4, 8)}.get((objective, stage), (3, 3, 6))
    assert batch["tokens"].shape == (2, T)
    assert (batch["document"][0] == 0).sum() == seen and batch["supervised"][0].sum() == learnt
    assert (batch["tokens"][0, 3:learnt] == tokenizer.eos_id).all() or objective == "mdlm"


@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_what_is_saved_is_what_was_evaluated(source, tmp_path, objective):
    block = ["--block_size", "4"] if objective == "bd3lm" else []
    metrics = run(source, tmp_path, "--objective", objective, *block, "--per_device_eval_batch_size", "7")
    model, tokenizer = load_model(tmp_path / "checkpoint-final"), Tokenizer(tmp_path / "checkpoint-final")
    assert model.config.objective == objective
    assert model.config.block_length == (4 if block else None)
    rows = data.load("builtin/sums", "validation", tokenizer, data.Reading(stage="sft", max_length=512))
    args = train.Settings.parse(["--model_name_or_path", "unused", "--output_dir", "unused", *SFT])
    collate = loaders.collate_for(args, model.config, tokenizer)
    again, _ = train.evaluate(model, model, rows, collate, batch_size=7, ranks=ALONE)
    assert again == pytest.approx([row["eval_loss"] for row in metrics if "eval_loss" in row][-1], rel=1e-5)


@pytest.mark.parametrize("mask_prompt_loss", [True, False])  # False: the first token is learnt, if anything precedes
def test_the_evaluated_loss_of_ar_is_the_mean_surprise(source, mask_prompt_loss):
    model, tokenizer = load_model(source, dtype=torch.float64), Tokenizer(source)
    model.config.objective, model.config.right_shift = "ar", True
    reading = data.Reading(stage="sft", max_length=512, mask_prompt_loss=mask_prompt_loss)
    rows = data.load("builtin/sums", "validation", tokenizer, reading)
    surprise, tokens = 0.0, 0
    for i in range(len(rows)):
        ids, supervised = torch.from_numpy(rows[i]["tokens"]), torch.from_numpy(rows[i]["supervised"])
        layout = ar_example(Batch(**batch_of(ids, supervised)), norm_type="token").layout
        log_p = model(ids[None], layout)[0].log_softmax(-1)
        surprise -= log_p[:-1].gather(1, ids[1:, None])[supervised[1:]].sum().item()
        tokens += int(supervised[1:].sum())
    collate = functools.partial(loaders.collate, pad_id=tokenizer.pad_id)
    lengths = []

    def recorded(picked):
        lengths.extend(len(row["tokens"]) for row in picked)
        return collate(picked)

    for batch_size in (1, 6):
        value, _ = train.evaluate(model, model, rows, recorded, batch_size=batch_size, ranks=ALONE)
        assert value == pytest.approx(surprise / tokens, rel=1e-9)
        assert lengths == sorted(lengths)  # so that there is little padding
        lengths.clear()


def batch_of(ids, supervised) -> dict:
    T = len(ids)
    zeros = torch.zeros(1, T, dtype=torch.int64)
    position = torch.arange(T)[None]
    return {
        "tokens": ids[None],
        "supervised": supervised[None],
        "document": zeros,
        "position": position,
        "sample": torch.zeros(1, dtype=torch.int64),
    }


def test_the_same_command_gives_the_same_curve_and_weights(source, tmp_path):
    first, second = (run(source, tmp_path / name, "--logging_steps", "1") for name in "ab")
    assert steps_of(first) == steps_of(second)
    a, b = (load_model(tmp_path / name / "checkpoint-final").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_evaluation_does_not_depend_on_how_a_run_trains(source, tmp_path):
    plain = run(source, tmp_path / "a")
    other = run(source, tmp_path / "b", "--noise_type", "count", "--seed", "7", "--level_per", "sequence")
    assert plain[1]["step"] == other[1]["step"] == 0
    assert plain[1]["eval_loss"] == other[1]["eval_loss"]
    assert plain[1]["eval_perplexity"] == pytest.approx(math.exp(plain[1]["eval_loss"]))


def test_an_evaluation_of_the_first_rows_is_as_if_there_were_no_others_and_trains_alike(source, tmp_path, capsys):
    some = run(source, tmp_path / "a", "--eval_rows", "7", "--save_steps", "1")
    assert "; the first 7 of 20 rows to evaluate on" in capsys.readouterr().out
    only = run(source, tmp_path / "b", "--dataset_args", "builtin/sums[validation:7]")
    every, beyond = run(source, tmp_path / "c"), run(source, tmp_path / "d", "--eval_rows", "99")
    bounds = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in (some, only, every, beyond)]
    assert bounds[0] == bounds[1] and bounds[2] == bounds[3] != bounds[0]
    assert [row["loss"] for row in some if "loss" in row] == [row["loss"] for row in every if "loss" in row]

    # It decides no weights: a run may go on with another number.
    flags = ["--eval_rows", "4", "--resume_from_checkpoint", str(tmp_path / "a/checkpoint-1")]
    resumed = run(source, tmp_path / "e", *flags)
    assert [row["loss"] for row in resumed if "loss" in row] == [row["loss"] for row in some if "loss" in row][-1:]


PLAIN_TEXT = ["--stage", "pt", "--dataset_args", "builtin/letters", "--max_length", "32"]


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_a_sample_is_the_models_greedy_answer_and_changes_nothing(
    source, tmp_path, monkeypatch, capsys, objective, stage
):
    monkeypatch.setitem(
        builtin.BUILTIN, "builtin/letters", lambda split: [{"text": f"{n} sheep. " * 9} for n in range(20)]
    )
    monkeypatch.setattr(log, "curves", lambda *_: None)
    flags = ["--objective", objective, *(["--block_size", "4"] if objective == "bd3lm" else [])]
    flags += ["--compute_dtype", "bfloat16", "--logging_steps", "1", *(PLAIN_TEXT if stage == "pt" else [])]
    training, gradients = [], train.gradients

    def watched(engine, sync, model, *rest):
        training.append((model.training, torch.get_rng_state()))
        return gradients(engine, sync, model, *rest)

    monkeypatch.setattr(train, "gradients", watched)
    torch.manual_seed(0)
    without = run(source, tmp_path / "without", *flags)
    torch.manual_seed(0)
    rows = run(source, tmp_path / "with", *flags, "--sample_prompt", "What is <b> + 2?")
    assert steps_of(rows) == steps_of(without) and [now for now, _ in training] == [True] * 4
    assert torch.equal(training[1][1], training[3][1])  # nothing was drawn from the process's generator
    a, b = (load_model(tmp_path / name / "checkpoint-final").state_dict() for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)

    # Every evaluation has one, in the log, on the terminal and on the page; the last is of the weights that are saved.
    samples = [row["sample"] for row in rows if "eval_loss" in row]
    assert len(samples) == 3 and {row["sample_prompt"] for row in rows if "sample" in row} == {"What is <b> + 2?"}
    said, page = capsys.readouterr().out, (tmp_path / "with/curves.html").read_text()
    assert f"step 2: sample What is <b> + 2? -> {samples[-1][:8]}".splitlines()[0] in said.replace("↵", "\n")
    assert "What is &lt;b&gt; + 2?" in page and "<b>" not in page
    assert not (tmp_path / "without/curves.html").exists()
    model, tokenizer = load_model(tmp_path / "with/checkpoint-final"), Tokenizer(tmp_path / "with/checkpoint-final")
    model.compute_dtype, model.known_ids = torch.bfloat16, tokenizer.known_ids
    prompt = tokenizer.encode("What is <b> + 2?")
    if stage == "sft":
        prompt, _ = tokenizer.render([{"role": "user", "content": "What is <b> + 2?"}], reply=True)
    new = min(64, model.config.answer_length or 64)
    how = {"block_size": 32} if objective == "mdlm" else {}
    *_, last = denoise(model, [prompt], max_new_tokens=new, steps=new, end_ids=tuple(tokenizer.end_ids), **how)
    answer = [token for token, hidden in zip(last.tokens[0].tolist(), last.masked[0].tolist()) if not hidden]
    assert samples[-1] == tokenizer.decode(answer[len(prompt) :])


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_the_evaluated_bound_falls(source, tmp_path, objective, optim):
    block = ["--block_size", "4"] if objective == "bd3lm" else []
    metrics = run(
        source,
        tmp_path,
        "--objective",
        objective,
        *block,
        "--optim",
        optim,
        "--max_steps",
        "25",
        "--learning_rate",
        "5e-3",
    )
    bounds = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    assert len(bounds) == 10  # at the start, every tenth of 25 steps rounded up, and at the end
    assert bounds[-1] < 0.75 * bounds[0]


def test_every_parameter_has_one_optimizer(source):
    args = train.Settings.parse(["--model_name_or_path", source, "--output_dir", "unused", *SFT, "--optim", "muon"])
    args.weight_decay = 0.1
    model, _ = train.build_model(args)
    muon, adamw = train.build_optimizers(model, args)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    assert all(".layers." in names[id(p)] and p.ndim == 2 for group in muon.param_groups for p in group["params"])
    decay = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decay["model.embed_tokens.weight"] == 0.1 and decay["model.norm.weight"] == 0


def test_the_learning_rate_rises_then_falls(source):
    args = train.Settings.parse(["--model_name_or_path", "unused", "--output_dir", "unused", "--dataset_args", ""])
    rates = [train.learning_rate(progress, args) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5e-4, 1e-4, 0.5e-4, 0])
    args.lr_scheduler_type = "linear"
    assert train.learning_rate(0.775, args) == pytest.approx(0.25e-4)
    args.lr_scheduler_type = "constant"
    assert train.learning_rate(0.9, args) == 1e-4
    args.warmup_ratio = 0.0
    assert train.learning_rate(0.0, args) == 1e-4


@pytest.mark.parametrize("more", [[], ["--max_minutes", "1000"]])
def test_neither_the_first_step_nor_the_last_is_in_vain(source, tmp_path, more):
    flags = ["--max_steps", "4", "--warmup_ratio", "0.4", "--lr_scheduler_type", "linear", "--learning_rate", "1e-3"]
    rows = run(source, tmp_path, *flags, "--logging_steps", "1", "--eval_strategy", "no", *more)
    assert [row["learning_rate"] for row in rows if "loss" in row] == pytest.approx(
        [1e-3 / 2, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3]
    )


def test_a_gradient_is_clipped_to_its_norm_or_not_at_all(source):
    args = train.Settings.parse(["--model_name_or_path", source, "--output_dir", "unused", *SFT])
    model, tokenizer = train.build_model(args)
    args.check_objective(model.config)
    rows = data.load("builtin/sums", "train", tokenizer, data.Reading(stage="sft", max_length=48))
    loader = loaders.Loader(
        rows, micro_batch_size=8, accumulation=1, seed=1, collate=loaders.collate_for(args, model.config, tokenizer)
    )
    examples = examples_of(next(loader.batches()), model.config, args)
    norms = []
    for most in (0.0, 0.01):
        model.zero_grad()
        before = train.gradients(model, lambda on: None, model, examples, 1, most, ALONE)[1].item()
        norms.append((before, torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()))
    assert norms[0] == pytest.approx((norms[1][0],) * 2, rel=1e-5) and norms[1][1] == pytest.approx(0.01, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Flags

FLAGS = [
    "--objective mdlm --right_shift_logits True",
    "--objective bd3lm --block_size 8 --pad_to 512",
    "--overwrite",
    "--save_dtype bfloat16",
    "--max_length 40 --truncation filter",
    "--max_length 40 --mask_prompt_loss False",
    "--group_by_length False --num_proc 2",
    "--stage pt --dataset_args TEXT --text_field body --insert_eos False --drop_tail False --max_length 32",
    "--loss_weight_type uniform --loss_norm_type sequence",
    "--noise_type count --loss_weight_type count",
    "--noise_type decay --mask_decay 0.3",
    "--objective bd3lm --block_size 2,8 --context causal --ar_weight 0.5 --noise_type all",
    "--level_per sequence --scheduler cosine --time_epsilon 0.1 --time_max 0.9 --at_least_one True",
    "--complementary_masks True",
    "--optim muon --learning_rate 1e-2 --lr_scheduler_type linear --warmup_ratio 0.5 --weight_decay 0.1",
    "--adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-6 --max_grad_norm 0",
    "--gradient_accumulation_steps 2 --seed 3 --compute_dtype bfloat16",
    "--eval_strategy no",
    "--eval_strategy epoch --num_train_epochs 1 --max_steps 9 --per_device_train_batch_size 16",
    "--eval_steps 1 --eval_rows 5 --per_device_eval_batch_size 3 --save_steps 1 --save_total_limit 1 --logging_steps 1",
    "--stop_at_eval_loss 100 --eval_steps 1",
    "--max_minutes 0.00000001",
    "--train_on last --packing True --objective ar",
    "--packing True --objective bd3lm --block_size 16 --max_length 40",
    "--streaming True --packing True --objective bd3lm --block_size 16 --max_length 40",
    "--streaming True --shuffle_buffer 30 --dataloader_num_workers 1",
    "--load_preprocessed_data True --dataset_args PREPROCESSED",
    "--resume_from_checkpoint auto --skip_nonfinite 1",
    "--parallel zero2 --reduce_dtype bfloat16 --checkpoint_activations full",
    "--checkpoint_activations selective",
    "--torch_compile True --sample_prompt 1+2?",
    "--report_to none",
    "--lora --r 4 --lora_alpha 8 --lora_dropout 0.1 --target_modules q_proj,down_proj",
    "--freeze_embeddings True",
    "--config ARGS",
]
REQUIRED = {"--help", "--model_name_or_path", "--output_dir", "--dataset_args", "--stage", "--max_steps"}
ELSEWHERE = {"--push_to_hub"}  # in tests/test_card.py


@pytest.mark.parametrize("flags", FLAGS)
def test_a_run_with(source, tmp_path, flags):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"{i} sheep jump over the fence. " * 9}) + "\n" for i in range(40)))
    if "PREPROCESSED" in flags:
        argv = ["--dataset_args", "builtin/sums", "--stage", "sft", "--model_name_or_path", source, "--show", "0"]
        data.main([*argv, "--output_dir", str(tmp_path / "set")])
    (tmp_path / "args.json").write_text(json.dumps({"max_length": 40, "insert_eos": True, "noise_type": None}))
    named = {"TEXT": text, "PREPROCESSED": tmp_path / "set", "ARGS": tmp_path / "args.json"}
    flags = " ".join(str(named.get(word, word)) for word in flags.split())
    metrics = run(source, tmp_path / "run", *flags.split())
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses and all(map(math.isfinite, losses))
    if "save_dtype" in flags:
        assert load_config(tmp_path / "run/checkpoint-final").dtype == "bfloat16"
    if "stop_at" in flags or "max_minutes" in flags:
        assert metrics[-1]["step"] == 1
        assert (tmp_path / "run/checkpoint-final/model.safetensors").is_file()
    if "eval_strategy epoch" in flags:
        assert [row["step"] for row in metrics if "eval_loss" in row] == [0, 4, 8, 9]
    if "eval_strategy no" in flags:
        assert not any("eval_loss" in row for row in metrics)
    if "save_total_limit" in flags:
        assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
            "checkpoint-1",
            "checkpoint-final",
        ]


def test_every_flag_is_exercised_here():
    exercised = {word for flags in FLAGS for word in flags.split() if word.startswith("--")}
    published = {name for name in train.Settings.parser()._option_string_actions if name.startswith("--")}
    assert published == exercised | REQUIRED | ELSEWHERE


def test_builtin_tiny_starts_from_nothing_and_its_ar_checkpoint_declares_no_mask(tmp_path):
    run("builtin/tiny", tmp_path, "--objective", "ar")
    model, tokenizer = load_model(tmp_path / "checkpoint-final"), Tokenizer(tmp_path / "checkpoint-final")
    assert model.config.model_type == "qwen3" and tokenizer.mask_added
    assert tokenizer.mask_id < model.config.vocab_size and model.config.vocab_size % 64 == 0


def test_the_log_tells_rates_memory_and_the_time_left(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log, "peak_flops", lambda device: 1e9)
    predictions = []
    monkeypatch.setattr(log, "train_flops", lambda config, layout, rows: predictions.append(rows) or 5_000_000)
    flags = ["--max_steps", "6", "--logging_steps", "2", "--eval_strategy", "no", "--gradient_accumulation_steps", "2"]
    rows = [row for row in run(source, tmp_path / "run", *flags) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        seconds = row["tokens"] / row["tokens_per_second"]
        assert 0 < seconds < 60 * row["minutes"]
        assert row["supervised_tokens_per_second"] == pytest.approx(row["supervised_tokens"] / seconds)
        assert row["tokens_per_second_per_process"] == row["tokens_per_second"]  # of one process
        assert row["mfu"] == pytest.approx(4 * 5e6 / seconds / 1e9)  # a line is two steps of two micro-batches
        assert 0.05 < row["peak_memory_gb"] < 1000
    assert [row["minutes_left"] for row in rows] == pytest.approx(
        [2 * rows[0]["minutes"], rows[1]["minutes"] / 2, 0], abs=1e-3
    )
    assert "minutes_left" in capsys.readouterr().out
    assert any(count % 64 for count in predictions)  # not those that fill up an index


@pytest.mark.parametrize("case", ["ar", "mdlm", "bd3lm", "packed", "random"])
def test_the_pairs_that_cost_flops_are_those_that_see_each_other(rng, case):
    B, T = 3, 20
    position = torch.arange(T).repeat(B, 1)
    document = torch.where(position < torch.tensor([[20], [13], [7]]), 0, -1)
    if case == "random":  # any document, block and copy, in any order
        layout = Layout(position, *(torch.randint(low, 4, (B, T), generator=rng) for low in (-2, 0, 0)))
    elif case == "packed":
        layout = Layout.of(position % 8, position // 8, 4).two_stream()
    else:
        K = {"ar": 1, "mdlm": None, "bd3lm": 4}[case]
        layout = Layout.of(position, document, K)
        layout = layout.two_stream() if case == "bd3lm" else layout
    slow = visible(layout.map(lambda field: field[:, :, None]), layout.map(lambda field: field[:, None, :]))
    assert log.visible_pairs(layout) == slow.sum() > 0


def test_a_cap_on_the_time_is_what_the_time_left_and_the_steps_of_the_run_are_told_by(source, tmp_path, capsys):
    """Not the 100,000 steps that the run would have without it: neither in a line nor on the bar of a terminal."""
    rows = run(source, tmp_path, "--max_steps", "100000", "--max_minutes", "0.02", "--logging_steps", "1")
    rows = [row for row in rows if "loss" in row]
    assert all(row["minutes_left"] <= max(0, 0.02 - row["minutes"]) + 1e-4 for row in rows) and rows[0]["minutes_left"]
    out = capsys.readouterr().out
    assert "run    0.02 minutes, at most 100,000 steps of" in out
    told = [(int(step), int(steps)) for step, steps in re.findall(r"^step (\d+)/(\d+) ", out, re.M)]
    assert [step for step, _ in told] == [row["step"] for row in rows] and all(b < 100_000 for _, b in told)
    for (step, steps), row in zip(told, rows):
        assert (steps - step) * row["minutes"] / step == pytest.approx(row["minutes_left"], abs=row["minutes"] / step)

    written = log.Log(tmp_path, tmp_path, [], None, 0, None, silent=False)
    written.bar = tqdm(total=None, file=io.StringIO())
    written.show(3, 12, 0.5, loss=1.0)
    assert (written.bar.total, written.bar.postfix) == (12, "loss 1")
    written.bar.close()
    written.file.close()


def test_a_cap_on_the_time_counts_training_alone_and_spreads_evaluations_and_saves_over_it(
    source, tmp_path, monkeypatch
):
    evaluate, began = train.evaluate, time.perf_counter()

    def slow(*args, **options):
        time.sleep(1.0)  # each evaluation takes longer than the whole training may
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", slow)
    flags = ["--max_steps", "100000", "--max_minutes", "0.015", "--logging_steps", "1", "--warmup_ratio", "0.5"]
    rows = run(source, tmp_path, *flags, "--eval_steps", "0.34", "--save_steps", "0.5", "--sample_prompt", "1 + 2?")
    steps, evaluated = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    assert len(evaluated) == 4 and time.perf_counter() - began > 4  # at the start, after a third, two thirds, the end
    assert 0.3 < evaluated[1]["minutes"] / 0.015 < 0.67 and len(steps) > 5
    assert steps[0]["learning_rate"] < 0.5e-4  # the first evaluation has not used up the warm-up
    longest = max(b["minutes"] - a["minutes"] for a, b in itertools.pairwise(steps))
    assert 0.015 <= steps[-1]["minutes"] <= 0.015 + 2 * longest + 0.002
    assert len([path for path in tmp_path.glob("checkpoint-*") if path.name[11:].isdigit()]) == 1


@pytest.mark.parametrize(
    ("parameters", "dtype", "able", "chosen"),
    [(6e7, None, 1, "bfloat16"), (6e7, None, 0, "float32"), (1e6, None, 1, "float32"), (6e7, "float32", 1, "float32")],
)
def test_a_cpu_computes_large_models_in_bfloat16_where_it_can_and_says_so(monkeypatch, parameters, dtype, able, chosen):
    monkeypatch.setattr(parallel, "has_bfloat16", lambda: bool(able))
    with torch.device("meta"):
        model = LanguageModel(Config(vocab_size=int(parameters) // 128, objective="mdlm"))
    flags = [] if dtype is None else ["--compute_dtype", dtype]
    args = train.Settings.parse(["--model_name_or_path", "x", "--output_dir", "y", *SFT, *flags])
    said = log.describe(args, model, "", 1, train.Ranks(0, 1, torch.device("cpu")))
    assert f"computed in {chosen}\n" in said


def test_what_memory_does_not_hold_is_refused_before_the_kernel_ends_the_run(monkeypatch):
    """A model whose gradients and optimizer, 12 bytes a parameter, are a little more than what is free, or less."""
    with torch.device("meta"):
        model = LanguageModel(Config(vocab_size=int(1e6), objective="mdlm"))
    args = train.Settings.parse(["--model_name_or_path", "x", "--output_dir", "y", *SFT, "--max_length", "8"])
    alone = train.Ranks(0, 1, torch.device("cpu"))
    needed = 12 * model.size + log.memory(args, model, alone)[1]
    for spare, refused in ((-1024, True), (1024, False)):
        meminfo = f"MemFree: 3 kB\nMemAvailable:   {int(needed + spare) // 1024} kB\nBuffers: 1 kB"
        monkeypatch.setattr(log.Path, "read_text", lambda _, text=meminfo: text)
        with pytest.raises(ValueError, match="GB of memory are free; lower") if refused else nullcontext():
            log.check_memory(args, model, alone)


def test_the_memory_told_is_of_what_a_process_holds_and_of_all_that_it_feeds(monkeypatch):
    """Of Qwen3-0.6B on 64 processes, by the formulas of recipes/README.md."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    shape = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = train.LanguageModel(train.Config(**shape))
    P = model.size

    def told(*flags, objective="mdlm", world_size=64) -> tuple[float, float]:
        fixed = ["--model_name_or_path", "x", "--output_dir", "y", *SFT, "--compute_dtype", "bfloat16"]
        args = train.Settings.parse([*fixed, *flags])
        model.config.objective, model.config.block_length = objective, 32
        args.check_objective(model.config)
        said = log.describe(args, model, "", 1, train.Ranks(0, world_size, torch.device("cpu")))
        return tuple(float(number) for number in re.findall(r"([\d.]+) GB", said))

    accumulated = ["--gradient_accumulation_steps", "2", "--parallel"]
    for flags, size in {
        (): 16 * P,
        ("--optim", "muon"): 12 * P,
        ("--parallel", "zero2"): 16 * P / 64 + 2 * P,
        ("--parallel", "zero3"): 16 * P / 64,
        ("--parallel", "hybrid"): 16 * P / 8,
        (*accumulated, "zero3"): 16 * P / 64 + 4 * P,
        (*accumulated, "zero3", "--reduce_dtype", "bfloat16"): 16 * P / 64 + 2 * P,
    }.items():
        assert told(*flags)[0] == pytest.approx(size / 1e9, abs=0.006)
    once = told()[1]
    assert once > 1 and told("--max_length", "256")[1] == pytest.approx(once / 2, abs=0.02)
    for twice in (told(objective="bd3lm"), told("--complementary_masks", "True"), told("--pad_to", "1024")):
        assert twice[1] == pytest.approx(2 * once, abs=0.02)
    for kept in ("selective", "full"):
        assert told("--checkpoint_activations", kept)[1] < once
        once = told("--checkpoint_activations", kept)[1]


def test_rates_are_of_all_processes_over_the_time_that_each_took():
    class Two(train.Ranks):
        def sum(self, *values):
            return [2 * value for value in values]  # the other's are the same

    sums = Counter(loss=6.0, denominator=3, tokens=100, supervised=10, flops=5e9, seconds=2.0)
    told = log.summarize(sums, Two(0, 2, torch.device("cpu")), 1e10)
    assert told["loss"] == 2 and told["tokens"] == 200 and told["supervised_tokens"] == 20
    assert told["tokens_per_second"] == 100 and told["tokens_per_second_per_process"] == 50
    assert told["supervised_tokens_per_second"] == 10 and told["mfu"] == 0.25


def test_packing_tells_the_share_of_useful_tokens_before_and_after(source, tmp_path, capsys):
    packing = ["--packing", "True", "--objective", "bd3lm", "--block_size", "4", "--max_length", "128"]
    run(source, tmp_path / "run", *packing, "--group_by_length", "False")
    said = re.search(r"(\d+)% of each batch is padding, packed (\d+)%", capsys.readouterr().out)
    assert 50 > int(said[1]) > int(said[2]) >= 0


def test_plain_text_is_not_filled_up_to_blocks_nor_told_to_have_padding(source, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} sheep jump. " * 20}) + "\n" for i in range(40))
    )
    text = ["--stage", "pt", "--dataset_args", str(tmp_path / "text.jsonl"), "--max_length", "40"]
    run(source, tmp_path / "run", *text, "--objective", "bd3lm", "--block_size", "16")
    assert "; 0% of each batch is padding" in capsys.readouterr().out


def test_a_part_of_the_run_is_as_many_steps_as_it_says():
    assert [train.every(part, 100) for part in (0.07, 0.14, 0.55, 0.071, 1e-4, 7)] == [7, 14, 55, 8, 1, 7]


def test_weights_and_biases_gets_what_the_metrics_hold(source, tmp_path, monkeypatch):
    class Run:
        logged, finished = [], False

        def log(self, metrics, step):
            self.logged.append({"step": step, **metrics})

        def finish(self):
            Run.finished = True

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run(source, tmp_path, "--report_to", "wandb") == Run.logged
    assert Run.finished


def test_tensorboard_gets_what_the_metrics_hold_and_drops_what_a_resumed_run_does_again(source, tmp_path, monkeypatch):
    class Writer:
        def __init__(self, directory, purge_step):
            self.texts, self.scalars = [], []
            writers.append((directory, purge_step, self))

        def add_text(self, name, value, step):
            self.texts.append((name, value, step))

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    writers, tensorboard = [], types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    flags = ["--report_to", "tensorboard", "--sample_prompt", "1 + 2?", "--save_steps", "1"]
    rows = run(source, tmp_path, *flags)
    directory, purged, writer = writers[0]
    assert (directory, purged, writer.closed) == (tmp_path / "tensorboard", 0, True)
    (settings, *texts), said = writer.texts, ("sample", "sample_prompt")
    assert json.loads(settings[1]) == json.loads((tmp_path / "args.json").read_text())
    named = [(name, value, row["step"]) for row in rows for name, value in row.items() if name != "step"]
    assert texts == [each for each in named if each[0] in said] != []
    assert writer.scalars == [each for each in named if each[0] not in said]
    run(source, tmp_path, *flags, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert writers[1][1] == 2  # the first step after the last numbered checkpoint, which keeps its own figures


def test_a_run_from_another_ones_args_is_that_run_again(source, tmp_path, capsys):
    flags = ["--objective", "bd3lm", "--block_size", "4", "--max_length", "48", "--learning_rate", "3e-5"]
    flags += ["--context", "causal", "--mask_prompt_loss", "False", "--group_by_length", "False"]
    first = run(source, tmp_path / "a", *flags, "--logging_steps", "1")
    train.main(["--config", str(tmp_path / "a/args.json"), "--output_dir", str(tmp_path / "b")])
    second = [json.loads(line) for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    losses = [[row[name] for row in rows for name in ("loss", "eval_loss") if name in row] for rows in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) > 3
    known = [json.loads((tmp_path / name / "args.json").read_text()) for name in "ab"]
    differs = {name for name in known[0] if known[0][name] != known[1][name]}
    assert differs == {"config", "output_dir"}
    said = refused(capsys, "--config", str(tmp_path / "a/args.json"))  # the same directory
    assert "holds a run (checkpoint-" in said
    said = refused(capsys, "--config", str(tmp_path / "a/args.json"), "--stage", "pt", "--output_dir", str(tmp_path))
    assert "is for --stage sft; leave it out of --stage pt" in said


def test_what_a_run_worked_out_by_itself_nobody_gave(tmp_path):
    argv = ["--model_name_or_path", "m", "--dataset_args", "d", "--output_dir", "a", "--objective", "ar"]
    args = train.Settings.parse(argv)
    (tmp_path / "args.json").write_text(json.dumps(asdict(args)))
    again = train.Settings.parse(["--config", str(tmp_path / "args.json")])
    assert asdict(again) == asdict(args) | {"config": again.config} and "noise_type" not in again.given
    assert train.Settings.parse(["--config", again.config, "--noise_type", "count"]).loss_weight_type == "count"
    assert "--objective ar" in card.recipe(args) and "noise" not in card.recipe(args)


@pytest.mark.parametrize(("flags", "recur"), [((), False), (("--pad_to", "512"), True)])
def test_cudnn_may_attend_where_all_rows_have_one_length(source, tmp_path, flags, recur, monkeypatch):
    monkeypatch.setattr(train, "parallelize", None)  # which comes after, and ends it
    with pytest.raises(TypeError):
        run(source, tmp_path / "run", *flags)
    assert torch.backends.cuda.cudnn_sdp_enabled() == recur
    train.use_cudnn(True)


def test_a_run_computes_in_the_dtype_it_is_told(source, tmp_path):
    losses = {
        dtype: [
            row["eval_loss"] for row in run(source, tmp_path / dtype, "--compute_dtype", dtype) if "eval_loss" in row
        ]
        for dtype in ("float32", "bfloat16")
    }
    for exact, rounded in zip(*losses.values(), strict=True):
        assert rounded == pytest.approx(exact, rel=1e-2) and rounded != exact


def test_a_bound_that_is_not_finite_ends_the_run_in_one_line(source, tmp_path, capsys):
    model, tokenizer = load_model(source), Tokenizer(source)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    save_model(model, tmp_path / "damaged", tokenizer=tokenizer)
    said = refused(capsys, "--model_name_or_path", str(tmp_path / "damaged"), "--output_dir", str(tmp_path / "x"), *SFT)
    assert "the evaluated bound is nan" in said


def test_a_run_leaves_its_curves(source, tmp_path):
    run(source, tmp_path, "--logging_steps", "1")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = {
    "--insert_eos False": "--insert_eos is for --stage pt",
    "--stage pt --truncation filter": "--truncation is for --stage sft",
    "--objective ar --noise_type count": "ar has no noise",
    "--objective ar --block_size 4": "only bd3lm has a block length",
    "--objective bd3lm": "pass --block_size",
    "--objective bd3lm --block_size 0": "expected at least 1",
    "--objective bd3lm --block_size 600": "exceeds --max_length 512",
    "--objective bd3lm --block_size 32 --max_length 40 --pad_to 40": "less than the longest row, 64",
    "--max_length 2000": "exceed the model's context of 1024",
    "--noise_type count --loss_weight_type scheduler": "does not go with --noise_type count",
    "--loss_weight_type count": "does not go with --noise_type level",
    "--time_epsilon 0": "expected 0 <",
    "--complementary_masks True --scheduler cosine": "--scheduler linear",
    "--stop_at_eval_loss 1 --eval_strategy no": "needs evaluations",
    "--eval_rows 0": "--eval_rows 0: expected at least 1",
    "--sample_prompt 1+2? --eval_strategy no": "--sample_prompt needs evaluations",
    "--sample_prompt 1+<|mask|>": "--sample_prompt: <|mask|> in it would be filled in; leave it out",
    f"--sample_prompt {'1+2' * 400}": "new ones exceed the model's context of 1024; shorten it",
    "--eval_rows 5 --eval_strategy no": "--eval_rows needs evaluations",
    "--max_steps 0": "--max_steps 0: expected at least 1",
    "--learning_rate -1": "expected more than 0",
    "--warmup_ratio 2": "expected 0 to 1",
    "--max_stpes 3": "did you mean --max_steps?",
    "--dataset_args builtin/sum": "unknown dataset builtin/sum",
    "--dataset_args builtin/sums --stage pt": "no column 'text'",
    "--model_name_or_path ./nowhere": "neither a directory",
    "--eval_steps 0": "expected more than 0",
    "--stage pt --dataset_args builtin/stdlib --packing True": "--packing is for --stage sft",
    "--packing True --objective mdlm": "mdlm learns chat with its padding",
    "--streaming True --load_preprocessed_data True": "contradict each other",
    "--overwrite --resume_from_checkpoint auto": "contradict each other",
    "--load_preprocessed_data --model_name_or_path builtin/tiny": "builtin/tiny makes its own of text",
    "--resume_from_checkpoint ./nowhere": "there is no directory nowhere to resume from; . holds no checkpoint",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_writes_nothing(source, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "run"
    base = ["--model_name_or_path", source, "--output_dir", str(output), *SFT]
    said = refused(capsys, *base, *flags.split())
    assert MISTAKES[flags] in said
    assert not output.exists()


def test_a_run_is_not_overwritten_unless_told(source, tmp_path, capsys):
    run(source, tmp_path, "--save_steps", "1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = refused(capsys, "--model_name_or_path", source, "--output_dir", str(tmp_path), *SFT)
    assert "holds a run" in said and "--overwrite" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # a mistake with --overwrite loses nothing either
    refused(
        capsys, "--model_name_or_path", source, "--output_dir", str(tmp_path), *SFT, "--overwrite", "--max_steps", "0"
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(source, tmp_path, "--overwrite", "--save_steps", "0")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-final"]  # nothing of the old one


def test_an_unconverted_checkpoint_is_sent_to_convert(source, tmp_path, capsys):
    run("builtin/tiny", tmp_path / "ar", "--objective", "ar")
    path = str(tmp_path / "ar/checkpoint-final")
    flags = ["--output_dir", str(tmp_path / "x"), *SFT, "--objective", "mdlm"]
    assert "declare it anew with convert.py" in refused(capsys, "--model_name_or_path", path, *flags)
    config = tmp_path / "ar/checkpoint-final/config.json"  # now as published AR checkpoints are: nothing is declared
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "objective"}))
    assert "run convert.py on it first" in refused(capsys, "--model_name_or_path", path, *flags)
    assert not (tmp_path / "x").exists()


def test_streaming_needs_a_number_of_steps(source, tmp_path, capsys):
    flags = ["--dataset_args", "builtin/sums", "--stage", "sft", "--streaming", "--output_dir", str(tmp_path / "x")]
    assert "pass --max_steps" in refused(capsys, "--model_name_or_path", source, *flags)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("package", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_to_report_to_is_told(source, tmp_path, capsys, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    flags = ["--output_dir", str(tmp_path / "x"), *SFT, "--report_to", package]
    assert f"pip install {package}" in refused(capsys, "--model_name_or_path", source, *flags)


def test_a_declared_objective_is_not_contradicted(source, tmp_path, capsys):
    run(source, tmp_path / "mdlm")
    path = str(tmp_path / "mdlm/checkpoint-final")
    flags = ["--objective", "bd3lm", "--block_size", "4"]
    said = refused(capsys, "--model_name_or_path", path, "--output_dir", str(tmp_path / "x"), *SFT, *flags)
    assert "contradicts the checkpoint, which declares objective mdlm" in said

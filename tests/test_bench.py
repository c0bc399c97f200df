"""bench.py compares ours with plain ways that must do the same; here it is seen that they do, on small shapes."""

import json

import pytest
import torch
from conftest import random_tokens, tiny

import bench
from diffusion import denoise
from likelihood import log_likelihood
from model import LanguageModel


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("steps", [8, 4])
def test_plain_decoding_gives_the_samplers_tokens_step_by_step(objective, steps):
    model = tiny(objective=objective, block_length=4 if objective == "bd3lm" else None)
    prompts = [random_tokens(n, seed=n).tolist() for n in (9, 4, 3)]
    options = {"max_new_tokens": 8, "steps": steps, "block_size": 4, "block_align": "prompt"}
    ours = [step.tokens for step in denoise(model, prompts, **options)][1:]
    plain = [tokens.clone() for tokens in bench.plain_denoise(model, prompts, 8, steps, 4)]
    assert len(ours) == len(plain) == steps
    for a, b in zip(ours, plain, strict=True):
        assert a.tolist() == b.tolist()


def test_two_streams_a_draw_estimate_what_copies_of_cached_blocks_do():
    model = tiny(objective="bd3lm", block_length=4)
    contexts, answers = [random_tokens(6).tolist()] * 2, [random_tokens(5, seed=1).tolist(), [3]]
    exact, error = log_likelihood(model, contexts, answers, draws=64)
    assert error.tolist() == [0, 0]  # all subsets
    nats, error = bench.two_stream_likelihood(model, contexts, answers, draws=300)
    assert nats[1].item() == pytest.approx(exact[1].item()) and error[1] == 0
    assert abs(nats[0] - exact[0]) < 4 * error[0] < 0.1 * abs(exact[0])


def test_a_table_is_printed_and_written(tmp_path, capfd):
    shape = ["--model", "tiny", "--prompt_tokens", "8", "--new_tokens", "4", "--steps", "4", "--block_size", "4"]
    bench.main(["sample", *shape, "--batch", "2", "--output", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["new_tokens"] == 4 and figures["machine"]["torch"] == torch.__version__
    for case in ("mdlm-2", "bd3lm-2"):
        ours, plain = figures["sample"][case]["ours"], figures["sample"][case]["plain"]
        assert ours["equal"] == 1 and len(ours["seconds"]) == 4
        assert ours["flops"] < plain["flops"] and ours["fed"]["rows"] < plain["fed"]["rows"]
    assert "mdlm  x2  ours" in capfd.readouterr().out
    for way, row in figures["sample"]["ar-2"].items():
        assert row["tokens_per_forward"] == 1 if way == "ar" else 1 <= row["tokens_per_forward"] <= 8
        assert row["tokens_per_second"] > 0


def test_one_row_of_the_table_alone_can_be_measured(tmp_path, capfd):
    shape = ["--model", "tiny", "--prompt_tokens", "8", "--new_tokens", "16", "--steps", "16", "--block_size", "4"]
    bench.main(["sample", *shape, "--batch", "1", "--only", "speculation", "--speculate", "2"])
    out = capfd.readouterr().out
    assert "speculation x1, drafts of 2: faster than ar from" in out and "mdlm" not in out


def test_training_steps_are_measured_in_each_dtype_and_agree_with_plain_ones(monkeypatch, capsys):
    monkeypatch.setattr(bench.log, "has_bfloat16", lambda: True)
    monkeypatch.setattr(bench, "matmul_flops", lambda device, dtype: 1e12 if dtype == "float32" else 2e12)
    shape = ["--model", "tiny", "--batch", "2", "--length", "16", "--block_size", "4", "--steps", "2"]
    args = bench.Train.parse(shape)

    def in_this_process(arguments, case, ways, warmup, steps) -> dict:
        found, said = {}, []
        monkeypatch.setattr(bench, "serve", lambda args, step: said.extend(map(step, range(steps))))
        for way in ways:
            said.clear()
            bench.train_case(args, case, way)
            found[way] = {name: [step[name]() for step in said] for name in said[0]}
            found[way] |= {"seconds": [1.0] * steps, "memory": 1}
        return found

    monkeypatch.setattr(bench, "compare", in_this_process)
    table = bench.train(args, shape)["train"]  # which ends where the losses differ
    for objective in ("mdlm", "bd3lm"):
        exact, rounded = (table[f"{objective}-{dtype}"]["ours"] for dtype in ("float32", "bfloat16"))
        assert exact["loss"] == pytest.approx(rounded["loss"], rel=1e-2) and exact["loss"] != rounded["loss"]
        assert exact["mfu"] == 2 * rounded["mfu"] and exact["flops"] == rounded["flops"]
    assert capsys.readouterr().out.count("plain ") == 4


def test_the_shape_of_smollm2_is_that_of_its_parameters():
    with torch.device("meta"):
        model = LanguageModel(bench.MODELS["smollm2-135m"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert bench.Train.parse(["--model", "smollm2-135m"]).batch == 1 and bench.Train.parse([]).batch == 4


def test_curves_of_several_runs_are_drawn(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3, "grad_norm": 1.0} for n in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = tmp_path / "curves.png"
    bench.main(["curves", str(tmp_path / "a"), str(tmp_path / "b"), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "c").mkdir()
    for line, words in {
        (str(tmp_path / "a"), str(tmp_path / "c"), "--picture", str(tmp_path / "no.png")): "c holds no metrics.jsonl",
        (str(tmp_path / "a"), "--picture", str(picture)): "curves.png exists; choose another name",
    }.items():
        drawn = picture.read_bytes()
        with pytest.raises(SystemExit) as stop:
            bench.main(["curves", *line])
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert picture.read_bytes() == drawn and not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --steps 0", "--steps 0: expected at least 1"),
        ("sample --new_tokens 100", "--new_tokens 100: expected a multiple of the block size 32"),
        ("sample --steps 100", "--steps 100: expected to divide 128 tokens"),
        ("sample --batch 1 0", "--batch 0: expected at least 1"),
        ("likelihood --requests 6", "--requests 6: expected a multiple of 4"),
        ("load --path nowhere", "nowhere"),
        ("speed", "invalid choice: 'speed'"),
    ],
)
def test_mistakes_are_told_in_one_line(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(line.split())
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err and captured.out == ""

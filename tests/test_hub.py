"""With a Hub: a2d_ar beside lm-eval's own hf, and recipes/eval.sh run to its end. Minutes long; shown by

    HF_ENDPOINT=https://huggingface.co python -m pytest -m slow -s tests/test_hub.py

Configs, tokenizers and data sets are those of the Hub that $HF_ENDPOINT names; the weights are small and random, so
that the scores mean nothing: what is compared are prompts, log-likelihoods, answers and scores.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("lm_eval", reason="needs lm-eval[math]==0.4.13")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

import convert
import evaluate
from checkpoint import load_config
from model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
HUB = os.environ.get("HF_ENDPOINT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HUB, reason="needs a Hub: set HF_ENDPOINT, the public one is https://huggingface.co"),
]
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "max_window_layers": 2, "head_dim": 32}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}
SMALL |= {"torch_dtype": "float32", "dtype": "float32", "initializer_range": 0.2}  # large: logits differ clearly
LENGTH = "max_gen_toks=16"  # of an answer, at most


def small(repo: str, folder: Path) -> str:
    """A checkpoint of the Hub's config, but for its size, and tokenizer, with random weights; its directory."""
    from huggingface_hub import snapshot_download

    path = folder / repo
    source = snapshot_download(repo, allow_patterns=["*.json", "*.jinja", "*.txt"], ignore_patterns=["*.index.json"])
    shutil.copytree(source, path, copy_function=shutil.copyfile)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {name: SMALL[name] for name in SMALL.keys() & raw.keys()}))
    model, generator = LanguageModel(load_config(path)), torch.Generator().manual_seed(len(repo))
    model.init_weights(generator)
    with torch.no_grad():
        for vector in (parameter for parameter in model.parameters() if parameter.ndim == 1):  # norms and biases
            vector += 0.2 * torch.randn(vector.shape, generator=generator)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# a2d_ar against lm-eval's hf

CELLS = {  # task: shots, whether as a chat, gen_kwargs
    "mmlu_generative_dream": (0, True, None),
    "mmlu_pro": (0, True, LENGTH),
    "hellaswag_gen": (0, True, None),
    "gsm8k_cot": (5, True, LENGTH),
    "bbh": (3, True, LENGTH),
    "minerva_math": (0, True, LENGTH),
    "humaneval_instruct_sandboxed": (0, True, LENGTH),
    "mbpp_instruct_sandboxed": (0, True, LENGTH),
    "hellaswag": (0, False, None),
    "mmlu": (0, False, None),
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(ROOT / "tasks"))


@pytest.mark.parametrize("repo", ["Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"])
def test_ar_is_lm_evals_own_hf_on_every_task(repo, tmp_path, manager, capsys):
    pytest.importorskip("transformers", reason="needs lm-eval[hf], transformers among it")
    hf = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]").HFLM
    path = small(repo, tmp_path)
    if "diffusion" in repo:
        convert.main(["--model_name_or_path", path, "--to", "ar", "--output_dir", str(tmp_path / "ar")])
        path = str(tmp_path / "ar")
    given = {"pretrained": path, "dtype": "float32", "batch_size": 4}
    models = [evaluate.models()["a2d_ar"](**given), hf(**given, device="cpu", enable_thinking=False)]
    lines, seconds = [], [0.0, 0.0]
    for task, (shots, chat, length) in CELLS.items():
        runs = []
        for i, model in enumerate(models):
            began = time.time()
            run = simple_evaluate(
                model,
                tasks=[task],
                num_fewshot=shots,
                limit=8,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                gen_kwargs=length,
                task_manager=manager,
                bootstrap_iters=0,
                confirm_run_unsafe_code=True,
            )
            runs.append(run)
            seconds[i] += time.time() - began
        compared = compare(*(run["samples"] for run in runs))
        scores = [{name: x for name, x in run["results"][task].items() if isinstance(x, float)} for run in runs]
        assert scores[0] == scores[1]
        lines += [f"| {task} | {shots} | {name} | {x:.4f} | {scores[1][name]:.4f} | {compared} |"
                  for name, x in scores[0].items() if "stderr" not in name]  # fmt: skip
    with capsys.disabled():
        print(f"\n\n{repo}: {seconds[0]:.0f} s, hf {seconds[1]:.0f} s")
        print("\n| task | shots | metric | a2d_ar | hf | requests |", "| --- " * 6 + "|", *lines, sep="\n")


def compare(ours: dict[str, list], theirs: dict[str, list]) -> str:
    """Holds samples of the same tasks to each other, request by request; says how many there were and how close."""
    ours, theirs = (
        {(task, sample["doc_id"]): sample for task in run for sample in run[task]} for run in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    requests, worst = 0, None
    for where, one in ours.items():
        other = theirs[where]
        assert one["prompt_hash"] == other["prompt_hash"], where
        for (a,), (b,) in zip(one["resps"], other["resps"], strict=True):
            requests += 1
            if isinstance(a, str):
                assert a == b, where
            else:  # the log-likelihood, and whether it is what greedy decoding gives
                assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1], where
                worst = max(worst or 0.0, abs(a[0] - b[0]))
    return f"{requests} equal answers" if worst is None else f"{requests} within {worst:.1g} nats"


# ---------------------------------------------------------------------------------------------------------------------
# recipes/eval.sh


def row(path: str, output: Path, *argv: str) -> tuple[str, dict[str, dict], dict[str, list]]:
    """Runs the recipe in the reference's setting: 4 questions a task, answers of 16 tokens at most. Its table; the
    manifest and the samples (task, question, answers) of every cell."""
    command = ["sh", ROOT / "recipes" / "eval.sh", "--model_name_or_path", path, "--setting", "reference", *argv]
    command += ["--output_dir", output, "--", "--limit", "4", "--gen_kwargs", LENGTH]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr[-3000:]
    cells = {file.parts[-3]: json.loads(file.read_text()) for file in output.rglob("manifest_*.json")}
    answers = {}
    for file in output.rglob("samples_*.jsonl"):
        found = [json.loads(line) for line in file.read_text().splitlines()]
        name = file.name.removeprefix("samples_").rpartition("_")[0]
        answers[name] = sorted((sample["doc_id"], sample["prompt_hash"], sample["resps"]) for sample in found)
    return done.stdout[done.stdout.index("reference setting") :], cells, answers


@pytest.mark.parametrize("method", ["mdlm", "bd3lm"])
def test_the_recipes_eight_cells_run_to_their_end_and_two_processes_give_what_one_gives(method, tmp_path, capsys):
    path = small(f"dllm-hub/Qwen3-0.6B-diffusion-{method}-v0.1", tmp_path)
    table, cells, answers = row(path, tmp_path / "one")
    tasks = [task for task, (_, chat, _) in CELLS.items() if chat]
    assert sorted(cells) == sorted(tasks)
    for task, made in cells.items():
        assert made["model"] == f"a2d_{method}" and made["requested"] == [task] and f"| {task}<br>" in table
        asked = [
            one["questions"] for one in made["tasks"].values() if one["prompts_sha256"]
        ]  # of a group, each subtask
        assert 0 < min(asked) and max(asked) == 4 and made["generated"]["requests"] == sum(asked)
    _, again, twice = row(path, tmp_path / "two", "--model_type", "coder", "--num_gpu", "2")
    for task in tasks[-2:]:
        assert again[task]["processes"] == 2 and twice[task] == answers[task] and len(twice[task]) == 4
        assert again[task]["tasks"][task]["prompts_sha256"] == cells[task]["tasks"][task]["prompts_sha256"]
        assert again[task]["tasks"][task]["results"] == cells[task]["tasks"][task]["results"]
    tell(capsys, table, cells)


def test_the_coder_cells_run_to_their_end_with_open_dcoders_shift_and_rule(tmp_path, capsys):
    table, cells, _ = row(small("fredzzp/open-dcoder-0.5B", tmp_path), tmp_path / "out", "--model_type", "coder")
    assert sorted(cells) == ["humaneval_instruct_sandboxed", "mbpp_instruct_sandboxed"]
    for made in cells.values():
        assert made["config"]["right_shift"] and made["sampler"]["remasking"] == "p2"
        assert made["generated"]["requests"] == 4
    tell(capsys, table, cells)


def tell(capsys, table: str, cells: dict[str, dict]) -> None:
    with capsys.disabled():
        print(f"\n\n{table}\n| cell | questions | seconds | generating | tokens per forward |\n" + "| --- " * 5 + "|")
        for task, made in cells.items():
            spent, per_forward = made["generated"], made["tokens_per_forward"]
            times = f"{made['seconds']:.0f} | {spent['seconds']:.0f}"
            print(f"| {task} | {spent['requests']} | {times} | {per_forward:.2f} |")

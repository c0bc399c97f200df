"""Recipes: a mistake gets one line, the program's own, and its status."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny

import convert
import sample
import train
from checkpoint import save_model
from recipes import ablation
from tokenizer import Tokenizer
from train import Settings

RECIPES = Path(__file__).parents[1] / "recipes"
TRAINING = sorted(path.stem for path in RECIPES.glob("*.sh") if "common.sh" in path.read_text())


def run(recipe: str, *words: str, cwd="/") -> tuple[int, str, str]:
    environment = os.environ | {"PYTHON": sys.executable, "NPROC": "2", "MODEL": "./nowhere"}
    command = [str(RECIPES / f"{recipe}.sh"), *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_every_recipe_can_be_started():
    assert TRAINING == ["alpaca", "openwebtext", "shakespeare", "tiny-a2d"]
    assert all(os.access(path, os.X_OK) for path in RECIPES.glob("*.sh") if path.stem != "common")


def test_every_command_of_the_quickstart_is_one_that_its_program_takes(tmp_path):
    """A stand-in for Python notes the commands. What chats is trained on conversations, all turns of them."""
    python, noted = tmp_path / "python", tmp_path / "noted"
    python.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$NOTED" && echo >> "$NOTED"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "NOTED": str(noted), "RUNS": str(tmp_path / "runs")}
    subprocess.run([str(RECIPES / "quickstart.sh")], env=environment, capture_output=True, check=True)

    programs = {"train.py": train.Settings, "convert.py": convert.Convert, "sample.py": sample.Sample}
    commands = [line.split("\0")[:-1] for line in noted.read_text().splitlines()]
    parsed = [programs[program].parse(words) for program, *words in commands]
    runs = {Path(args.output_dir).name: args for args in parsed if isinstance(args, train.Settings)}
    assert list(runs) == ["ar-sums", "ar", "mdlm", "bd3lm"]
    for name in ("ar", "mdlm", "bd3lm"):
        assert runs[name].dataset_args.startswith("builtin/chats") and runs[name].train_on == "all"
    scored = Counter(args.dataset_args for args in parsed if isinstance(args, sample.Sample))
    assert scored == {
        "builtin/sums[test:500]": 6,
        "builtin/chats[test:250]": 2,
        "builtin/repeats[test:125]": 3,
        None: 2,
    }


SMOL = (  # the chat template's form: a system turn where there is none
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_real_models_recipe_from_conversion_to_figures(tmp_path):
    """With a model of SmolLM2's form, 9 heads over 3, and alpaca's columns; training is seconds."""
    rows = [
        {"instruction": f"Add {n} and one.", "input": "", "output": f"That is {n + 1}, and one more is {n + 2}."}
        for n in range(80)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"vocab_size": 384, "hidden_size": 72, "intermediate_size": 192, "head_dim": 8, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "num_hidden_layers": 3, "max_position_embeddings": 1024, "rope_scaling": None}
    model = tiny("llama", dtype=torch.float32, mask_token_id=None, **shape)
    core = Tokenizer.train([f"{row['instruction']} {row['output']}" for row in rows], 383, template=SMOL)
    save_model(model, tmp_path / "base", tokenizer=core)

    environment = {"BASE": str(tmp_path / "base"), "DATA": str(tmp_path / "rows.jsonl"), "RUNS": str(tmp_path / "runs")}
    environment |= {"MINUTES": "0.03", "QUESTIONS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    recipe = [str(RECIPES / "smollm2.sh")]
    done = subprocess.run(recipe, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"# \d+ tokens a second: .* in 0.03 minutes of training. .* about (\d+) minutes", done.stdout)
    assert told and 1 <= int(told[1]) < 20
    assert done.stdout.count("What is the capital of France?") >= 5 and "chat.py" in done.stdout
    table = (tmp_path / "runs/figures.md").read_text()
    assert table in done.stdout and "| answers by speculation equal to AR's | 2 of 2 | 2 of 2 |" in table
    before, after = re.search(r"bound, blocks of 8 \| ([\d.]+) \| ([\d.]+) ", table).groups()
    assert float(after) < float(before)

    # Without a Hub, a model that is not there gets one line. Another base does not go on with the first one's run.
    environment |= {"BASE": "nobody/nothing", "RUNS": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(recipe, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nobody/nothing" in done.stderr
    assert "--output_dir runs/smollm2/nothing/a2d" in done.stdout


def test_the_real_models_recipe_tells_of_a_program_that_the_system_killed(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $1 in convert.py) kill -9 $$ ;; esac\n")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "RUNS": str(tmp_path / "runs")}
    done = subprocess.run([RECIPES / "smollm2.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 137 and done.stderr.splitlines()[-1].startswith("smollm2.sh: killed, perhaps")


@pytest.mark.parametrize("recipe", TRAINING)
def test_a_recipe_explains_itself_and_refuses_another_objective_in_one_line(recipe, tmp_path):
    status, out, err = run(recipe, "--help", cwd=tmp_path)
    assert status == 0 and f"recipes/{recipe}.sh mdlm|bd3lm" in out and "train.py --help" in out and not err
    for words in ([], ["mdlmm"]):
        status, out, err = run(recipe, *words, cwd=tmp_path)
        assert status == 2 and "expected mdlm or bd3lm" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("recipe", ["quickstart", "smollm2", "eval"])
def test_the_other_recipes_explain_themselves_and_refuse_other_words_in_one_line(recipe, tmp_path):
    status, out, err = run(recipe, "--help", cwd=tmp_path)
    assert status == 0 and len(out.splitlines()) > 2 and "set -e" not in out and not err
    status, out, err = run(recipe, "--nope", "1", cwd=tmp_path)
    assert status == 2 and err.startswith(f"{recipe}.sh: ") and "--nope" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("words", [["--max_stpes", "3"], ["--max_length", "0"], ["--output_dir", "RUN"]])
def test_a_mistake_in_a_flag_or_a_missing_model_gets_train_pys_line_alone(words, tmp_path):
    words = [str(tmp_path / "run") if word == "RUN" else word for word in words]
    status, _, err = run("alpaca", "bd3lm", *words)
    expected = {"--max_stpes": "did you mean --max_steps?", "--max_length": "expected at least 1"}
    assert status == 2 and err.startswith("train.py: ") and err.count("\n") == 1, err
    assert expected.get(words[0], "neither a directory") in err and not (tmp_path / "run").exists()


def test_what_is_submitted_to_slurm_was_checked_and_has_the_recipes_interpreter(tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$PYTHON" "$@"\n')
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "NPROC")}
    command, options = [str(RECIPES / "tiny-a2d.sh"), "mdlm"], {"capture_output": True, "text": True}
    done = subprocess.run(command, env=environment | {"PATH": path}, **options)
    assert re.match(r"(\.venv/bin/)?python --nodes 8 recipes/train\.slurm\.sh train\.py --objective mdlm ", done.stdout)
    done = subprocess.run([*command, "--max_stpes", "3"], env=environment | {"PATH": path}, **options)
    assert done.returncode == 2 and not done.stdout and "did you mean --max_steps?" in done.stderr


def ablation_flags(folder: Path, *words: str) -> list[str]:
    return ["--steps", "2", "--questions", "4", "--output", f"{folder}/runs", "--table", f"{folder}/t.md", *words]


@pytest.mark.parametrize("which", ["sums", pytest.param("stdlib", marks=pytest.mark.slow)])
def test_the_ablation_writes_what_it_measured_and_does_nothing_twice(which, tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "t.md").write_text(f"before\n{ablation.BEGIN}replaced\n{ablation.END}after\n")
    args = ablation.Ablation.parse(ablation_flags(tmp_path, "--sets", which, "--arms", "base,ar", "--seeds", "1"))
    ablation.ablate(args)
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "replaced" not in text

    # Every number is that of the arm's file, in the column of its name.
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    header, *rows = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in rows] == ["the AR model before", "base", "`--objective ar`"]
    assert header[1:] == [name for name in ablation.COLUMNS if which == "sums" or "exact" not in name]
    for row, name in zip(rows, ("start", "base-1", "ar-1")):
        measured = json.loads((tmp_path / "runs" / f"{which}-{name}.json").read_text())["measured"]
        for column, shown in zip(header[1:], row[1:], strict=True):
            assert shown == (f"{measured[column]:.{ablation.COLUMNS[column]}f}" if column in measured else "—")
    assert "—" not in rows[1]

    # What is there is read, unless it was made otherwise.
    (start,), (base, _) = ablation.plan(args)
    monkeypatch.setattr(ablation.subprocess, "run", lambda *_, **__: pytest.fail("run again"))
    assert ablation.run(base, args.output, 4)["measured"]["AR nats"] > 0
    for job, questions in ((base, 5), (base._replace(before=[]), 4), (start._replace(commands=start.commands[:1]), 4)):
        with pytest.raises(pytest.fail.Exception, match="run again"):
            ablation.run(job, args.output, questions)


def test_an_arm_differs_from_the_base_by_its_flags_alone_and_trains_on_as_many_tokens(tmp_path):
    starts, jobs = ablation.plan(ablation.Ablation.parse(ablation_flags(tmp_path, "--seeds", "2", "--steps", "10")))
    assert len(starts) == 2 and len(jobs) == len({job.name for job in jobs}) == 2 * 2 * len(ablation.ARMS)
    settings = {job.name: asdict(Settings.parse(job.commands[0][1:])) for job in jobs}
    for which in ablation.SETS:
        base, again = settings[f"{which}-base-1"], settings[f"{which}-base-2"]
        assert {name for name in base if again[name] != base[name]} == {"seed", "output_dir"}
        for arm, flags in ablation.ARMS.items():
            ours = settings[f"{which}-{arm}-1"]
            differ = {name for name in ours if ours[name] != base[name]} - {"output_dir", "dataset_args", "max_steps"}
            follows = {"ar": {"model_name_or_path"}, "decay": {"mask_decay"}}  # what those flags bring with them
            assert differ <= {*flags} | follows.get(arm, set()) and bool(differ) == (arm != "base")
            rows = ours["max_steps"] * ours["per_device_train_batch_size"] * (2 if ours["complementary_masks"] else 1)
            assert rows == 10 * ablation.SETS[which][0]


def test_what_chance_may_make_is_marked():
    base = [1.0, 1.1, 1.2]
    assert ablation.cell([1.2, 1.3, 1.4], base, 2) == "1.30 ± 0.10 ≈"  # 0.2 against 2.78 * sqrt(0.02 / 3) = 0.227
    assert ablation.cell([1.3, 1.4, 1.5], base, 2) == "1.40 ± 0.10"
    assert ablation.cell([1.3, 1.4, 1.5], [], 1) == "1.4 ± 0.1" and ablation.cell([1.26], [1.0], 1) == "1.3"
    assert ablation.cell([], base, 2) == "—"


def test_a_mistake_in_a_flag_of_the_ablation_gets_one_line(tmp_path):
    status, out, err = run("ablation", *ablation_flags(tmp_path, "--stpes", "3"))
    assert status == 2 and "did you mean --steps?" in err and err.count("\n") == 1 and not out
    with pytest.raises(ValueError, match="'bsae' is unknown; expected some of base,"):
        ablation.Ablation.parse(["--arms", "base,bsae"])
    with pytest.raises(ValueError, match=r"lacks <!--.* name another file"):
        ablation.ablate(ablation.Ablation.parse(ablation_flags(tmp_path, "--table", str(RECIPES / "README.md"))))
    assert not any(tmp_path.iterdir())

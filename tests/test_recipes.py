"""Recipes: a mistake gets one line, the program's own, and its status."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import convert
import sample
import train

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
        "builtin/chats[test:250]": 3,
        "builtin/repeats[test:125]": 3,
        None: 2,
    }


@pytest.mark.parametrize("recipe", TRAINING)
def test_a_recipe_explains_itself_and_refuses_another_objective_in_one_line(recipe, tmp_path):
    status, out, err = run(recipe, "--help", cwd=tmp_path)
    assert status == 0 and f"recipes/{recipe}.sh mdlm|bd3lm" in out and "train.py --help" in out and not err
    for words in ([], ["mdlmm"]):
        status, out, err = run(recipe, *words, cwd=tmp_path)
        assert status == 2 and "expected mdlm or bd3lm" in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("recipe", ["quickstart", "eval"])
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

"""`--help` is the manual: flags in groups, each with what it means and what it is when it is not given."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # program: the class of its options
    "train": "Settings",
    "sample": "Sample",
    "chat": "Chat",
    "serve": "Serve",
    "convert": "Convert",
    "data": "Prepare",
    "evaluate": "Evaluation",  # of model_args; all else is lm-eval's
}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def options(program: str):
    return getattr(importlib.import_module(program), PROGRAMS[program])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_in_a_group_and_tells_its_meaning_and_its_default(program):
    if program == "evaluate":
        pytest.importorskip("lm_eval")
    parser = options(program).parser()
    manual = parser.format_help()
    groups = [group for group in parser._action_groups if group._group_actions]
    assert [action.dest for group in groups if group.title == "options" for action in group._group_actions] == ["help"]
    for group in (group for group in groups if group.title != "options"):
        assert f"\n{group.title}:\n" in manual
        for action in group._group_actions:
            assert action.help and len(action.help.split()) > 1, action.dest
            assert not action.help.startswith("(default"), action.dest
            assert "default" in action.help or action.required or not action.option_strings, action.dest
            assert action.option_strings == [] or f"--{action.dest}" in manual


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program != "evaluate"])
def test_help_ends_well(program, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(["--help"])
    manual = capsys.readouterr().out
    assert not stop.value.code and manual.startswith(f"usage: {program}.py ")
    assert max(map(len, manual.splitlines())) <= 120


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_changes_neither_the_garbage_collector_nor_signal_handlers(module):
    code = (
        "import gc, importlib, signal, sys\n"
        "numbers = signal.valid_signals()\n"
        "before = gc.isenabled(), gc.get_threshold(), [signal.getsignal(number) for number in numbers]\n"
        "sys.modules['__main__'].__file__ = sys.argv[2]\n"  # as where the module is the program that was started
        "try:\n"
        "    importlib.import_module(sys.argv[1])\n"
        "except ModuleNotFoundError as error:\n"
        "    sys.exit(77 if error.name == 'lm_eval' else str(error))\n"
        "after = gc.isenabled(), gc.get_threshold(), [signal.getsignal(number) for number in numbers]\n"
        "assert before == after, (before, after)\n"
    )
    argv = [sys.executable, "-c", code, module, str(ROOT / f"{module}.py")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("needs lm-eval")
    assert done.returncode == 0, done.stderr


def test_every_module_is_installed_and_the_files_that_it_reads():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tool["py-modules"] == MODULES
    for folder in ("tasks", "page"):
        assert folder in tool["packages"]
        kinds = {f"*{path.suffix}" for path in (ROOT / folder).iterdir() if path.suffix not in (".py", ".pyc", "")}
        assert kinds == set(tool["package-data"][folder])

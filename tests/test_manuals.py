"""`--help` is the manual: flags in groups, each with what it means and what it is when it is not given."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {  # program: the function that makes its parser
    "train": "arguments",
    "sample": "arguments",
    "chat": "arguments",
    "convert": "arguments",
    "data": "arguments",
    "evaluate": "model_options",  # of model_args; all else is lm-eval's
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_in_a_group_and_tells_its_meaning_and_its_default(program):
    if program == "evaluate":
        pytest.importorskip("lm_eval")
    parser = getattr(importlib.import_module(program), PROGRAMS[program])()
    told = parser.format_help()
    groups = [group for group in parser._action_groups if group._group_actions]
    assert [action.dest for group in groups if group.title == "options" for action in group._group_actions] == ["help"]
    for group in (group for group in groups if group.title != "options"):
        assert f"\n{group.title}:\n" in told
        for action in group._group_actions:
            assert action.help and len(action.help.split()) > 1, action.dest
            manual = " ".join(parser._get_formatter()._get_help_string(action).split())
            assert "default" in manual or action.required or not action.option_strings, action.dest
            assert action.option_strings == [] or f"--{action.dest}" in told


@pytest.mark.parametrize("program", [program for program in PROGRAMS if program != "evaluate"])
def test_help_ends_well(program, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(["--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and said.startswith(f"usage: {program}.py ")
    assert max(map(len, said.splitlines())) <= 120


def test_the_garbage_collector_rests_only_until_the_arguments_are_parsed():
    code = (
        "import gc, sys; sys.modules['__main__'].__file__ = sys.argv[1]; import cli; print(gc.isenabled()); "
        "cli.Parser('train.py', '').parse_args([]); print(gc.isenabled())"
    )
    argv = [sys.executable, "-c", code, str(ROOT / "train.py")]
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.split() == ["False", "True"]

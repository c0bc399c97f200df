"""The manual is true: programs take the commands of README.md and docs/, what is marked runs, links lead somewhere.

A comment above a fence, which no reader of the page sees, marks it: <!-- run -->, or <!-- run slow --> for `-m slow`.
<!-- run: train.py --max_steps 2 --> adds these flags to that program's commands, to make them small. The blocks of a
page run in order, in a copy of the project whose quickstart has ended with random weights.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import checkpoint
from test_manuals import PROGRAMS, options

ROOT = Path(__file__).parents[1]
FRONT = ROOT / "README.md"
PAGES = [FRONT, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "ABLATION.md", ROOT / "recipes/README.md"]
QUICKSTART = {"ar": "ar", "mdlm": "mdlm", "bd3lm": "causal"}  # its runs, and the checkpoint that stands in for each

FENCE = re.compile(r"^(?:<!-- run( slow)?(?:: (\S+) ([^\n]+))? -->\n)?```(\w*)\n(.*?)^```$", flags=re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.+\n)(?: {4}.+\n|\n(?= {4}))*")
HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", flags=re.M | re.S)
CONTROL = re.compile(r"[|&;<>()]+")
SPAN = re.compile(r"`((?:python|torchrun|sbatch|recipes/\w+\.sh|make|pytest) [^`]+)`")
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then echo bd3lm 32; else printf "%s\\0" "$@" >> "$NOTED" && echo >> "$NOTED"; fi
"""


class Block(NamedTuple):
    kind: str  # sh, console, python, text, ...
    text: str
    runs: bool
    slow: bool
    program: str  # gets
    flags: str  # these besides


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for fence in FENCE.finditer(text):
        slow, program, flags, kind, inside = fence.groups(default="")
        found.append(Block(kind, inside, fence[0].startswith("<!--"), bool(slow), program, flags))
    return found


def prose(text: str) -> str:
    return INDENTED.sub("\n", FENCE.sub("\n", text))


def simple(line: str) -> list[list[str]]:
    """The simple commands of a line of shell, each without what the environment gets before it."""
    lexer, found = shlex.shlex(line, posix=True, punctuation_chars=True), [[]]
    lexer.whitespace_split = True
    for word in lexer:
        if CONTROL.fullmatch(word):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words]


def shell(kind: str, text: str) -> str:
    """What a block gives to the shell, a command a line: all of it, or what stands after a $."""
    joined = text if "<<'" in text else text.replace("\\\n", " ")
    return joined if kind == "sh" else "\n".join(re.findall(r"^\$ (.*)", joined, flags=re.M))


def commands(text: str) -> list[list[str]]:
    """All simple commands of a page: of its sh blocks, after the $ of others, and those of ours in its prose."""
    lines = [shell(block.kind, HEREDOC.sub(r"<<\1", block.text)) for block in blocks(text)]
    found = [words for line in "\n".join(lines).splitlines() for words in simple(line)]

    outside = FENCE.sub("\n", text)
    indented = "".join(INDENTED.findall(outside)).replace("\\\n", " ")
    spans = re.findall(r"^    (?:\$ )?(\S*(?:python|sample\.py|torchrun) .*)", indented, flags=re.M)
    spans += SPAN.findall(INDENTED.sub("\n", outside))
    ours = (span.replace("\n", " ") for span in spans if "scripts/" not in span)  # a folder of dLLM's
    return found + [words for span in ours for words in simple(span)]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def complete(program: str, words: list[str]) -> list[str]:
    """Without the dots that stand for what the reader knows; then what is required and was left to them is given."""
    filled = [word for i, word in enumerate(words) if word != "…" or words[i - 1].startswith("--")]
    if "…" in words:
        required = [action.option_strings[-1] for action in options(program).parser()._actions if action.required]
        filled += [word for flag in required if flag not in words for word in (flag, "X")]
    return filled


def check_program(name: str, words: list[str], monkeypatch) -> None:
    """ValueError if the program of this name refuses the command line."""
    if name == "bench":
        tables = importlib.import_module("bench").TABLES
        if words[0] not in tables:
            raise ValueError(f"bench.py {words[0]}: expected one of {', '.join(tables)}")
        tables[words[0]][0].parse(words[1:])
    elif name == "evaluate" and words[0] != "--table":
        pytest.importorskip("lm_eval")
        evaluate = importlib.import_module("evaluate")
        monkeypatch.setattr(sys, "argv", [])
        words = [word for i, word in enumerate(words) if word != "…" or words[i - 1].startswith("--")]
        _, args = evaluate.read_command_line([word.replace("…", "pretrained=X") for word in words])
        if args.model in evaluate.models():
            evaluate.parse_model_args(dict(args.model_args))
        else:
            importlib.import_module("lm_eval.api.registry").get_model(args.model)  # ValueError where there is none
    elif name != "evaluate":
        options(name).parse(complete(name, words))


def check_recipe(words: list[str], folder: Path, monkeypatch) -> None:
    """ValueError if a recipe refuses its words, or one of the programs those that the recipe gives it."""
    python, noted = folder / "python", folder / "noted"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    noted.write_text("")
    environment = os.environ | {"PYTHON": str(python), "NOTED": str(noted), "RUNS": str(folder / "runs")}
    done = subprocess.run([ROOT / words[0], *words[1:]], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    for line in noted.read_text().splitlines():
        check(line.split("\0")[:-1], folder, monkeypatch)


def check(words: list[str], folder: Path, monkeypatch) -> None:
    """ValueError if that is no command that works on a fresh clone, as far as its words tell."""
    names = {f"{name}.py": name for name in [*PROGRAMS, "bench"]}
    head = words[0].removeprefix(".venv/bin/")
    place = next((i for i, word in enumerate(words) if word in names), None)
    if place is not None:
        if head == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(words[1 : place + 1])
        elif head == "sbatch" and not (ROOT / words[place - 1]).is_file():
            raise ValueError(f"{words[place - 1]} is not there")
        elif head not in ("python", "sbatch", "recipes/launch.py", *names):
            raise ValueError(f"{head} does not start a program")
        check_program(names[words[place]], words[place + 1 :], monkeypatch)
    elif re.fullmatch(r"recipes/\w+\.sh", head) and "…" not in words:
        check_recipe(words, folder, monkeypatch)
    elif head == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
        if not {*words[1:]} <= {*targets}:
            raise ValueError(f"make {words[1:]}: expected some of {targets}")
    elif head == "pytest" or words[:3] == ["python", "-m", "pytest"] or (head == "python" and "/" in words[1]):
        missing = [word for word in words[1:] if word.endswith(".py") and not (ROOT / word).is_file()]
        if missing:
            raise ValueError(f"{missing} is not there")
    elif words[:2] == ["python", "-m"]:
        if not (ROOT / f"{words[2].replace('.', '/')}.py").is_file():
            raise ValueError(f"{words[2]} is not a module of ours")
    elif head not in ("git", "cd", ".", "pip", "curl", "echo", "head", "EOF") and words != ["python", "-"]:
        raise ValueError(f"{head}: is that a command? Then name it here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one_that_its_program_takes(page, tmp_path, monkeypatch):
    for words in commands(page.read_text()):
        try:
            check(words, tmp_path, monkeypatch)
        except (ValueError, SystemExit) as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npython train.py --dataset_args X --output_dir Y --model_name_or_path Z --max_stpes 2\n```",
        "```sh\ntorchrun --processes 8 train.py --objective mdlm …\n```",
        "```console\n$ python sample.py --model_name_or_path X --thresh 0.9\n```",
        "```sh\npython evaluate.py --model a2d_mdlm --tasks sums --model_args pretrained=X,stepz=8\n```",
        "```sh\npython bench.py sampel\n```",
        "```sh\nmake quikstart\n```",
        "```sh\nrecipes/eval.sh --model X\n```",
        "```sh\npython trane.py\n```",
        "a\n\n    python convert.py --model_name_or_path X \\\n        --ouptut_dir Y\n",
        "by `python convert.py --to X …` it",
    ],
)
def test_a_command_that_does_not_work_is_found(text, tmp_path, monkeypatch):
    (words,) = commands(text)
    with pytest.raises((ValueError, SystemExit)):
        check(words, tmp_path, monkeypatch)


def test_every_program_is_on_the_front_page():
    shown = {word for words in commands(FRONT.read_text()) for word in words}
    assert {f"{program}.py" for program in [*PROGRAMS, "bench"]} <= shown


# ---------------------------------------------------------------------------------------------------------------------
# Links


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)", prose(text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """The links of a page to files and headings that are not there."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text() if path else text)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_every_link_leads_somewhere(page):
    assert not broken(page, page.read_text())


def test_a_link_that_leads_nowhere_is_found():
    text = "# One, two\n[a](#one-two) [b](#two) [c](LICENSE) [d](LICENCE) ![e](assets/no.png) [f](docs/words.md#no)\n"
    assert broken(FRONT, text) == ["#two", "LICENCE", "assets/no.png", "docs/words.md#no"]


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def runnable(slow: bool) -> list:
    """The pages with blocks to run. Of a page with slow ones only `-m slow` runs all, and then in order."""
    return [page for page in PAGES if any(block.runs and block.slow >= slow for block in blocks(page.read_text()))]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def run_blocks(wanted: list[Block], project: Path) -> None:
    """Runs blocks in order, as printed but for marked flags and the port; AssertionError for a status other than 0.

    A block that serves goes on until the last one has ended."""
    port, home = free_port(), project.parent
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": search, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    how = {"cwd": project, "env": environment, "text": True, "stdin": subprocess.DEVNULL, "start_new_session": True}
    with contextlib.ExitStack() as serving:
        for block in wanted:
            code = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            if block.kind == "python":
                words = [sys.executable, "-c", code]
            else:
                code = shell(block.kind, code)
                more = {block.program: block.flags, "serve.py": f"--port {port}"}
                for program, flags in more.items():
                    if program:
                        code = re.sub(rf"(?<=python {re.escape(program)}) ", f" {flags} ", code)
                words = ["bash", "-euc", code]
            if "python serve.py" not in code:
                done = subprocess.run(words, **how | {"start_new_session": False}, capture_output=True)
                assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
                continue
            server = subprocess.Popen(words, **how, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            serving.callback(server.wait)
            serving.callback(os.killpg, server.pid, signal.SIGTERM)
            wait_for(port, server)


def wait_for(port: int, server: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise AssertionError(f"serve.py ended with {server.poll()} or does not listen")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project, without tests; where its quickstart left checkpoints there are small random ones."""
    unwanted = shutil.ignore_patterns(".*", "runs", "tests", "assets", "*.md", "*.egg-info", "build")
    copy = Path(shutil.copytree(ROOT, tmp_path / "project", ignore=unwanted))
    for run, name in QUICKSTART.items():
        (copy / "runs/quickstart" / run).mkdir(parents=True)
        (copy / "runs/quickstart" / run / "checkpoint-final").symlink_to(checkpoint(name))
    return copy


def test_a_block_that_fails_is_found(project):
    marked = "<!-- run: data.py --max_length 0 -->\n```sh\npython data.py --dataset_args X --model_name_or_path Y\n```"
    for text, told in ((marked, "expected at least 1"), ("<!-- run -->\n```python\n1 / 0\n```", "ZeroDivisionError")):
        with pytest.raises(AssertionError, match=told):
            run_blocks(blocks(text), project)


@pytest.mark.parametrize("page", runnable(slow=False), ids=lambda page: page.stem)
def test_the_quick_blocks_run(page, project):
    run_blocks([block for block in blocks(page.read_text()) if block.runs and not block.slow], project)


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable(slow=True), ids=lambda page: page.stem)
def test_all_blocks_run(page, project):
    pytest.importorskip("lm_eval")
    run_blocks([block for block in blocks(page.read_text()) if block.runs], project)

"""What matters when an AR model becomes a BD3LM: one factor at a time from a base, at equal tokens, over several seeds.

    SETS, BASE, ARMS    what is trained on, and the flags of train.py by which the arms differ
    plan                the commands of every arm, as anybody could type them
    measure             what is measured of a checkpoint
    run                 an arm: its commands, its measurement, and the file that keeps both
    report              the part of ABLATION.md between the marks

recipes/ablation.sh starts it, with one thread a process.
"""

import argparse
import json
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch

from bench import machine
from cli import one_line_errors
from files import read_json, replacing_file
from options import Count, Directory, Options
from recipes.measure import Measured, tokens_a_forward
from train import TINY, Settings

SETS = {  # name: rows of a step, flags; {rows} is how many a training takes, so that no more are read
    "sums": (32, "--stage sft --dataset_args builtin/sums[train:{rows}] --max_length 64 --group_by_length False"),
    "stdlib": (6, "--stage pt --dataset_args builtin/stdlib[train:120,validation:3,test:6] --max_length 128"),
}
EVERY = "--optim muon --adam_beta2 0.95 --eval_strategy no --save_steps 0 --logging_steps 50 --overwrite"
START = 5  # times as many steps as an arm has the AR model before it

BASE = {"objective": "bd3lm", "block_size": "8", "context": "causal", "ar_weight": "0.3", "right_shift_logits": "True"}
BASE |= {"noise_type": "level", "loss_weight_type": "uniform"}
ARMS = {  # name: which of the base's flags differ; None: without it
    "base": {},
    "block": {"context": "block", "ar_weight": None},  # its clean tokens see ahead: there is no AR loss to add
    "ar0": {"ar_weight": "0"},
    "ar0.5": {"ar_weight": "0.5"},
    "count": {"noise_type": "count"},
    "all": {"noise_type": "all"},
    "decay": {"noise_type": "decay"},
    "growing": {"block_size": "1,2,4,8"},
    "unshifted": {"right_shift_logits": "False"},
    "complementary": {"complementary_masks": "True"},  # a step has every row twice: half the steps
    "ar": {"objective": "ar"} | dict.fromkeys(BASE.keys() - {"objective"}),  # the AR model, trained on
}

COLUMNS = {"AR nats": 4, "bound, blocks of 4": 4, "bound, blocks of 8": 4}  # what is measured: digits shown
COLUMNS |= {f"exact %, {how}": 1 for how in ("as AR", "a token a forward", "threshold 0.9")}
COLUMNS |= {f"tokens a forward, {how}": 2 for how in ("speculation", "threshold 0.9")}
T95 = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31}  # Student's t for two means of n seeds each, 95 %; of more it is about 2
BEGIN, END = "<!-- from here on written by recipes/ablation.sh -->\n", "<!-- up to here -->\n"


def names(known):
    """A reader of some of the names, separated by commas."""

    def read(text: str) -> tuple[str, ...]:
        for name in (found := text.split(",")):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; expected some of {','.join(known)}")
        return tuple(dict.fromkeys(found))

    return read


@dataclass(kw_only=True)
class Ablation(Options):
    """Trains and measures the arms of the ablation, and writes the tables. Finished arms are not run again, unless
    their commands differ now."""

    prog: ClassVar[str] = "ablation.py"
    sets: Annotated[tuple[str, ...], names(SETS), "SET,SET"] = tuple(SETS)  # of sums, stdlib (default: both)
    arms: Annotated[tuple[str, ...], names(ARMS), "ARM,ARM,..."] = tuple(ARMS)
    """of base (which the others are compared with), block, ar0, ... (default: all)"""
    seeds: Count = 3  # trainings of an arm, with --seed 1, 2, ...
    steps: Count = 160  # of an arm; the AR model before it takes five times as many
    questions: Count = 250  # of builtin/sums' test split; of builtin/stdlib's at most 32 texts to go on with
    jobs: Count = 2  # arms at a time
    output: Directory = "runs/ablation"  # gets a directory, a log and a .json for each arm
    table: Annotated[str, "FILE.md"] = "ABLATION.md"  # the tables go between its marks; what is outside stays


class Job(NamedTuple):
    """Commands, the checkpoint to measure after them, and the commands that it rests on."""

    name: str
    commands: list[list[str]]
    checkpoint: str
    before: list[list[str]]


def plan(args: Ablation) -> tuple[list[Job], list[Job]]:
    """The AR model of each data set, and all arms, the first seed of each before the next."""

    def train(which: str, name: str, source: str, steps: int, **own) -> list[str]:
        rows, flags = SETS[which]
        own |= {"max_steps": steps, "per_device_train_batch_size": rows, "output_dir": f"{args.output}/{name}"}
        words = [word for flag, value in own.items() if value is not None for word in (f"--{flag}", str(value))]
        fixed = f"{flags} {EVERY}".format(rows=rows * steps).split()
        return ["train.py", "--model_name_or_path", source, *words, *fixed]

    starts, jobs = {}, []
    for which in args.sets:
        name, final = f"{which}-start", f"{args.output}/{which}-start/checkpoint-final"
        first = train(which, name, TINY, START * args.steps, objective="ar", learning_rate="2e-2")
        converted = ["--output_dir", f"{args.output}/{which}-a2d", "--overwrite"]
        starts[which] = Job(name, [first, ["convert.py", "--model_name_or_path", final, *converted]], final, [])
    for seed in range(1, args.seeds + 1):
        for arm in args.arms:
            for which, start in starts.items():
                name, flags = f"{which}-{arm}-{seed}", BASE | ARMS[arm] | {"learning_rate": "7e-3", "seed": seed}
                source = start.checkpoint if flags["objective"] == "ar" else f"{args.output}/{which}-a2d"
                steps = max(1, args.steps // (2 if "complementary_masks" in flags else 1))
                commands = [train(which, name, source, steps, **flags)]
                jobs.append(Job(name, commands, f"{args.output}/{name}/checkpoint-final", start.commands))
    return list(starts.values()), jobs


# ---------------------------------------------------------------------------------------------------------------------
# An arm


def measure(settings: Settings, path: str, questions: int) -> dict[str, float]:
    """Of COLUMNS those that the checkpoint at `path` has. In float64, so that rounding decides no token."""
    of, chat = Measured(path, settings, torch.float64), settings.stage == "sft"
    config, validation = of.config, of.rows("validation")

    # What to answer: questions; or what to go on with, the first quarter of pieces from all over the test files.
    if chat:
        chats = of.chats(f"builtin/sums[test:{questions}]")
        prompts, new = of.questions(chats), 8
    else:
        pieces, n = of.rows("test"), min(questions, 32)
        prompts, new = [pieces[i * len(pieces) // n]["tokens"][:32].tolist() for i in range(n)], 64

    def decode(how: str, declared, **options) -> tuple[dict[str, float], list[str]]:
        """The columns of that name, and the texts."""
        answers = of.answers(prompts, declared, max_new_tokens=new, **options)
        texts, columns = [answer.text for answer in answers], {f"tokens a forward, {how}": tokens_a_forward(answers)}
        if chat:
            right = sum(text.strip() == turns[-1]["content"] for text, turns in zip(texts, chats))
            columns[f"exact %, {how}"] = 100 * right / len(chats)
        return {name: value for name, value in columns.items() if name in COLUMNS}, texts

    found, texts = decode("as AR", of.as_ar)
    found["AR nats"] = of.nats(validation, of.as_ar)
    if config.objective == "ar":
        return found
    for K in (4, 8):
        found[f"bound, blocks of {K}"] = of.nats(validation, replace(config, block_length=K))
    found |= decode("threshold 0.9", config, threshold=0.9)[0]
    if chat:
        found |= decode("a token a forward", config, steps=new)[0]
    if config.context == "causal":
        columns, drafted = decode("speculation", config, speculate=8)
        assert drafted == texts, f"{path}: what speculation wrote is not what ar writes"
        found |= columns
    return found


def run(job: Job, output: str, questions: int) -> dict:
    """What is known of a job: what an earlier call kept of it, if by the same commands, else after running them."""
    file, asked = Path(output, f"{job.name}.json"), {"commands": job.before + job.commands, "questions": questions}
    if file.is_file() and asked.items() <= (known := read_json(file, "delete it")).items():
        return known
    began = time.perf_counter()
    with file.with_suffix(".log").open("w") as log:
        for command in job.commands:
            if subprocess.run([sys.executable, *command], stdout=log, stderr=log).returncode:
                raise ValueError(f"{job.name}: {command[0]} failed; {log.name} ends with the reason")
    measured = measure(Settings.parse(job.commands[0][1:]), job.checkpoint, questions)
    known = asked | {"measured": measured, "seconds": time.perf_counter() - began, "machine": machine("cpu")}
    with replacing_file(file) as draft:
        draft.write_text(json.dumps(known, indent=1) + "\n")
    return known


# ---------------------------------------------------------------------------------------------------------------------
# The report


def cell(values: list[float], base: list[float], digits: int) -> str:
    """Mean ± standard deviation over the seeds; ≈ where the mean differs from the base's by no more than chance may."""
    if not values:
        return "—"
    n, mean = len(values), statistics.mean(values)
    if n == 1:
        return f"{mean:.{digits}f}"
    text = f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"
    if len(base) != n:
        return text
    error = ((statistics.variance(values) + statistics.variance(base)) / n) ** 0.5
    return text + " ≈" * (abs(mean - statistics.mean(base)) <= T95.get(n, 2.0) * error)


def table(args: Ablation, which: str, known: dict[str, dict]) -> list[str]:
    """The lines of a data set's table: the AR model before, then a row for each arm, by the flags that differ."""
    rows = {"start": [known[f"{which}-start"]["measured"]]}
    rows |= {arm: [known[f"{which}-{arm}-{s}"]["measured"] for s in range(1, args.seeds + 1)] for arm in args.arms}
    columns = [name for name in COLUMNS if any(name in found[0] for found in rows.values())]
    lines = [f"| {' | '.join(['', *columns])} |", "| --- " * (len(columns) + 1) + "|"]
    for arm, found in rows.items():
        flags = " ".join(f"--{flag} {value}" for flag, value in ARMS.get(arm, {}).items() if value is not None)
        shown = [f"`{flags}`" if flags else {"start": "the AR model before"}.get(arm, arm)]
        base = [] if arm == "base" else rows.get("base", [])
        for name in columns:
            values, others = ([one[name] for one in ones if name in one] for ones in (found, base))
            shown.append(cell(values, others, COLUMNS[name]))
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def report(args: Ablation, jobs: list[Job], known: dict[str, dict]) -> str:
    """Tables, what made them, and the commands, in Markdown. jobs: those whose commands are shown."""
    lines = []
    for which in args.sets:
        lines += [f"### builtin/{which}", "", *table(args, which, known), ""]

    # On what, in what time, and by which commands; those of the other arms have the flags of their rows besides.
    made = {tuple(one["machine"][name] for name in ("commit", "cpu", "cores", "torch")) for one in known.values()}
    lines += ["Commit {}, {}, {} cores, torch {}.".format(*one) for one in sorted(made, key=str)]
    minutes = sum(one["seconds"] for one in known.values()) / 60
    lines += [
        f"{len(known)} trainings and their measurements took {minutes:.0f} minutes of one thread each, in all.",
        "",
    ]
    lines += [f"    python {shlex.join(command)}" for job in jobs for command in job.commands]
    return "\n".join([*lines, ""])


def ablate(args: Ablation) -> None:
    # The place of the tables is looked for before the work.
    path = Path(args.table)
    head, begin, rest = (path.read_text() if path.is_file() else BEGIN + END).partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"--table {path} lacks {BEGIN.strip()} or {END.strip()}; put them in, or name another file")
    Path(args.output).mkdir(parents=True, exist_ok=True)

    # First the AR models, then the arms that begin with them.
    starts, jobs = plan(args)
    known = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for stage in (starts, jobs):
                running, seconds = {pool.submit(run, job, args.output, args.questions): job.name for job in stage}, []
                for done, future in enumerate(as_completed(running), 1):
                    one = known[running[future]] = future.result()
                    seconds.append(one["seconds"])
                    left = statistics.mean(seconds) * (len(stage) - done) / args.jobs / 60
                    took = f"{running[future]}: {seconds[-1]:.0f} s"
                    print(f"[{done}/{len(stage)}] {took}, {left:.0f} minutes left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all others would still run
            raise
    with replacing_file(path) as draft:
        draft.write_text(head + begin + report(args, [*starts, *jobs[: len(starts)]], known) + end + tail)
    print(f"wrote {path}")


if __name__ == "__main__":
    with one_line_errors("ablation.py"):
        ablate(Ablation.parse())

"""Kills training runs at random moments, resumes them, and compares how they end with a run that was left alone.

    python tests/torn_runs.py [--kills 30] [--seed 0]

On one process: SIGKILL in a step, in a save, in an evaluation, in the first second; the resumed run's curve and final
weights must equal the uninterrupted run's to the bit. Then on 4, 2 and 1 processes in turn, to 1e-9 in float64, killed
all at once or one of them. After each kill every checkpoint that claims to be whole is loaded.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import launch  # first: it finds the rest
import test_parallel as runs
import torch

import checkpoint
import resume
import train

# What begins lasts about so many seconds.
SECONDS = {"start": 3.0, "step": 0.1, "save": 0.15, "evaluation": 0.1, "final": 0.1}
MORE = ["--save_steps", "2", "--eval_steps", "3"]


def kill(process: subprocess.Popen, events: Path, when: str, count: int, delay: float, one: bool) -> bool:
    """Kills, `delay` after the count-th event, all processes or (one) a single rank; False: it ended before that."""
    if when == "first second":
        time.sleep(delay)
    else:
        while True:
            lines = [line.split() for line in events.read_text().splitlines()] if events.exists() else []
            if sum(event == when for event, _ in lines) >= count:
                break
            if process.poll() is not None:
                return False
            time.sleep(0.002)
        time.sleep(delay)
    if process.poll() is not None:
        return False
    ranks = sorted({int(line.split()[1]) for line in events.read_text().splitlines()} if events.exists() else set())
    victims = [random.choice(ranks)] if one and ranks else [process.pid, *ranks]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue
    process.wait(60)
    for pid in ranks:  # torchrun ends what is left of its own; nothing must be there when the run goes on
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
    return True


def check_whole(output: Path) -> int:
    """How many of the run's checkpoints claim to be whole, all of which must be."""
    whole = 0
    for path in output.glob("checkpoint-*"):
        model = checkpoint.load_model(path)
        try:
            progress = resume.read_progress(path)
        except FileNotFoundError:
            continue
        optimizers = train.build_optimizers(model, train.Settings.parse(runs.flags_of("model", "run")))
        resume.load_training(path, model, optimizers)
        assert path.name == f"checkpoint-{progress['step']}", path
        whole += 1
    return whole


def torn_run(source: str, whole: Path, output: Path, processes: list[int], kills: int) -> tuple[Counter, int, int]:
    """Kills a run so often, on so many processes in turn, and resumes it each time: (kills by moment, how often a
    checkpoint that claimed to be whole was loaded, runs that ended in between).

    One that ends before is compared with `whole`, and begins anew.
    """
    killed, loaded, ends = Counter(), 0, 0
    events, said, steps = output.parent / "events", output.parent / "said", runs.curve(whole)[-1][0]
    while True:
        world = processes[min(len(processes) - 1, killed.total() * len(processes) // kills)]
        rows = ["--per_device_train_batch_size", str(8 // world), "--parallel", "zero2" if world == 4 else "ddp"]
        flags = runs.flags_of(source, output, *MORE, *rows, objective="bd3lm", steps=steps)
        events.unlink(missing_ok=True)
        plan = {"flags": [*flags, "--resume_from_checkpoint", "auto"], "events": str(events)}
        with said.open("w") as file:
            process = runs.start([plan], world, stdout=file)
        if killed.total() == kills:
            assert process.wait(300) == 0, said.read_text()
            return killed, loaded, ends
        moments = ["first second", *SECONDS] if len(processes) == 1 else ["step", "save", "evaluation"]
        when = moments[killed.total() % len(moments)]
        count = world * (1 if when in ("start", "final") else random.randint(1, 4 if when == "step" else 2))
        delay = random.uniform(0, SECONDS.get(when, 1.0))
        if kill(process, events, when, count, delay, one=world > 1 and random.random() < 0.5):
            killed[when if world == 1 else f"{when}, {world} processes"] += 1
            loaded += check_whole(output)
        else:
            assert process.wait(60) == 0, f"the run failed by itself, on {world} processes: {said.read_text()}"
            runs.assert_equal(whole, output)
        if (output / resume.FINAL).exists():
            assert len(processes) == 1, "the run ended too soon"
            ours, theirs = runs.weights(output), runs.weights(whole)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            ends += 1
            shutil.rmtree(output)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    random.seed(args.seed)
    launch.shrink()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        source = launch.make_source(place / "model")
        for name, processes, kills, steps in (("one", [1], args.kills, 24), ("many", [4, 2, 1], 9, 90)):
            whole, torn = place / f"whole-{name}", place / f"torn-{name}"
            flags = runs.flags_of(source, whole, *MORE, objective="bd3lm", steps=steps)
            runs.ended(runs.start([{"flags": flags}]))
            began = time.monotonic()
            killed, loaded, ends = torn_run(source, whole, torn, processes, kills)
            print(f"{killed.total()} kills in {time.monotonic() - began:.0f} s: {dict(killed)}")
            print(f"  after them {loaded} checkpoints claimed to be whole, and were; {ends + 1} runs ended")
            if name == "one":
                runs.assert_equal(whole, torn)
                print("  curve and final weights equal those of the uninterrupted run, to the bit")
            else:
                losses, final = runs.difference(whole, torn)
                print(f"  losses differ by {losses:.1e}, final weights by {final:.1e}, from one process left alone")
                assert losses < 1e-9 and final < 1e-9
                assert [row[:2] for row in runs.curve(whole)] == [row[:2] for row in runs.curve(torn)]


if __name__ == "__main__":
    main(sys.argv[1:])

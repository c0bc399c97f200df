"""Long runs on many processes: the curve is that of one process, nothing is lost, and a failure says what it is.

`python -m pytest tests/test_parallel.py -m slow -s` also runs what takes minutes, and shows the table of differences.
"""

import errno
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from datetime import timedelta
from pathlib import Path

import launch
import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from test_data import hub
from torch.distributed.checkpoint import FileSystemReader

import checkpoint
import files
import log
import parallel
import resume
import train
from tasks import builtin

LAUNCH = str(launch.ROOT / "tests/launch.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
OBJECTIVES = {"mdlm": [], "bd3lm": ["--block_size", "4"]}
STAGES = {"sft": "builtin/sums", "pt": launch.TEXT}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return launch.make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(builtin, "SUMS", launch.ROWS)
    monkeypatch.setitem(builtin.BUILTIN, launch.TEXT, launch.text_rows)
    monkeypatch.setattr(log, "curves", lambda *_: None)  # a second a run


def flags_of(source, output, *more, objective="mdlm", stage="sft", rows=8, steps=10) -> list[str]:
    """A run of ten steps of eight rows, every one in the log."""
    flags = ["--model_name_or_path", source, "--output_dir", str(output), "--objective", objective, "--stage", stage]
    flags += ["--dataset_args", STAGES[stage], "--max_length", "48", "--max_steps", str(steps), "--logging_steps", "1"]
    flags += ["--eval_steps", "5", "--save_steps", "0", "--learning_rate", "1e-2", *OBJECTIVES[objective]]
    return [*flags, "--per_device_train_batch_size", str(rows), *more]


def start(plans: list[dict], processes: int = 1, **options) -> subprocess.Popen:
    """options: Popen's."""
    path = Path(plans[0]["flags"][3]).parent / f"plan-{next(NUMBER)}.json"
    path.write_text(json.dumps(plans))
    command = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    return subprocess.Popen([*command, LAUNCH, str(path)], **PIPES | {"env": ENVIRONMENT} | options)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
NUMBER = itertools.count()


def ended(process: subprocess.Popen, *, timeout: float = 300) -> str:
    """What a process that must succeed has said."""
    said = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, said
    return said


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[tuple]:
    """(step, name, value) of all in metrics.jsonl that is the same on any machine."""
    kept = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "epoch", "sample")
    return [(row["step"], name, row[name]) for row in metrics(output) for name in kept if name in row]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-final/model.safetensors")


def difference(a: Path, b: Path) -> tuple[float, float]:
    """The largest differences of the losses, trained on and evaluated, and of the final weights."""
    losses = [[value for _, name, value in curve(path) if name.endswith("loss")] for path in (a, b)]
    ours, theirs = weights(a), weights(b)
    assert len(losses[0]) == len(losses[1]) > 10
    return (
        max(abs(x - y) for x, y in zip(*losses)),
        max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours),
    )


def assert_equal(a: Path, b: Path) -> None:
    """To the bit."""
    assert curve(a) == curve(b)
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(capsys, argv: list[str]) -> str:
    """What a command that must fail says, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("train.py: ")
    return said


# ---------------------------------------------------------------------------------------------------------------------
# One process = many


def compare(tmp_path, source, cases: list[dict], divisions: list[tuple[int, int]], **more) -> list[tuple]:
    """(case, division, difference of the losses, of the weights): against one process that accumulates four times."""
    table = []
    alone = [tmp_path / f"alone-{n}" for n in range(len(cases))]

    def plans(outputs, processes, accumulation):
        for case, output in zip(cases, outputs):
            parallel = case["parallel"] if processes > 1 else "ddp"
            flags = [*case.get("flags", []), "--gradient_accumulation_steps", str(accumulation)]
            flags += ["--parallel", parallel, "--per_device_train_batch_size", str(8 // processes // accumulation)]
            flags += ["--per_device_eval_batch_size", "8"]  # three batches of the 20 rows
            flags = flags_of(source, output, *flags, objective=case["objective"], stage=case["stage"])
            local = {"local": max(1, processes // 2)} if parallel == "hybrid" else {"local": processes}
            yield {"flags": flags, **local, **more}

    ended(start(list(plans(alone, 1, 4))))
    for processes, accumulation in divisions:
        outputs = [tmp_path / f"{processes}x{accumulation}-{n}" for n in range(len(cases))]
        ended(start(list(plans(outputs, processes, accumulation)), processes), timeout=900)
        for case, one, output in zip(cases, alone, outputs):
            table.append((case, (processes, accumulation), *difference(one, output)))
    return table


def test_two_processes_train_as_one(tmp_path, source):
    cases = [
        {"objective": "mdlm", "stage": "sft", "parallel": "zero2", "flags": ["--eval_rows", "9"]},
        {"objective": "bd3lm", "stage": "pt", "parallel": "ddp", "flags": SAMPLED},
        {"objective": "bd3lm", "stage": "pt", "parallel": "zero3", "flags": ["--optim", "muon", *SAMPLED]},
        {"objective": "mdlm", "stage": "sft", "parallel": "hybrid", "flags": ["--optim", "muon"]},
    ]
    for *_, losses, final in compare(tmp_path, source, cases, [(2, 2)]):
        assert losses < 1e-9 and final < 1e-9
    for n, case in enumerate(cases):
        alone, together = (
            [row["sample"] for row in metrics(tmp_path / f"{name}-{n}") if "sample" in row] for name in ("alone", "2x2")
        )
        assert alone == together and len(alone) == (3 if SAMPLED[0] in case["flags"] else 0)


SAMPLED = ["--sample_prompt", "7 is"]


@pytest.mark.slow
def test_inner_micro_batches_communicate_nothing_but_what_zero3_and_hybrid_gather(tmp_path, source):
    ways = ("ddp", "zero2", "zero3", "hybrid")

    def counts(accumulation) -> dict[str, Counter]:
        plans = []
        for way in ways:
            flags = ["--parallel", way, "--gradient_accumulation_steps", str(accumulation), "--eval_strategy", "no"]
            name = tmp_path / f"{way}-{accumulation}"
            flags = flags_of(source, name, *flags, rows=8 // accumulation, steps=2)
            plans.append({"flags": flags, "count": f"{name}.count", "local": 1 if way == "hybrid" else 2})  # two nodes
        ended(start(plans, 2))
        lines = {way: (tmp_path / f"{way}-{accumulation}.count.0").read_text().splitlines() for way in ways}
        return {way: Counter(json.loads(of_way[-1])) for way, of_way in lines.items()}

    once, four_times = counts(1), counts(4)
    print(once, four_times)
    assert once["ddp"] == four_times["ddp"]
    assert once["zero2"] == four_times["zero2"] and once["zero2"].total() > 0
    for way in ("zero3", "hybrid"):
        more = four_times[way] - once[way]
        assert all("allgather" in name for name in more) and (more.total() > 0 or way == "hybrid")


@pytest.mark.slow
def test_bfloat16_is_for_products_and_sums_and_leaves_the_weights_float32(tmp_path, source):
    ways, flags = ("ddp", "zero2", "zero3", "hybrid"), ["--gradient_accumulation_steps", "2"]
    ended(start([{"flags": flags_of(source, tmp_path / "exact", *flags, rows=4), "float32": True}]))
    plans = []
    for way, compute, summed in itertools.product(ways, DTYPES, DTYPES):
        more = ["--parallel", way, "--compute_dtype", compute, "--reduce_dtype", summed, "--save_steps", "9"]
        output = tmp_path / f"{way}-{compute}-{summed}"
        plans.append({"flags": flags_of(source, output, *flags, *more, rows=2), "float32": True})
    ended(start(plans, 2))
    for way, compute, summed in itertools.product(ways, DTYPES, DTYPES):
        output = tmp_path / f"{way}-{compute}-{summed}"
        losses, _ = difference(tmp_path / "exact", output)
        assert losses < (1e-5 if compute == summed == "float32" else 0.05)
        assert (losses > 1e-5) == ("bfloat16" in (compute, summed))  # the flags do something
        stored = FileSystemReader(output / "checkpoint-9/state").read_metadata().state_dict_metadata
        kept = {entry.properties.dtype for entry in stored.values() if hasattr(entry, "properties")}
        assert kept == {torch.float32}
    for way in ways[1:]:  # which round their gradients to bfloat16 before they are summed
        assert difference(tmp_path / "ddp-bfloat16-float32", tmp_path / f"{way}-bfloat16-float32")[0] < 0.01


DTYPES = ("float32", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_division_and_every_parallel_trains_as_one_process(tmp_path, source, capsys, dtype):
    ways = ("ddp", "zero2", "zero3", "hybrid")
    cases = [
        {"objective": objective, "stage": stage, "parallel": way}
        for objective, stage, way in itertools.product(OBJECTIVES, STAGES, ways)
    ]
    packed = {"objective": "bd3lm", "stage": "sft", "parallel": "zero2", "flags": ["--packing"]}
    recomputed = {"objective": "mdlm", "stage": "pt", "parallel": "zero3"}
    recomputed["flags"] = ["--checkpoint_activations", "full"]
    more = {"float32": True} if dtype == "float32" else {}
    table = compare(tmp_path, source, [*cases, packed, recomputed], [(2, 2), (4, 1)], **more)
    with capsys.disabled():
        print(f"\n{dtype}, ten steps of eight rows, against 1 process x accumulation 4: largest differences")
        for case, (processes, accumulation), losses, final in table:
            name = " ".join([case["objective"], case["stage"], case["parallel"], *case.get("flags", [])])
            print(f"  {name:45} {processes} x {accumulation}   losses {losses:7.1e}   final weights {final:7.1e}")
    bounds = (1e-9, 1e-9) if dtype == "float64" else (1e-5, 2e-5)  # losses near 5, weights near 1
    assert all(losses < bounds[0] and final < bounds[1] for *_, losses, final in table)


def test_gpus_wait_ten_minutes_for_each_other_and_the_processes_an_hour(monkeypatch):
    made, waits = [], {}
    world = types.SimpleNamespace(
        _get_backend=lambda device: types.SimpleNamespace(
            _set_default_timeout=lambda timeout: waits.update({device.type: timeout.total_seconds()})
        )
    )
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *a, **options: made.append((*a, options)))
    monkeypatch.setattr(parallel.dist, "group", types.SimpleNamespace(WORLD=world))
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for cuda, backends in ((True, "cpu:gloo,cuda:nccl"), (False, "gloo")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert parallel.setup().world_size == 2
        assert made.pop() == (backends, {"timeout": timedelta(hours=1)})
        assert waits == ({"cuda": 600} if cuda else {})
        waits.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Resumed = uninterrupted


class Ended(Exception):
    """In the place of a run's end by force."""


@pytest.mark.parametrize("where", ["gradients", "update", "save_training", "evaluate", "drop_training", "save_whole"])
def test_a_run_that_ends_anywhere_goes_on_as_if_it_had_not(tmp_path, source, monkeypatch, where):
    more = ["--save_steps", "3", "--eval_steps", "3", "--logging_steps", "2", "--resume_from_checkpoint", "auto"]
    more += SAMPLED
    train.main(flags_of(source, tmp_path / "whole", *more))
    module = train if hasattr(train, where) else resume
    function, calls, output = getattr(module, where), 0, tmp_path / "torn"
    for deadly in range(2, 40, 4):  # this call of the function is the last

        def ending(*args, deadly=deadly, **options):
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise Ended
            return function(*args, **options)

        calls = 0
        monkeypatch.setattr(module, where, ending)
        try:
            train.main(flags_of(source, output, *more))
        except Ended:
            continue
        break
    assert_equal(tmp_path / "whole", output)
    kept = [path.name for path in output.iterdir() if path.name.startswith(".")]
    assert not kept


def test_a_run_with_muon_goes_on_sharded_and_sharded_another_way(tmp_path, source):
    def plan(name, *more, rows=4) -> dict:
        return {"flags": flags_of(source, tmp_path / name, "--optim", "muon", *more, rows=rows)}

    on = [("--resume_from_checkpoint", str(tmp_path / place)) for place in ("alone/checkpoint-5", "on/checkpoint-8")]
    ended(start([plan("alone", "--save_steps", "5", rows=8)]))
    zero2 = plan("on", "--parallel", "zero2", *on[0], "--save_steps", "8")
    ended(start([zero2, plan("further", "--parallel", "zero3", *on[1])], 2))
    alone = weights(tmp_path / "alone")
    for name in ("on", "further"):
        assert max((x - weights(tmp_path / name)[key]).abs().max() for key, x in alone.items()) < 1e-9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_and_a_save(tmp_path, source, monkeypatch, number):
    more = ["--resume_from_checkpoint", "auto", "--logging_steps", "3"]  # with a line for the step that is the last
    train.main(flags_of(source, tmp_path / "whole", *more))
    gradients, steps = train.gradients, 0

    def signalled(*args):
        nonlocal steps
        steps += 1
        if steps == 5:  # where an evaluation is due, too
            os.kill(os.getpid(), number)
        return gradients(*args)

    monkeypatch.setattr(train, "gradients", signalled)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(source, tmp_path / "torn", *more))
    assert stop.value.code == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) == before
    assert [path.name for path in resume.checkpoints(tmp_path / "torn")] == ["checkpoint-6"]
    train.main(flags_of(source, tmp_path / "torn", *more))
    assert_equal(tmp_path / "whole", tmp_path / "torn")
    minutes = [row["minutes"] for row in metrics(tmp_path / "torn") if "minutes" in row]
    assert minutes == sorted(minutes)  # it goes on, too
    size = len(metrics(tmp_path / "torn"))
    train.main(flags_of(source, tmp_path / "torn", *more))  # complete: nothing more is done
    assert len(metrics(tmp_path / "torn")) == size


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_the_run_at_once_with_the_same_status(
    tmp_path, source, monkeypatch, number
):
    monkeypatch.setenv("STOPPED_FILE", str(tmp_path / "stopped"))
    build, before = train.build_model, signal.getsignal(number)

    def signalled(args):
        (reading, writing), fork = os.pipe(), os.fork()
        if fork == 0:
            os.write(writing, b"ready")
            time.sleep(60)
            os._exit(1)
        os.read(reading, 5)
        os.kill(fork, number)  # as a pool ends those that tokenise: no signal to the run
        assert os.waitpid(fork, 0)[1] == number and not (tmp_path / "stopped").exists()
        os.close(reading)
        os.close(writing)
        os.kill(os.getpid(), number)
        return build(args)

    monkeypatch.setattr(train, "build_model", signalled)
    with pytest.raises(SystemExit) as stop:
        train.main(flags_of(source, tmp_path / "run"))
    assert stop.value.code == 75 and signal.getsignal(number) == before
    assert (tmp_path / "stopped").exists() and not (tmp_path / "run").exists()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, source, monkeypatch):
    gradients, calls = train.gradients, Counter()

    def signalled(*args):
        calls["steps"] += 1
        if calls["steps"] == 9:  # which the ranks tell each other of before the tenth
            signal.raise_signal(signal.SIGTERM)
        return gradients(*args)

    monkeypatch.setattr(train, "gradients", signalled)
    train.main(flags_of(source, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-final"]


def test_a_second_interrupt_does_at_once_what_one_did_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
    try:
        with train.Signals() as signals:
            signals.steps = True
            signal.raise_signal(signal.SIGINT)
            assert signals.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_evaluation_that_a_save_came_before_is_made_up_for(tmp_path, source, monkeypatch):
    more = ["--save_steps", "5", "--resume_from_checkpoint", "auto", "--stop_at_eval_loss", "100"]
    train.main(flags_of(source, tmp_path / "whole", *more))
    assert metrics(tmp_path / "whole")[-1]["step"] == 5
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "evaluate", lambda *args, **options: (1 / (not list((tmp_path / "torn").glob("c*-5"))), None)
        )
        with pytest.raises(ZeroDivisionError):
            train.main(flags_of(source, tmp_path / "torn", *more))
    train.main(flags_of(source, tmp_path / "torn", *more))
    assert metrics(tmp_path / "torn")[-1]["eval_loss"] == metrics(tmp_path / "whole")[-1]["eval_loss"]
    ours, theirs = weights(tmp_path / "torn"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_killed_process_left_behind_is_put_back_or_removed(tmp_path):
    whole, replaced, gone = (tmp_path / name for name in ("checkpoint-2", ".checkpoint-2.old", ".checkpoint-4.old"))
    for path in (whole, replaced, gone, tmp_path / ".checkpoint-6.writing"):
        (path / "state").mkdir(parents=True)
        (path / "config.json").write_text(path.name)
    files.recover(tmp_path)
    held = {path.name: (path / "config.json").read_text() for path in tmp_path.iterdir()}
    assert held == {"checkpoint-2": "checkpoint-2", "checkpoint-4": ".checkpoint-4.old"}


def test_the_two_newest_checkpoints_can_be_resumed_and_the_limit_is_kept(tmp_path, source):
    def held(output):
        return {path.name: (path / "state").exists() for path in resume.checkpoints(output)}

    train.main(flags_of(source, tmp_path / "all", "--save_steps", "2"))
    assert held(tmp_path / "all") == {f"checkpoint-{n}": n > 4 for n in (2, 4, 6, 8)}
    assert all(checkpoint.load_model(path) for path in (tmp_path / "all").glob("checkpoint-*"))
    train.main(flags_of(source, tmp_path / "some", "--save_steps", "2", "--save_total_limit", "3"))
    assert held(tmp_path / "some") == {f"checkpoint-{n}": n > 4 for n in (4, 6, 8)}
    with pytest.raises(FileNotFoundError, match="holds no training state"):
        resume.read_progress(tmp_path / "all/checkpoint-2")


def test_a_checkpoint_goes_on_elsewhere_and_in_its_own_directory_once_nothing_is_later(
    tmp_path, source, capsys, monkeypatch
):
    train.main(flags_of(source, tmp_path / "whole", "--save_steps", "3"))
    resumed = ["--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-6")]
    train.main(flags_of(source, tmp_path / "other", *resumed))
    assert all(
        torch.equal(value, weights(tmp_path / "whole")[name]) for name, value in weights(tmp_path / "other").items()
    )
    assert [row["step"] for row in metrics(tmp_path / "other") if "loss" in row] == [7, 8, 9, 10]
    assert "holds a run" in refused(capsys, flags_of(source, tmp_path / "other", *resumed))
    before = curve(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)  # the checkpoint is of this run, however its place is written
    assert "checkpoint-9 say; go on from it in another" in refused(capsys, flags_of(source, "whole", *resumed))
    for later in ("checkpoint-9", "checkpoint-final"):
        shutil.rmtree(tmp_path / "whole" / later)
    train.main(flags_of(source, "whole", *resumed, "--save_steps", "7", "--save_total_limit", "1"))
    assert curve(tmp_path / "whole") == before
    assert [path.name for path in resume.checkpoints(tmp_path / "whole")] == ["checkpoint-7"]


@pytest.mark.slow
def test_a_run_goes_on_under_any_other_parallel(tmp_path, source):
    """On four processes, then on two, in float64: sixteen pairs, and from one process to each, and back."""
    ways, from_one = ("ddp", "zero2", "zero3", "hybrid"), tmp_path / "one"

    def plan(output, processes, *more):
        flags = [
            "--gradient_accumulation_steps",
            str(4 // processes),
            "--save_steps",
            "5",
            "--logging_steps",
            "3",
            *more,
        ]
        return {"flags": flags_of(source, output, *flags, rows=2), "local": max(1, processes // 2)}

    def resumed(output, way, processes):
        more = ["--resume_from_checkpoint", str(output / "checkpoint-5"), "--parallel", way]
        return plan(tmp_path / f"{output.name}-{way}-{processes}", processes, *more)

    ended(start([plan(from_one, 1)]))
    ended(start([plan(tmp_path / way, 4, "--parallel", way) for way in ways], 4))
    sources = [from_one, *(tmp_path / way for way in ways)]
    ended(start([resumed(output, way, 2) for output in sources for way in ways], 2), timeout=600)
    ended(start([resumed(output, "ddp", 1) for output in sources]))
    for output in tmp_path.glob("*-*-[12]"):
        lines = [[row for row in curve(path) if row[0] > 5] for path in (output, from_one)]
        assert [row[:2] for row in lines[0]] == [row[:2] for row in lines[1]]
        # a line of steps 4 to 6 also tells of those before the save
        assert [value for *_, value in lines[0]] == pytest.approx([value for *_, value in lines[1]], abs=1e-9)
        ours, theirs = weights(output), weights(from_one)
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-9, output.name
    assert len(list(tmp_path.glob("*-*-[12]"))) == 25


STREAM = ["--streaming", "True", "--shuffle_buffer", "16", "--resume_from_checkpoint", "auto"]


@pytest.mark.parametrize("more", ([], ["--streaming", "True", "--max_steps", "10"]), ids=["rows", "stream"])
def test_examples_made_ahead_are_the_same_and_a_checkpoint_knows_only_those_trained_on(
    more, tmp_path, source, monkeypatch
):
    flags = [*more, "--save_steps", "3"]
    train.main(flags_of(source, tmp_path / "whole", *flags, objective="bd3lm"))
    monkeypatch.setitem(train.PREFETCH, "cpu", 3)
    train.main(flags_of(source, tmp_path / "ahead", *flags, objective="bd3lm"))
    assert_equal(tmp_path / "whole", tmp_path / "ahead")
    resume = ["--resume_from_checkpoint", str(tmp_path / "ahead/checkpoint-6")]
    train.main(flags_of(source, tmp_path / "resumed", *flags, *resume, objective="bd3lm"))
    assert [row for row in curve(tmp_path / "whole") if row[0] > 6] == [
        row for row in curve(tmp_path / "resumed") if row[0] > 6
    ]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "resumed")[name])


def trained_on(output: Path) -> Counter:
    """How often each row was trained on, by what it says."""
    rows = Counter()
    for path in output.parent.glob(f"{output.name}-rows-*"):
        for line in path.read_text().splitlines():
            rows.update(map(tuple, json.loads(line)["tokens"]))
    return rows


def test_a_resumed_stream_gives_no_row_twice_and_loses_none(tmp_path, source, monkeypatch):
    def recorded(name):
        make = train.training_example

        def training_example(batch, *rest, **options):
            if torch.is_grad_enabled():  # not of an evaluation
                with (tmp_path / f"{name}-rows-0").open("a") as file:
                    rows = [row[known].tolist() for row, known in zip(batch.tokens, batch.document >= 0)]
                    file.write(json.dumps({"tokens": rows}) + "\n")
            return make(batch, *rest, **options)

        return training_example

    sixty = ["--max_steps", "14"]  # 14 steps of 8 are a pass of 60 rows and most of another
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_example", recorded("whole"))
        train.main(flags_of(source, tmp_path / "whole", *STREAM, *sixty, objective="bd3lm"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_example", recorded("torn"))
        gradients, steps = train.gradients, 0

        def signalled(*args):
            nonlocal steps
            steps += 1
            if steps % 4 == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return gradients(*args)

        patch.setattr(train, "gradients", signalled)
        stops = 0
        while not (tmp_path / "torn/checkpoint-final").exists():
            try:
                train.main(flags_of(source, tmp_path / "torn", *STREAM, *sixty, objective="bd3lm"))
            except SystemExit as stop:
                assert stop.code == 75
                stops += 1
    assert stops > 1
    assert_equal(tmp_path / "whole", tmp_path / "torn")
    assert trained_on(tmp_path / "whole") == trained_on(tmp_path / "torn")


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize("tolerated", [0, 2])
def test_a_gradient_that_is_not_finite_ends_the_run_or_is_left_out(tmp_path, source, monkeypatch, capsys, tolerated):
    gradients, update, steps, updates = train.gradients, train.update, 0, 0

    def poisoned(engine, sync, model, *rest):
        nonlocal steps
        steps += 1
        total, norm = gradients(engine, sync, model, *rest)
        return (total * math.nan, norm * math.nan) if steps in (4, 5, 7) else (total, norm)

    def counted(optimizers, *rest):
        nonlocal updates
        some = optimizers[0].param_groups[0]["params"][0]
        before = some.detach().clone()
        update(optimizers, *rest)
        updates += not torch.equal(some, before)

    monkeypatch.setattr(train, "gradients", poisoned)
    monkeypatch.setattr(train, "update", counted)
    more = ["--save_steps", "3", "--skip_nonfinite", str(tolerated)]
    said = refused(capsys, flags_of(source, tmp_path / "run", *more))
    step, last = (7, "checkpoint-6") if tolerated else (4, "checkpoint-3")
    assert f"step {step}: the loss or the gradient is not finite, on samples" in said
    assert f"last good checkpoint: {tmp_path}/run/{last};" in said
    assert updates == step - 1 - tolerated
    assert all(row["loss"] > 0 or row["step"] in (4, 5) for row in metrics(tmp_path / "run") if "loss" in row)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("unread", [0, 1, 3])  # steps that are under way before a loss is read
def test_a_step_that_is_left_out_leaves_nothing_behind(tmp_path, source, monkeypatch, optim, unread):
    """It ends as a run does in which that step has no update."""
    monkeypatch.setitem(train.UNREAD, "cpu", unread)
    gradients, update = train.gradients, train.update
    calls = Counter()

    def poisoned(engine, sync, model, *rest):
        total, norm = gradients(engine, sync, model, *rest)
        calls["gradients"] += 1
        if calls["gradients"] == 4:
            model.model.norm.weight.grad.mul_(math.nan)
            return total, norm * math.nan
        return total, norm

    def missing(optimizers, *rest):
        calls["update"] += 1
        update(optimizers, *rest) if calls["update"] != 4 else [each.zero_grad() for each in optimizers]

    with monkeypatch.context() as patch:
        patch.setattr(train, "gradients", poisoned)
        more = ["--skip_nonfinite", "1", "--logging_steps", "2", "--optim", optim]
        train.main(flags_of(source, tmp_path / "left out", *more))
    monkeypatch.setattr(train, "update", missing)
    train.main(flags_of(source, tmp_path / "missing", "--optim", optim))
    ours, theirs = weights(tmp_path / "left out"), weights(tmp_path / "missing")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = {
        (name, row["step"]): row.get("loss") for name in ("left out", "missing") for row in metrics(tmp_path / name)
    }
    assert losses["left out", 4] == losses["missing", 3]  # the mean of step 3 alone


def test_steps_that_were_left_out_count_after_a_resumption(tmp_path, source, monkeypatch, capsys):
    gradients, calls = train.gradients, Counter()

    def poisoned(*args):
        calls["gradients"] += 1
        total, norm = gradients(*args)
        return total, norm * (math.nan if calls["gradients"] in (2, 11) else 1)

    monkeypatch.setattr(train, "gradients", poisoned)
    flags = flags_of(source, tmp_path / "run", "--skip_nonfinite", "1", "--save_steps", "5", "--eval_strategy", "no")
    train.main(flags)  # ten steps, and then five
    shutil.rmtree(tmp_path / "run/checkpoint-final")
    said = refused(capsys, [*flags, "--resume_from_checkpoint", "auto"])
    assert "step 6: the loss or the gradient is not finite" in said and "/checkpoint-5" in said


def test_a_loss_that_is_not_finite_counts_as_such_a_gradient(tmp_path, source, monkeypatch, capsys):
    losses, calls = train.losses, 0

    def infinite(*args):  # whose own gradient is finite
        nonlocal calls
        calls += 1
        total, ar = losses(*args)
        return total + (math.inf if calls == 4 else 0), ar

    monkeypatch.setattr(train, "losses", infinite)
    said = refused(capsys, flags_of(source, tmp_path / "run", "--eval_strategy", "no"))
    assert "step 4: the loss or the gradient is not finite, on samples [[24, 25, 26, 27, 28, 29, 30, 31]]" in said
    assert "last good checkpoint: none was written" in said


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("written", [20_000, 400_000])  # bytes: into the weights, and into the state
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, source, capsys, written):
    output, more = tmp_path / "run", ["--save_steps", "4", "--eval_strategy", "no"]
    train.main(flags_of(source, tmp_path / "whole", *more))
    save, saves = resume.save_training, 0

    def full(*args, **options):
        nonlocal saves
        saves += 1
        if saves == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (written, hard))  # a file that grows further: EFBIG
        save(*args, **options)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resume.save_training = full
    try:
        said = refused(capsys, flags_of(source, output, *more))
    finally:
        resume.save_training = save
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in said and "GB are free there" in said, said
    held = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert held == ["checkpoint-4"]
    train.main(flags_of(source, output, *more, "--resume_from_checkpoint", "auto"))
    assert_equal(tmp_path / "whole", output)


def test_a_directory_that_cannot_be_written_is_told_in_one_line(tmp_path, source, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file/run", tmp_path / "file"):
        said = refused(capsys, flags_of(source, output))
        assert f"--output_dir {output}: {tmp_path}/file is no directory to write to" in said
    for more in ([], ["--resume_from_checkpoint", "auto"]):
        said = refused(capsys, flags_of(source, Path("/proc/self/run"), *more))  # not even for root
        assert "--output_dir /proc/self/run: /proc/self" in said and "is no directory to write to" in said


CONTRADICTIONS = {
    "--objective bd3lm --block_size 4": "--objective bd3lm contradicts",
    "--block_size 8": "only bd3lm has a block length",
    "--dataset_args builtin/sums[train:40]": "--dataset_args builtin/sums[train:40] contradicts",
    "--seed 1": "--seed 1 contradicts",
    "--max_steps 20": "--max_steps 20 contradicts",
    "--per_device_train_batch_size 4": "are 4 rows a step, but 8",
    "--overwrite": "--overwrite and --resume_from_checkpoint contradict",
    "--model_name_or_path OTHER": "a checkpoint of another model",
    "--resume_from_checkpoint NOWHERE": "holds no training state",
}


def test_a_resumption_with_other_flags_is_refused_and_changes_nothing(tmp_path, source, capsys):
    model = checkpoint.load_model(source)
    model.config.rope_theta *= 2
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(checkpoint.config_dict(model.config)))
    output = tmp_path / "run"
    train.main(flags_of(source, output, "--save_steps", "4"))
    shutil.rmtree(output / "checkpoint-final")
    before = contents(output)
    for flags, expected in CONTRADICTIONS.items():
        flags = flags.replace("OTHER", str(tmp_path / "other")).replace("NOWHERE", str(tmp_path))
        more = ["--save_steps", "4", "--resume_from_checkpoint", "auto", *flags.split()]
        said = refused(capsys, flags_of(source, output, *more))
        assert expected in said, said
        assert contents(output) == before
    block = flags_of(source, tmp_path / "blocks", "--save_steps", "4", objective="bd3lm")
    train.main(block)
    shutil.rmtree(tmp_path / "blocks/checkpoint-final")
    said = refused(capsys, [*block, "--resume_from_checkpoint", "auto", "--block_size", "8"])
    assert "--block_size 8 contradicts" in said and "of a run with 4" in said
    for path in resume.checkpoints(output):
        resume.drop_training(path)
    before = contents(output)
    said = refused(capsys, flags_of(source, output, "--resume_from_checkpoint", "auto"))
    assert "holds no training state to resume from" in said and contents(output) == before


def test_a_damaged_state_is_told_in_one_line_and_an_earlier_one_serves(tmp_path, source, capsys):
    output = tmp_path / "run"
    train.main(flags_of(source, output, "--save_steps", "4"))
    (shard,) = (output / "checkpoint-8/state").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:1000])
    damaged = "checkpoint-8 does not fit this run or is damaged: __0_0.distcp is missing or truncated"
    for damage in (damaged, "checkpoint-8 does not fit this run or is damaged: .metadata is missing"):
        shutil.rmtree(output / "checkpoint-final")
        by_name = ["--resume_from_checkpoint", str(output / "checkpoint-8")]
        assert damage in refused(capsys, flags_of(source, output, *by_name))
        train.main(flags_of(source, output, "--save_steps", "0", "--resume_from_checkpoint", "auto"))
        said = capsys.readouterr()
        assert f"{output}/{damage}" in said.out and f"resume {output}/checkpoint-4" in said.out
        assert "Traceback" not in said.err
        (output / "checkpoint-8/state/.metadata").unlink(missing_ok=True)


def test_a_rank_that_fails_ends_the_others_and_its_traceback_comes_first(tmp_path, source):
    began = time.monotonic()
    plan = {"flags": flags_of(source, tmp_path / "run", "--max_steps", "1000", rows=4), "fail": [1, 3]}
    process = start([plan], 2)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and time.monotonic() - began < 100
    first = said.index("Traceback (most recent call last)")
    assert said.index("RuntimeError: a fault of this rank's own") < (said.find("Traceback", first + 1) % len(said))
    assert "[rank0]" not in said  # the other has nothing to say


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(tmp_path, source):
    plan = {"flags": flags_of(source, tmp_path / "run", "--max_steps", "100000", rows=4)}
    plan["events"] = str(tmp_path / "events")
    process = start([plan], 2)
    pids = wait_for(tmp_path / "events", "step", 10)
    os.kill(pids[-1], signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Signal 9" in said and time.monotonic() - began < 40


def wait_for(events: Path, name: str, count: int, timeout: float = 120) -> list[int]:
    """The processes of the events of that name, once there are so many."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        lines = [line.split() for line in events.read_text().splitlines()] if events.exists() else []
        if sum(event == name for event, _ in lines) >= count:
            return [int(pid) for event, pid in lines if event == name]
        time.sleep(0.01)
    raise TimeoutError(f"{count} events {name} did not come")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, of_rank, expected",
    [
        (["--learning_rate", "-1"], [], "--learning_rate -1.0: expected more than 0"),
        (["--learning_rat", "1"], [], "did you mean --learning_rate?"),
        (["--dataset_args", "builtin/sum"], [], "unknown dataset builtin/sum"),
        ([], ["--learning_rate", "1e-4"], "--learning_rate is 0.01 here, 0.0001 on another process"),
        ([], ["--learning_rate", "-1"], "--learning_rate -1.0: expected more than 0"),
    ],
)
def test_a_mistake_on_many_processes_is_told_in_one_line(tmp_path, source, flags, of_rank, expected):
    plan = {"flags": flags_of(source, tmp_path / "run", *flags), "rank flags": {"1": of_rank}}
    process = start([plan], 2)
    said = process.communicate(timeout=120)[0]
    lines = [line for line in said.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and expected in lines[0] and "[rank" not in said, said  # nor any process's traceback
    assert process.returncode == 1 and "exitcode  : 2" in said  # the rank's; torchrun's own is 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_ends_the_run_after_a_save_and_it_goes_on(tmp_path, source, number):
    """With --signals_to_handle for SIGUSR1, as recipes/train.slurm.sh has it; on two processes that read a stream by
    worker processes, then on one, on which nothing is lost either."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for n in range(4):
        rows = [{"messages": row["messages"]} for row in builtin.sums_rows("train")[n::4]]
        (shards / f"{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [*STREAM, "--dataset_args", str(shards), "--max_steps", "24", "--dataloader_num_workers", "1"]

    def plan(name, rows):
        flags = flags_of(source, tmp_path / name, *more, objective="bd3lm", rows=rows)
        record, events = str(tmp_path / f"{name}-rows-{{rank}}"), str(tmp_path / f"{name}-events")
        return {"flags": flags, "record": record, "events": events}

    ended(start([plan("whole", 8)]))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps([plan("torn", 4)]))
    command = [*TORCHRUN, "2", "--signals_to_handle", "SIGTERM,SIGINT,SIGUSR1", LAUNCH, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "torn-events", "step", 10)
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    stopped = [path.name for path in resume.checkpoints(tmp_path / "torn")]
    assert process.returncode == 1 and len(stopped) == 1, said
    assert "stopped by a signal; wrote" in said and "RuntimeError" not in said, said
    ended(start([plan("torn", 8)]))
    losses, final = difference(tmp_path / "whole", tmp_path / "torn")
    assert losses < 1e-9 and final < 1e-9
    assert trained_on(tmp_path / "whole") == trained_on(tmp_path / "torn")


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((n = 0; n < SLURM_NNODES; n++)); do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo localhost || echo "$@" >>"$REQUEUED"
"""


@pytest.mark.slow
def test_the_slurm_script_requeues_a_run_that_was_stopped_and_it_goes_on_but_no_other(tmp_path, source):
    """With stand-ins for srun, which passes signals on, and scontrol; two nodes of one process."""
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    requeued, jobs = tmp_path / "requeued", itertools.count(os.getpid())
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "NPROC": "1"}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "REQUEUED": str(requeued)}

    def submitted(plan) -> subprocess.Popen:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps([plan]))
        (tmp_path / "events").unlink(missing_ok=True)
        requeued.unlink(missing_ok=True)
        command = ["bash", str(launch.ROOT / "recipes/train.slurm.sh"), LAUNCH, str(path)]
        job = {"SLURM_JOB_ID": str(next(jobs))}
        return subprocess.Popen(command, **PIPES, env=environment | job, cwd=tmp_path)

    def agents() -> set[int]:
        """The two torchruns, once the run is under way."""
        ranks = set(wait_for(tmp_path / "events", "step", 10))
        return {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}

    def plan(name, *more):
        flags = ["--parallel", "hybrid", "--resume_from_checkpoint", "auto", "--max_steps", "200", *more]
        flags = flags_of(source, tmp_path / name, *flags, "--eval_steps", "50", rows=4)
        return {"flags": flags, "events": str(tmp_path / "events")}

    ended(start([{"flags": [*plan("whole")["flags"], "--per_device_train_batch_size", "8"]}]))
    for name in ("warned", "preempted", "cancelled"):
        job = submitted(plan(name))
        to_nodes = agents()
        assert len(to_nodes) == 2
        if name == "warned":
            job.send_signal(signal.SIGUSR1)
        else:
            if name == "cancelled":
                job.send_signal(signal.SIGTERM)
            for pid in to_nodes:
                os.kill(pid, signal.SIGTERM)
        said = job.communicate(timeout=120)[0]
        assert job.returncode != 0 and "stopped by a signal; wrote" in said, said
        assert not (tmp_path / name / "checkpoint-final").exists()
        assert requeued.exists() == (name != "cancelled")
        if name != "cancelled":
            assert requeued.read_text().startswith("requeue ") and not list(tmp_path.glob(".stopped-*"))
            job = submitted(plan(name))
            said = job.communicate(timeout=300)[0]
            assert job.returncode == 0 and not requeued.exists() and "resume " in said, said
            losses, final = difference(tmp_path / "whole", tmp_path / name)
            assert losses < 1e-9 and final < 1e-9
    job = submitted(plan("failing") | {"fail": [1, 3]})
    said = job.communicate(timeout=120)[0]
    assert job.returncode != 0 and not requeued.exists() and "a fault of this rank's own" in said


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_left_alone():
    command = [sys.executable, str(launch.ROOT / "tests/torn_runs.py")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    print(said.stdout)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("30 kills")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def recipe_sets(root: Path) -> dict[str, int]:
    """The recipes' data sets, small and under their names; rows to train on that each recipe reads."""
    texts = [row["text"] for row in launch.text_rows("train")]
    chats = [{"messages": row["messages"]} for row in builtin.sums_rows("train")]
    asked = [
        {"instruction": text, "output": f"```{('python', 'rust')[n % 2]}\n{n}\n```"} for n, text in enumerate(texts)
    ]
    for name, configs in {
        "Trelis/tiny-shakespeare": {"default": [{"Text": text} for text in texts]},
        "dylanebert/openwebtext": {"default": [{"text": text} for text in texts]},
        "tatsu-lab/alpaca": {"default": [row | {"input": "", "text": "not this"} for row in asked]},
        "allenai/tulu-3-sft-mixture": {"default": chats},
        "HuggingFaceTB/smoltalk": {"all": chats[:30], "other": chats},
        "OpenCoder-LLM/opc-sft-stage1": {"one": asked[:20], "two": [row | {"seq_id": 1} for row in asked[:10]]},
        "OpenCoder-LLM/opc-sft-stage2": {"one": asked[:8]},
    }.items():
        hub(root, name, {config: {"train": rows, "test": rows[:4]} for config, rows in configs.items()})
    return {"shakespeare": 60, "alpaca": 60, "tiny-a2d": 60 + 30 + 15 + 4}


@pytest.mark.slow
@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("recipe", ["shakespeare", "openwebtext", "alpaca", "tiny-a2d"])
def test_a_recipe_runs_on_two_processes_and_goes_on(tmp_path, source, recipe, method):
    """With its own data sets by their names, under $BASE_DATASETS_DIR; rows, steps and canvases are fewer."""
    read, output = recipe_sets(tmp_path / "sets"), tmp_path / "run"
    environment = {"BASE_DATASETS_DIR": str(tmp_path / "sets"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment |= {"PYTHON": sys.executable, "NPROC": "2", "MODEL": source, "OUTPUT": str(output)}
    command = ["sh", str(launch.ROOT / f"recipes/{recipe}.sh"), method, "--max_length", "64", "--max_steps", "4"]
    command += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--num_proc", "1"]
    command += ["--save_steps", "2", "--logging_steps", "1"]

    def run() -> str:
        return ended(subprocess.Popen(command, **PIPES, env=ENVIRONMENT | environment))

    assert "resume" not in run()
    assert metrics(output)[0].get("rows read") == read.get(recipe)
    before, whole = curve(output), weights(output)
    shutil.rmtree(output / "checkpoint-final")
    assert f"resume {output}/checkpoint-2" in run()
    assert curve(output) == before
    assert all(torch.equal(value, whole[name]) for name, value in weights(output).items())


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.parametrize(
    "device, objective, compute, bound",
    [
        pytest.param("cpu", "mdlm", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("cpu", "bd3lm", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("cuda", "mdlm", "float32", 1e-3, marks=pytest.mark.cuda),
        pytest.param("cuda", "bd3lm", "float32", 1e-3, marks=pytest.mark.cuda),
        pytest.param("cuda", "bd3lm", "bfloat16", 0.2, marks=pytest.mark.cuda),
    ],
)
def test_compiled_layers_train_as_plain_ones_and_no_later_epoch_compiles(
    tmp_path, source, monkeypatch, device, objective, compute, bound
):
    """An epoch has batches of many lengths, and a last one of fewer rows: what is compiled must serve them all."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    update, graphs = train.update, []

    def counted(*args):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return update(*args)

    monkeypatch.setattr(train, "update", counted)
    for name, more in (("plain", ["--torch_compile", "False"]), ("compiled", ["--torch_compile", "True"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs.clear()
        flags = flags_of(source, tmp_path / name, "--compute_dtype", compute, *more, objective=objective, steps=20)
        train.main(flags)
    assert graphs[0] > 0 and len(set(graphs[8:])) == 1, graphs  # 60 rows are 8 steps
    assert difference(tmp_path / "plain", tmp_path / "compiled")[0] < bound


@pytest.mark.slow
def test_compiled_and_recomputed_layers_train_alike_under_every_parallel(tmp_path, source):
    pairs = [("ddp", "none"), ("ddp", "selective"), ("zero2", "full"), ("zero3", "selective"), ("hybrid", "full")]
    plans = []
    for way, kept in pairs:
        more = ["--parallel", way, "--checkpoint_activations", kept, "--torch_compile", "True"]
        plans.append({"flags": flags_of(source, tmp_path / f"{way}-{kept}", *more, objective="bd3lm", rows=4)})
    ended(start([{"flags": flags_of(source, tmp_path / "alone", objective="bd3lm")}]))
    ended(start(plans, 2), timeout=900)
    for way, kept in pairs:
        losses, final = difference(tmp_path / "alone", tmp_path / f"{way}-{kept}")
        assert losses < 1e-9 and final < 1e-9, (way, kept)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA

ON_CPU = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.cuda
def test_a_gpu_trains_as_the_cpu_does(tmp_path, source):
    more = ["--compute_dtype", "float32", "--gradient_accumulation_steps", "2", "--torch_compile", "False"]
    exact = [{"flags": flags_of(source, tmp_path / name, *more, stage="pt", rows=4)} for name in ("cpu64", "gpu64")]
    blocks = {name: flags_of(source, tmp_path / name, *more, objective="bd3lm", rows=4) for name in ("cpu", "gpu")}
    single = [{"flags": flags, "float32": True} for flags in blocks.values()]
    half = flags_of(source, tmp_path / "half", "--torch_compile", "False", objective="bd3lm")
    ended(start([exact[0], single[0]], env=ON_CPU))
    ended(start([exact[1], single[1], {"flags": half, "float32": True}]))
    losses, final = difference(tmp_path / "cpu64", tmp_path / "gpu64")  # mdlm in float64: one law for both devices
    assert losses < 1e-9 and final < 1e-9
    assert difference(tmp_path / "cpu", tmp_path / "gpu")[0] < 0.02  # FlexAttention, TF32: ten bits of mantissa
    assert difference(tmp_path / "cpu", tmp_path / "half")[0] < 0.2  # seven bits


@pytest.mark.cuda
def test_the_fused_optimizer_updates_on_a_gpu_as_on_the_cpu():
    after = []
    for device in ("cpu", "cuda"):
        model, generator = tiny().train().to(device), torch.Generator().manual_seed(0)
        optimizers = train.build_optimizers(
            model, train.Settings.parse(flags_of("model", "run", "--weight_decay", "0.1"))
        )
        assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW"] and optimizers[0].defaults["fused"]
        for step in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).to(device)
            train.update(optimizers, 1e-2 / (step + 1), torch.ones((), device=device))
        after.append([parameter.detach().cpu() for parameter in model.parameters()])
    for ours, theirs in zip(*after):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3", "hybrid"])
def test_two_gpus_train_as_one_and_a_stopped_run_goes_on_there(tmp_path, source, parallel):
    more = ["--compute_dtype", "float32", "--save_steps", "4", "--torch_compile", "False"]
    ended(start([{"flags": flags_of(source, tmp_path / "one", *more, stage="pt")}], env=ENVIRONMENT | FIRST_GPU))
    two = flags_of(source, tmp_path / "two", *more, "--parallel", parallel, stage="pt", rows=4)
    ended(start([{"flags": two}], 2))
    losses, final = difference(tmp_path / "one", tmp_path / "two")
    assert losses < 1e-9 and final < 1e-9
    shutil.rmtree(tmp_path / "two/checkpoint-final")
    ended(start([{"flags": [*two, "--resume_from_checkpoint", "auto"]}], 2))
    losses, final = difference(tmp_path / "one", tmp_path / "two")
    assert losses < 1e-9 and final < 1e-9


FIRST_GPU = {"CUDA_VISIBLE_DEVICES": "0"}

"""train.py as the tests start it, alone or by torchrun: few rows, float64, and faults where a test wants one.

    python tests/launch.py PLAN.json        torchrun --nproc_per_node 2 tests/launch.py PLAN.json

PLAN.json is a list of runs, one after the other in the same processes: {"flags": [...]} and any of

    "float32": true         as train.py is; else the weights and all that follows from them are float64
    "local": 2              processes of a node, as hybrid sees it
    "rank flags": {"1": [...]}      flags that only this rank is given
    "record": FILE          a line {"samples", "tokens"} there of each micro-batch that is trained on; {rank} in it too
    "events": FILE          a line "NAME PID" there when a start, step, save, final or evaluation begins
    "count": FILE           a line {collective: calls} there of each step's passes
    "fail": [RANK, STEP]    that rank raises RuntimeError in that step
"""

import functools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ROWS = {"train": 60, "validation": 20, "test": 20}
TEXT = "builtin/stdlib"  # here rows made up below, so that nothing is read


def text_rows(split: str) -> list[dict]:
    """Of various lengths."""
    return [{"text": " ".join(f"{n * n} is {n} squared." for n in range(i, i + 3 + i % 5))} for i in range(ROWS[split])]


def make_source(path: Path) -> str:
    """A tiny float64 model at `path` that declares no objective, with a tokenizer of the rows."""
    from conftest import tiny

    from checkpoint import save_model
    from tasks.builtin import sums_rows
    from tokenizer import Tokenizer

    rows = sums_rows("validation")[: ROWS["validation"]]  # those that shrink() leaves
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = Tokenizer.train(texts + [row["text"] for row in text_rows("test")], vocab_size=300)
    shape = {"vocab_size": 320, "mask_token_id": tokenizer.mask_id, "initializer_range": 0.05}
    model = tiny(**shape, max_position_embeddings=256, tie_word_embeddings=True)
    model.config.dtype = "float64"
    save_model(model, path, tokenizer=tokenizer)
    return str(path)


def shrink() -> None:
    """Few rows, in this process from now on: of processes of ours, not of the one that the tests run in."""
    from tasks import builtin

    builtin.SUMS = ROWS
    builtin.BUILTIN[TEXT] = text_rows


def run(plan: dict) -> None:
    import torch

    import checkpoint
    import train

    rank = os.environ.get("RANK", "0")
    shrink()
    torch.set_num_threads(1)
    train.curves = lambda *_: None  # a second a run
    if not plan.get("float32"):
        train.load_model = lambda path, dtype: checkpoint.load_model(path)
    if "local" in plan:
        os.environ["LOCAL_WORLD_SIZE"] = str(plan["local"])
        os.environ["LOCAL_RANK"] = str(int(rank) % plan["local"])
    original = {name: getattr(train, name) for name in HOOKED}
    steps = 0

    def note(event: str) -> None:
        if "events" in plan:
            descriptor = os.open(plan["events"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{event} {os.getpid()}\n".encode())
            os.close(descriptor)

    def noted(event: str, name: str):
        def call(*args, **options):
            note(event)
            return original[name](*args, **options)

        return call

    def gradients(engine, sync, model, examples, *rest):
        nonlocal steps
        steps += 1
        note("step")
        if plan.get("fail") == [int(rank), steps]:
            raise RuntimeError("a fault of this rank's own")
        if "count" not in plan:
            return original["gradients"](engine, sync, model, examples, *rest)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = original["gradients"](engine, sync, model, examples, *rest)
        calls = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        with Path(f"{plan['count']}.{rank}").open("a") as file:
            file.write(json.dumps(calls) + "\n")
        return result

    def training_example(args, config):
        make = original["training_example"](args, config)
        if "record" not in plan:
            return make

        def recorded(batch):
            rows = [row[known].tolist() for row, known in zip(batch["tokens"], batch["document"] >= 0)]
            with Path(plan["record"].format(rank=rank)).open("a") as file:
                file.write(json.dumps({"samples": batch["sample"].tolist(), "tokens": rows}) + "\n")
            return make(batch)

        return recorded

    train.gradients, train.training_example = gradients, training_example
    for event, name in (("save", "save_training"), ("final", "save_whole"), ("evaluation", "evaluate")):
        setattr(train, name, noted(event, name))
    note("start")
    try:
        train.main([*plan["flags"], *plan.get("rank flags", {}).get(rank, [])])
    finally:
        for name, function in original.items():
            setattr(train, name, function)


HOOKED = ("gradients", "training_example", "save_training", "save_whole", "evaluate", "load_model")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without
    plans = json.loads(Path(sys.argv[-1]).read_text())
    if len(plans) > 1:  # one process group serves all
        import train

        train.setup = functools.cache(train.setup)
        destroy, train.dist.destroy_process_group = train.dist.destroy_process_group, lambda: None
    for plan in plans:
        run(plan)
    if len(plans) > 1 and train.dist.is_initialized():
        destroy()

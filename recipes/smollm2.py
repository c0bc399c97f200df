"""What a training by recipes/smollm2.sh brought: bounds, AR nats, tokens a forward and repetition, on held-out chats.

    python -m recipes.smollm2 --before runs/smollm2/a2d --runs runs/smollm2/run

A column for the conversion before training, whose AR side is the untouched model, and one for each run.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from tqdm import tqdm

from checkpoint import DTYPES
from cli import one_line_errors
from files import read_json, replacing_file
from log import ARGS, past_rows
from options import Count, Directory, Model, Options
from recipes.measure import Measured, tokens_a_forward
from train import Settings


def directories(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@dataclass(kw_only=True)
class Figures(Options):
    """Measures the conversion before training, and what came of each run, on chats that no run has seen."""

    prog: ClassVar[str] = "smollm2.py"
    before: Model  # the checkpoint that the runs began with
    runs: Annotated[tuple[str, ...], directories, "DIR,DIR,..."]  # of train.py
    questions: Count = 50  # held-out chats to answer the last turn of
    rows: Count = 50  # held-out rows for bounds and nats, at most
    max_new_tokens: Count = 64  # of an answer
    speculate: Count = 4  # drafts
    batch_size: Count = 10  # answers at a time
    dtype: Annotated[str, "|".join(DTYPES)] = "float32"  # in bfloat16 a draft may win where the AR model has a tie
    table: Directory | None = None  # a Markdown file for the table (default: it is only printed)


def repetition(tokenizer, texts: list[str]) -> float:
    """Of the 3-grams of tokens in each text, the percentage that occurred in it before."""
    grams = [list(zip(ids, ids[1:], ids[2:])) for ids in map(tokenizer.encode, texts)]
    return 100 * (1 - sum(len(set(of)) for of in grams) / max(1, sum(map(len, grams))))


def measure(args: Figures, path: str, settings: Settings) -> dict[str, str]:
    """The figures of a checkpoint, by name."""
    of = Measured(path, settings, getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu")
    rows, config = of.rows("test"), of.config
    prompts = of.questions(of.chats(settings.dataset_args)[: args.questions])

    def answers(label: str, declared, **options):
        found = []
        for begin in tqdm(range(0, len(prompts), args.batch_size), label, unit="batch", leave=False):
            batch = prompts[begin : begin + args.batch_size]
            found += of.answers(batch, declared, max_new_tokens=args.max_new_tokens, **options)
        return found

    # Nats are computed as in training, answers as --dtype says.
    of.model.compute_dtype = settings.computes_in(of.device, of.model.size)
    found = {"AR nats per token": f"{of.nats(rows, of.as_ar, 4, args.rows):.3f}"}
    for K in (4, 8):
        found[f"bound, blocks of {K}"] = f"{of.nats(rows, replace(config, block_length=K), 4, args.rows):.3f}"
    of.model.compute_dtype = None
    by = {
        "as AR": answers("as AR", of.as_ar),
        "speculation": answers("speculation", config, speculate=args.speculate),
        "threshold 0.9": answers("threshold 0.9", config, threshold=0.9),
        "a token a forward": answers("a token a forward", config, steps=args.max_new_tokens),
    }
    equal = sum(a.text == b.text for a, b in zip(by["as AR"], by["speculation"]))
    found["answers by speculation equal to AR's"] = f"{equal} of {len(prompts)}"
    for how in ("speculation", "threshold 0.9"):
        found[f"tokens a forward, {how}"] = f"{tokens_a_forward(by[how]):.2f}"
    for how in ("as AR", "a token a forward", "threshold 0.9"):
        found[f"repeated 3-grams, %, {how}"] = f"{repetition(of.tokenizer, [a.text for a in by[how]]):.1f}"
    return found


def figures(args: Figures) -> None:
    columns = {}
    for run in args.runs:
        known = read_json(f"{run}/{ARGS}", "name a directory that train.py wrote")
        settings = Settings(**{name: value for name, value in known.items() if name in Settings.__dataclass_fields__})
        if not columns:
            columns["before"] = {"training": "none", **measure(args, args.before, settings)}
        spent = [row for row in past_rows(Path(run)) if "tokens" in row]
        tokens, minutes = sum(row["tokens"] for row in spent), spent[-1]["minutes"]
        trained = {"training": f"{minutes:.0f} minutes, {spent[-1]['step']:,} steps, {tokens / 1e6:.2f} M tokens"}
        columns[run] = trained | measure(args, f"{run}/checkpoint-final", settings)

    lines = [f"| {' | '.join(['', *columns])} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {' | '.join([name, *(of[name] for of in columns.values())])} |" for name in columns["before"]]
    print("\n".join(lines))
    if args.table:
        with replacing_file(args.table) as draft:
            draft.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    with one_line_errors("smollm2.py"):
        figures(Figures.parse())

"""What a training run reports: its first lines, its log (metrics.jsonl and the progress bar), its curves, its cost."""

import base64
import functools
import hashlib
import html
import importlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from display import printable
from files import naming_file, replacing_file
from lora import LoRALinear
from model import Config, LanguageModel, Layout
from parallel import Ranks

try:
    import resource
except ImportError:  # Windows
    resource = None

# In a run's --output_dir, beside its checkpoints; PAGE where it has samples.
ARGS, METRICS, PICTURE, PAGE = "args.json", "metrics.jsonl", "curves.png", "curves.html"
# What a line of the log is made of; ar_loss and ar_weight: of the AR loss beside the masked one.
SUMS = ("loss", "ar_loss", "ar_weight", "denominator", "tokens", "supervised", "flops", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# The log


class Log:
    """metrics.jsonl and the progress bar, or plain lines where a line cannot be redrawn. Rank 0 has one
    that writes, the others a `silent` one."""

    def __init__(
        self, output: Path, directory: Path, past: list[dict], report, step: int, steps: int | None, *, silent: bool
    ):
        """directory: where it writes, `output` or one that will take its place. past: the lines of the run that this
        one goes on with. report: of `import_reporter`. step: the one a resumed run goes on from, else 0. steps: of the
        run, where they are known."""
        self.directory, self.past, self.silent, self.reporter = directory, past, silent, None
        self.name = output.resolve().name
        if silent:
            return
        if report is not None:
            self.reporter = report(output, json.loads((directory / ARGS).read_text()), step)

        path = directory / METRICS
        with replacing_file(path) as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in self.past))
        self.file = path.open("a", buffering=1)
        self.bar = tqdm(initial=step, total=steps, unit="step", disable=None, dynamic_ncols=True)

    def write(self, step: int, **metrics: float | str) -> None:
        """A line in metrics.jsonl."""
        if self.silent:
            return
        with naming_file(self.directory / METRICS):
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.reporter is not None:
            self.reporter.log(metrics, step=step)

    def show(self, step: int, steps: int, left: float, **metrics: float) -> None:
        """On the bar, which shows the time left by itself. steps: of the run, as far as is known; left: minutes."""
        if self.silent:
            return
        text = " ".join(f"{name} {readable(value)}" for name, value in metrics.items())
        if self.bar.disable:
            print(f"step {step}/{steps} {text} minutes_left {left:.3g}", flush=True)
        else:
            self.bar.total = steps
            self.bar.set_postfix_str(text)

    def advance(self) -> None:
        """One step more on the bar."""
        if not self.silent:
            self.bar.update()

    def forget_pause(self) -> None:
        """What has passed since the last step does not count on the bar."""
        if not self.silent:
            self.bar.unpause()

    def print(self, text: str) -> None:
        """A line that stays."""
        if not self.silent:
            tqdm.write(printable(text), file=sys.stdout)
            sys.stdout.flush()

    def draw(self) -> None:
        """curves.png of what metrics.jsonl holds, and where that has samples curves.html."""
        if self.silent:
            return
        rows, picture = read_rows(self.directory / METRICS), io.BytesIO()
        curves({self.name: rows}, picture)
        with replacing_file(self.directory / PICTURE) as file:
            file.write_bytes(picture.getvalue())
        if any("sample" in row for row in rows):
            with replacing_file(self.directory / PAGE) as file:
                file.write_text(page(self.name, rows, picture.getvalue()), encoding="utf-8")

    def close(self) -> None:
        """Draws the curves, and ends the log."""
        if self.silent:
            return
        self.draw()
        self.bar.close()
        self.file.close()
        if self.reporter is not None:
            self.reporter.finish()


def readable(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def start_wandb(wandb, output: Path, settings: dict, step: int):
    # An id made of the directory's name, so that a resumed run goes on with its own curves.
    known = {"name": output.name, "id": hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]}
    known |= {"project": os.environ.get("WANDB_PROJECT", "nanoA2D"), "dir": str(output), "resume": "allow"}
    return wandb.init(config=settings, **known)


class TensorBoard:
    """A run as `start_wandb` returns one, for TensorBoard."""

    def __init__(self, tensorboard, output: Path, settings: dict, step: int):
        # What was logged after this step is of steps to be done again; at step 0, all is of a run that is overwritten.
        self.writer = tensorboard.SummaryWriter(output / "tensorboard", purge_step=step and step + 1)
        self.writer.add_text("settings", json.dumps(settings, indent=2), step)

    def log(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
            add(name, value, step)

    def finish(self) -> None:
        self.writer.close()


REPORTERS = {"wandb": ("wandb", start_wandb), "tensorboard": ("torch.utils.tensorboard", TensorBoard)}


def import_reporter(name: str) -> Callable | None:
    """What begins a run there, of its directory, settings and first step; None for none."""
    if name == "none":
        return None
    module, begin = REPORTERS[name]
    try:
        return functools.partial(begin, importlib.import_module(module))
    except ImportError as error:
        missing = f"--report_to {name}: the package is not installed; pip install {name}, or leave it out"
        raise ValueError(missing) from error


def summarize(sums: Counter, ranks: Ranks, peak: float | None) -> dict:
    """Metrics of the steps since the last line of the log, over all ranks."""
    total = dict(zip(SUMS, ranks.sum(*(sums[name] for name in SUMS))))
    seconds = total["seconds"] / ranks.world_size
    metrics = {
        "loss": total["loss"] / max(1, total["denominator"]),
        "tokens_per_second": total["tokens"] / seconds,
        "tokens_per_second_per_process": total["tokens"] / seconds / ranks.world_size,
        "supervised_tokens_per_second": total["supervised"] / seconds,
        "tokens": total["tokens"],
        "supervised_tokens": total["supervised"],
    }
    if total["ar_weight"]:
        metrics["ar_loss"] = total["ar_loss"] / total["ar_weight"]
    if peak:  # model FLOPs utilization: the share of what the devices could have done that the steps needed
        metrics["mfu"] = total["flops"] / seconds / (peak * ranks.world_size)
    if ranks.device.type == "cuda":
        metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    elif resource is not None:  # of the whole process; in bytes on macOS, in kilobytes elsewhere
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        metrics["peak_memory_gb"] = resident * (1 if sys.platform == "darwin" else 1024) / 1e9
    return metrics


def describe(args, model: LanguageModel, about_data: str, steps: int, ranks: Ranks) -> str:
    """The first lines of a run. args: train.Settings."""
    config, dtype, learnt = model.config, args.computes_in(ranks.device, model.size), trained(model)
    size = f"{model.size:,} parameters" + (f" ({learnt:,} of them trained)" if learnt < model.size else "")
    shift = ", right shift" if config.right_shift and config.objective != "ar" else ""
    block = f", block length {args.block_size or config.block_length}" if config.objective == "bd3lm" else ""
    block += f", causal context, AR loss x {args.beside(config):g}" if args.beside(config) else ""
    where = f"{ranks.world_size} x {ranks.device.type} ({args.parallel})" if ranks.world_size > 1 else ranks.device.type
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size
    length = args.pad_to or args.max_length
    state, activations = memory(args, model, ranks)
    most = f"{args.max_minutes:g} minutes, at most " if args.max_minutes else ""
    return (
        f"model  {args.model_name_or_path}: {config.model_type}, {size}, as {config.objective}"
        f"{block}{shift}, on {where}{', layers compiled' if args.compiles_on(ranks.device) else ''}\n"
        f"data   {about_data}\n"
        f"run    {most}{steps:,} steps of {rows:,} rows, {'' if args.stage == 'pt' else 'at most '}{rows * length:,} "
        f"tokens; {args.optim}, learning rate {args.learning_rate:g}, computed in {str(dtype).removeprefix('torch.')}\n"
        f"memory {state / 1e9:.2f} GB a process for weights, gradients and optimizer; about {activations / 1e9:.2f} GB "
        f"for activations, by count, with rows of {length} tokens"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a training step costs

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 by device name (NVIDIA's data sheets)


def forward_flops(config: Config, tokens: int, rows: int, pairs: int) -> int:
    """FLOPs of the matrix products of a forward, 2 a multiply-add; a training step takes three times as many.

        2 * P * tokens            P: weights of the layers' matrices; tokens: those fed, of BD3LM's two streams both
        2 * (V * D + P') * rows   rows: the predictions that are made; the head, and the last layer's P' after attention
        4 * L * H * C * pairs     scores and weighted values; pairs: (query, key)

    Embedding, norms, softmax, rotation and optimizer are not counted.
    """
    D, C, inner = config.hidden_size, config.head_dim, config.intermediate_size
    H, G, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    weights = L * (2 * D * H * C + 2 * D * G * C + 3 * D * inner)
    last = H * C * D + 3 * D * inner
    return 2 * (weights - last) * tokens + 2 * (config.vocab_size * D + last) * rows + 4 * L * H * C * pairs


def train_flops(config: Config, layout: Layout, rows: int) -> int:
    """FLOPs of a training step on `layout`, forward 1 part and backward 2 parts; of the pairs, those that see each
    other."""
    tokens = layout.position.numel()
    frozen = 0 if config.adapter is None else forward_flops(config, tokens, rows, 0)  # weights without a gradient
    return 3 * forward_flops(config, tokens, rows, visible_pairs(layout)) - frozen


def visible_pairs(layout: Layout) -> int:
    """How many (query, key) of the rows see each other, as model.visible has it, without a matrix of them."""
    # A document of a row, and a block in it, as one number: blocks of a document follow each other. All are at least 0
    row, blocks = torch.arange(len(layout.block))[:, None], int(layout.block.max()) + 2
    document = (row * (int(layout.document.max()) + 3) + layout.document + 2) * blocks
    place, noisy = document + layout.block + 1, layout.noisy > 0

    # Noisy tokens see their block of their copy. All see the clean ones of their document up to a block, theirs or, if
    # they are noisy, the one before: where these stand in order says how many they are
    copies = (place * (int(layout.noisy.max()) + 1) + layout.noisy)[noisy]
    alike = copies.unique(return_counts=True)[1]
    clean = place[~noisy].sort().values
    seen = torch.searchsorted(clean, place - noisy.long(), right=True) - torch.searchsorted(clean, document)
    return int(alike.square().sum() + seen.sum())


def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second that the device could do at most; None: not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def memory(args, model: LanguageModel, ranks: Ranks) -> tuple[float, float]:
    """Bytes that a process of a run takes, but for what is small: (weights, gradients and optimizer; activations)."""
    config, dtype = model.config, args.computes_in(ranks.device, model.size)
    streams = 2 if config.objective == "bd3lm" else 1
    fed = args.per_device_train_batch_size * (args.pad_to or args.max_length) * streams * (1 + args.complementary_masks)
    activations = activation_bytes(config, fed, dtype.itemsize, args.checkpoint_activations)
    if args.lora_dropout and args.checkpoint_activations == "none":  # what LoRA's products see, and which part that is
        seen = sum(module.in_features for module in model.modules() if isinstance(module, LoRALinear))
        activations += fed * seen * (dtype.itemsize + 1)
    return state_bytes(args, model, ranks, dtype), activations


def check_memory(args, model: LanguageModel, ranks: Ranks) -> None:
    """ValueError where a CPU run needs more memory than is free, its float32 weights being there: the kernel would end
    it without a word. Linux alone tells."""
    known = Path("/proc/meminfo")
    if ranks.device.type == "cpu" and known.exists():
        free = 1024 * int(known.read_text().partition("MemAvailable:")[2].split()[0])
        state, activations = memory(args, model, ranks)
        if (needed := state - 4 * model.size + activations) > free:
            raise ValueError(
                f"a process needs about {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB of memory are free; lower "
                "--per_device_train_batch_size or --max_length, or pass --checkpoint_activations full"
            )


def trained(model: LanguageModel) -> int:
    """Parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def state_bytes(args, model: LanguageModel, ranks: Ranks, dtype: torch.dtype) -> float:
    """Bytes that a process keeps: every weight, and of those that are trained the gradient and one or two moments, in
    float32, or its share of them where they are sharded."""
    size = 4 * model.size + (8 if args.optim == "muon" else 12) * trained(model)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size /= {"ddp": 1, "hybrid": local}.get(args.parallel, ranks.world_size)
    if ranks.world_size > 1 and args.parallel == "zero2":
        size += dtype.itemsize * model.size  # the weights as gathered
    if ranks.world_size > 1 and args.parallel != "ddp" and args.gradient_accumulation_steps > 1:
        # The sum of the gradients so far, which is sharded at last.
        size += getattr(torch, args.reduce_dtype).itemsize * trained(model)
    return size


def activation_bytes(config: Config, tokens: int, itemsize: int, recompute: str = "none") -> int:
    """Bytes of activations that a forward of `tokens` keeps for the backward pass, `itemsize` a number: of every layer
    what its norms, products, attention and MLP read. recompute: train.py's --checkpoint_activations; with `selective`
    a layer's input and the outputs of products and attention are kept, with `full` a layer's input."""
    D, C, inner = config.hidden_size, config.head_dim, config.intermediate_size
    q, k = config.num_attention_heads * C, config.num_key_value_heads * C
    normed = q + k if config.family.qk_norm else 0
    layer = {
        "none": 4 * D + normed + 2 * (q + k) + 4 * inner,
        "selective": 3 * D + 2 * (q + k) + 2 * inner,
        "full": D,
    }
    return itemsize * tokens * config.num_hidden_layers * layer[recompute]


# ---------------------------------------------------------------------------------------------------------------------
# Training curves

CURVES = {  # metric of metrics.jsonl: its axis
    "loss": "training loss",
    "eval_loss": "evaluated bound, nats per token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
AS_AR = {"loss": "ar_loss", "eval_loss": "eval_ar_loss"}  # of the AR side, where it has a loss of its own


def past_rows(directory: Path) -> list[dict]:
    """The rows of the metrics.jsonl there, if there is one."""
    file = directory / METRICS
    return read_rows(file) if file.is_file() else []


def read_rows(file: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without a last line that is still being written; ValueError for a damaged one."""
    rows = []
    for n, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line.decode()))
            if type(rows[-1]["step"]) is not int:
                raise TypeError("no step")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            shown = line.decode(errors="replace")[:40]
            raise ValueError(f"{file}, line {n}: {shown!r} is no row of a run's log; remove it") from error
    return rows


def read_runs(directories: list[str | Path]) -> dict[str, list[dict]]:
    """Of each run its name, for `curves`, and the rows of its metrics.jsonl.

    A name is as much of the end of the directory's path as tells it from the others. Raises FileNotFoundError where a
    directory holds no run, ValueError where one occurs twice or a line is damaged; a last line that is still being
    written is left out.
    """
    paths = [Path(directory).resolve() for directory in directories]
    runs = {}
    for directory, path in zip(directories, paths):
        file = path / METRICS
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no {METRICS}; expected the --output_dir of a run of train.py")
        # The name: the fewest last parts of the path that no other path ends in.
        endings = (path.parts[-n:] for n in range(1, len(path.parts)))
        name = next((end for end in endings if sum(other.parts[-len(end) :] == end for other in paths) == 1), None)
        if name is None:
            raise ValueError(f"{directory} is named twice; name each run once")
        runs["/".join(name)] = read_rows(file)
    return runs


def page(name: str, rows: list[dict], picture: bytes) -> str:
    """A run's curves.png and, of the rows of its metrics.jsonl, the samples, as a page that needs nothing else."""
    lines, prompt = [], None
    for row in (row for row in rows if "sample" in row):
        if row["sample_prompt"] != prompt:
            prompt = row["sample_prompt"]
            lines.append(f'<tr><th colspan="3">{html.escape(printable(prompt))}</th></tr>')
        step, bound, text = row["step"], row["eval_loss"], html.escape(printable(row["sample"]))
        lines.append(f"<tr><td>{step:,}</td><td>{bound:.4f}</td><td>{text}</td></tr>")
    name, table, image = html.escape(name), "\n".join(lines), base64.b64encode(picture).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }} img {{ max-width: 100% }}
th, td {{ padding: 2px 1em 2px 0; text-align: left; vertical-align: top; white-space: pre-wrap }}
td {{ overflow-wrap: anywhere }}
</style></head><body><h1>{name}</h1>
<img alt="curves" src="data:image/png;base64,{image}">
<table><tr><th>step</th><th>bound, nats per token</th><th>sample</th></tr>
{table}
</table></body></html>
"""


def curves(runs: dict[str, list[dict]], path: str | Path | io.BytesIO) -> None:
    """A .png of four axes, a line for each of `runs`: its name, and the rows of its metrics.jsonl (`read_runs`).

    A run has one colour in all four; where it has nothing of a metric, it has no line there. What the AR side of it
    loses is dashed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):  # which decides what ticks have room for one
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    named = {}  # name: a line of it
    for panel, (metric, label) in zip(axes.flat, CURVES.items()):
        for n, (name, rows) in enumerate(runs.items()):
            for of, dashes in ((metric, "-"), (AS_AR.get(metric), "--")):
                points = [(row["step"], row[of]) for row in rows if of in row]
                if points:
                    style = {"color": f"C{n}", "linewidth": 1.2, "marker": "." if len(points) < 60 else ""}
                    (line,) = panel.plot(
                        *zip(*points), dashes, label=name if of == metric else f"{name}, as ar", **style
                    )
                    named.setdefault(name, line)
        dashed = any(line.get_linestyle() == "--" for line in panel.lines)
        panel.set_xlabel("step")
        panel.set_title(f"{label}{'; dashed: as ar' if dashed else ''}", fontsize=10, loc="left")
        panel.grid(alpha=0.3)
        if metric in ("loss", "eval_loss", "grad_norm") and panel.lines:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(PlainNumbers())
            panel.yaxis.set_minor_formatter(PlainNumbers())
    if len(runs) > 1 and named:
        figure.legend(handles=[named[name] for name in runs if name in named], loc="outside upper center", ncols=3)
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)

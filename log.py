"""What a run of training tells: the cost of its steps, its log and its curves."""

import json
from pathlib import Path

from model import Config, Layout, visible

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


def kept_bytes(config: Config, tokens: int, itemsize: int, recompute: str = "none") -> int:
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


def train_flops(config: Config, layout: Layout, rows: int) -> int:
    """FLOPs of a training step on `layout`, forward 1 part and backward 2 parts; of the pairs, those that see each
    other. All rows of `layout` are taken to be like the first."""
    first = layout.map(lambda field: field[:1])
    pairs = visible(first.map(lambda field: field[:, :, None]), first.map(lambda field: field[:, None, :])).sum()
    return 3 * forward_flops(config, layout.position.numel(), rows, layout.position.shape[0] * int(pairs))


# ---------------------------------------------------------------------------------------------------------------------
# Training curves

METRICS = "metrics.jsonl"  # of a run of train.py: a row a log, and one an evaluation
CURVES = {  # metric of metrics.jsonl: its axis
    "loss": "training loss",
    "eval_loss": "evaluated bound, nats per token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}


def read_runs(directories: list[str | Path]) -> dict[str, list[dict]]:
    """Of each run its name, for `curves`, and the rows of its metrics.jsonl.

    A name is as much of the end of the directory's path as tells it from the others. Raises FileNotFoundError where a
    directory holds no run, ValueError where one occurs twice or a line is damaged; a last line that is still being
    written is left out.
    """
    places = [Path(directory).resolve() for directory in directories]
    runs = {}
    for directory, place in zip(directories, places):
        file = place / METRICS
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no {METRICS}; expected the --output_dir of a run of train.py")
        length = next((n for n in range(1, len(place.parts)) if _alike(place, places, n) == 1), None)
        if length is None:
            raise ValueError(f"{directory} is named twice; name each run once")
        rows = []
        for n, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {n}: {line[:40]!r} is no row of a run's log; remove it") from error
        runs["/".join(place.parts[-length:])] = rows
    return runs


def _alike(place: Path, places: list[Path], length: int) -> int:
    """How many of `places` end in the same `length` parts as `place`."""
    return sum(other.parts[-length:] == place.parts[-length:] for other in places)


def curves(runs: dict[str, list[dict]], path: str | Path) -> None:
    """A .png of four axes, a line for each of `runs`: its name, and the rows of its metrics.jsonl (`read_runs`).

    A run has one colour in all four; where it has nothing of a metric, it has no line there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    named = {}  # name: a line of it
    for panel, (metric, label) in zip(axes.flat, CURVES.items()):
        for n, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                style = {"color": f"C{n}", "linewidth": 1.2, "marker": "." if len(points) < 60 else ""}
                named[name] = panel.plot(*zip(*points), label=name, **style)[0]
        panel.set_xlabel("step")
        panel.set_title(label, fontsize=10, loc="left")
        panel.grid(alpha=0.3)
        if metric in ("loss", "eval_loss", "grad_norm") and panel.lines:
            panel.set_yscale("log")
    if len(runs) > 1 and named:
        figure.legend(handles=[named[name] for name in runs if name in named], loc="outside upper center", ncols=3)
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)

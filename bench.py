"""Every figure the README quotes, by one command: `python bench.py train`.

Each table compares ours with a plain implementation that does the same work in the obvious way and wastes nothing else,
in the same run: two fresh processes, so that peak memory is each one's own, that take their steps in turn, so that a
machine that drifts drifts for both.

FLOPs are those of the matrix products, as model.train_flops counts them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from diffusion import Batch, bd3lm_example, draw_noise, loss, loss_weight, mdlm_example
from model import PEAK_FLOPS, Config, LanguageModel, train_flops

# family, vocabulary, hidden, intermediate, layers, heads, key/value heads, head_dim
MODELS = {
    "tiny": Config(),
    "mid": Config("qwen3", 151_936, 256, 768, 4, 4, 2, 64),
    "qwen3-0.6b": Config("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, max_position_embeddings=40_960),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def peak_memory(device: str, reset: bool = False) -> int:
    """Bytes: the process's largest resident set (cuda: allocated memory), since the last reset if one is possible."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:  # not Linux, or not permitted: the peak since the process began, which a step exceeds
            pass
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def plain_loss(model, example, batch, noise, device: str) -> torch.Tensor:
    """The loss of `example` from the logits of every position fed, in torch's own functions."""
    T = batch.tokens.shape[1]
    logits = model(example.tokens, example.layout)  # (B, T, V), two streams: (B, 2T, V)
    logits = logits[:, :T].flatten(0, 1)
    entropy = F.cross_entropy(logits, batch.tokens.flatten().to(device), reduction="none")  # (B*T,)
    weights = loss_weight(noise.level, "scheduler") * noise.masked
    return (entropy * weights.flatten().to(device)).sum() / example.denominator


def train_case(args, objective: str, way: str) -> None:
    """One process: a line of JSON when ready, one after each step that a line on stdin asks for, one at the end."""
    device, config = args.device, MODELS[args.model]
    B, T, mask_id = args.batch, args.length, config.vocab_size - 1
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.init_weights()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    data = torch.randint(mask_id, (B, T))
    everything, zeros = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int64)

    def step(number: int):
        """(the mean loss, the example it is of) of a whole training step."""
        sample = number * B + torch.arange(B)
        batch = Batch(data, everything, zeros, torch.arange(T).expand(B, T), sample)
        block_length = args.block_size if objective == "bd3lm" else None
        noise = draw_noise(batch, block_length=block_length)
        if objective == "bd3lm":
            example = bd3lm_example(batch, noise, mask_id=mask_id, block_length=block_length)
        else:
            example = mdlm_example(batch, noise, mask_id=mask_id)
        example = example.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if way == "ours":
                total, denominator = loss(model, example)
                mean = total / denominator
            else:
                mean = plain_loss(model, example, batch, noise, device)
        mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean.detach(), example

    before = peak_memory(device, reset=True)
    print(json.dumps({}), flush=True)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        mean, example = step(number)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rows = int((example.weights > 0).sum()) if way == "ours" else example.tokens.numel()
        flops = train_flops(config, example.layout, rows)
        print(json.dumps({"seconds": seconds, "loss": mean.item(), "flops": flops}), flush=True)
    print(json.dumps({"memory": peak_memory(device) - before}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(arguments: list[str], objective: str, warmup: int, steps: int) -> dict:
    """{way: {seconds, loss, flops (each a list over the timed steps), memory}} of the two ways, a step each in turn."""

    def read(child) -> dict:
        line = child.stdout.readline()
        if not line:
            sys.exit(f"bench.py: the process of {objective} ended with status {child.wait()}; its output is above")
        return json.loads(line)

    children = {
        way: subprocess.Popen(
            [sys.executable, __file__, *arguments, "--case", objective, way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ("ours", "plain")
    }
    results = {way: read(child) | {"seconds": [], "loss": [], "flops": []} for way, child in children.items()}
    for number in range(warmup + steps):
        for way, child in children.items():
            child.stdin.write("step\n")
            child.stdin.flush()
            for name, value in read(child).items():
                if number >= warmup:
                    results[way][name].append(value)
    for way, child in children.items():
        child.stdin.close()
        results[way] |= read(child)
        child.wait()
    return results


def machine(device: str) -> dict:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    return {"cpu": cpu, "cores": cores, "gpu": gpu} | versions


def train(args, arguments: list[str]) -> dict:
    """Prints the table of training steps and returns its figures."""
    if args.case:
        return train_case(args, *args.case)
    where = machine(args.device)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in (where["gpu"] or "")), None)
    cuda = args.device == "cuda"
    precision, memory = ("bf16 autocast", "allocated memory") if cuda else ("fp32", "RSS")
    print(
        f"training step: {args.model}, batch {args.batch} x {args.length}, block {args.block_size}, {precision}, AdamW"
    )
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print(f"s/step: median [least, most] of {args.steps}; GB: peak {memory} above that before the first step")
    print("faster, memory: against plain, the median ratio of paired steps and the ratio of GB\n")
    share = "  MFU" if peak else ""
    print(f"{'':12}   s/step {'[least, most]':>16} tokens/s  GFLOP GFLOP/s{share}    GB  faster  memory")
    table = {}
    for objective in ("mdlm", "bd3lm"):
        ways = compare(arguments, objective, args.warmup, args.steps)
        ours, plain = ways["ours"], ways["plain"]
        for way, row in ways.items():
            seconds = row["seconds"]
            row["faster"] = statistics.median(b / a for a, b in zip(seconds, plain["seconds"]))
            row["memory_ratio"] = row["memory"] / plain["memory"]
            row["flops_per_second"] = sum(row["flops"]) / sum(seconds)
            row["tokens_per_second"] = args.batch * args.length / statistics.median(seconds)
            share = f" {row['flops_per_second'] / peak:4.0%}" if peak else ""
            print(
                f"{objective:6}{way:6} {statistics.median(seconds):8.3f} "
                f"{f'[{min(seconds):.3f}, {max(seconds):.3f}]':>16} {row['tokens_per_second']:8.0f} "
                f"{statistics.mean(row['flops']) / 1e9:6.0f} {row['flops_per_second'] / 1e9:7.0f}{share} "
                f"{row['memory'] / 1e9:5.2f} {row['faster']:6.2f}x {row['memory_ratio']:7.2f}"
            )
        # Two ways that do not compute the same have no ratio; autocast rounds to 8 bits.
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours["loss"], plain["loss"]))
        if apart > (2e-2 if cuda else 1e-4):
            sys.exit(f"bench.py: the two ways' {objective} losses differ: {ours['loss']} and {plain['loss']}")
        table[objective] = ways
    if cuda and not peak:
        print(f"no MFU: the peak of {where['gpu']} is not in model.py's PEAK_FLOPS")
    return {"machine": where, "train": table}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures ours against a plain implementation in the same run.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "train",
        help="the training step of mdlm and bd3lm",
        description="Time and memory of the training step of mdlm and bd3lm: forward, backward, optimizer, noise. Two "
        "processes at a time hold a model each. On cuda nothing has been measured yet.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.set_defaults(function=train)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: fp32; cuda: bf16 autocast")
    p.add_argument("--model", choices=list(MODELS), default="mid", help="the model's shape; its weights are random")
    p.add_argument("--batch", type=int, default=4, help="rows")
    p.add_argument("--length", type=int, default=256, help="tokens of a row")
    p.add_argument("--block_size", type=int, default=32, help="tokens of a block of bd3lm")
    p.add_argument("--steps", type=int, default=5, help="timed steps of each way")
    p.add_argument("--warmup", type=int, default=1, help="steps before them")
    p.add_argument("--output", metavar="FILE.json", help="also write the figures here")
    p.add_argument("--case", nargs=2, metavar=("OBJECTIVE", "WAY"), help=argparse.SUPPRESS)  # one of the processes
    args = parser.parse_args(arguments)
    for name in ("batch", "length", "block_size", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.warmup < 0:
        parser.error(f"--warmup {args.warmup}: expected at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    figures = args.function(args, arguments)
    if figures and args.output:
        settings = {name: value for name, value in vars(args).items() if name not in ("function", "output", "case")}
        with open(args.output, "w") as file:
            json.dump({"settings": settings, **figures}, file, indent=1)
        print(f"figures written to {args.output}")


if __name__ == "__main__":
    main(sys.argv[1:])

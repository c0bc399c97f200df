"""Measures nanoA2D against a plain implementation in the same run, for every figure of docs/measured.md.

  python bench.py train       the training step of mdlm and bd3lm: time and memory
  python bench.py sample      greedy decoding with mdlm and bd3lm
  python bench.py likelihood  scoring multiple-choice requests
  python bench.py load        loading a checkpoint, and each program's --help
  python bench.py curves      no measurement: the curves of several runs in one picture

python bench.py TABLE --help has a table's flags. On cuda nothing has been measured yet.

The plain implementation does the same work in the obvious way and wastes nothing else. Each of the two ways is a fresh
process, so that peak memory is its own, and they take their steps in turn, so that a machine that drifts drifts for
both. Two ways whose results differ have no ratio: the program then ends with status 1.

FLOPs are those of the matrix products (log.forward_flops, and three times that for a training step).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import safetensors.torch
import torch
import torch.nn.functional as F

import graphs
import log
import lora
import parallel
from checkpoint import load_config, load_model, save_model
from cli import compile_layers, one_line_errors, prepare
from diffusion import Batch, bd3lm_example, denoise, draw_noise, loss, loss_weight, mdlm_example
from files import check_file, replacing_file
from likelihood import log_likelihood
from log import PEAK_FLOPS, forward_flops, train_flops
from model import Config, KVCache, LanguageModel, Layout
from options import Count, Natural, Options, Rows, Tokens, Words, flags

# family, vocabulary, hidden, intermediate, layers, heads, key/value heads, head_dim
MODELS = {
    "tiny": Config(),
    "mid": Config("qwen3", 151_936, 256, 768, 4, 4, 2, 64),
    "smollm2-135m": Config("llama", 49_152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192, rope_theta=1e5),
    "qwen3-0.6b": Config("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, max_position_embeddings=40_960),
}


# ---------------------------------------------------------------------------------------------------------------------
# Options: a class for each table


@dataclass(kw_only=True)
class Machine(Options):
    "what is measured, and on what"

    device: Literal["cpu", "cuda"] = "cpu"  # cpu: fp32, where nothing else is said; cuda: bf16
    model: Literal[*MODELS] = "mid"  # the model's shape; its weights are random

    def __post_init__(self):
        super().__post_init__()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")


@dataclass(kw_only=True)
class Blocks(Options):
    "what is measured, and on what"

    block_size: Tokens = 32  # tokens of a block of bd3lm, and of mdlm's decoding


@dataclass(kw_only=True)
class Layers(Options):
    "what is measured, and on what"

    torch_compile: bool = False  # compile the layers: a minute at the start, fewer kernels after it (for cuda)


@dataclass(kw_only=True)
class Output(Options):
    "output"

    output: Annotated[str, "FILE.json"] | None = None  # also write the figures here (default: print them alone)
    overwrite: bool = False  # replace a file of that name


@dataclass(kw_only=True)
class Train(Machine, Blocks, Layers, Output):
    """Time and memory of the training step of mdlm and bd3lm: forward, backward, optimizer, noise. Then the time of a
    step with causal context and the AR loss against one with block context, and time and memory of one with LoRA,
    mdlm's, with the defaults of train.py, against one that trains all weights.

    Two processes at a time hold a model each."""

    prog: ClassVar[str] = "bench.py train"
    batch: Rows | None = None  # rows (default: 4; of a model of more than 10 layers 1)
    length: Tokens = 256  # tokens of a row
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """of the matrix products; weights and optimizer are float32 (default: on cuda bfloat16; else float32, then bfloat16
    if the CPU has instructions for it)"""
    steps: Count = 3  # timed steps of each way
    warmup: Natural = 1  # steps before them; 4 where the layers are compiled

    def __post_init__(self):
        super().__post_init__()
        self.batch = self.batch or (4 if MODELS[self.model].num_hidden_layers <= 10 else 1)

    @property
    def dtypes(self) -> list[str]:
        if self.compute_dtype is not None:
            return [self.compute_dtype]
        both = self.device != "cuda" and parallel.has_bfloat16()
        return ["float32", "bfloat16"] if both else ["bfloat16" if self.device == "cuda" else "float32"]


@dataclass(kw_only=True)
class Sample(Machine, Blocks, Layers, Output):
    """Time of greedy decoding with mdlm and bd3lm, and of a forward of speculation.

    plain: logits of every position, no cache for mdlm, the prefix encoded anew for every block of bd3lm. Speculation is
    compared with ar, after the first forward, that of the prompt. How many of its drafts are right says nothing with
    random weights; the time of a forward does not depend on it."""

    prog: ClassVar[str] = "bench.py sample"
    batch: tuple[Rows, ...] = (1, 4)  # rows, one measurement each
    prompt_tokens: Tokens = 64  # tokens of the longest prompt
    new_tokens: Tokens = 128  # tokens to generate, a multiple of the block size
    steps: Count = 128  # forwards for them, so many that each block has a whole number
    warmup: Natural = 2  # forwards before the timed ones
    speculate: Count = 8  # tokens of a draft
    only: Literal["mdlm", "bd3lm", "speculation"] | None = None  # measure this alone (default: all three)

    def __post_init__(self):
        super().__post_init__()
        if self.new_tokens % self.block_size:
            raise ValueError(f"--new_tokens {self.new_tokens}: expected a multiple of the block size {self.block_size}")
        if self.new_tokens % self.steps or self.steps * self.block_size % self.new_tokens:
            raise ValueError(
                f"--steps {self.steps}: expected to divide {self.new_tokens} tokens, and evenly over their blocks"
            )


@dataclass(kw_only=True)
class Likelihood(Machine, Blocks, Output):
    """Time of scoring multiple-choice requests with mdlm and bd3lm: one-token answers, as of MMLU, and longer ones."""

    prog: ClassVar[str] = "bench.py likelihood"
    requests: Count = 256  # answers to score; every question has 4
    runs: Count = 1  # timed runs of each way

    def __post_init__(self):
        super().__post_init__()
        if self.requests % 4:
            raise ValueError(f"--requests {self.requests}: expected a multiple of 4, the answers to a question")


@dataclass(kw_only=True)
class Load(Machine, Output):
    """Time and memory of loading a checkpoint, and the time each program's --help takes.

    plain: the model made, the whole file read, then copied in."""

    prog: ClassVar[str] = "bench.py load"
    model: Literal[*MODELS] = "qwen3-0.6b"
    path: Annotated[str, "DIR"] | None = None
    """load this directory instead (default: random weights, in a temporary directory)"""
    runs: Count = 3  # fresh processes of each


@dataclass(kw_only=True)
class Curves(Options):
    """Loss, bound, learning rate and gradient norm of several runs in one picture."""

    prog: ClassVar[str] = "bench.py curves"
    runs: Annotated[Words, "RUN"]  # an --output_dir of train.py
    picture: Annotated[str, "FILE.png"] = "curves.png"  # the file to write
    overwrite: bool = False  # replace a file of that name


# ---------------------------------------------------------------------------------------------------------------------
# Two processes, a step each in turn


def compare(arguments: list[str], case: str, ways: tuple[str, ...], warmup: int, steps: int) -> dict:
    """{way: what its process said}: lists over the timed steps, and what it said at its end."""

    def read(child) -> dict:
        line = child.stdout.readline()
        if not line:
            sys.exit(f"bench.py: the process of {case} ended with status {child.wait()}; its output is above")
        return json.loads(line)

    children = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--case", case, way, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    }
    results = {}
    for way, child in children.items():  # one after the other: what comes before the first step is not disturbed
        read(child)
        results[way] = {}
    for number in range(warmup + steps):
        for way, child in children.items():
            child.stdin.write("step\n")
            child.stdin.flush()
            for name, value in read(child).items():
                if number >= warmup:
                    results[way].setdefault(name, []).append(value)
    for way, child in children.items():
        child.stdin.close()
        results[way] |= read(child)
        child.wait()
    return results


def serve(args, step, end=dict) -> None:
    """The other side of `compare`: a line when ready, one for each step asked for, one at the end.

    step(number) -> what to say of it; end() -> what to say of all. Seconds and the peak of memory are added here.
    """
    before = peak_memory(args.device, reset=True)
    print(json.dumps({}), flush=True)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        said = step(number)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds} | {name: value() for name, value in said.items()}), flush=True)
    print(json.dumps({"memory": peak_memory(args.device) - before} | end()), flush=True)


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


def matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of this machine on one large product of matrices: the best of six."""
    n = 8192 if device == "cuda" else 2048
    x = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def heading(args, title: str) -> dict:
    """Prints what is measured on what; returns the machine."""
    where = machine(args.device)
    print(title)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    return where


def random_model(args, **declared) -> LanguageModel:
    """A model of the shape asked for, with random weights, in evaluation mode: fp32, cuda: bf16."""
    config = MODELS[args.model]
    config = replace(config, mask_token_id=config.vocab_size - 1, right_shift=False, **declared)
    model = LanguageModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The training step


def plain_loss(model, example, batch, noise, device: str) -> torch.Tensor:
    """The loss of `example` from the logits of every position fed, in torch's own functions."""
    T = batch.tokens.shape[1]
    logits = model(example.tokens, example.layout)  # (B, T, V), two streams: (B, 2T, V)
    logits = logits[:, :T].flatten(0, 1)
    entropy = F.cross_entropy(logits, batch.tokens.flatten().to(device), reduction="none")  # (B*T,)
    weights = loss_weight(noise.level, "scheduler") * noise.masked
    return (entropy * weights.flatten().to(device)).sum() / example.denominator


def train_case(args: Train, case: str, way: str) -> None:
    objective, dtype = case.split("-")
    device, config = args.device, MODELS[args.model]
    B, T, mask_id = args.batch, args.length, config.vocab_size - 1
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.init_weights()
    model.to(device)
    model.compute_dtype = None if dtype == "float32" else torch.bfloat16
    if way == "lora":
        config.mask_token_id = mask_id
        lora.adapt(model.train(), lora.Adapting(lora=True), ".", 0).to(device)
    if args.torch_compile:  # both ways: the layers are the same, the comparison is of what is around them
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    data = torch.randint(mask_id, (B, T))
    everything, zeros = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.int64)

    def step(number: int) -> dict:
        sample = number * B + torch.arange(B)
        batch = Batch(data, everything, zeros, torch.arange(T).expand(B, T), sample)
        block_length = args.block_size if objective == "bd3lm" else None
        noise = draw_noise(batch, block_length=block_length)
        if objective == "bd3lm":
            beside = {"causal": True, "ar_weight": 0.3} if way == "causal" else {}
            example = bd3lm_example(batch, noise, mask_id=mask_id, block_length=block_length, **beside)
        else:
            example = mdlm_example(batch, noise, mask_id=mask_id)
        example = example.to(device)
        if way != "plain":
            total, denominator = loss(model, example)
            mean = total / denominator
        else:
            mean = plain_loss(model, example, batch, noise, device)
        mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = mean.detach()

        def flops() -> int:
            rows = int((example.weights > 0).sum()) if way != "plain" else example.tokens.numel()
            return train_flops(config, example.layout, rows)

        return {"loss": mean.item, "flops": flops}

    serve(args, step)


def train(args: Train, arguments: list[str]) -> dict:
    """Prints the table of training steps and returns its figures."""
    cuda = args.device == "cuda"
    shape = f"{args.model}, batch {args.batch} x {args.length}, block {args.block_size}"
    where = heading(args, f"training step: {shape}, products in {' and '.join(args.dtypes)}, AdamW in float32")
    known = next((flops for name, flops in PEAK_FLOPS.items() if name in (where["gpu"] or "")), None)
    source = "this machine's best at one large product of matrices, just now"
    source = f"the peak of {where['gpu']} in bfloat16" if known else source
    peaks = {dtype: matmul_flops(args.device, dtype) for dtype in args.dtypes}
    peaks |= {"bfloat16": known} if known else {}
    shown = ", ".join(f"{dtype} {peak / 1e9:,.0f}" for dtype, peak in peaks.items())
    memory = "allocated memory" if cuda else "RSS"
    print(f"s/step: median [least, most] of {args.steps}; GB: peak {memory} above that before the first step")
    print(f"MFU: of GFLOP/s {shown}, {source}")
    print("faster, memory: against plain, the median ratio of paired steps and the ratio of GB\n")
    print(f"{'':21}   s/step {'[least, most]':>16} tokens/s  GFLOP GFLOP/s  MFU    GB  faster  memory")
    table = {}
    for case in (f"{objective}-{dtype}" for dtype in args.dtypes for objective in ("mdlm", "bd3lm")):
        objective, dtype = case.split("-")
        ways = compare(arguments, case, ("ours", "plain"), args.warmup, args.steps)
        ours, plain = ways["ours"], ways["plain"]
        for way, row in ways.items():
            seconds = row["seconds"]
            row["faster"] = statistics.median(b / a for a, b in zip(seconds, plain["seconds"]))
            row["memory_ratio"] = row["memory"] / plain["memory"]
            row["flops_per_second"] = sum(row["flops"]) / sum(seconds)
            row["tokens_per_second"] = args.batch * args.length / statistics.median(seconds)
            row["mfu"] = row["flops_per_second"] / peaks[dtype]
            print(
                f"{objective:6}{dtype:9}{way:6} {statistics.median(seconds):8.3f} "
                f"{f'[{min(seconds):.3f}, {max(seconds):.3f}]':>16} {row['tokens_per_second']:8.0f} "
                f"{statistics.mean(row['flops']) / 1e9:6.0f} {row['flops_per_second'] / 1e9:7.0f} {row['mfu']:4.0%} "
                f"{row['memory'] / 1e9:5.2f} {row['faster']:6.2f}x {row['memory_ratio']:7.2f}"
            )
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours["loss"], plain["loss"]))
        if not apart <= (1e-4 if dtype == "float32" else 2e-2):  # NaN is no agreement; bfloat16 has 8 bits
            sys.exit(f"bench.py: the two ways' {case} losses differ: {ours['loss']} and {plain['loss']}")
        table[case] = ways

    print()
    for dtype in args.dtypes:
        ways = compare(arguments, f"bd3lm-{dtype}", ("causal", "ours"), args.warmup, args.steps)
        ways["times"] = statistics.median(a / b for a, b in zip(*(ways[way]["seconds"] for way in ("causal", "ours"))))
        print(f"bd3lm {dtype}: with causal context and the AR loss {ways['times']:.2f} times the step of block context")
        table[f"context-{dtype}"] = ways
        ways = table[f"lora-{dtype}"] = compare(arguments, f"mdlm-{dtype}", ("lora", "ours"), args.warmup, args.steps)
        ways["times"] = statistics.median(a / b for a, b in zip(*(ways[way]["seconds"] for way in ("lora", "ours"))))
        ways["memory_ratio"] = ways["lora"]["memory"] / ways["ours"]["memory"]
        print(f"mdlm {dtype}: with LoRA {ways['times']:.2f} times the step, {ways['memory_ratio']:.2f} of its memory")
    return {"machine": where, "peak_flops": peaks, "train": table}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@torch.no_grad()
def plain_denoise(model, prompts: list[list[int]], n: int, steps: int, K: int):
    """The canvas (B, T) after each forward: `denoise`'s greedy decoding with blocks that begin where prompts end.

    Logits of every position of every step, no cache for mdlm; for bd3lm the prefix is encoded anew for every block.
    """
    config, device = model.config, model.head_weight.device
    B, T = len(prompts), max(map(len, prompts)) + n
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    column = torch.arange(T, device=device).expand(B, T)
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    masked = (column >= lengths[:, None]) & (column < lengths[:, None] + n)
    tokens[masked] = config.mask_token_id
    document = torch.where(column < lengths[:, None] + n, 0, -1)
    cached = config.objective == "bd3lm"
    layout = Layout.of(column, None if (document == 0).all() else document)
    if cached:
        layout = Layout.of(column, document, K, -lengths % K)

    def at(columns):
        return layout.map(lambda field: field.gather(1, columns))

    for begin in range(0, n, K):
        columns = lengths[:, None] + torch.arange(begin, min(begin + K, n), device=device)  # (B, K)
        if cached:
            cache = KVCache(config, B, T + 1, dtype=model.head_weight.dtype, device=device)
            P = int(lengths.max()) + begin
            prefix = at(column[:, :P])
            inside = column[:, :P] < lengths[:, None] + begin
            prefix = prefix._replace(document=torch.where(inside, prefix.document, -1))
            to = torch.where(inside, column[:, :P], T)
            unread = torch.empty(0, dtype=torch.int64, device=device)
            model(tokens[:, :P], prefix, cache=cache, columns=to, index=unread)
        for _ in range(steps * K // n):
            if cached:
                logits = model(tokens.gather(1, columns), at(columns), cache=cache, columns=columns)
            else:
                logits = model(tokens, layout)  # (B, T, V)
            p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
            p[..., config.mask_token_id] = 0.0  # never chosen, though its share counts
            p, token = p.max(dim=-1)
            if not cached:
                p, token = p.gather(1, columns), token.gather(1, columns)
            p = p.masked_fill(~masked.gather(1, columns), -torch.inf)
            chosen = p.topk(n // steps, dim=1).indices
            places = columns.gather(1, chosen)
            tokens.scatter_(1, places, token.gather(1, chosen))
            masked.scatter_(1, places, False)
            yield tokens


def sample_case(args: Sample, case: str, way: str) -> None:
    objective, batch = case.split("-")
    declared = {"objective": objective, "block_length": args.block_size if objective == "bd3lm" else None}
    if objective == "ar":  # which speculation makes the same tokens as
        declared["context"] = "causal"
    model = random_model(args, **declared)
    config, generator = model.config, torch.Generator().manual_seed(0)
    lengths = [args.prompt_tokens * share // 64 for share in (64, 48, 33, 17)]
    prompts = [
        torch.randint(config.vocab_size - 1, (lengths[row % 4],), generator=generator).tolist()
        for row in range(int(batch))
    ]
    work = {"tokens": 0, "rows": 0, "pairs": 0}

    def count(_, inputs, options) -> None:
        B, T = inputs[0].shape
        keys = options["cache"].keys.shape[2] if options.get("cache") is not None else T
        work["tokens"] += B * T
        work["pairs"] += B * T * keys
        work["rows"] += B * T if options.get("index") is None else len(options["index"])

    def start():
        if way != "plain":
            blocks = {"steps": args.steps, "block_size": args.block_size, "block_align": "prompt"}
            how = {"ours": blocks, "speculation": {"speculate": args.speculate}, "ar": {}}[way]
            steps = denoise(model, prompts, max_new_tokens=args.new_tokens, **how)
            next(steps)  # the canvas before the first forward
            return ((step.tokens, step.masked) for step in steps)
        return (
            (tokens, None) for tokens in plain_denoise(model, prompts, args.new_tokens, args.steps, args.block_size)
        )

    if way != "plain":
        prepare(model, args.torch_compile)
    for _ in zip(range(args.warmup), start()):
        pass
    model.register_forward_pre_hook(count, with_kwargs=True)
    canvases = start()
    last = [None]

    def step(number: int) -> dict:
        last[0] = next(canvases, last[0])  # speculation may be done earlier
        return {}

    def end() -> dict:
        tokens, masked = last[0]
        if args.device == "cuda" and way != "plain":  # the replay of a graph calls no hook: once more, without
            work.update(tokens=0, rows=0, pairs=0)
            graphs.recorded = lambda advance, *_: advance
            for _ in zip(range(args.steps), start()):
                pass
        written = int(batch) * args.new_tokens - (0 if masked is None else int(masked.sum()))
        return {"flops": forward_flops(config, **work), "tokens": tokens.tolist(), "written": written, "fed": work}

    serve(args, step, end)


def bandwidth(device: str) -> float:
    """Bytes/s at which this machine reads memory: the best of six sums over half a GiB."""
    x = torch.ones(2**27, device=device)
    seconds = []
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - began)
    return 4 * x.numel() / min(seconds)


def weight_bytes(config: Config, size: int) -> int:
    """Bytes of the weights that a forward reads: the layers' matrices and the head, once."""
    return size * forward_flops(config, tokens=1, rows=1, pairs=0) // 2


def sample(args: Sample, arguments: list[str]) -> dict:
    """Prints the table of sampling and returns its figures."""
    cuda, config = args.device == "cuda", MODELS[args.model]
    where = heading(
        args,
        f"sampling {args.new_tokens} tokens after {args.prompt_tokens} (batch: after 1, 3/4, 1/2, 1/4 of that) in "
        f"{args.steps} steps: {args.model}, block {args.block_size}, {'bf16' if cuda else 'fp32'}, greedy",
    )
    floor = weight_bytes(config, 2 if cuda else 4) / (read := bandwidth(args.device))
    print(f"ms: median [least, most] of a forward; floor: {1e3 * floor:.2f} ms, its weights at {read / 1e9:.1f} GB/s")
    if args.only != "speculation":
        print("floor share: of the time of all forwards; faster: plain's time for them against ours")
        print("equal: tokens that are those of plain" + (" (bfloat16 rounds each way's otherwise)\n" if cuda else "\n"))
        print(f"{'':14} {'ms':>8} {'[least, most]':>18} forwards/s tokens/s  floor GFLOP/s  faster  equal")
    table = {}
    for objective in ("mdlm", "bd3lm"):
        for batch in args.batch if args.only in (None, objective) else ():
            case = f"{objective}-{batch}"
            ways = compare(arguments, case, ("ours", "plain"), 0, args.steps)
            for way, row in ways.items():
                seconds = row["seconds"]
                row["faster"] = sum(ways["plain"]["seconds"]) / sum(seconds)
                row["tokens_per_second"] = batch * args.new_tokens / sum(seconds)
                row["flops_per_second"] = row["flops"] / sum(seconds)
                row["bandwidth_share"] = floor * len(seconds) / sum(seconds)
                same = [a == b for pair in zip(row["tokens"], ways["plain"]["tokens"]) for a, b in zip(*pair)]
                row["equal"] = sum(same) / len(same)
                spread = f"[{1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f}]"
                print(
                    f"{objective:6}x{batch:<3}{way:5}{1e3 * statistics.median(seconds):8.2f} {spread:>18} "
                    f"{len(seconds) / sum(seconds):10.1f} {row['tokens_per_second']:8.1f} "
                    f"{row['bandwidth_share']:6.0%} {row['flops_per_second'] / 1e9:7.0f} {row['faster']:6.2f}x "
                    f"{row['equal']:6.1%}"
                )
            if ways["ours"]["equal"] < 1 and not cuda:
                sys.exit(f"bench.py: the two ways' tokens differ in {case}")
            for row in ways.values():
                del row["tokens"]
            table[case] = ways
    for batch in args.batch if args.only in (None, "speculation") else ():
        case, steps = f"ar-{batch}", max(4, args.new_tokens // args.speculate)
        ways = table[case] = compare(arguments, case, ("speculation", "ar"), 0, steps)
        pairs = [pair for rows in zip(*(row.pop("tokens") for row in ways.values())) for pair in zip(*rows)]
        if not (cuda or all(b in (a, config.vocab_size - 1) for a, b in pairs)):  # ar has masks where it has not been
            sys.exit(f"bench.py: the tokens of speculation are not those of {case}")
        for way, row in ways.items():
            seconds, tokens = row["seconds"][1:], row["written"] - batch
            row["milliseconds"] = 1e3 * statistics.median(seconds)
            row["tokens_per_forward"], row["tokens_per_second"] = tokens / len(seconds) / batch, tokens / sum(seconds)
            spread = f"[{1e3 * min(seconds):.1f}, {1e3 * max(seconds):.1f}]"
            print(
                f"{way:11} x{batch:<3}{row['milliseconds']:7.2f} ms {spread} a forward, "
                f"{row['tokens_per_forward']:.2f} tokens per forward, {row['tokens_per_second']:.1f} tokens/s"
            )
        times = ways["speculation"]["milliseconds"] / ways["ar"]["milliseconds"]
        print(
            f"speculation x{batch}, drafts of {args.speculate}: faster than ar from {times:.2f} tokens per forward on"
        )
    return {"machine": where, "bandwidth": read, "sample": table}


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


@torch.no_grad()
def two_stream_likelihood(model, contexts, answers, draws: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The bd3lm bound of each answer by one forward over noisy and clean context and answer for each draw, and its
    standard error."""
    config, device = model.config, model.head_weight.device
    K, estimates = config.block_length, []
    generator = torch.Generator().manual_seed(seed)
    for context, answer in zip(contexts, answers):
        P, T = len(context), len(context) + len(answer)
        tokens = torch.tensor([context + answer], device=device)
        layout = Layout.of(torch.arange(T, device=device)[None], None, K).two_stream()
        blocks = [(max(P, start), min(start + K, T)) for start in range(P // K * K, T, K)]
        found = []
        for _ in range(1 if len(answer) == 1 else draws):
            noisy, where, weight = tokens.clone(), [], []
            for start, stop in blocks:
                m = stop - start
                n = int(torch.randint(1, m + 1, (), generator=generator))
                where.append(start + torch.randperm(m, generator=generator)[:n])
                weight.append(torch.full((n,), m / n, dtype=torch.float64))
            index = torch.cat(where).to(device)
            noisy[0, index] = config.mask_token_id
            logits = model(torch.cat([noisy, tokens], dim=1), layout, index=index)
            log_p = logits.log_softmax(dim=1).gather(1, tokens[0, index, None])[:, 0]
            found.append((log_p.double().cpu() * torch.cat(weight)).sum())
        found = torch.stack(found)
        error = found.std() / len(found) ** 0.5 if len(found) > 1 else torch.zeros_like(found[0])
        estimates.append(torch.stack([found.mean(), error]))
    return tuple(torch.stack(estimates).T)


def likelihood_case(args: Likelihood, case: str, way: str) -> None:
    objective, P, L, draws = case.split("-")
    model = random_model(args, objective=objective, block_length=args.block_size if objective == "bd3lm" else None)
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> list[int]:
        return torch.randint(model.config.vocab_size - 1, (n,), generator=generator).tolist()

    contexts, answers = [], []
    for _ in range(args.requests // 4):
        contexts += [text(int(P))] * 4
        answers += [text(int(L)) for _ in range(4)]

    def score(contexts, answers):
        noise = torch.Generator().manual_seed(1)
        return log_likelihood(model, contexts, answers, draws=int(draws), generator=noise)

    def everything(contexts, answers):
        if way == "one at a time":
            alone = [score([context], [answer]) for context, answer in zip(contexts, answers)]
            return tuple(torch.cat(part) for part in zip(*alone))
        if way == "two streams":
            return two_stream_likelihood(model, contexts, answers, int(draws))
        return score(contexts, answers)

    def step(number: int) -> dict:
        nats, error = everything(contexts, answers)
        return {"nats": nats.tolist, "error": error.tolist}

    everything(contexts[:8], answers[:8])  # warm
    serve(args, step)


def likelihood(args: Likelihood, arguments: list[str]) -> dict:
    """Prints the table of scoring and returns its figures."""
    where = heading(
        args,
        f"log-likelihood of {args.requests} requests, 4 answers to a question: {args.model}, block {args.block_size}",
    )
    print(f"s: median [least, most] of {args.runs}; forwards of at most 4,096 tokens; faster: against the second way")
    print("one at a time: the same call with one request each, the same draws, equal estimates")
    print("two streams: a forward over context and answer, noisy and clean, for each request and draw\n")
    print(f"{'':6} {'context + answer':>17} {'draws':>5}  {'way':13} {'s':>7} {'[least, most]':>16} faster")
    table = {}
    for objective, other in (("mdlm", "one at a time"), ("bd3lm", "two streams")):
        for P, L, draws in ((100, 1, 32), (60, 8, 8)):
            case = f"{objective}-{P}-{L}-{draws}"
            ways = compare(arguments, case, ("ours", other), 0, args.runs)
            for way, row in ways.items():
                seconds = row["seconds"]
                row["faster"] = statistics.median(b / a for a, b in zip(seconds, ways[other]["seconds"]))
                print(
                    f"{objective:6} {f'{P} + {L}':>17} {draws:5}  {way:13} {statistics.median(seconds):7.2f} "
                    f"{f'[{min(seconds):.2f}, {max(seconds):.2f}]':>16} {row['faster']:5.1f}x"
                )
            ours, theirs = (torch.tensor(row.pop("nats")[-1]) for row in ways.values())
            error = torch.tensor([row.pop("error")[-1] for row in ways.values()])
            apart, bound = (ours - theirs).abs().max(), 0.1 * L if args.device == "cuda" else 1e-3
            if other == "two streams" and L > 1:  # which has draws of its own
                apart, bound = (ours - theirs).sum().abs(), 5 * error.square().sum().sqrt()
            if not apart <= bound:
                sys.exit(f"bench.py: the two ways' estimates differ in {case} by {apart:.3g} nats, above {bound:.3g}")
            table[case] = ways
    return {"machine": where, "likelihood": table}


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_case(args: Load, case: str, way: str) -> None:
    dtype = getattr(torch, case)

    def step(number: int) -> dict:
        if way == "ours":
            model = load_model(args.path, dtype=dtype, device=args.device)
        else:
            model = LanguageModel(load_config(args.path))
            state = {}
            for file in sorted(Path(args.path).glob("*.safetensors")):
                state |= safetensors.torch.load_file(file)
            model.load_state_dict(state, strict=False)
            model.to(args.device, dtype)
        bytes = 0
        for parameter in model.parameters():  # a page of each 4 KiB is touched: what is only mapped is not yet loaded
            parameter.detach().flatten().view(torch.uint8)[::4096].sum()
            bytes += parameter.numel() * parameter.element_size()
        return {"bytes": lambda: bytes}

    serve(args, step)


def load(args: Load, arguments: list[str]) -> dict:
    """Prints how long a checkpoint takes to load, what memory, and how long each program's --help; returns it all."""
    if args.path is not None:
        load_config(args.path)  # refuses what is no checkpoint
    where = heading(args, f"loading {args.path or args.model + ' with random weights, stored as bfloat16'}")
    table = {"load": {}, "help": {}}
    with tempfile.TemporaryDirectory() as directory:
        if args.path is None:
            model = LanguageModel(replace(MODELS[args.model], dtype="bfloat16"))
            model.init_weights(torch.Generator().manual_seed(0))
            args.path = os.path.join(directory, args.model)
            save_model(model.to(torch.bfloat16), args.path)
            del model
            arguments = [*arguments, "--path", args.path]
        print(f"s: median [least, most] of {args.runs} fresh processes, the file being in the system's cache")
        print("peak: the process's growth against the bytes of the loaded weights\n")
        print(f"{'':9} {'':6} {'s':>6} {'[least, most]':>16} {'GB':>6} {'peak':>6} faster")
        for dtype in ("bfloat16", "float32"):
            runs = [compare(arguments, dtype, ("ours", "plain"), 0, 1) for _ in range(args.runs)]
            plain = statistics.median(run["plain"]["seconds"][0] for run in runs)
            for way in ("ours", "plain"):
                seconds = [run[way]["seconds"][0] for run in runs]
                bytes = runs[0][way]["bytes"][0]
                peak = max(run[way]["memory"] for run in runs) / bytes
                faster = plain / statistics.median(seconds)
                table["load"][f"{dtype} {way}"] = {"seconds": seconds, "bytes": bytes, "peak": peak, "faster": faster}
                print(
                    f"{dtype:9} {way:6} {statistics.median(seconds):6.2f} "
                    f"{f'[{min(seconds):.2f}, {max(seconds):.2f}]':>16} {bytes / 1e9:6.2f} {peak:5.2f}x {faster:5.1f}x"
                )
    print(f"\nseconds until a process ends: median [least, most] of {args.runs}, in turn")
    here = Path(__file__).parent
    commands = {"python -c 'import torch'": ["-c", "import torch"]} | {
        f"python {name}.py --help": [str(here / f"{name}.py"), "--help"]
        for name in ("train", "sample", "chat", "evaluate", "convert", "data", "bench")
    }
    for _ in range(args.runs):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            table["help"].setdefault(name, []).append(time.perf_counter() - began)
    for name, seconds in table["help"].items():
        print(f"{name:27} {statistics.median(seconds):6.2f} [{min(seconds):.2f}, {max(seconds):.2f}]")
    return {"machine": where, **table}


# ---------------------------------------------------------------------------------------------------------------------
# Curves of runs


def curves(args: Curves) -> None:
    """Draws the metrics of several runs in one picture."""
    check_file("--picture", args.picture, (".png",), overwrite=args.overwrite)
    runs = log.read_runs(args.runs)
    with replacing_file(args.picture) as path:
        log.curves(runs, path)
    print(f"curves of {len(runs)} runs drawn to {args.picture}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

TABLES = {  # name: its options, its function, and that of each process it starts
    "train": (Train, train, train_case),
    "sample": (Sample, sample, sample_case),
    "likelihood": (Likelihood, likelihood, likelihood_case),
    "load": (Load, load, load_case),
    "curves": (Curves, curves, None),
}


def main(arguments: list[str]) -> None:
    # A process that `compare` started: its errors are ours, and stay whole.
    if arguments[:1] == ["--case"]:
        _, case, way, table, *rest = arguments
        options, _, run_case = TABLES[table]
        return run_case(options.parse(rest), case, way)

    with one_line_errors("bench.py"):
        if not arguments:
            raise ValueError("the following arguments are required: TABLE")
        table = arguments[0]
        if table in ("-h", "--help"):
            return print(__doc__)
        if table not in TABLES:
            choices = ", ".join(map(repr, TABLES))
            raise ValueError(f"argument TABLE: invalid choice: {table!r} (choose from {choices})")
        options, measure, _ = TABLES[table]
        args = options.parse(arguments[1:])
        if table == "curves":
            return curves(args)
        if args.output:
            check_file("--output", args.output, (".json",), overwrite=args.overwrite)
        figures = measure(args, arguments)
        if args.output:
            settings = {name: value for name, value in asdict(args).items() if name not in flags(Output)}
            with replacing_file(args.output) as path:
                path.write_text(json.dumps({"settings": settings, **figures}, indent=1))
            print(f"figures written to {args.output}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""CUDA: decoding without waiting for the GPU, by shapes that recur and forwards that are recorded as CUDA graphs."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def static_steps(batch) -> Iterator[None]:
    """Advances `batch`, a diffusion.Decoding, as its `steps` does, but reads whether all rows are done only when the
    next step is under way."""
    if not batch.masked.any():
        return
    step = torch.compile(batch.advance) if batch.model.compiled else batch.advance
    replayed = recorded(step, batch.generator, batch.column.device)
    advance = step  # the prompt's forward, which is like no other of its width where there are drafts
    for width in batch.widths():
        over = later(batch.done.all())
        advance(width)
        if over():  # every row was done before this forward, which changed nothing
            return
        yield
        advance = replayed


def static_widths(batch) -> Iterator[int]:
    """How many columns each forward feeds, known before decoding: first the prompt; then of a row its block and, with
    right shift, the column before it; and where a row begins a block, all columns from the block before on.

    A fixed number of reveals tells when rows begin their blocks; otherwise it is as if one always did.
    """
    if not batch.cached:
        yield from itertools.repeat(batch.T)
    own, lead = (0, 1) if batch.objective == "ar" else (batch.K, batch.right_shift)
    begins: dict[int, int] = {}  # forward: columns
    for counts in (batch.schedule > 0).sum(dim=2).tolist():  # forwards of each block of the row
        blocks, forward = [b for b, count in enumerate(counts) if count], 0
        for before, b in itertools.pairwise(blocks):
            forward += counts[before]
            begins[forward] = max(begins.get(forward, 0), (b - before) * batch.K + own)
    yield batch.width()
    widest = max([own + lead, *begins.values()])
    for forward in itertools.count(1):
        yield max(own + lead, begins.get(forward, 0)) if batch.fixed_count else widest


def recorded(advance, generator: torch.Generator | None, device: torch.device):
    """`advance` on CUDA: of each width the first call as it is, the second recorded as a graph, which then replays."""
    if device.type != "cuda":
        return advance
    graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
    # torch's own stream for recording is of one device, for good; they share memory, since no result outlives a replay
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(W: int) -> None:
        with torch.cuda.device(device):
            if W not in graphs:
                graphs[W] = None
                return advance(W)
            if graphs[W] is None:
                graphs[W] = torch.cuda.CUDAGraph()
                if generator is not None and generator.device.type == "cuda":
                    graphs[W].register_generator_state(generator)
                with torch.cuda.graph(graphs[W], pool=pool, stream=stream):
                    advance(W)
            graphs[W].replay()

    return run


def later(x: Tensor):
    """A function that returns x.tolist() (of () a number); on CUDA it waits for what came before it, not after."""
    if not x.is_cuda:
        return x.clone().tolist
    copy, ready = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(x, non_blocking=True)
    ready.record(torch.cuda.current_stream(x.device))

    def value():
        ready.synchronize()
        return copy.tolist()

    return value


def use_cudnn(lengths_recur: bool) -> None:
    """Says whether attention on CUDA may be cuDNN's, for the whole process."""
    # torch prefers it on an H100. It is planned anew for every shape, which others report to take up to a second, and
    # is reported to be faster by half or more once it is. Neither has been measured here.
    torch.backends.cuda.enable_cudnn_sdp(lengths_recur)

"""Many processes: who they are (Ranks), how the model is spread over them (parallelize), and what signals do (Signals).

torchrun starts one process a GPU; alone, a process is rank 0 of 1. Nothing here knows what is trained.
"""

import functools
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from checkpoint import barrier, has_bfloat16
from model import LanguageModel
from options import Options

USR1 = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has none
REQUEUE = 75  # exit status of a run that a signal ended: it can go on (EX_TEMPFAIL)


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone without it."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Over all ranks, each value; on the CPU, so that no GPU is waited for."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing) -> list:
        """Every rank's `thing`."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    @contextmanager
    def first_on_node(self):
        """Lets a node's first process do what is inside before its others: download, tokenise into a shared cache."""
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if not first:
            barrier()
        yield
        if first:
            barrier()


def setup() -> Ranks:
    """Joins the processes of torchrun, if it started this one, and takes this process's GPU, if there is one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    # On the CPU ranks wait while another tokenises or saves; GPUs wait for each other within a step, or hang
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1))
    if cuda:
        dist.group.WORLD._get_backend(device)._set_default_timeout(timedelta(minutes=10))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


# ---------------------------------------------------------------------------------------------------------------------
# The model over processes


@dataclass(kw_only=True)
class Parallel(Options):
    "processes, memory, speed: what changes no result but by rounding (many processes: start them by torchrun)"

    compute_dtype: Literal["bfloat16", "float32"] | None = None
    """of the matrix products; weights and optimizer are float32 (default: bfloat16 on CUDA, and on a CPU that has
    instructions for it where the model has more than 50 million parameters; else float32)"""
    parallel: Literal["ddp", "zero2", "zero3", "hybrid"] = "ddp"
    """ddp: every process has the whole model. zero2: weights, gradients and optimizer are sharded, weights gathered
    once a step. zero3: and gathered again for the backward pass. hybrid: sharded within a node, replicated across
    nodes"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # in which gradients are summed over processes
    checkpoint_activations: Literal["none", "selective", "full"] = "none"
    """what the backward pass computes again instead of keeping it: selective, all but matrix products; full, everything
    inside a layer"""
    torch_compile: bool | None = None
    """compile the layers: minutes at the start, then half the kernels and less memory traffic (default: on CUDA)"""

    def computes_in(self, device: torch.device, parameters: int) -> torch.dtype:
        fast = device.type == "cuda" or (parameters > 5e7 and has_bfloat16())
        return getattr(torch, self.compute_dtype or ("bfloat16" if fast else "float32"))

    def compiles_on(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.torch_compile is None else self.torch_compile


def parallelize(model: LanguageModel, options: Parallel, ranks: Ranks):
    """Activation checkpointing, compilation, precision, sharding, in this order: (engine, sync), what to call in the
    model's place, and a function of whether the next backward pass sums gradients over ranks, as a step's last must.
    """
    for layer in model.model.layers:
        if options.checkpoint_activations != "none":
            saved = _selective() if options.checkpoint_activations == "selective" else {}
            layer.forward = _recomputed(layer.forward, saved)
        if options.compiles_on(ranks.device):
            torch._dynamo.config.recompile_limit = 64  # a shape of its own, and the last layer's, each count
            layer.compile()
    model.to(ranks.device)
    compute_dtype = options.computes_in(ranks.device, model.size)
    reduce_dtype = getattr(torch, options.reduce_dtype)
    model.compute_dtype = None if compute_dtype == torch.float32 else compute_dtype  # None: as the weights are
    if ranks.world_size == 1:
        return model, lambda on: None
    if options.parallel == "ddp":
        return _replicate(model, ranks, reduce_dtype)
    return _shard(model, ranks, options.parallel, None if reduce_dtype == compute_dtype else reduce_dtype)


def _recomputed(forward, saved: dict):
    """`forward`, which the backward pass calls again. A function, since torch.compile passes over a functools.partial
    in silence."""

    def recomputed(*inputs):
        return checkpoint(forward, *inputs, use_reentrant=False, **saved)

    return recomputed


def _selective() -> dict:
    """Keeps the outputs of matrix products and attention; all else is computed again in the backward pass."""
    # Attention is one of these, by device, dtype and mask. That of a FlexAttention is kept in compiled layers alone: in
    # others it is compiled by itself, and hidden in what that makes of it.
    aten, kernels = torch.ops.aten, ("flash_attention", "efficient_attention", "cudnn_attention")
    outputs = [getattr(aten, f"_scaled_dot_product_{kernel}").default for kernel in kernels]
    outputs += [aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops.higher_order.flex_attention]
    outputs += [aten.mm.default, aten.addmm.default]
    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, outputs)}


def _replicate(model: LanguageModel, ranks: Ranks, reduce_dtype: torch.dtype):
    """DDP: every rank has the whole model, and gradients are summed while the backward pass runs."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    devices = [ranks.device] if ranks.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)  # else gradients are held twice
    if reduce_dtype == torch.bfloat16:
        # In a lambda, as DDP refuses that hook, known by its name, without NCCL; gloo sums bfloat16 as well.
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return ddp, functools.partial(setattr, ddp, "require_backward_grad_sync")


def _shard(model: LanguageModel, ranks: Ranks, parallel: str, reduce_dtype: torch.dtype | None):
    """FSDP2 (`fully_shard`): weights, gradients and optimizer are sharded, layer by layer. The embedding is in the
    root's unit with the last norm and the head, which may be tied to it. hybrid shards within a node only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = (ranks.world_size,), ("shard",)
    if parallel == "hybrid":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        shape, names = (ranks.world_size // local, local), ("replicate", "shard")
    options = {
        "mesh": init_device_mesh(ranks.device.type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=reduce_dtype),
        "reshard_after_forward": parallel != "zero2",
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)

    def sync(on: bool) -> None:
        model.set_requires_gradient_sync(on)
        if parallel == "zero2":
            model.set_reshard_after_backward(on)  # the next micro-batch finds the weights gathered

    return model, sync


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) as a wish that the run ends after its step; twice SIGINT: at once.

    `number` is that of the signal, 0 while there is none. Before `steps` is set there is nothing to finish or to save:
    SIGINT does what it did, the others exit with REQUEUE.
    """

    def __init__(self):
        self.number, self.steps, self.before, self.process = 0, False, {}, os.getpid()

    def __enter__(self):
        for number in {signal.SIGINT, signal.SIGTERM, USR1}:
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame) -> None:
        if os.getpid() != self.process:  # a fork of it, to tokenise say, which ends as any other
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.steps:
            if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
                print("\nfinishing this step, then saving; Ctrl-C again quits now", file=sys.stderr, flush=True)
            self.number = number
            signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        elif number == signal.SIGINT:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        else:
            mark_stopped()
            sys.exit(REQUEUE)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def mark_stopped() -> None:
    """Creates $STOPPED_FILE, if there is such a variable: for the script that started torchrun, whose exit status is 1
    whatever that of its ranks."""
    if "STOPPED_FILE" in os.environ:
        Path(os.environ["STOPPED_FILE"]).touch()

"""AdamW or Muon, and the learning rate's schedule, with their options."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from diffusion import NORMS
from lora import Adapting
from model import LanguageModel
from options import Count, Decay, NonNegative, Positive, Share


@dataclass(kw_only=True)
class Optimization(Adapting):
    "optimization"

    loss_norm_type: Literal[*NORMS] = "token"
    """what the loss is averaged over. token: supervised tokens of the global batch. sequence: tokens within each row,
    then rows. batch: rows"""
    optim: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the layers' matrices, AdamW on the rest; much faster from random weights"""
    learning_rate: Annotated[Positive, "RATE"] = 1e-4  # peak; Muon's is scaled to the size of AdamW's updates
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls to 0 after the warm-up; constant: it stays at its peak"""
    warmup_ratio: Share = 0.1  # part of the run, 0 to 1, in which the learning rate rises from 0
    weight_decay: Annotated[NonNegative, "RATE"] = 0.0  # of the matrices, a step, times learning rate
    adam_beta1: Decay = 0.9  # AdamW's decay of the gradient's mean
    adam_beta2: Decay = 0.999  # AdamW's decay of its mean square
    adam_epsilon: Annotated[NonNegative, "E"] = 1e-8  # added to the root of AdamW's mean square
    max_grad_norm: Annotated[NonNegative, "NORM"] = 1.0  # clip the gradient's norm; 0: do not
    num_train_epochs: Annotated[Positive, "N"] = 20.0  # passes over the data
    max_steps: Count | None = None  # optimizer steps (default: what --num_train_epochs come to)


def build_optimizers(model: LanguageModel, args: Optimization) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the layers' matrices and AdamW for the rest."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in trained if p.ndim == 2 and ".layers." not in name]
    vectors = [p for _, p in trained if p.ndim == 1]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = []
    if args.optim == "muon":
        optimizers.append(Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay))
    else:
        groups[0]["params"] = matrices + others
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,
    )
    return [*optimizers, adamw]


STACK = 2**26  # weights that Muon updates at a time, so that its copies of them stay below a GB


class Muon(torch.optim.Muon):
    """Keller Jordan's Muon as torch.optim has it, with rates that give updates of the size of AdamW's (arXiv
    2502.16982), but for matrices of one shape at a time: one by one a GPU waits for the launch of 34 kernels each.

    `found_inf` () float32 on the device, as torch's fused AdamW has it: where it is 1, a step changes nothing.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, matrices in shapes.items():
                many = max(1, STACK // shape.numel())
                for start in range(0, len(matrices), many):
                    self._update(matrices[start : start + many], group)

    def _update(self, matrices: list[Tensor], group: dict) -> None:
        """Of n matrices of one shape (r, c), of which FSDP has given this process some rows."""
        for p in matrices:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, momenta = local(matrices), local([self.state[p]["momentum_buffer"] for p in matrices])
        first, decayed = weights[0], 1 - group["lr"] * group["weight_decay"]
        left_out = torch.zeros((), device=first.device) if self.found_inf is None else self.found_inf
        applied = left_out == 0

        # Nesterov's momentum: a mean of gradients, and then of it and the newest. A step that is left out has the mean
        # for its gradient, which leaves the mean as it is.
        mean, gradient = torch.stack(momenta), torch.stack(local([p.grad for p in matrices]))  # (n, r, c)
        gradient = torch.where(applied, gradient, mean)
        mean.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(momenta, mean.unbind())
        update = gradient.lerp_(mean, group["momentum"])
        if update.is_cuda and update.dtype == torch.float32:
            update = update.bfloat16()  # enough for the iteration; a CPU may have no instructions for it
        update = on_whole_matrices(lambda x: orthogonal(x, group), update, matrices[0])
        update = torch.where(applied, update.to(first.dtype), 0)

        if decayed != 1:
            torch._foreach_mul_(weights, torch.where(applied, first.new_full((), decayed), 1))
        torch._foreach_add_(weights, update.unbind(), alpha=-0.2 * group["lr"] * max(matrices[0].shape) ** 0.5)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """What this process has of each: of a DTensor its shard, which shares its memory."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def on_whole_matrices(function, rows: Tensor, matrix: Tensor) -> Tensor:
    """This process's rows of what `function` makes of n matrices (n, r, c), of which it has `rows` (n, r', c), as of
    `matrix`. All processes that share the matrices compute the same."""
    if not hasattr(matrix, "to_local"):
        return function(rows)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = matrix.device_mesh, torch.Size([len(rows), *matrix.shape])
    whole = [Replicate()] * mesh.ndim
    sharded = [Shard(1) if place.is_shard() else place for place in matrix.placements]
    stride = (shape[1] * shape[2], shape[2], 1)
    found = function(DTensor.from_local(rows, mesh, sharded, shape=shape, stride=stride).full_tensor()).contiguous()
    return DTensor.from_local(found, mesh, whole, run_check=False).redistribute(mesh, sharded).to_local()


def orthogonal(x: Tensor, group: dict) -> Tensor:
    """(n, r, c): of each matrix U S V^T about U V^T, by Newton and Schulz's iteration."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    norms = torch.stack(torch._foreach_norm(x.unbind()))
    x = x / norms.clamp(min=group["eps"])[:, None, None]
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate(progress: float, args: Optimization) -> float:
    """At a point of the run, 0 to 1: a linear rise over warmup_ratio, then a cosine or a line down to 0, or neither."""
    if progress < args.warmup_ratio:
        return args.learning_rate * progress / args.warmup_ratio
    rest = (progress - args.warmup_ratio) / max(1e-12, 1 - args.warmup_ratio)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}
    return args.learning_rate * factor[args.lr_scheduler_type]

"""AdamW or Muon, and the learning rate's schedule, with their options."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from diffusion import NORMS
from model import LanguageModel
from options import Count, Decay, NonNegative, Options, Positive, Share


@dataclass(kw_only=True)
class Optimization(Options):
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
    """AdamW for all, or Muon (Keller Jordan's, in torch.optim) for the layers' matrices and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = []
    if args.optim == "muon":
        muon = torch.optim.Muon(
            matrices, lr=args.learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    else:
        groups[0]["params"] = matrices + others
    adamw = torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,
    )
    return [*optimizers, adamw]


def learning_rate(progress: float, args: Optimization) -> float:
    """At a point of the run, 0 to 1: a linear rise over warmup_ratio, then a cosine or a line down to 0, or neither."""
    if progress < args.warmup_ratio:
        return args.learning_rate * progress / args.warmup_ratio
    rest = (progress - args.warmup_ratio) / max(1e-12, 1 - args.warmup_ratio)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}
    return args.learning_rate * factor[args.lr_scheduler_type]

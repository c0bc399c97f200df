"""Noise schedules, the three objectives (ar, mdlm, bd3lm), their one loss, and the one sampler.

Everything random about a training example is an explicit `Noise`; an objective turns a clean `Batch` and its noise into
an `Example`; `loss` is the same for all. `denoise` generates, continues and fills in for all three: AR is block length
1, BD3LM block length K, MDLM one block.

Masked diffusion: MDLM, arXiv 2406.07524. Block diffusion: BD3LM, arXiv 2503.09573. Time t in (0, 1], 1 = all masked;
alpha(t) is the probability that a token is still clean. Letters as in model.py; S steps.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, LanguageModel, Layout, attention_mask

OBJECTIVES = ("ar", "mdlm", "bd3lm")

# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def alpha(t: Tensor, scheduler: str = "linear") -> Tensor:
    """Probability that a token is still clean at time t: 1 - t (linear), 1 - cos(pi/2 (1 - t)) (cosine)."""
    if scheduler == "linear":
        return 1 - t
    if scheduler == "cosine":
        return 1 - torch.cos(math.pi / 2 * (1 - t))
    raise ValueError(f"scheduler {scheduler!r} is unknown; expected linear or cosine")


def alpha_derivative(t: Tensor, scheduler: str = "linear") -> Tensor:
    """d alpha / dt."""
    if scheduler == "linear":
        return torch.full_like(t, -1.0)
    if scheduler == "cosine":
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))
    raise ValueError(f"scheduler {scheduler!r} is unknown; expected linear or cosine")


def loss_weight(level: Tensor, weight_type: str, scheduler: str = "linear") -> Tensor:
    """Weight of a masked token's cross-entropy at noise `level`.

    scheduler: -alpha'(t) / (1 - alpha(t)), MDLM's equation 11, with the reference's 1e-6 against division by zero.
    uniform: 1. count: 1 / level, which is m / n where the level is the masked share n / m (the unbiased bound).
    """
    if weight_type == "scheduler":
        return -alpha_derivative(level, scheduler) / (1 - alpha(level, scheduler) + 1e-6)
    if weight_type == "uniform":
        return torch.ones_like(level)
    if weight_type == "count":
        return 1 / level
    raise ValueError(f"loss_weight_type {weight_type!r} is unknown; expected scheduler, uniform or count")


def reverse_mask_prob(s: Tensor, t: Tensor, scheduler: str = "linear") -> Tensor:
    """Probability that a token masked at time t is still masked at the earlier time s < t."""
    return (1 - alpha(s, scheduler)) / (1 - alpha(t, scheduler))


def reveal_schedule(
    masks: Tensor,
    steps: int,
    scheduler: str = "linear",
    *,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(..., S) int64: how many of masks (...) to reveal at each of `steps` equal steps of time from 1 to 0.

    The expected number, rounded half to even; `stochastic`: a binomial draw. Steps that reveal nothing are left out,
    so that a schedule is front-loaded and ends in zeros; it sums to `masks`.
    """
    grid = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    t, s = grid[:-1].float(), grid[1:].float()  # float32, as the reference computes its probabilities
    reveal = (1 - reverse_mask_prob(s, t, scheduler).double()).to(masks.device)  # (S,)
    remaining, schedule = masks.double(), []
    for p in reveal:
        if stochastic:
            expected = torch.binomial(remaining, p.expand_as(remaining), generator=generator)
        else:
            expected = (remaining * p).round()
        schedule.append(torch.minimum(remaining, expected))
        remaining = remaining - schedule[-1]
    schedule = torch.stack(schedule, dim=-1).long()
    order = (schedule == 0).to(torch.int8).argsort(dim=-1, stable=True)  # zeros last, the rest in their order
    return schedule.gather(-1, order)


# ---------------------------------------------------------------------------------------------------------------------
# Clean batches and their noise


class Batch(NamedTuple):
    """Clean rows. tokens, document, position (B, T) int64; supervised (B, T) bool: whose loss counts; sample (B,)
    int64: each row's place in the epoch's order, which its noise depends on, and not on the process or the batch."""

    tokens: Tensor
    supervised: Tensor
    document: Tensor
    position: Tensor
    sample: Tensor
    epoch: int = 0


class Noise(NamedTuple):
    """Everything random about an example: level (B, T) float in (0, 1], the time t; masked (B, T) bool."""

    level: Tensor
    masked: Tensor


def draw_noise(
    batch: Batch,
    *,
    block_length: int | None = None,
    seed: int = 0,
    noise_type: str = "level",
    level_per: str = "block",
    scheduler: str = "linear",
    time_epsilon: float = 1e-3,
    time_max: float = 1.0,
    at_least_one: bool = False,
) -> Noise:
    """The noise of a batch, which is a function of seed, epoch and each row's `sample` alone.

    Levels have low discrepancy without coupling rows or processes: sample n has level frac(u + n * golden ratio), its
    blocks frac(level + a random permutation / blocks), so that every row covers (0, 1] evenly and no stratum is tied to
    a place. Blocks without a supervised token take no stratum.

    block_length: of the noise; None: one block a document (MDLM). level_per: "block" (BD3LM, arXiv 2503.09573,
    equation 8), or "sequence": one level a row, as the reference draws. noise_type: "level" masks each token with
    probability 1 - alpha(t), t in [time_epsilon, time_max]; "count" masks n ~ uniform 1..m of a block's m supervised
    tokens, its level is n / m. at_least_one: a block whose draw is empty masks one token all the same (it lowers the
    variance and biases the 1/t weight).
    """
    position, supervised = batch.position, batch.supervised
    B, T = position.shape
    block = torch.zeros_like(position) if block_length is None else position // block_length
    changes = (batch.document.diff(dim=1) != 0) | (block.diff(dim=1) != 0)
    run = F.pad(changes.cumsum(dim=1), (1, 0))  # (B, T): the block's number in its row, over all documents
    size = torch.zeros_like(run).scatter_add_(1, run, supervised.long())  # (B, T): supervised tokens of run r
    learned = size > 0
    strata = learned.sum(dim=1)
    shared = _generator(seed, batch.epoch, 2**64 - 1).random()
    base = (shared + batch.sample.numpy() * ((math.sqrt(5) - 1) / 2)) % 1.0  # (B,)
    level = torch.zeros(B, T, dtype=torch.float64)  # of run r
    order = torch.empty(B, T, dtype=torch.float64)  # a token's uniform draw
    for row, n in enumerate(batch.sample.tolist()):
        generator = _generator(seed, batch.epoch, n)
        stratum = torch.from_numpy(generator.permutation(int(strata[row]))).double()
        if level_per == "sequence":
            stratum = torch.zeros_like(stratum)
        level[row, learned[row]] = (base[row] + stratum / max(1, len(stratum))) % 1.0
        order[row] = torch.from_numpy(generator.random(T))
    # rank (B, T): of a supervised token's draw among its block's
    key = torch.where(supervised, run + order, math.inf)
    rank = torch.empty_like(run).scatter_(1, key.argsort(dim=1), torch.arange(T).expand(B, T))
    rank = rank - (size.cumsum(dim=1) - size).gather(1, run)
    level, size = level.gather(1, run), size.gather(1, run)
    if noise_type == "count":
        count = 1 + (level * size).floor()
        level, masked = count / size.clamp(min=1), rank < count
    elif noise_type == "level":
        level = time_epsilon + (time_max - time_epsilon) * level
        masked = order < 1 - alpha(level, scheduler)
        if at_least_one:
            masked |= rank == 0
    else:
        raise ValueError(f"noise_type {noise_type!r} is unknown; expected level or count")
    return Noise(level.float(), masked & supervised)


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    # uint64 spelled out: NumPy would take a list that holds 2**64 - 1 through float64.
    return np.random.Generator(np.random.Philox(key=np.array([(seed << 32) + epoch, stream], dtype=np.uint64)))


def with_complement(batch: Batch, noise: Noise) -> tuple[Batch, Noise]:
    """Batch and noise (2B, T), every row a second time with the complementary mask at level 1 - t."""
    twice = Batch(*(torch.cat([field, field]) for field in batch[:5]), batch.epoch)
    level = torch.cat([noise.level, (1 - noise.level).clamp(min=1e-3)])
    return twice, Noise(level, torch.cat([noise.masked, batch.supervised & ~noise.masked]))


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


class Example(NamedTuple):
    """What the loss sees. tokens (B, T') int64 and their layout; index (N,): the flat positions in B*T' whose output
    predicts targets (N,), with weights (N,) float; entries of weight 0 pad N to a multiple of 64, so that shapes recur.
    denominator: what the weighted sum is divided by, to be summed over the global batch first."""

    tokens: Tensor
    layout: Layout
    index: Tensor
    targets: Tensor
    weights: Tensor
    denominator: float

    def map(self, function) -> "Example":
        """`function` applied to each of its tensors."""
        layout = self.layout.map(function)._replace(kind=self.layout.kind)
        rest = (function(x) for x in (self.index, self.targets, self.weights))
        return Example(function(self.tokens), layout, *rest, self.denominator)

    def to(self, device) -> "Example":
        return self.map(lambda x: x.to(device, non_blocking=True))


def ar_example(batch: Batch, *, norm_type: str = "token") -> Example:
    """Next-token prediction: every supervised token but a document's first, from the position before it."""
    document = batch.document if (batch.document > 0).any() else None  # right padding is never seen by a causal query
    layout = Layout.of(batch.position, document, 1)
    weight = torch.ones(batch.tokens.shape)
    return _example(batch, batch.tokens, layout, _columns(batch) - 1, batch.supervised, weight, True, norm_type)


def mdlm_example(
    batch: Batch,
    noise: Noise,
    *,
    mask_id: int,
    right_shift: bool = False,
    weight_type: str = "scheduler",
    norm_type: str = "token",
    scheduler: str = "linear",
) -> Example:
    """Masked diffusion (arXiv 2406.07524, equation 11): masked tokens from the whole row.

    right_shift: a token is predicted at the position before it; a document's first token then has no predictor and no
    loss.
    """
    document = batch.document if (batch.document != 0).any() else None
    layout = Layout.of(batch.position, document)
    noised = batch.tokens.masked_fill(noise.masked, mask_id)
    weight = loss_weight(noise.level, weight_type, scheduler)
    return _example(
        batch, noised, layout, _columns(batch) - int(right_shift), noise.masked, weight, right_shift, norm_type
    )


def bd3lm_example(
    batch: Batch,
    noise: Noise,
    *,
    mask_id: int,
    block_length: int,
    right_shift: bool = False,
    weight_type: str = "scheduler",
    norm_type: str = "token",
    scheduler: str = "linear",
) -> Example:
    """Block diffusion (arXiv 2503.09573, equation 8): masked tokens from their noisy block and the clean past.

    Two streams in one sequence: the noisy copy, then the clean one. Only blocks with a supervised token have a noisy
    copy (of the others nobody sees it, nor is it predicted from); in plain text these are all, in chat the answer's.
    right_shift: a block's first token is predicted by the clean stream's previous position, the others by the noisy
    stream's; with block_length 1 and everything masked that is the causal model exactly.
    """
    clean = Layout.of(batch.position, batch.document, block_length)
    kept, place = _learned_blocks(clean, batch.supervised)
    W = kept.shape[1]
    noisy = clean.map(lambda field: field.gather(1, kept))._replace(noisy=torch.ones_like(kept))
    layout = Layout(*(torch.cat(pair, dim=1) for pair in zip(noisy[:4], clean[:4])))  # (B, W + T)
    noised = batch.tokens.masked_fill(noise.masked, mask_id)
    streams = torch.cat([noised.gather(1, kept), batch.tokens], dim=1)
    predictor = place
    if right_shift:
        predictor = torch.where(batch.position % block_length == 0, W + _columns(batch) - 1, place - 1)
    weight = loss_weight(noise.level, weight_type, scheduler)
    return _example(batch, streams, layout, predictor, noise.masked, weight, right_shift, norm_type)


def _learned_blocks(layout: Layout, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """(kept (B, W), place (B, T)): columns of the blocks with a supervised token, in order, and where in them a column
    stands. Where a row has fewer than W, others fill it, whose outputs nobody uses. W is a multiple of T / 16, so that
    shapes recur."""
    B, T = supervised.shape
    changes = (layout.document.diff(dim=1) != 0) | (layout.block.diff(dim=1) != 0)
    run = F.pad(changes.cumsum(dim=1), (1, 0))  # (B, T): the block's number in its row
    learned = torch.zeros(B, T, dtype=torch.bool).scatter_reduce_(1, run, supervised, "amax").gather(1, run)
    step = max(1, T // 16)
    W = min(T, -(-max(1, int(learned.sum(dim=1).max())) // step) * step)
    kept = (~learned).to(torch.int8).argsort(dim=1, stable=True)[:, :W]  # the learned first, then others, whole or not
    return kept, learned.cumsum(dim=1) - 1


def _columns(batch: Batch) -> Tensor:
    return torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)


def _example(batch, inputs, layout, predictor, masked, weight, right_shift, norm_type) -> Example:
    """predictor (B, T): the column of `inputs` (B, T') whose output predicts each token."""
    supervised = batch.supervised & (batch.position > 0) if right_shift else batch.supervised
    masked = masked & supervised
    B = len(inputs)
    rows = int(batch.supervised.any(dim=1).sum())  # a row with nothing supervised fills a rank's share, and weighs 0
    if norm_type == "token":
        denominator = int(supervised.sum())
    elif norm_type == "sequence":
        weight, denominator = weight / supervised.sum(dim=1, keepdim=True).clamp(min=1), rows
    elif norm_type == "batch":
        denominator = rows
    else:
        raise ValueError(f"loss_norm_type {norm_type!r} is unknown; expected token, sequence or batch")
    index = (torch.arange(B)[:, None] * inputs.shape[1] + predictor)[masked]
    pad = (0, -len(index) % 64 if len(index) else 64)
    chosen = (F.pad(x, pad) for x in (index, batch.tokens[masked], weight[masked].float()))
    return Example(inputs, layout, *chosen, denominator)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

SLICE = 2**19  # logits that exist at a time where tokens are chosen or scored on a CPU
# Rows of logits that exist at a time, each V wide. CPU: with 128 a step takes 5 % longer, with 512 no less. CUDA, not
# measured: each chunk reads and writes the weight's whole gradient, 12 bytes for each of its 2 * chunk multiply-adds.
CHUNK = {"cpu": 256, "cuda": 2048}


def loss(model: LanguageModel, example: Example) -> tuple[Tensor, float]:
    """(total, denominator): the sum over masked tokens of weight * cross-entropy in nats, and what to divide it by.

    The two are summed over all micro-batches and ranks of a step before they are divided, so that neither the loss nor
    its gradient depends on how the global batch is cut.
    """

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return _CrossEntropy.apply(hidden, weight, example.targets, example.weights)

    return model(example.tokens, example.layout, index=example.index, head=head), example.denominator


class _CrossEntropy(torch.autograd.Function):
    """Sum of weights * cross-entropy of hidden (N, D) @ weight.T (V, D) against targets (N,).

    The gradients are formed in the forward pass, chunk by chunk: no logits are kept, none larger than a chunk exist.
    The softmax and the sums over chunks are float32 (float64 for float64 weights).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights):
        matrix = weight.to(hidden.dtype)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        chunk = min(CHUNK[hidden.device.type], len(hidden))
        # One buffer for all chunks: in fresh memory the page faults cost more than the softmax.
        buffer = torch.empty(chunk, len(matrix), dtype=matrix.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            target, w = targets[rows, None], weights[rows, None].to(wide)
            scores = torch.mm(hidden[rows], matrix.T, out=buffer[: rows.stop - start]).to(wide)  # (chunk, V)
            chosen = scores.gather(1, target) - scores.amax(dim=1, keepdim=True)
            torch.softmax(scores, dim=1, out=scores)  # in place, a row at a time: one pass over memory
            log_norm = -scores.amax(dim=1, keepdim=True).log()  # the likeliest token's probability is 1 / norm
            total += (w * (log_norm - chosen)).sum()
            if not (needs_hidden or needs_weight):
                continue
            # d total / d scores is w * (softmax - one-hot); w is applied on the narrow side of both products
            gradient = scores.scatter_add_(1, target, -torch.ones_like(w)).to(matrix.dtype)
            if needs_hidden:
                grad_hidden[rows] = w * (gradient @ matrix)
            if needs_weight and wide == matrix.dtype:
                grad_weight.addmm_(gradient.T, w * hidden[rows])
            elif needs_weight:
                grad_weight += gradient.T @ (w * hidden[rows]).to(matrix.dtype)
        ctx.gradients = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Choosing tokens, and choosing which of them to keep


def gumbel(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """float64 logits - T log(-log uniform): their argmax is a sample from softmax(logits / T). T 0: logits as given.

    The logarithm of the reference's exp(logits) / (-log u)^T, which would overflow.
    """
    if temperature == 0:
        return logits
    return logits.double() - temperature * torch.log(-torch.log(uniform))


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (N, V) with -inf outside the top_k largest, and outside the smallest set of probability >= top_p."""
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        p = ordered.softmax(dim=1)
        outside = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, p.cumsum(dim=1) - p >= top_p)
        logits = logits.masked_fill(outside, -math.inf)
    return logits


def ranks(confidence: Tensor, masked: Tensor) -> Tensor:
    """(B, T): the place of each masked position by falling confidence in its row, ties to the left; the rest after."""
    order = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(confidence.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


# A decoding rule: (confidence, token, masked, quota, generator) -> masked'. confidence, token and masked are (B, T),
# masked being the positions of each row's current block that may still be chosen; quota (B,) is what the schedule would
# reveal at this step. Every rule leaves fewer masked of a row that has any, so that decoding ends.


def fixed_count(confidence, token, masked, quota, generator):
    """Reveals the `quota` most confident positions: the reference's rule."""
    return masked & (ranks(confidence, masked) >= quota[:, None])


def confidence_threshold(threshold: float):
    """Reveals every position more confident than `threshold`, at least the best one; the schedule is not used."""

    def rule(confidence, token, masked, quota, generator):
        return masked & (confidence <= threshold) & (ranks(confidence, masked) > 0)

    return rule


def entropy_bound(bound: float):
    """Reveals the surest positions while the entropies of those before add up to at most `bound` nats.

    EB-Sampler, arXiv 2505.24857: the sum over the revealed without the largest bounds what revealing them together,
    as if they were independent, can cost. confidence is the negative entropy; the schedule is not used.
    """

    def rule(confidence, token, masked, quota, generator):
        entropy, order = (-confidence).masked_fill(~masked, math.inf).sort(dim=1, stable=True)
        spent = entropy.cumsum(dim=1) - entropy  # by those before; inf - inf is of positions that are not masked
        return masked & (torch.empty_like(spent).scatter_(1, order, spent) > bound)

    return rule


def confidence_factor(factor: float):
    """Reveals the n most confident positions, n the largest with (n + 1)(1 - the n-th's probability) < `factor`.

    Fast-dLLM's factor rule (arXiv 2505.22618, section 3.3); at least the best one; the schedule is not used.
    """

    def rule(confidence, token, masked, quota, generator):
        place = ranks(confidence, masked)
        return masked & ((place + 2) * (1 - confidence) >= factor) & (place > 0)

    return rule


def path_planning(confidence, token, masked, quota, generator):
    """Masks the least confident of the block's answer, revealed ones included, `quota` fewer than there were.

    P2 with self-planning (arXiv 2502.03540), as Open-dLLM decodes: a revealed position's confidence is that of the
    token now predicted there, yet it keeps the one it has until it is masked again. confidence is -inf elsewhere.
    """
    answer = confidence > -math.inf
    keep = answer.sum(dim=1) - (masked.sum(dim=1) - quota)
    return answer & (ranks(confidence, answer) >= keep[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


class Step(NamedTuple):
    """The canvas after a forward. tokens (B, T) int64, the mask id where masked (B, T) bool; a row's columns beyond its
    own canvas hold 0. done (B,): the row is finished, whatever may still be masked. forwards: model calls so far.
    confidence (B, T): the untempered probability a settled token had when it was chosen; 0 where masked or given."""

    tokens: Tensor
    masked: Tensor
    done: Tensor
    forwards: int
    confidence: Tensor


@dataclass
class Kept:
    """What one call of `denoise` leaves for the next, of the same model: a row's clean tokens and the cache with them.

    It is right at every step, so that a call may be abandoned. Guidance and blocks that begin where the prompt ends
    change what earlier columns see: they take none.
    """

    tokens: list[int] = field(default_factory=list)
    block_size: int = 0  # of the attention blocks
    cache: KVCache | None = None


@torch.no_grad()
def denoise(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    canvas_masks: list[list[bool]] | None = None,
    max_new_tokens: int = 128,
    steps: int = 128,
    block_size: int | None = None,
    steps_per_block: int | None = None,
    block_align: str | None = None,
    scheduler: str = "linear",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    remasking: str = "low_confidence",
    stochastic_transfer: bool = False,
    threshold: float | None = None,
    entropy: float | None = None,
    factor: float | None = None,
    cfg_scale: float = 0.0,
    cfg_keep_tokens: tuple[int, ...] = (),
    suppress_tokens: tuple[int, ...] = (),
    begin_suppress_tokens: tuple[int, ...] = (),
    end_ids: tuple[int, ...] = (),
    kept: Kept | None = None,
    generator: torch.Generator | None = None,
    static: bool | None = None,
) -> Iterator[Step]:
    """Fills the masks of a batch of canvases, a `Step` at the start and after each forward. Ids in, ids out.

    A row's canvas is its prompt, masked where `canvas_masks` (of the prompts' shape) says so, then `max_new_tokens`
    masks. The objective, right shift, mask id and BD3LM's block length come from `model.config` (mdlm where it declares
    none). Rows are decoded block by block, each at its own pace, blocks of `block_size`: for bd3lm also the attention
    block (default: the checkpoint's), for mdlm only an order of work (default: one block), for ar always 1
    (it takes none).

    block_align: "sequence" (bd3lm's default: blocks lie as in training, a prompt's last partial block is denoised with
    the prompt fixed) or "prompt" (blocks start where the prompt ends; the reference's, and mdlm's default). With
    canvas_masks blocks always count from the sequence's start. steps: forwards for the whole answer (with canvas_masks:
    for the row's whole canvas, where the reference counts the batch's longest), shared evenly by its blocks; or
    steps_per_block. Each block's reveals follow `reveal_schedule` of its own mask count.

    temperature 0: the likeliest token. remasking: which tokens stay, "low_confidence" (by untempered probability),
    "random", or "p2" (`path_planning`: what the current block has revealed may be masked again). threshold, entropy,
    factor: reveal as many as `confidence_threshold`, `entropy_bound` or `confidence_factor` allows instead of a fixed
    count; steps then goes unused. cfg_scale s: logits
    u + (s + 1)(c - u), u with the given tokens but cfg_keep_tokens masked. suppress_tokens never occur;
    begin_suppress_tokens count as improbable only when confidence is compared, as in the reference. The mask id is
    never chosen. end_ids: a row is done at its first generated one with nothing masked before it (p2: in its block).

    kept: for a single row of ar or bd3lm. The complete blocks of the prompt's longest common prefix with kept.tokens
    are taken from its cache instead of being computed again, with the same outcome; it then holds this row's.

    static (default: on CUDA): shapes that recur, and nothing that is read back before the step after it is under way;
    on CUDA a forward with its choice of tokens is then recorded as a graph and replayed.

    Raises ValueError for options that contradict the model, the prompts or each other.
    """
    config, device = model.config, model.head_weight.device
    static = device.type == "cuda" if static is None else static
    objective = config.objective or "mdlm"
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
    cached = objective != "mdlm"
    right_shift = objective == "ar" or bool(config.right_shift)
    if not prompts:
        raise ValueError("no prompts; expected at least one (an empty one generates from scratch)")
    V, mask_id = config.vocab_size, config.mask_token_id
    if mask_id is None and (cfg_scale or objective != "ar"):
        raise ValueError("the checkpoint declares no mask_token_id; make a diffusion checkpoint of it with convert.py")
    for name, given in {
        "mask_token_id": () if mask_id is None else (mask_id,),
        "prompts": itertools.chain(*prompts),
        "cfg_keep_tokens": cfg_keep_tokens,
        "suppress_tokens": suppress_tokens,
        "begin_suppress_tokens": begin_suppress_tokens,
        "end_ids": end_ids,
    }.items():
        for token in given:
            if not 0 <= token < V:
                raise ValueError(
                    f"{name}: token id {token} is outside the vocabulary; expected 0 to {V - 1}, as this model's "
                    "tokenizer gives them"
                )
    if len({*suppress_tokens} | ({mask_id} - {None})) == V:
        raise ValueError(f"suppress_tokens names all {V} tokens, so that none is left to choose; name fewer")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 0")
    if canvas_masks is not None:
        expected, found = list(map(len, prompts)), list(map(len, canvas_masks))
        if found != expected:
            raise ValueError(f"canvas_masks of lengths {found}: expected a bool for each prompt token, {expected}")
        if block_align == "prompt":
            raise ValueError("block_align prompt: masks inside a canvas have no prompt's end to count from; drop it")
        if objective == "ar" and any(mask[:1] == [True] for mask in canvas_masks):
            raise ValueError("an ar model cannot fill in the first token; begin the canvas with the BOS or EOS token")
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    B, T = len(prompts), max(lengths)
    if T > config.max_position_embeddings:
        raise ValueError(
            f"prompt and answer of {T} tokens exceed the model's context of {config.max_position_embeddings}; "
            "shorten the prompt or lower --max_new_tokens"
        )
    for name, value in {"steps": steps, "steps_per_block": steps_per_block, "block_size": block_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    if objective == "ar":
        K = 1
        if block_size is not None:
            raise ValueError(f"block_size {block_size}: an ar model decodes token by token; leave --block_size out")
    elif objective == "bd3lm":
        K = config.block_length if block_size is None else block_size
        if K is None:
            raise ValueError("bd3lm needs a block size and the checkpoint declares none; pass --block_size")
        if config.block_length not in (None, K):
            raise ValueError(f"block_size {K} is not the checkpoint's {config.block_length}; leave --block_size out")
    else:
        K = max(T, 1) if block_size is None else block_size
    if objective == "ar" and min(map(len, prompts)) == 0:
        raise ValueError("an empty prompt has nothing to predict from; begin it with the BOS or EOS token")
    if remasking not in ("low_confidence", "random", "p2"):
        raise ValueError(f"remasking {remasking!r} is unknown; expected low_confidence, random or p2")
    if block_align not in (None, "sequence", "prompt"):
        raise ValueError(f"block_align {block_align!r} is unknown; expected sequence or prompt")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: expected 0 (the likeliest token) or more")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale {cfg_scale}: expected a number, 0 for no guidance")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: expected at least 1; leave it out to choose among all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: expected above 0 and at most 1; leave it out to choose among all tokens")
    if temperature == 0 and (top_k, top_p) != (None, None):
        option = f"top_p {top_p}" if top_k is None else f"top_k {top_k}"
        raise ValueError(f"{option} changes nothing at temperature 0; raise --temperature or leave it out")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold {threshold}: expected a probability between 0 and 1, 0.9 say")
    if entropy is not None and not 0 <= entropy < math.inf:
        raise ValueError(f"entropy {entropy}: expected 0 nats or more, 0.1 say")
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"factor {factor}: expected above 0, 1 say")
    adaptive = {"threshold": threshold, "entropy": entropy, "factor": factor}
    adaptive = {name: value for name, value in adaptive.items() if value is not None}
    if len(adaptive) > 1:
        raise ValueError(f"{' and '.join(adaptive)} each say how many tokens a step reveals; leave out all but one")
    for name in adaptive:
        if remasking == "random":
            raise ValueError(f"{name} compares confidences, remasking random does not have any; drop one of the two")
        if remasking == "p2":
            raise ValueError(f"{name} replaces the schedule, by which remasking p2 masks again; drop one of the two")
        if stochastic_transfer or steps_per_block is not None:
            option = "stochastic_transfer" if stochastic_transfer else "steps_per_block"
            raise ValueError(f"{name} replaces the schedule, which {option} is about; drop one of the two")
    if kept is not None:
        if not cached or len(prompts) > 1:
            raise ValueError(f"kept: {len(prompts)} rows of {objective}; expected one of ar or bd3lm, or leave it out")
        if cfg_scale or block_align == "prompt":
            raise ValueError("kept: guidance and block_align prompt change what earlier tokens see; leave it out")
    rules = {"threshold": confidence_threshold, "entropy": entropy_bound, "factor": confidence_factor}
    rule = path_planning if remasking == "p2" else fixed_count
    for name, value in adaptive.items():
        rule = rules[name](value)

    # The canvas. Column = position; rows are padded on the right.
    column = torch.arange(T, device=device).expand(B, T)
    length = torch.tensor(lengths, device=device)
    tokens = torch.zeros(B, T, dtype=torch.int64)
    masked = torch.zeros(B, T, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        masked[row, len(prompt) : lengths[row]] = True
        if canvas_masks is not None:
            masked[row, : len(prompt)] = torch.tensor(canvas_masks[row], dtype=torch.bool)
    tokens, masked = tokens.to(device), masked.to(device)
    tokens[masked] = 0 if mask_id is None else mask_id
    generated = masked.clone()
    # Decoding blocks, their masks and the schedule of each.
    offset = torch.zeros(B, dtype=torch.int64, device=device)
    if canvas_masks is None and (block_align or ("sequence" if cached else "prompt")) == "prompt":
        offset = (max_new_tokens - length) % K
    block = (column + offset[:, None]) // K
    last_block = ((length - 1).clamp(min=0) + offset) // K
    spans = lengths if canvas_masks is not None else [max_new_tokens] * B
    budgets = [steps_per_block or math.ceil(steps / max(1, math.ceil(span / K))) for span in spans]
    masks = torch.zeros(B, int(last_block.max()) + 1, dtype=torch.int64, device=device)
    masks.scatter_add_(1, block.clamp(max=masks.shape[1] - 1), masked.long())
    schedule = masks.new_zeros(*masks.shape, max(budgets))
    for budget in set(budgets):
        rows = [row for row in range(B) if budgets[row] == budget]
        schedule[rows, :, :budget] = reveal_schedule(
            masks[rows], budget, scheduler, stochastic=stochastic_transfer, generator=generator
        )
    # What the model is fed: with guidance, every row a second time with its given tokens masked.
    copies = 2 if cfg_scale else 1
    keep = torch.isin(tokens, torch.tensor(cfg_keep_tokens, dtype=torch.int64, device=device))
    hidden_given = ~generated & ~keep & (column < length[:, None])
    document = torch.where(column < length[:, None], 0, -1)
    if cached:
        layout = Layout.of(column, document, K, offset)
        cache = KVCache(config, copies * B, T + 1, dtype=model.head_weight.dtype, device=device)  # column T: a dump
    else:
        layout = Layout.of(column, None if min(lengths) == T else document)
        whole = layout.map(lambda field: torch.cat([field] * copies))._replace(kind=layout.kind)
        mask = attention_mask(whole, whole)
    pick = functools.partial(
        _pick,
        cfg_scale=cfg_scale,
        suppress=suppress_tokens,
        begin_suppress=begin_suppress_tokens,
        mask_id=mask_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        entropy=entropy is not None,
        generator=generator,
    )
    ends = torch.tensor(end_ids, dtype=torch.int64, device=device)
    rows = torch.arange(B, device=device)
    # The state of decoding, which `advance` changes in place: tokens, masked, and
    filled = torch.zeros(B, dtype=torch.int64, device=device)  # columns before this one are in the cache, clean
    step = torch.zeros(B, dtype=torch.int64, device=device)  # forwards spent on the row's current block
    done = ~masked.any(dim=1)
    confidence = torch.zeros(B, T, dtype=torch.promote_types(model.head_weight.dtype, torch.float32), device=device)
    if kept is not None:
        _reuse(kept, cache, layout, tokens[0], masked[0], K)
        filled += len(kept.tokens)

    def window() -> tuple[Tensor, ...]:
        """(current, start, first, stop), (B,) each: the block at work, its first column, and which columns to feed.

        Those are whatever is clean and not yet in the cache, and the current block; with right shift also the position
        before it, which predicts its first token. AR feeds no mask.
        """
        first_masked = torch.where(masked.any(dim=1), masked.int().argmax(dim=1), (length - 1).clamp(min=0))
        current = block.gather(1, first_masked[:, None])[:, 0]
        start = (current * K - offset).clamp(min=0)
        if not cached:
            return current, start, torch.zeros_like(start), length
        first, stop = filled, torch.minimum((current + 1) * K - offset, length)
        if right_shift:
            first = torch.minimum(filled, (start - 1).clamp(min=0))
            stop = torch.maximum(start, first + 1) if K == 1 else stop
        return current, start, first, stop

    def advance(W: int) -> None:
        """One forward over `W` columns of each row, from its window's first on, and the choice of tokens after it."""
        current, start, first, stop = window()
        here = block == current[:, None]
        candidates = masked & here & ~done[:, None]
        asked = candidates  # p2 also compares what it has revealed
        if remasking == "p2":
            asked = generated & here & ~done[:, None]
        columns, fetch, fed = None, column, layout
        if cached:
            columns = first[:, None] + torch.arange(W, device=device)  # (B, W)
            inside = columns < stop[:, None]
            fetch = columns.clamp(max=T - 1)
            columns = torch.where(inside, columns, T)
            fed = layout.map(lambda field: field.gather(1, fetch))
            # Outside, padding: in block 0, so that it sees the dump, since a query that sees nothing may give NaN.
            fed = fed._replace(document=torch.where(inside, fed.document, -1), block=torch.where(inside, fed.block, 0))
        inputs = tokens.gather(1, fetch)
        if copies == 2:
            inputs = torch.cat([inputs, inputs.masked_fill(hidden_given.gather(1, fetch), mask_id)])
            fed = fed.map(lambda field: torch.cat([field, field]))._replace(kind=fed.kind)
            columns = columns if columns is None else torch.cat([columns, columns])
        # The outputs wanted: those that predict a candidate; static: a block's, for as many are in every step.
        if static:
            place = start[:, None] + torch.arange(min(K, T), device=device)
            wanted = asked.gather(1, place.clamp(max=T - 1)) & (place < T)
            row, place = rows[:, None].expand_as(place).flatten(), torch.where(wanted, place, T).flatten()
        else:
            row, place = asked.nonzero().unbind(dim=1)  # (N,) each
        predictor = (place.clamp(max=T - 1) - int(right_shift) - first[row]).clamp(0, W - 1)
        index = row * W + predictor
        if copies == 2:
            index = torch.cat([index, index + B * W])

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            # Half as many rows as in training: choosing copies its logits, in float64 where there is a temperature.
            halves = hidden.chunk(copies)  # conditional, unconditional
            pairs = zip(*(half.split(CHUNK[device.type] // 2) for half in halves))
            picks = [pick(list(pair), weight) for pair in pairs]
            return tuple(torch.cat(column) for column in zip(*picks))

        context = {"cache": cache, "columns": columns} if cached else {"mask": mask}
        picked, probability, score = model(inputs, fed, index=index, head=head, **context)
        if remasking == "random":
            score = torch.rand(probability.shape, generator=generator, device=device)

        def canvas(values: Tensor, empty) -> Tensor:
            """(B, T): values (N,) at their places, `empty` elsewhere; column T, of no place, is cut."""
            return values.new_full((B, T + 1), empty).index_put_((row, place), values)[:, :T]

        token, likely = canvas(picked, 0), canvas(probability, -math.inf)
        quota = schedule[rows, current, step.clamp(max=schedule.shape[-1] - 1)]
        still = rule(canvas(score, -math.inf), token, candidates, quota, generator)
        revealed = candidates & ~still
        tokens.copy_(torch.where(revealed, token, tokens))
        confidence.copy_(torch.where(revealed, likely, confidence).masked_fill(still, 0.0))
        if remasking == "p2" and mask_id is not None:
            tokens.masked_fill_(still, mask_id)
        masked.copy_((masked & ~candidates) | still)
        filled.copy_(start)
        step.copy_(torch.where((masked & here).any(dim=1), step + 1, 0))
        # A row ends at its first generated end token with nothing masked before it.
        ended = generated & ~masked & (tokens[:, :, None] == ends).any(dim=2)
        end = torch.where(ended.any(dim=1), ended.int().argmax(dim=1), T)
        before = column < end[:, None]
        if remasking == "p2":  # which may mask the end token again until its block is finished
            before = block <= block.gather(1, end.clamp(max=T - 1)[:, None])
        done.copy_(~(masked & before).any(dim=1))

    forwards = 0
    yield Step(tokens.clone(), masked.clone(), done.clone(), forwards, confidence.clone())
    if not any(map(sum, masks.tolist())):
        return
    if static:
        _, _, first, stop = window()
        own, lead = (0, 1) if objective == "ar" else (K, int(right_shift))
        widths = _widths(int((stop - first).max()), schedule, own, lead, K, rule is fixed_count)
        run = _recorded(advance, generator, device)
    while True:
        over = _later(done.all())
        if static:
            run(next(widths) if cached else T)
            if over():  # every row was done before this forward, which changed nothing
                return
        elif over():
            return
        else:
            _, _, first, stop = window()
            advance(int((stop - first).max()))
        forwards += 1
        if kept is not None:
            kept.tokens = tokens[0, : int(filled)].tolist()
        yield Step(tokens.clone(), masked.clone(), done.clone(), forwards, confidence.clone())


def _widths(first: int, schedule: Tensor, own: int, lead: int, K: int, fixed: bool) -> Iterator[int]:
    """How many columns each forward feeds, known before decoding: the first so many, then of a row its block, `own`,
    and the `lead` columns before it; and where it begins a block, all from the one before on, of K a block.

    Where only the reading of tokens tells when a row begins a block (not `fixed`), that is as if one always did.
    """
    begins: dict[int, int] = {}  # forward: columns
    for counts in (schedule > 0).sum(dim=2).tolist():  # forwards of each block of the row
        blocks, forward = [b for b, count in enumerate(counts) if count], 0
        for before, b in itertools.pairwise(blocks):
            forward += counts[before]
            begins[forward] = max(begins.get(forward, 0), (b - before) * K + own)
    widest = max([own + lead, *begins.values()])
    yield first
    for forward in itertools.count(1):
        yield max(own + lead, begins.get(forward, 0)) if fixed else widest


def _recorded(advance, generator: torch.Generator | None, device: torch.device):
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


def _later(flag: Tensor):
    """A function that returns the value of `flag` (); on CUDA it waits for what came before it, not after."""
    if not flag.is_cuda:
        return flag.item
    copy, ready = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
    copy.copy_(flag, non_blocking=True)
    ready.record(torch.cuda.current_stream(flag.device))

    def value() -> bool:
        ready.synchronize()
        return copy.item()

    return value


def _reuse(kept: Kept, cache: KVCache, layout: Layout, tokens: Tensor, masked: Tensor, K: int) -> None:
    """Cuts `kept` to the complete blocks of what it shares with tokens (T,) and moves these to `cache`, its new one."""
    known = len(kept.tokens) if kept.block_size == K else 0
    ours = tokens.masked_fill(masked, -1)[:known]  # no token equals a mask
    agree = ours == torch.tensor(kept.tokens[: len(ours)], dtype=torch.int64, device=tokens.device)
    n = int(agree.int().cumprod(dim=0).sum()) // K * K
    kept.tokens, kept.block_size = kept.tokens[:n], K
    if n:
        cache.keys[:, :, :n] = kept.cache.keys[:, :, :n]
        cache.values[:, :, :n] = kept.cache.values[:, :, :n]
        cache.write_layout(torch.arange(n, device=tokens.device)[None], layout.map(lambda field: field[:, :n]))
    kept.cache = cache


def _slices(hidden: list[Tensor], weight: Tensor, whole: bool = False) -> Iterator[tuple[int, list[Tensor]]]:
    """(first token, the logits (N, v) of each of hidden (N, D) from there on), over the vocabulary in order.

    On the CPU a slice is of SLICE logits, which stay in a core's cache, and computed as (v, N) with N rounded up to
    eights: of a step's few rows MKL then reads the weights in a third to two thirds of the time. Elsewhere, or `whole`,
    it is all of them.
    """
    N, V = len(hidden[0]), len(weight)
    if weight.is_cuda:
        yield 0, [rows @ weight.T for rows in hidden]
        return
    start, columns = 0, [F.pad(rows, (0, 0, 0, -N % 8)).T for rows in hidden]  # (D, N) each
    for part in weight.split(V if whole else max(1, SLICE // max(N, 1))):
        yield start, [(part @ rows).T[:N] for rows in columns]
        start += len(part)


def _pick(
    hidden, weight, *, cfg_scale, suppress, begin_suppress, mask_id, temperature, top_k, top_p, entropy, generator
):
    """(token, probability, score), each (N,), from hidden [(N, D)] or, with guidance, [conditional, unconditional].

    The score is the probability; with `entropy` the distribution's negative entropy in nats.
    """
    restricted = temperature and (top_k is not None or top_p is not None)
    parts = []
    for start, scores in _slices(hidden, weight, whole=restricted):
        logits = scores[0].to(torch.promote_types(scores[0].dtype, torch.float32))  # (N, v), changed in place
        if cfg_scale:
            free = scores[1].to(logits.dtype)
            logits = free + (cfg_scale + 1) * (logits - free)
        inside = range(start, start + logits.shape[1])
        for token in suppress:
            if token in inside:
                logits[:, token - start].fill_(-math.inf)
        if mask_id in inside:  # never chosen, yet its share of the probability counts, as in the reference
            share = logits[:, mask_id - start].clone()
            logits[:, mask_id - start].fill_(-math.inf)
        best, place = logits.max(dim=1)
        top = best
        if temperature:
            noisy = restrict(logits / temperature, top_k, top_p) * temperature if restricted else logits
            uniform = torch.rand(noisy.shape, generator=generator, device=noisy.device, dtype=torch.float64)
            best, place = gumbel(noisy, temperature, uniform).max(dim=1)
        if mask_id in inside:
            logits[:, mask_id - start].copy_(share)
            top = torch.maximum(top, share)
        for token in begin_suppress:
            if token in inside:
                logits[:, token - start].fill_(-math.inf)
        chosen = logits.gather(1, place[:, None])[:, 0]
        if begin_suppress:
            top = logits.max(dim=1).values
        top = top.clamp(min=torch.finfo(logits.dtype).min)  # a slice may be suppressed as a whole
        logits.sub_(top[:, None])
        if entropy:
            p = logits.exp()
            total, mean = p.sum(dim=1), (p * logits.clamp_(min=torch.finfo(p.dtype).min)).sum(dim=1)  # 0 * -inf: NaN
        else:
            total = mean = logits.exp_().sum(dim=1)
        parts.append((best, place + start, chosen, top, total, mean))
    best, place, chosen, top, total, mean = (torch.stack(column) for column in zip(*parts))  # (slices, N)
    first = best.argmax(dim=0, keepdim=True)
    token, chosen = place.gather(0, first)[0], chosen.gather(0, first)[0]
    peak = top.amax(dim=0)
    share = (top - peak).exp()
    norm = (total * share).sum(dim=0)
    probability = (chosen - peak).exp() / norm
    if not entropy:
        return token, probability, probability
    return token, probability, ((mean + (top - peak) * total) * share).sum(dim=0) / norm - norm.log()


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood

COPIES = 1024  # tokens of noisy copies in a row of one forward: attention compares each with all, and masks most


@dataclass
class _Row:
    """One sequence to feed: a clean past, then noisy copies of blocks; and whose log-probabilities are wanted of it.

    Requests that would feed the same share a row: the answers to one question, where their noisy blocks are equal.
    """

    past: tuple[int, ...]
    shared: int  # so many tokens of the past are complete blocks of the context
    copies: dict[tuple[int, bytes], int] = field(default_factory=dict)  # (start, int64 tokens): the copy's number
    queries: list[np.ndarray] = field(default_factory=list)  # (n, 5): copy (-1: past), predictor, target, request, set
    weights: list[np.ndarray] = field(default_factory=list)  # (n,): what that log-probability counts in its set

    @property
    def width(self) -> int:
        """Tokens of its longest copy."""
        return max((len(tokens) // 8 for _, tokens in self.copies), default=0)


@torch.no_grad()
def log_likelihood(
    model: LanguageModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    *,
    draws: int = 128,
    generator: torch.Generator | None = None,
    forward_tokens: int = 4096,
    check_greedy: bool = False,
) -> tuple[Tensor, ...]:
    """(estimate, standard_error), (B,) float64 each: log p(continuation | context) in nats.

    ar: exact. mdlm: an unbiased estimate of the lower bound (MDLM, arXiv 2406.07524, equation 10, with the count of
    masks in the level's place): over n ~ uniform 1..L of a continuation's L tokens and S a random subset of size n, the
    mean of L / n times the sum over S of log p(token | all tokens outside S). bd3lm: the sum over blocks of that bound
    given the clean past (BD3LM, arXiv 2503.09573, equation 8); blocks lie by sequence, as in training, and the last one
    ends with the continuation.

    draws: of each block (mdlm: of the continuation). Where a block has no more subsets than that they are enumerated,
    so one token is exact. Otherwise draws form sets, each systematic over n with a random shift of its own, and the
    error is that of the mean over sets. Noise is a function of the generator, the context and the block: answers to one
    question share theirs, and the batch does not change it. forward_tokens: how many a forward may take, unless one
    sequence alone has more. check_greedy: a third tensor, (B,) bool: the model's own greedy continuation is this one.

    Raises ValueError for a request longer than the model, and for an empty context where the first token then has no
    predictor (ar, right shift).
    """
    config = model.config
    objective = config.objective or "mdlm"
    K = {"ar": 1, "mdlm": None, "bd3lm": config.block_length}[objective]
    right_shift = objective == "ar" or bool(config.right_shift)
    if objective != "ar" and config.mask_token_id is None:
        raise ValueError("the checkpoint declares no mask_token_id; make a diffusion checkpoint of it with convert.py")
    if objective == "bd3lm" and K is None:
        raise ValueError("bd3lm needs a block length and the checkpoint declares none; see convert.py --block_size")
    if draws < 2:
        raise ValueError(f"draws {draws}: expected at least 2, or there is no standard error")
    longest = config.max_position_embeddings + int(objective == "ar")  # ar does not feed its last token
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))
    sets = min(max(draws // 2, 2), 16)
    rows: dict[tuple | bytes, _Row] = {}
    for request, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        tokens = np.array([*context, *continuation], dtype=np.int64)
        P, T = len(context), len(tokens)
        if T > longest:
            raise ValueError(f"context and continuation of {T} tokens exceed the model's {longest}; cut the context")
        if right_shift and P == 0 < T:
            raise ValueError("an empty context has nothing to predict from; begin it with the BOS or EOS token")
        if P == T:
            continue
        stream = int.from_bytes(hashlib.blake2b(tokens[:P].tobytes(), digest_size=7).digest())
        size = K or T
        past = tuple(tokens[: (T - 1) // size * size].tolist())
        for start in range(P // size * size, T, size):
            first, stop = max(P, start), min(start + size, T)
            noise = np.random.Generator(np.random.Philox(key=np.array([seed, stream + start], dtype=np.uint64)))
            for masked, weight, which in _subsets(stop - first, draws, sets, noise):
                place = first + masked.nonzero()[0]
                predictor = place - int(right_shift)
                noised = tokens[start:stop].copy()
                if objective != "ar":
                    noised[place - start] = config.mask_token_id
                row = rows.setdefault(past if K else noised.tobytes(), _Row(past, P // size * size))
                row.shared = min(row.shared, P // size * size)
                copy = -1
                if predictor[-1] >= start:  # else its one masked token is predicted by the past
                    copy = row.copies.setdefault((start, noised.tobytes()), len(row.copies))
                query = np.full((len(place), 5), (copy, 0, 0, request, which))
                query[predictor < start, 0] = -1
                query[:, 1], query[:, 2] = predictor, tokens[place]
                row.queries.append(query)
                row.weights.append(np.full(len(place), weight))

    table = np.zeros((len(contexts), sets + 1))  # a column per set; the last: enumerated blocks
    greedy = np.ones(len(contexts), dtype=bool)
    score = _score_blocks if K else _score_whole
    # Side by side: questions of about the same length, and answers to the same one.
    todo = sorted(rows.values(), key=lambda row: (len(row.past) + row.width, row.past[: row.shared]), reverse=True)
    while todo:
        cost, batch = 0, []
        while todo and (not batch or (len(batch) + 1) * cost <= forward_tokens):
            batch.append(todo.pop(0))
            noisy = len(batch[-1].copies) * batch[-1].width
            cost = max(cost, len(batch[-1].past) + min(noisy, max(batch[-1].width, COPIES)))
        asked = [np.unique(np.concatenate(row.queries)[:, :3], axis=0, return_inverse=True) for row in batch]
        scores = score(model, batch, [query for query, _ in asked], K)
        for row, (_, inverse), (log_p, likeliest) in zip(batch, asked, scores):
            _, _, _, request, which = np.concatenate(row.queries).T
            np.add.at(table, (request, which), np.concatenate(row.weights) * log_p[inverse.ravel()])
            np.logical_and.at(greedy, request, likeliest[inverse.ravel()])
    estimate = torch.from_numpy(table[:, -1] + table[:, :-1].mean(axis=1))
    error = torch.from_numpy(table[:, :-1].std(axis=1, ddof=1) / math.sqrt(sets))
    if not check_greedy:
        return estimate, error
    verdict = torch.from_numpy(greedy) if objective == "ar" else is_greedy(model, contexts, continuations)
    return estimate, error, verdict


def _subsets(m: int, draws: int, sets: int, noise: np.random.Generator):
    """Yields (masked (m,) bool, weight, set): subsets of m places whose weighted sums, added in each set, are unbiased.

    All of them where they are no more than `draws` (set -1). Else set r draws n at the levels (i + u_r) / b of its b
    draws. Its subsets lie one after the other around a circle on which the places are in random order: each is a
    uniform one of its size, and together they mask the places about equally often.
    """
    if m < 30 and 2**m - 1 <= draws:
        for code in range(1, 2**m):
            masked = code >> np.arange(m) & 1 == 1
            n = int(masked.sum())
            yield masked, 1 / (n * math.comb(m, n)), -1
        return
    shift = noise.random(sets)
    place = noise.random((m, sets)).argsort(axis=0).argsort(axis=0)  # of token j on the circle of set r
    for r in range(sets):
        b = draws // sets + int(r < draws % sets)
        begin = 0
        for i in range(b):
            n = min(1 + int(m * (i + shift[r]) / b), m)
            yield (place[:, r] - begin) % m < n, m / (n * b), r
            begin += n


def _scores(targets: Tensor):
    """A head that returns, for each of hidden (N, D), its target's log-probability and whether none is likelier."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_p, likeliest = [], []
        chunk = CHUNK[hidden.device.type]
        for rows, target in zip(hidden.split(chunk), targets.split(chunk)):
            chosen, tops, norms = None, [], []
            for start, (logits,) in _slices([rows], weight):
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                place = target - start
                here = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                inside = (place >= 0) & (place < logits.shape[1])
                chosen = here if chosen is None else torch.where(inside, here, chosen)
                tops.append(logits.max(dim=1).values)  # amax is slower where v is strided
                norms.append(tops[-1] + logits.sub_(tops[-1][:, None]).exp_().sum(dim=1).log())
            log_p.append(chosen - torch.stack(norms).logsumexp(dim=0))
            likeliest.append(chosen == torch.stack(tops).amax(dim=0))
        return torch.cat(log_p), torch.cat(likeliest)

    return head


def _score_whole(model, batch: list[_Row], asked: list[np.ndarray], K: None):
    """mdlm: (log-probability, likeliest) of each row's queries; a row is its one noisy copy."""
    sequences = [np.frombuffer(tokens, dtype=np.int64) for row in batch for _, tokens in row.copies]
    B, T = len(sequences), max(map(len, sequences))
    inputs, document = np.zeros((B, T), dtype=np.int64), np.full((B, T), -1)
    for i, tokens in enumerate(sequences):
        inputs[i, : len(tokens)], document[i, : len(tokens)] = tokens, 0
    device = model.head_weight.device
    inputs, ragged = torch.from_numpy(inputs).to(device), (document < 0).any()
    position = torch.arange(T, device=device).expand(B, T)
    layout = Layout.of(position, torch.from_numpy(document).to(device) if ragged else None)
    index = torch.from_numpy(np.concatenate([i * T + query[:, 1] for i, query in enumerate(asked)])).to(device)
    targets = torch.from_numpy(np.concatenate([query[:, 2] for query in asked])).to(device)
    return _split(model(inputs, layout, index=index, head=_scores(targets)), asked)


def _split(scores: tuple[Tensor, Tensor], asked: list[np.ndarray]):
    ends = np.cumsum([len(query) for query in asked])[:-1]
    log_p, likeliest = (part.cpu().numpy() for part in scores)
    return list(zip(np.split(log_p.astype(np.float64), ends), np.split(likeliest, ends)))


def _score_blocks(model, batch: list[_Row], asked: list[np.ndarray], K: int):
    """ar, bd3lm: (log-probability, likeliest) of each row's queries; the clean past first, then its noisy copies.

    Contexts that several rows share are encoded once, in a forward before. Copies that do not fit one forward come in
    further ones, after the same cached past.
    """
    device, dtype = model.head_weight.device, model.head_weight.dtype
    lengths = np.array([len(row.past) for row in batch])
    B, P, width = len(batch), int(lengths.max()), max(row.width for row in batch)
    contexts = {row.past[: row.shared]: i for i, row in enumerate(batch)}  # and one row that has it
    begin = np.zeros(B, dtype=np.int64)  # the columns before this one are in the cache
    copies = max(len(row.copies) for row in batch)
    fit = max(1, COPIES // max(width, 1))  # copies of a forward
    W = min(copies, fit) * width

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    def clean(pasts: list[tuple], first: np.ndarray):
        """Tokens, columns and layout of each past from its column `first` on, right-padded to the longest."""
        n = max(len(past) - f for past, f in zip(pasts, first))
        tokens, column = np.zeros((len(pasts), n), dtype=np.int64), first[:, None] + np.arange(n)
        for i, past in enumerate(pasts):
            tokens[i, : len(past) - first[i]] = past[first[i] :]
        inside = column < np.array([len(past) for past in pasts])[:, None]
        block = np.where(inside, column // K, 0)  # padding sees the dump: a query that sees nothing may give NaN
        return tokens, np.where(inside, column, P + W), column, np.where(inside, 0, -1), block, 0 * column

    if copies == 0 and len(contexts) == B:  # ar: nothing is fed twice
        tokens, _, column, *_ = clean([row.past for row in batch], begin)
        index = tensor(np.concatenate([i * P + query[:, 1] for i, query in enumerate(asked)]))
        head = _scores(tensor(np.concatenate([query[:, 2] for query in asked])))
        return _split(model(tensor(tokens), Layout.of(tensor(column), None, K), index=index, head=head), asked)

    cache = KVCache(model.config, B, P + W + 1, dtype=dtype, device=device)  # column P + W: a dump
    if len(contexts) < B and any(contexts):
        C = max(map(len, contexts))
        part = KVCache(model.config, len(contexts), P + W + 1, dtype=dtype, device=device)
        tokens, columns, *layout = map(tensor, clean(list(contexts), np.zeros(len(contexts), dtype=np.int64)))
        unread = torch.empty(0, dtype=torch.int64, device=device)
        model(tokens, Layout(*layout), cache=part, columns=columns, index=unread)
        order = {context: n for n, context in enumerate(contexts)}
        owner = torch.tensor([order[row.past[: row.shared]] for row in batch], device=device)
        cache.keys[:, :, :C], cache.values[:, :, :C] = part.keys[:, owner, :C], part.values[:, owner, :C]
        for kept, new in zip(cache.layout[:4], part.layout[:4]):
            kept[:, :C] = new[owner, :C]
        # the last cached token is fed again: under right shift it predicts
        begin = np.array([max(row.shared - 1, 0) for row in batch])

    results = [(np.zeros(len(query)), np.zeros(len(query), dtype=bool)) for query in asked]
    for chunk in range(0, max(copies, 1), fit):
        n = max(0, min(fit, copies - chunk))
        # (B, n * width): tokens, columns, position, document, block, noisy
        fed = [np.zeros((B, n, width), dtype=np.int64) for _ in range(6)]
        fed[3] -= 1
        for i, row in enumerate(batch):
            for c, (start, tokens) in enumerate(list(row.copies)[chunk : chunk + n]):
                tokens = np.frombuffer(tokens, dtype=np.int64)
                fed[0][i, c, : len(tokens)] = tokens
                fed[2][i, c] = start + np.arange(width)
                fed[3][i, c, : len(tokens)] = 0
                fed[4][i, c], fed[5][i, c] = start // K, chunk + c + 1
        fed = [field.reshape(B, n * width) for field in fed]
        fed[1][:] = P + np.arange(n * width)
        before = 0
        if chunk == 0 and P:
            past = clean([row.past for row in batch], begin)
            before = past[0].shape[1]
            fed = [np.concatenate(pair, axis=1) for pair in zip(past, fed)]
        index, mine = [], []
        for i, (row, query) in enumerate(zip(batch, asked)):
            copy, predictor = query[:, 0], query[:, 1]
            starts = np.array([start for start, _ in row.copies] + [0])  # the last: of copy -1, the past
            place = np.where(copy < 0, predictor - begin[i], before + (copy - chunk) * width + predictor - starts[copy])
            mine.append((copy >= chunk) & (copy < chunk + n) | (copy < 0) & (chunk == 0))
            index.append((i * fed[0].shape[1] + place)[mine[-1]])
        parts = [query[chosen] for query, chosen in zip(asked, mine)]
        tokens, columns, *layout = map(tensor, fed)
        head = _scores(tensor(np.concatenate([query[:, 2] for query in parts])))
        scores = model(
            tokens, Layout(*layout), cache=cache, columns=columns, index=tensor(np.concatenate(index)), head=head
        )
        for result, chosen, part in zip(results, mine, _split(scores, parts)):
            result[0][chosen], result[1][chosen] = part
    return results


@torch.no_grad()
def is_greedy(model: LanguageModel, contexts: list[list[int]], continuations: list[list[int]]) -> Tensor:
    """(B,) bool: greedy decoding gives the continuation: a token a forward, of a block's the likeliest first.

    Stops when every row has failed.
    """
    if model.config.objective == "ar":
        return log_likelihood(model, contexts, continuations, check_greedy=True)[2]
    rows = [[*context, *continuation] for context, continuation in zip(contexts, continuations, strict=True)]
    T = max(map(len, rows), default=0)
    wanted, answer = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.bool)
    for i, (context, row) in enumerate(zip(contexts, rows)):
        wanted[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        answer[i, len(context) : len(row)] = True
    verdict = torch.ones(len(rows), dtype=torch.bool)
    if not answer.any():
        return verdict
    canvas_masks = [mask[: len(row)] for mask, row in zip(answer.tolist(), rows)]
    for step in denoise(model, rows, canvas_masks=canvas_masks, max_new_tokens=0, steps_per_block=T):
        wrong = answer & ~step.masked.cpu() & (step.tokens.cpu() != wanted)
        verdict = ~wrong.any(dim=1)
        if not verdict.any():
            break
    return verdict

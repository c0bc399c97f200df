"""Diffusion over tokens: noise, the three objectives (ar, mdlm, bd3lm) with their one loss, and the one sampler.

    Schedules and weights   SCHEDULES, WEIGHTS: alpha(t) and a masked token's weight; a new one is a row of its table
    Noise                   Noising, draw_noise: which tokens of a clean Batch are masked, as an explicit Noise
    Objectives              training_example: a Batch and its Noise as an Example, for ar, mdlm or bd3lm
    The loss                loss: of an Example, the same for all three objectives
    Sampling                its options; choose.py has its decoding rules, and how a token is chosen
    The sampler             denoise and Decoding: fills in the masks of a canvas, block by block
    Speculation             the same for a model of causal context: it drafts by diffusion and verifies as ar

Masked diffusion: MDLM, arXiv 2406.07524. Block diffusion: BD3LM, arXiv 2503.09573. Time t is in (0, 1], 1 = all masked;
alpha(t) is the probability that a token is still clean. The reference is dLLM. Letters as in model.py, and S for steps.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from choose import REMASKING, RULES, check_canvas, choose_tokens, fixed_count, noised_at
from graphs import static_steps, static_widths
from model import Config, KVCache, LanguageModel, Layout, attention_mask
from options import Bound, Count, Ids, Natural, Options, Steps, Tokens

# ---------------------------------------------------------------------------------------------------------------------
# Schedules and weights

SCHEDULES = {  # name: alpha(t) and its derivative
    "linear": (lambda t: 1 - t, lambda t: torch.full_like(t, -1.0)),
    "cosine": (
        lambda t: 1 - torch.cos(math.pi / 2 * (1 - t)),
        lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
    ),
}
WEIGHTS = {  # name: a masked token's weight at a noise level, and the noise types that it goes with, default first
    # MDLM's equation 11: -alpha'(t) / (1 - alpha(t)); the reference's 1e-6 guards against division by zero.
    "scheduler": (lambda t, s: -alpha_derivative(t, s) / (1 - alpha(t, s) + 1e-6), ("level",)),
    # m / n where n of m tokens are masked: the unbiased bound under counts.
    "count": (lambda t, s: 1 / t, ("count", "decay")),
    "uniform": (lambda t, s: torch.ones_like(t), ("level", "count", "decay", "all")),
}


def row_of(table: dict, name: str, what: str):
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; expected {' or '.join(table)}")
    return table[name]


def alpha(t: Tensor, scheduler: str = "linear") -> Tensor:
    return row_of(SCHEDULES, scheduler, "scheduler")[0](t)


def alpha_derivative(t: Tensor, scheduler: str = "linear") -> Tensor:
    return row_of(SCHEDULES, scheduler, "scheduler")[1](t)


def loss_weight(level: Tensor, weight_type: str, scheduler: str = "linear") -> Tensor:
    """Weight of a masked token's cross-entropy at noise `level`: the time t, or the share n / m that is masked."""
    return row_of(WEIGHTS, weight_type, "loss_weight_type")[0](level, scheduler)


def reverse_mask_prob(s: Tensor, t: Tensor, scheduler: str = "linear") -> Tensor:
    """Probability that a token masked at time t is still masked at the earlier time s < t."""
    return (1 - alpha(s, scheduler)) / (1 - alpha(t, scheduler))


def reveal_schedule(
    masks: Tensor, steps: int, scheduler: str = "linear", *, width: int | None = None, stochastic=False, generator=None
) -> Tensor:
    """(..., S) int64: how many of masks (...) to reveal at each of `steps` equal steps of time from 1 to 0; together
    all of them. width: S, where it is less than `steps`; the largest of masks is enough for all that reveal any."""
    grid = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    t, s = grid[:-1].float(), grid[1:].float()  # float32, as the reference computes its probabilities
    reveal = (1 - reverse_mask_prob(s, t, scheduler).double()).to(masks.device)  # (S,)

    # Binomial draws of what is left are a draw of each token's own step. Sorted, a run of equal steps is one forward,
    # which reveals as many tokens as the run is long; steps that reveal nothing do not occur.
    if stochastic:
        n = int(masks.max())
        drawn = torch.rand(*masks.shape, n, dtype=torch.float64, device=masks.device, generator=generator)
        step = torch.searchsorted(1 - (1 - reveal).cumprod(0), drawn, right=True).clamp(max=steps - 1)
        step = step.where(torch.arange(n, device=masks.device) < masks[..., None], steps).sort(dim=-1).values
        run = (step.diff(prepend=step[..., :1]) != 0).cumsum(dim=-1)
        schedule = torch.zeros_like(step).scatter_add_(-1, run, (step < steps).long())
        return F.pad(schedule, (0, (width or steps) - n))

    # Else it reveals the expected number, rounded half to even. Steps that would round to none even of all masks cost
    # nothing, however many they are.
    reveal = reveal[(reveal * masks.max().clamp(min=1)).round() > 0]
    remaining, schedule = masks.double(), []
    for p in reveal:
        schedule.append(torch.minimum(remaining, (remaining * p).round()))
        remaining = remaining - schedule[-1]
    schedule = torch.stack(schedule, dim=-1).long()

    # Steps that reveal nothing move to the end, so that no forward is spent on them.
    order = (schedule == 0).to(torch.int8).argsort(dim=-1, stable=True)
    return F.pad(schedule.gather(-1, order), (0, (width or steps) - schedule.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Noise


class Batch(NamedTuple):
    """Clean rows. tokens, document, position (B, T) int64; supervised (B, T) bool: whose loss counts; sample (B,)
    int64: each row's place in the epoch's order, which its noise depends on, and not on the process or the batch.
    fill (B, T) bool: end tokens that only fill a row's last block; None: there are none."""

    tokens: Tensor
    supervised: Tensor
    document: Tensor
    position: Tensor
    sample: Tensor
    epoch: int = 0
    fill: Tensor | None = None


class Noise(NamedTuple):
    """Everything random about an example: level (B, T) in (0, 1], a time t or a share n / m; masked (B, T) bool."""

    level: Tensor
    masked: Tensor


class Blocks(NamedTuple):
    """Of each token (B, T): the number of its block in the row, how many supervised tokens that has, and how many of
    them come before this one."""

    number: Tensor
    size: Tensor
    place: Tensor

    def rank(self, key: Tensor, supervised: Tensor) -> Tensor:
        """(B, T): the rank of a token's key (B, T), in [0, 1), among the supervised ones of its block."""
        # Sort by block, then key, unsupervised last. A rank is the place in this order, less earlier blocks' tokens.
        order = torch.where(supervised, self.number + key, math.inf).argsort(dim=1)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(key.shape[1]).expand_as(order))
        return rank - (supervised.cumsum(dim=1) - supervised.long() - self.place)


# A noise type: (level, uniform, supervised, blocks, noising) -> (level, masked), all (B, T). level in [0, 1) is a draw
# of the token's block, uniform in [0, 1) one of its own.


def _by_level(level, uniform, supervised, blocks, noising):
    """Masks each token with probability 1 - alpha(t), t between time_epsilon and time_max."""
    level = noising.time_epsilon + (noising.time_max - noising.time_epsilon) * level
    masked = uniform < 1 - alpha(level, noising.scheduler)
    # Rank 0 is masked anyway if any token is.
    return level, masked | (blocks.rank(uniform, supervised) == 0) if noising.at_least_one else masked


def _by_count(level, uniform, supervised, blocks, noising):
    """Masks n of a block's m supervised tokens, n uniform in 1..m; the level is n / m."""
    count = 1 + (level * blocks.size).floor()
    return count / blocks.size.clamp(min=1), blocks.rank(uniform, supervised) < count


def _by_decay(level, uniform, supervised, blocks, noising):
    """As many as by count, but the i-th token of a block has weight 2^((1 - n/m) i / (H m)): later ones are masked more
    often, the more so the fewer are (Efficient-DLM, arXiv 2512.14067, whose half-life ratio H is)."""
    size = blocks.size.clamp(min=1)
    count = 1 + (level * size).floor()
    weight = 2 ** ((1 - count / size) * blocks.place / (noising.mask_decay * size))
    # Draws without replacement by weight: those for which an exponential draw of that rate comes first.
    key = 1 - (1 - uniform) ** (1 / weight)
    return _by_count(level, key, supervised, blocks, noising)


def _all(level, uniform, supervised, blocks, noising):
    """Masks every supervised token."""
    return torch.ones_like(level), supervised


NOISE_TYPES = {"level": _by_level, "count": _by_count, "decay": _by_decay, "all": _all}


@dataclass(kw_only=True)
class Noising(Options):
    "noise (mdlm and bd3lm)"

    loss_weight_type: Literal[*WEIGHTS] | None = None
    """weight of a masked token: scheduler, -alpha'(t)/(1 - alpha(t)), 1/t for linear, the likelihood bound; uniform, 1,
    better at small budgets; count, m/n (default: scheduler; by --noise_type count and decay: count, all: uniform)"""
    noise_type: Literal[*NOISE_TYPES] | None = None
    """level: mask each token with probability 1 - alpha(t). count: mask n of a block's m tokens, n uniform in 1..m,
    which has lower variance. decay: as many, but later ones more often. all: every one, which only drafts need
    (default: level; with --mask_decay decay)"""
    mask_decay: Annotated[float, Bound(lambda h: h > 0, "above 0, in blocks"), "H"] | None = None
    """with --noise_type decay: a token H block lengths after another is masked twice as often, when few are masked
    (Efficient-DLM; default: 0.5)"""
    level_per: Literal["block", "sequence"] = "block"
    """a level for each block, spread evenly over a row's blocks, or one a row, as dLLM does"""
    scheduler: Literal[*SCHEDULES] = "linear"
    """alpha(t), the probability that a token is not masked at time t: linear 1 - t, cosine 1 - cos((1 - t) pi/2)"""
    time_epsilon: Annotated[float, "T"] = 1e-3  # lowest time that is drawn
    time_max: Annotated[float, "T"] = 1.0  # highest time, 1 for all masked
    at_least_one: bool = False  # mask one token where a block's draw is empty; lowers variance, biases the 1/t weight
    complementary_masks: bool = False  # train on every row twice, the second time with the other tokens masked

    def __post_init__(self):
        super().__post_init__()
        self.noise_type = self.noise_type or ("level" if self.mask_decay is None else "decay")
        if self.mask_decay is not None and self.noise_type != "decay":
            raise ValueError(f"--mask_decay {self.mask_decay} is of --noise_type decay, not {self.noise_type}")
        if self.noise_type == "decay":
            self.mask_decay = self.mask_decay or 0.5
        fitting = [name for name, (_, noise_types) in WEIGHTS.items() if self.noise_type in noise_types]
        self.loss_weight_type = self.loss_weight_type or fitting[0]
        if self.loss_weight_type not in fitting:
            raise ValueError(
                f"--loss_weight_type {self.loss_weight_type} does not go with --noise_type {self.noise_type}; expected "
                f"{' or '.join(fitting)}"
            )
        if not 0 < self.time_epsilon < self.time_max <= 1:
            raise ValueError(f"--time_epsilon and --time_max: expected 0 < {self.time_epsilon} < {self.time_max} <= 1")
        if self.complementary_masks and (self.scheduler, self.noise_type) != ("linear", "level"):
            raise ValueError(
                "--complementary_masks needs --noise_type level and --scheduler linear, where 1 - t is a time"
            )


def draw_noise(
    batch: Batch, noising: Noising | None = None, *, block_length: int | None = None, seed: int = 0
) -> Noise:
    """The noise of a batch: that of a row is a function of seed, epoch, its `sample` and the row, not of its batch.

    block_length: of the noise; None: one block a document (MDLM). BD3LM draws a level for each block (arXiv 2503.09573,
    equation 8); level_per "sequence" draws one for the row, as the reference does.
    """
    noising = noising or Noising()
    supervised = batch.supervised
    B, T = supervised.shape

    # Number the blocks of each row, over all its documents. `size` and `level` are indexed by that number, until
    # `gather` below spreads them over the tokens.
    run = _block_number(batch.document, 0 if block_length is None else batch.position // block_length)
    size = torch.zeros_like(run).scatter_add_(1, run, supervised.long())  # (B, T): supervised tokens of block r
    before = supervised.cumsum(dim=1) - supervised.long() - (size.cumsum(dim=1) - size).gather(1, run)
    learned = size > 0

    # Levels cover [0, 1) evenly without coupling rows or processes: sample n has level frac(u + n * golden ratio), and
    # its blocks frac(level + a random permutation / blocks), so that no stratum is tied to a place in the row. Blocks
    # without a supervised token take no stratum. All of it, and a uniform number for each token, comes from the
    # sample's own generator.
    shared = _generator(seed, batch.epoch, 2**64 - 1).random()
    base = (shared + batch.sample.numpy() * ((math.sqrt(5) - 1) / 2)) % 1.0  # (B,)
    level = torch.zeros(B, T, dtype=torch.float64)  # of block r
    uniform = torch.empty(B, T, dtype=torch.float64)
    for row, n in enumerate(batch.sample.tolist()):
        generator = _generator(seed, batch.epoch, n)
        stratum = torch.from_numpy(generator.permutation(int(learned[row].sum()))).double()
        if noising.level_per == "sequence":
            stratum = torch.zeros_like(stratum)
        level[row, learned[row]] = (base[row] + stratum / max(1, len(stratum))) % 1.0
        uniform[row] = torch.from_numpy(generator.random(T))

    blocks = Blocks(run, size.gather(1, run), before)
    level, masked = NOISE_TYPES[noising.noise_type](level.gather(1, run), uniform, supervised, blocks, noising)
    return Noise(level.float(), masked & supervised)


def _block_number(document: Tensor, block) -> Tensor:
    """(B, T): the number of each token's block in its row, counted over all the row's documents."""
    block = torch.zeros_like(document) + block
    changes = (document.diff(dim=1) != 0) | (block.diff(dim=1) != 0)
    return F.pad(changes.cumsum(dim=1), (1, 0))


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    # uint64 spelled out: NumPy would take a list that holds 2**64 - 1 through float64. A seed may have 63 bits.
    key = [((seed << 32) + epoch) % 2**64, stream ^ (seed >> 32)]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def with_complement(batch: Batch, noise: Noise) -> tuple[Batch, Noise]:
    """Batch and noise (2B, T), every row a second time with the complementary mask at level 1 - t."""
    fill = None if batch.fill is None else torch.cat([batch.fill, batch.fill])
    twice = Batch(*(torch.cat([field, field]) for field in batch[:5]), batch.epoch, fill)
    level = torch.cat([noise.level, (1 - noise.level).clamp(min=1e-3)])
    return twice, Noise(level, torch.cat([noise.masked, batch.supervised & ~noise.masked]))


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


class Example(NamedTuple):
    """What the loss sees. tokens (B, T') int64 and their layout; index (N,): the flat positions in B*T' whose output
    predicts targets (N,), with weights (N,) float; entries of weight 0 pad N to a multiple of 64, so that shapes recur.
    denominator: what the weighted sum is divided by, to be summed over the global batch first. next_token (N,) bool:
    which entries are of the AR loss beside the masked one; None: there is none."""

    tokens: Tensor
    layout: Layout
    index: Tensor
    targets: Tensor
    weights: Tensor
    denominator: float
    next_token: Tensor | None = None

    def map(self, function) -> "Example":
        """`function` applied to each of its tensors."""
        layout = self.layout.map(function)._replace(kind=self.layout.kind)
        rest = (function(x) for x in (self.index, self.targets, self.weights))
        next_token = None if self.next_token is None else function(self.next_token)
        return Example(function(self.tokens), layout, *rest, self.denominator, next_token)

    def to(self, device) -> "Example":
        return self.map(lambda x: x.to(device, non_blocking=True))


def training_example(
    batch: Batch,
    config: Config,
    noising: Noising,
    *,
    seed: int,
    norm_type: str = "token",
    block_length: int | None = None,
    ar_weight: float = 0.0,
) -> Example:
    """The Example of a clean batch for the config's objective, under the noise that `seed` draws. block_length: of
    bd3lm, where it is not the config's, of which it is a divisor. ar_weight: see bd3lm_example."""
    if config.objective == "ar":
        return ar_example(batch, norm_type=norm_type)
    K = block_length or config.block_length if config.objective == "bd3lm" else None
    noise = draw_noise(batch, noising, block_length=K, seed=seed)
    if noising.complementary_masks:
        batch, noise = with_complement(batch, noise)
    how = {"weight_type": noising.loss_weight_type, "scheduler": noising.scheduler, "norm_type": norm_type}
    how |= {"mask_id": config.mask_token_id, "right_shift": config.right_shift}
    if K is None:
        return mdlm_example(batch, noise, **how)
    return bd3lm_example(batch, noise, block_length=K, causal=config.causal, ar_weight=ar_weight, **how)


def ar_example(batch: Batch, *, norm_type: str = "token") -> Example:
    """Next-token prediction: every supervised token but a document's first, from the position before it."""
    document = batch.document if (batch.document > 0).any() else None  # right padding is never seen by a causal query
    layout = Layout.of(batch.position, document, 1)
    weight = torch.ones(batch.tokens.shape)
    return _example(
        batch, batch.tokens, layout, torch.arange(batch.tokens.shape[1]) - 1, batch.supervised, weight, True, norm_type
    )


def mdlm_example(
    batch: Batch,
    noise: Noise,
    *,
    mask_id,
    right_shift=False,
    weight_type="scheduler",
    norm_type="token",
    scheduler="linear",
) -> Example:
    """Masked diffusion (arXiv 2406.07524, equation 11): masked tokens from the whole row.

    right_shift: a token is predicted at the position before it; a document's first token then has no predictor and no
    loss.
    """
    document = batch.document if (batch.document != 0).any() else None
    layout = Layout.of(batch.position, document)
    noised = batch.tokens.masked_fill(noise.masked, mask_id)
    predictor = torch.arange(batch.tokens.shape[1]) - int(right_shift)
    weight = loss_weight(noise.level, weight_type, scheduler)
    return _example(batch, noised, layout, predictor, noise.masked, weight, right_shift, norm_type)


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
    causal: bool = False,
    ar_weight: float = 0.0,
) -> Example:
    """Block diffusion (arXiv 2503.09573, equation 8): masked tokens from their noisy block and the clean past.

    Two streams in one sequence: the noisy copy, then the clean one. With right_shift, block_length 1 and everything
    masked it is the causal model exactly. causal: clean tokens see only those before them, not their whole block (as
    NBDiff, arXiv 2512.06776), so that the clean stream is an AR model; ar_weight > 0 adds so much of its own loss.
    """
    # Only blocks with a supervised token get a noisy copy; any other would be neither seen nor scored.
    # In plain text these are all blocks, in chat the answer's.
    clean = Layout.of(batch.position, batch.document, block_length)
    columns, place = _learned_blocks(clean, batch.supervised)
    W = columns.shape[1]
    noised = batch.tokens.masked_fill(noise.masked, mask_id).gather(1, columns)
    noisy = clean.map(lambda field: field.gather(1, columns))._replace(noisy=torch.ones_like(columns))
    if causal:  # a clean token is a block by itself; a noisy block is numbered by its first position
        noisy, clean = noisy._replace(block=noisy.block * block_length), clean._replace(block=clean.position)

    streams = torch.cat([noised, batch.tokens], dim=1)
    layout = Layout(*(torch.cat(pair, dim=1) for pair in zip(noisy[:4], clean[:4])))  # (B, W + T)

    # A token is predicted at its own place in the noisy stream. With right shift at the place before; for a block's
    # first token that is the clean stream's previous position.
    predictor = place
    if right_shift:
        predictor = torch.where(
            batch.position % block_length == 0, W + torch.arange(batch.tokens.shape[1]) - 1, place - 1
        )
    weight = loss_weight(noise.level, weight_type, scheduler)
    example = _example(batch, streams, layout, predictor, noise.masked, weight, right_shift, norm_type)
    if not ar_weight:
        return example

    # The clean stream predicts its own next tokens, but not those that only fill a block.
    own = batch.supervised if batch.fill is None else batch.supervised & ~batch.fill
    predictor, weight = W + torch.arange(batch.tokens.shape[1]) - 1, torch.full(batch.tokens.shape, ar_weight)
    beside = _example(batch, streams, layout, predictor, own, weight, True, norm_type)
    both = {name: torch.cat([getattr(example, name), getattr(beside, name)]) for name in Example._fields[2:5]}
    return example._replace(**both, next_token=torch.arange(len(both["index"])) >= len(example.index))


def _learned_blocks(layout: Layout, supervised: Tensor) -> tuple[Tensor, Tensor]:
    """(columns (B, W), place (B, T)): the columns of the blocks with a supervised token, in order, and where among them
    a column stands. Where a row has fewer than W, others fill it, whose outputs nobody uses. W is T or a multiple
    of T // 16, so that shapes recur."""
    B, T = supervised.shape
    run = _block_number(layout.document, layout.block)
    learned = torch.zeros(B, T, dtype=torch.bool).scatter_reduce_(1, run, supervised, "amax").gather(1, run)
    step = max(1, T // 16)
    W = min(T, -(-max(1, int(learned.sum(dim=1).max())) // step) * step)
    columns = (~learned).to(torch.int8).argsort(dim=1, stable=True)[:, :W]  # the learned first, then others
    return columns, learned.cumsum(dim=1) - 1


NORMS = {  # name: (tokens (B, 1), rows) -> what divides each row's weights, and what divides the sum
    "token": lambda tokens, rows: (torch.ones_like(tokens), int(tokens.sum())),
    "sequence": lambda tokens, rows: (tokens.clamp(min=1), rows),
    "batch": lambda tokens, rows: (torch.ones_like(tokens), rows),
}


def _example(batch, inputs, layout, predictor, masked, weight, right_shift, norm_type) -> Example:
    """predictor (B, T): the column of `inputs` (B, T') whose output predicts each token."""
    supervised = batch.supervised & (batch.position > 0) if right_shift else batch.supervised
    masked = masked & supervised
    rows = int(batch.supervised.any(dim=1).sum())  # a row with nothing supervised fills a rank's share, and weighs 0
    divisor, denominator = row_of(NORMS, norm_type, "loss_norm_type")(supervised.sum(dim=1, keepdim=True), rows)
    index = (torch.arange(len(inputs))[:, None] * inputs.shape[1] + predictor)[masked]
    pad = (0, -len(index) % 64 if len(index) else 64)
    chosen = (F.pad(x, pad) for x in (index, batch.tokens[masked], (weight / divisor)[masked].float()))
    return Example(inputs, layout, *chosen, denominator)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

# Rows of logits that exist at a time, each V wide. CPU: with 128 a step takes 5 % longer, with 512 no less. CUDA, not
# measured: every chunk reads and writes the weight's whole gradient again, so a larger one moves fewer bytes in all.
CHUNK = {"cpu": 256, "cuda": 2048}


def loss(model: LanguageModel, example: Example) -> tuple[Tensor, float]:
    """(total, denominator): the sum over targets of weight * cross-entropy in nats, and what to divide it by.

    The two are summed over all micro-batches and ranks of a step before they are divided, so that neither the loss nor
    its gradient depends on how the global batch is cut.
    """
    return losses(model, example)[0], example.denominator


def losses(model: LanguageModel, example: Example) -> tuple[Tensor, Tensor]:
    """(total, next_token), (): the total of `loss`, and the part of it that is the AR loss, without a gradient."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return _CrossEntropy.apply(hidden, weight, example.targets, example.weights, example.next_token)

    return model(example.tokens, example.layout, index=example.index, head=head)


class _CrossEntropy(torch.autograd.Function):
    """Sum of weights * cross-entropy of hidden (N, D) @ weight.T (D, V) against targets (N,); and that over part (N,)
    bool of them (None: 0), which has no gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, part):
        # The gradients are formed here, chunk by chunk: no logits are kept, none larger than a chunk exist. The softmax
        # and the sums over chunks are float32 (float64 for float64 weights).
        matrix = weight.to(hidden.dtype)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        total, of_part = (torch.zeros((), dtype=wide, device=hidden.device) for _ in range(2))
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        chunk = min(CHUNK[hidden.device.type], len(hidden))
        # One buffer for all chunks: in fresh memory the page faults cost more than the softmax.
        buffer = torch.empty(chunk, len(matrix), dtype=matrix.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            target, w = targets[rows, None], weights[rows, None].to(wide)

            # Scores count from the row's maximum: the largest softmax is exp(0) / norm, log(norm) without another pass.
            scores = torch.mm(hidden[rows], matrix.T, out=buffer[: rows.stop - start]).to(wide)  # (chunk, V)
            chosen = scores.gather(1, target) - scores.amax(dim=1, keepdim=True)
            torch.softmax(scores, dim=1, out=scores)  # in place, a row at a time: one pass over memory
            log_norm = -scores.amax(dim=1, keepdim=True).log()
            nats = w * (log_norm - chosen)
            total += nats.sum()
            if part is not None:
                of_part += (nats * part[rows, None]).sum()
            if not (needs_hidden or needs_weight):
                continue

            # d total / d scores is w * (softmax - one-hot); w is applied on the narrow side of both products.
            gradient = scores.scatter_add_(1, target, -torch.ones_like(w)).to(matrix.dtype)
            if needs_hidden:
                grad_hidden[rows] = w * (gradient @ matrix)
            if needs_weight and wide == matrix.dtype:
                grad_weight.addmm_(gradient.T, w * hidden[rows])
            elif needs_weight:
                grad_weight += gradient.T @ (w * hidden[rows]).to(matrix.dtype)
        ctx.gradients = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(of_part)
        return total, of_part

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The sampler's options

# Options that mean nothing where tokens come one after the other.
BY_BLOCKS = ("block_size", "steps_per_block", "block_align", "remasking", "stochastic_transfer", "cfg_scale")

OR_ALL = "leave it out to choose among all tokens"
Temperature = Annotated[float, Bound(lambda t: t >= 0, "0 (the likeliest token) or more"), "T"]
TopK = Annotated[int, Bound(lambda k: k >= 1, f"at least 1; {OR_ALL}"), "K"]
TopP = Annotated[float, Bound(lambda p: 0 < p <= 1, f"above 0 and at most 1; {OR_ALL}"), "P"]
Threshold = Annotated[float, Bound(lambda p: 0 < p < 1, "a probability between 0 and 1, 0.9 say"), "P"]
Entropy = Annotated[float, Bound(lambda nats: nats >= 0, "0 nats or more, 0.1 say"), "NATS"]
Factor = Annotated[float, Bound(lambda f: f > 0, "above 0, 1 say"), "F"]


@dataclass(kw_only=True)
class Sampling(Options):
    "sampling"

    max_new_tokens: Annotated[Natural, "TOKENS"] = 128
    """masks that follow each prompt; chat.py takes fewer where an mdlm checkpoint was trained on shorter answers"""
    steps: Steps = 128
    """forwards for the whole answer, shared by as many blocks as it fills (one that straddles blocks takes a few more);
    fewer steps reveal more tokens each. Steps that would reveal nothing are left out. ar takes one a token"""
    block_size: Tokens | None = None
    """tokens of a decoding block; blocks are decoded from left to right. For bd3lm what the checkpoint declares, with
    causal context any (default: bd3lm what the checkpoint declares; mdlm 32; ar has none)"""
    steps_per_block: Steps | None = None  # forwards for one block (default: by --steps)
    block_align: Literal["sequence", "prompt"] | None = None
    """where blocks start. sequence: multiples of the block size from the first token of the prompt, as in training, so
    the prompt's last partial block is denoised with the prompt fixed. prompt: where the prompt ends, as dLLM does
    (default: bd3lm sequence, mdlm prompt)"""
    scheduler: Literal[*SCHEDULES] = "linear"  # alpha(t), which spreads reveals over steps
    temperature: Temperature = 0.0
    """of the Gumbel noise on the logits; 0 takes the likeliest token"""
    top_k: TopK | None = None
    """choose among the K likeliest tokens; needs --temperature above 0 (default: all)"""
    top_p: TopP | None = None
    """choose among the smallest set of tokens of probability at least P; needs --temperature above 0 (default: 1)"""
    remasking: Literal[*REMASKING] = "low_confidence"
    """which of a step's tokens stay: the most probable ones, or random ones; p2: the most probable ones of the block's
    whole answer, so that earlier ones may be masked again (path planning, Open-dLLM's rule)"""
    stochastic_transfer: bool = False  # draw how many tokens a step reveals, instead of the expected number
    threshold: Threshold | None = None
    """reveal every token of probability above P at each step, at least one, instead of a fixed number; 0.9 takes
    several times fewer forwards (default: none, --steps)"""
    entropy: Entropy | None = None
    """reveal the surest tokens while the entropies of those before add up to at most NATS (EB-Sampler), 0.1 say,
    instead of a fixed number (default: none, --steps)"""
    factor: Factor | None = None
    """reveal the n most probable tokens, n the largest with (n + 1)(1 - probability of the n-th) below F (Fast-dLLM),
    1 say, instead of a fixed number (default: none, --steps)"""
    speculate: Annotated[Count, "N"] | None = None
    """for a checkpoint with causal context: decode as its ar side would, yet up to N tokens a forward: each verifies
    the last draft and drafts N - 1 more by diffusion. The text is ar's, at any temperature (default: none)"""
    cfg_scale: Annotated[float, "S"] = 0.0
    """classifier-free guidance s: logits u + (s + 1)(c - u), u with the prompt masked; doubles the work"""
    cfg_keep_tokens: Ids = ()  # prompt tokens that u keeps (default: none)
    suppress_tokens: Ids = ()  # tokens never generated (default: none)
    begin_suppress_tokens: Ids = ()
    """tokens that count as improbable when confidences are compared, though they may be chosen, as in dLLM (default:
    none)"""

    def __post_init__(self):
        super().__post_init__()
        drawn = f"top_p {self.top_p}" if self.top_k is None else f"top_k {self.top_k}"
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise ValueError(f"{drawn} changes nothing at temperature 0; raise --temperature or leave it out")
        if self.speculate is not None:
            ours = {name: getattr(Sampling, name) for name in (*RULES, *BY_BLOCKS)}
            if other := [name for name, default in ours.items() if getattr(self, name) != default]:
                raise ValueError(
                    f"speculate decodes as ar does, token after token, without {other[0]}; drop one of them"
                )
        adaptive = [name for name in RULES if getattr(self, name) is not None]
        if len(adaptive) > 1:
            raise ValueError(f"{' and '.join(adaptive)} each say how many tokens a step reveals; leave out all but one")
        rule = adaptive[0] if adaptive else None
        if rule and self.remasking == "random":
            raise ValueError(f"{rule} compares confidences, remasking random does not have any; drop one of the two")
        if rule and self.remasking == "p2":
            raise ValueError(f"{rule} replaces the schedule, by which remasking p2 masks again; drop one of the two")
        if rule and (self.stochastic_transfer or self.steps_per_block):
            option = "stochastic_transfer" if self.stochastic_transfer else "steps_per_block"
            raise ValueError(f"{rule} replaces the schedule, which {option} is about; drop one of the two")

    @property
    def rule(self) -> tuple[Callable, str]:
        """The decoding rule, and the confidence that it compares."""
        for name, (make, confidence) in RULES.items():
            if getattr(self, name) is not None:
                return make(getattr(self, name)), confidence
        return REMASKING[self.remasking]

    @classmethod
    def default_length(cls, config: Config) -> int:
        """max_new_tokens where nobody chose it: no more than mdlm has learnt to fill."""
        return min(cls.max_new_tokens, config.answer_length or cls.max_new_tokens)

    def block(self, config: Config, objective: str) -> int | None:
        """Tokens of a block, None: the whole canvas. ValueError where the checkpoint says otherwise."""
        if self.speculate is not None:
            return 1
        given, declared = self.block_size, config.block_length if objective == "bd3lm" else None
        if objective == "ar" and given is not None:
            raise ValueError(f"block_size {given}: an ar model decodes token by token; leave --block_size out")
        if objective == "bd3lm" and given is None and declared is None:
            raise ValueError("bd3lm needs a block size and the checkpoint declares none; pass --block_size")
        if None not in (given, declared) and given != declared and not config.causal:
            raise ValueError(f"block_size {given} is not the checkpoint's {declared}; leave --block_size out")
        return 1 if objective == "ar" else given or declared


# ---------------------------------------------------------------------------------------------------------------------
# The sampler


class Step(NamedTuple):
    """The canvas after a forward. tokens (B, T) int64, the mask id where masked (B, T) bool; a row's columns beyond its
    own canvas hold 0. done (B,): the row is finished, whatever may still be masked. forwards: model calls so far.
    confidence (B, T): the untempered probability a settled token had when it was chosen; 0 where masked or given. draft
    (B, T) bool: masked columns whose token is drafted, on which the next forward decides; None: without speculation."""

    tokens: Tensor
    masked: Tensor
    done: Tensor
    forwards: int
    confidence: Tensor
    draft: Tensor | None = None


@dataclass
class Prefix:
    """What one call of `denoise` leaves for the next, of the same model: a row's clean tokens and the cache with them.

    It is valid after every step, so that a call may be abandoned. Guidance and blocks that begin where the prompt ends
    change what earlier columns see: they take none.
    """

    canvas: Tensor | None = None  # (1, T): the decoder's own, so that no step has to report
    filled: Tensor | None = None  # (1,): so many of its columns are clean and in the cache
    block_size: int = 0  # K of the decoder that filled it
    cache: KVCache | None = None

    @property
    def tokens(self) -> list[int]:
        return [] if self.canvas is None else self.canvas[0, : int(self.filled)].tolist()


@torch.no_grad()
def denoise(
    model: LanguageModel,
    prompts: list[list[int]],
    *,
    canvas_masks: list[list[bool]] | None = None,
    end_ids: tuple[int, ...] = (),
    prefix: Prefix | None = None,
    generator: torch.Generator | None = None,
    static: bool | None = None,
    **options,
) -> Iterator[Step]:
    """Fills the masks of a batch of canvases, a `Step` at the start and after each forward. Ids in, ids out.

    A row's canvas is its prompt, masked where `canvas_masks` (of the prompts' shape) says so, then `max_new_tokens`
    masks. Rows are decoded block by block, each at its own pace. The objective, right shift, mask id and BD3LM's block
    length come from `model.config` (mdlm where it declares none). options: the fields of `Sampling`.

    end_ids: a row is done at its first generated one with nothing masked before it (p2: in its block).
    prefix: for a single row of ar or bd3lm. The complete blocks of the prompt's longest common prefix with
    prefix.tokens are taken from its cache instead of being computed again, with the same outcome; it then holds this
    row's.
    static (default: on CUDA): a few fixed shapes, and `done` is read only when the next step is under way, so that the
    CPU never waits; on CUDA a step is then recorded as a graph and replayed.

    Raises ValueError, when the first step is taken, for options that contradict the model, the prompts or each other.
    """
    options = Sampling(**options)
    yield from decoder(options)(model, prompts, options, canvas_masks, end_ids, prefix, generator, static).run()


def decoder(options: Sampling) -> type["Decoding"]:
    """The class of batches that are decoded with these options."""
    return Decoding if options.speculate is None else Speculation


class Window(NamedTuple):
    """Of each row (B,): the current block, its first column, and which columns to feed, from `first` to `stop`."""

    block: Tensor
    start: Tensor
    first: Tensor
    stop: Tensor


class Decoding:
    """A batch of rows being decoded. A column is a position, and rows are padded on the right.

    A step is `advance`: `window` says which columns of each row to feed, `feed` gathers them with their layout,
    `predict` calls the model, whose head `choose` picks a token for every position asked about, and the decoding rule
    decides which of these stay. It changes its state in place, since CUDA graphs replay it: tokens, masked and
    confidence (B, T), and of each row (B,) `filled`, the columns before which all is clean and in the cache, `step`,
    the forwards spent on its current block, and `done`. Rows know nothing of each other, so that `resume` can move them
    from one batch to another.
    """

    STATE = ("tokens", "masked", "confidence", "schedule", "filled", "step", "done")  # of each row, besides its cache

    def __init__(self, model, prompts, options: Sampling, canvas_masks, end_ids, prefix, generator, static=None):
        config, device = model.config, model.head_weight.device
        self.model, self.options, self.generator = model, options, generator
        self.static = model.head_weight.is_cuda if static is None else static
        self.objective, self.mask_id = config.objective or "mdlm", config.mask_token_id
        self.cached = self.objective != "mdlm"
        self.right_shift = config.shift
        self.causal = config.causal and self.objective == "bd3lm"  # a clean token sees no later one of its block
        self.rule, self.score = options.rule
        self.fixed_count = self.rule is fixed_count  # for graphs.py, which then knows when blocks begin
        self.remasks = options.remasking == "p2"
        self.copies = 2 if options.cfg_scale else 1  # with guidance every row is fed twice
        check_canvas(config, self.objective, options, prompts, canvas_masks, end_ids, prefix)

        lengths = [len(prompt) + options.max_new_tokens for prompt in prompts]
        self.B, self.T = len(prompts), max(lengths)
        self.K = options.block(config, self.objective) or max(self.T, 1)
        self.rows = torch.arange(self.B, device=device)
        self.column = torch.arange(self.T, device=device).expand(self.B, self.T)
        self.length = torch.tensor(lengths, device=device)
        self.last = (self.length - 1).clamp(min=0)[:, None]
        self.ends = torch.tensor(end_ids, dtype=torch.int64, device=device)
        self._make_canvas(prompts, canvas_masks)
        self._make_blocks(lengths, infilling=canvas_masks is not None)
        self._make_context()

        wide = torch.promote_types(model.head_weight.dtype, torch.float32)
        self.confidence = torch.zeros(self.B, self.T, dtype=wide, device=device)
        self.filled = torch.zeros(self.B, dtype=torch.int64, device=device)
        self.step = torch.zeros(self.B, dtype=torch.int64, device=device)
        self.done = ~self.masked.any(dim=1)
        if prefix is not None:
            self.filled += _reuse(prefix, self.cache, self.layout, self.tokens[0], self.masked[0], self.K)
            prefix.canvas, prefix.filled, prefix.block_size, prefix.cache = self.tokens, self.filled, self.K, self.cache

    def _make_canvas(self, prompts, canvas_masks) -> None:
        tokens = torch.zeros(self.B, self.T, dtype=torch.int64)
        masked = torch.zeros(self.B, self.T, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            masked[row, len(prompt) : len(prompt) + self.options.max_new_tokens] = True
            if canvas_masks is not None:
                masked[row, : len(prompt)] = torch.tensor(canvas_masks[row], dtype=torch.bool)
        self.tokens, self.masked = tokens.to(self.column.device), masked.to(self.column.device)
        self.tokens[self.masked] = 0 if self.mask_id is None else self.mask_id
        self.generated = self.masked.clone()
        # What guidance masks in the second copy of a row: all that is given, but for some tokens.
        keep = torch.tensor(self.options.cfg_keep_tokens, dtype=torch.int64, device=self.column.device)
        self.given = ~self.generated & ~torch.isin(self.tokens, keep) & (self.column < self.length[:, None])

    def _make_blocks(self, lengths: list[int], infilling: bool) -> None:
        """Of each column (B, T): `block`, and `borders` (B, T, 4), its block, where that begins and ends, and the first
        column needed to predict it. Of each block: `schedule` (B, blocks, S), how many tokens each step reveals, and
        `wanted` (B, blocks, n), the columns that are generated, filled up with T."""
        options, K = self.options, self.K
        self.offset = torch.zeros_like(self.length)
        align = options.block_align or ("sequence" if self.cached else "prompt")
        if align == "prompt" and not infilling:  # then blocks begin where the prompt ends, at length - max_new_tokens
            self.offset = (options.max_new_tokens - self.length) % K
        self.block = (self.column + self.offset[:, None]) // K
        blocks = int((((self.length - 1).clamp(min=0) + self.offset) // K).max()) + 1
        masks = torch.zeros(self.B, blocks, dtype=torch.int64, device=self.column.device)
        masks.scatter_add_(1, self.block.clamp(max=blocks - 1), self.masked.long())
        start = (self.block * K - self.offset[:, None]).clamp(min=0)
        stop = torch.minimum((self.block + 1) * K - self.offset[:, None], self.length[:, None])
        self.borders = torch.stack([self.block, start, stop, (start - self.right_shift).clamp(min=0)], dim=-1)
        self.wanted = masks.new_full((*masks.shape, int(masks.max())), self.T)
        row, column = self.masked.nonzero().unbind(dim=1)
        block, before = self.block[row, column], masks.cumsum(dim=1) - masks  # masks of earlier blocks
        self.wanted[row, block, self.masked.cumsum(dim=1)[row, column] - 1 - before[row, block]] = column

        # The steps are shared evenly by the blocks of the answer (of an infilled canvas: by all its blocks).
        spans = lengths if infilling else [options.max_new_tokens] * self.B
        budgets = [options.steps_per_block or math.ceil(options.steps / max(1, math.ceil(span / K))) for span in spans]
        width = min(max(budgets), max(1, int(masks.max())))
        self.schedule = masks.new_zeros(*masks.shape, width)
        drawn = {"width": width, "stochastic": options.stochastic_transfer, "generator": self.generator}
        for steps in set(budgets):
            rows = [row for row in range(self.B) if budgets[row] == steps]
            self.schedule[rows] = reveal_schedule(masks[rows], steps, options.scheduler, **drawn)

    def _make_context(self) -> None:
        """Who sees whom, and what is attended to: a cache, or for mdlm the canvas itself under one mask."""
        document = torch.where(self.column < self.length[:, None], 0, -1)
        self.cache = self.mask = None
        if self.cached:
            blocks = (1,) if self.causal else (self.K, self.offset)
            self.layout = Layout.of(self.column, document, *blocks)
            # Column T is a dump, for padding. Only padding attends to it, since softmax over nothing gives NaN.
            self.fields = F.pad(torch.stack(self.layout[:4]), (0, 1))
            self.fields[1, :, self.T] = -1
            like = {"dtype": self.model.computes_in, "device": self.column.device}
            self.cache = KVCache(self.model.config, self.copies * self.B, self.T + 1, **like)
        else:
            self.layout = Layout.of(self.column, document if (document < 0).any() else None)
            whole = self._copied(self.layout)
            self.mask = attention_mask(whole, whole)

    def _copied(self, layout: Layout) -> Layout:
        """`layout` for every copy of the rows."""
        if self.copies == 1:
            return layout
        return layout.map(lambda field: field.repeat(self.copies, 1))._replace(kind=layout.kind)

    def resume(self, other: "Decoding", rows: list[int], theirs: list[int]) -> None:
        """Goes on with rows of another batch, `theirs` there and `rows` here, from where that has brought them: of the
        same prompts, under the same options. What the cache holds of them is copied, not computed again."""
        rows, theirs = (torch.tensor(numbers, device=self.column.device) for numbers in (rows, theirs))
        for name in self.STATE:
            mine, its = getattr(self, name), getattr(other, name)
            common = [slice(min(sizes)) for sizes in zip(mine.shape[1:], its.shape[1:])]  # canvases differ in padding
            mine[(rows, *common)] = its[(theirs, *common)]
        self.fixed_count = False  # the rows' blocks begin at other forwards than the schedule has it
        if self.cache is None:
            return
        rows, theirs = (
            torch.cat([numbers + copy * batch.B for copy in range(self.copies)])
            for numbers, batch in ((rows, self), (theirs, other))
        )
        n = min(self.T, other.T)
        for name in ("pairs", "fields"):
            getattr(self.cache, name)[:, rows, :n] = getattr(other.cache, name)[:, theirs, :n]

    def run(self) -> Iterator[Step]:
        """A `Step` as it is now, and after each forward, until every row is done."""
        yield self.now(0)
        for forwards, _ in enumerate(static_steps(self) if self.static else self.steps(), 1):
            if not self.static:
                self.check_finite()
            yield self.now(forwards)
        self.check_finite()

    def now(self, forwards: int) -> Step:
        tokens, masked, done, confidence = self.tokens, self.masked, self.done, self.confidence
        return Step(tokens.clone(), masked.clone(), done.clone(), forwards, confidence.clone())

    def check_finite(self) -> None:
        """ValueError where what was revealed had no probability, as of weights that hold NaN or overflow."""
        if self.confidence.isnan().any():
            raise ValueError(
                f"the model's output is not a number, in {self.confidence.dtype} from {self.model.head_weight.dtype} "
                "weights; use another --dtype, or another checkpoint"
            )

    def steps(self) -> Iterator[None]:
        """Advances until every row is done."""
        while not self.done.all().item():
            self.advance(self.width() if self.cached else self.T)
            yield

    def advance(self, W: int) -> None:
        """A forward over W columns of each row, from its window's first on, and what it reveals."""
        window = self.window()
        here = self.block == window.block[:, None]
        live = here & ~self.done[:, None]

        # Ask for a token at every mask of the current block; p2 also compares what it has revealed there.
        candidates = self.masked & live
        token, probability, score = self.predict(window, W, self.generated & live if self.remasks else candidates)

        # The rule says which positions stay masked, or are masked again; the others are revealed.
        quota = self.schedule[self.rows, window.block, self.step.clamp(max=self.schedule.shape[-1] - 1)]
        still = self.rule(score, token, candidates, quota, self.generator)
        revealed = candidates & ~still
        torch.where(revealed, token, self.tokens, out=self.tokens)
        torch.where(revealed, probability, self.confidence, out=self.confidence)
        if self.remasks:
            self.confidence.masked_fill_(still, 0.0)
            self.tokens.masked_fill_(still, self.mask_id or 0)
        torch.where(live, still, self.masked, out=self.masked)

        # What lies before the block has been fed clean; a block without masks makes way for the next.
        self.filled.copy_(window.start)
        self.step.add_(1).mul_((self.masked & here).any(dim=1))
        self.done.copy_(self.ended())

    def window(self) -> Window:
        """The current block, and the columns to feed: for mdlm all, for the others what is not yet in the cache."""
        first_masked = torch.where(self.masked, self.column, self.last).amin(dim=1)
        current, start, stop, lead = self.borders[self.rows, first_masked].unbind(dim=1)
        if not self.cached:
            return Window(current, start, torch.zeros_like(start), self.length)
        # From the first column not in the cache to the block's end. Right shift also needs the column before the block.
        # With K = 1 the only mask is never fed: its predictor is enough.
        first = torch.minimum(self.filled, lead)
        if self.right_shift and self.K == 1:
            stop = torch.maximum(start, first + 1)
        return Window(current, start, first, stop)

    def widths(self) -> Iterator[int]:
        """The widths of all forwards to come, for static shapes."""
        return static_widths(self)

    def width(self) -> int:
        """How many columns the next forward feeds: those of the row that needs most."""
        window = self.window()
        return int((window.stop - window.first).max())

    def feed(self, window: Window, W: int) -> tuple[Tensor, Tensor, Layout, Tensor | None]:
        """Of the columns fed, (B, W) each: tokens, which of them guidance masks, the layout, and the cache's columns;
        for mdlm of the whole canvas, which has no cache."""
        if not self.cached:
            return self.tokens, self.given, self.layout, None
        columns = window.first[:, None] + torch.arange(W, device=self.tokens.device)
        columns = torch.where(columns < window.stop[:, None], columns, self.T)
        layout, fetch = Layout(*self.fields.gather(2, columns.expand(4, -1, -1))), columns.clamp(max=self.T - 1)
        if self.causal:  # the current block is a noisy copy, numbered by its first position, until it is fed clean
            current = (columns >= window.start[:, None]) & (columns < self.T)
            block = torch.where(current, window.start[:, None], layout.block)
            layout = layout._replace(block=block, noisy=current.long())
        return self.tokens.gather(1, fetch), self.given.gather(1, fetch) if self.copies == 2 else None, layout, columns

    def predict(self, window: Window, W: int, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(token, probability, score), (B, T) each, where asked (B, T) bool; 0, -inf and -inf elsewhere."""
        tokens, given, layout, columns = self.feed(window, W)
        row, column = self.asked_columns(window, asked)
        predictor = (column - self.right_shift - window.first[row]).clamp(0, W - 1)
        index = row * W + predictor
        if self.copies == 2:  # the rows once more, with what is given masked
            tokens, layout = torch.cat([tokens, tokens.masked_fill(given, self.mask_id)]), self._copied(layout)
            index = torch.cat([index, index + self.B * W])
            columns = columns if columns is None else columns.repeat(2, 1)
        context = {"mask": self.mask} if columns is None else {"cache": self.cache, "columns": columns}
        picked, probability, score = self.model(tokens, layout, index=index, head=self.choose, **context)
        if self.score == "random":
            score = torch.rand(probability.shape, generator=self.generator, device=probability.device)

        def canvas(values: Tensor, empty) -> Tensor:
            """(B, T): values (N,) at their columns, `empty` elsewhere; column T, of no position, is cut."""
            return values.new_full((self.B, self.T + 1), empty).index_put_((row, column), values)[:, : self.T]

        whole = canvas(probability, -math.inf)
        return canvas(picked, 0), whole, whole if score is probability else canvas(score, -math.inf)

    def asked_columns(self, window: Window, asked: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column), (N,) each: where a token is wanted. With static shapes N is the same at every step, the most
        that a block generates from each row, and what is not wanted has column T."""
        if not self.static:
            return asked.nonzero().unbind(dim=1)
        column = self.wanted[self.rows, window.block]  # (B, n)
        wanted = asked.gather(1, column.clamp(max=self.T - 1)) & (column < self.T)
        return self.rows[:, None].expand_as(column).flatten(), torch.where(wanted, column, self.T).flatten()

    def choose(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """The model's head: `choose_tokens` of hidden (copies * N, D), by chunks."""
        # Half as many rows as in training: choosing copies its logits, in float64 where there is a temperature.
        chunk = CHUNK[hidden.device.type] // 2
        pairs = zip(*(half.split(chunk) for half in hidden.chunk(self.copies)))  # conditional, unconditional
        how = weight, self.options, self.mask_id, self.generator, self.model.known_ids
        picks = [choose_tokens(list(pair), *how) for pair in pairs]
        return picks[0] if len(picks) == 1 else tuple(torch.cat(column) for column in zip(*picks))

    def ended(self) -> Tensor:
        """(B,): nothing is masked before the row's first generated end token, or in the row."""
        end = self.generated & ~self.masked & (self.tokens[:, :, None] == self.ends).any(dim=2)
        end = torch.where(end, self.column, self.T).amin(dim=1)
        before = self.column < end[:, None]
        if self.remasks:  # p2 may mask the end token again until its block is finished
            before = self.block <= self.block.gather(1, end.clamp(max=self.T - 1)[:, None])
        return ~(self.masked & before).any(dim=1)


class Speculation(Decoding):
    """Rows decoded as the model's ar side decodes them, several tokens a forward: speculative decoding,
    arXiv 2211.17192, with the model as its own drafter, as in TiDAR, arXiv 2511.08923.

    Columns before `known` (B,) are settled; G = `drafted` draft tokens follow. A forward feeds these, and what is
    settled but not in the cache, as clean tokens, each of which predicts the next: the verdict. Draft tokens are
    accepted while they equal it, `a` of them; they and the verdict after them are settled. As a is not known before,
    the forward drafts for each a from 0 to G: copy a (Layout.noisy a + 1) is N masks from column known + a on, which
    see what is before them and each other. The first is in the verdict's place, the others are the next draft.

    Drafts change how many forwards it takes and nothing else. At a temperature that needs the noise of a token to be
    that of its place in the row (arXiv 2408.07978): what is written is then what ar would have drawn with that noise,
    and draft and verdict agree nearly as often as their distributions allow."""

    STATE = (*Decoding.STATE, "known", "draft", "key")

    def __init__(self, model, prompts, options: Sampling, canvas_masks, end_ids, prefix, generator, static=None):
        # Masks of a copy, of which N - 1 are drafted; `ahead` shrinks with the room that the canvas has left.
        self.N = self.ahead = min(options.speculate, max(options.max_new_tokens, 1))
        self.drafted = 0  # draft tokens after `known`: none in the first forward, then ahead - 1
        super().__init__(model, prompts, options, canvas_masks, end_ids, prefix, generator, static)
        self.known, self.draft = self.length - options.max_new_tokens, torch.zeros_like(self.masked)
        self.key = torch.randint(2**62, (self.B,), generator=generator, device=generator.device if generator else "cpu")
        self.key = self.key.to(self.column.device)

    def resume(self, other: "Speculation", rows: list[int], theirs: list[int]) -> None:
        super().resume(other, rows, theirs)
        self.drafted = other.drafted  # rows without a draft have masks in its place, which no verdict accepts

    def _make_context(self) -> None:
        """The cache: a column for each of the canvas, then those of the copies' masks, then a dump for padding."""
        self.dump = self.T + self.N**2
        self.layout = Layout.of(self.column, torch.where(self.column < self.length[:, None], 0, -1), 1)
        like = {"dtype": self.model.computes_in, "device": self.column.device}
        self.cache = KVCache(self.model.config, self.B, self.dump + 1, **like)

    def first(self) -> Tensor:
        """(B,): the first column to feed. Of what is settled that is at least the last, which predicts the next."""
        return torch.minimum(self.filled, self.known - 1).clamp(min=0)

    def now(self, forwards: int) -> Step:
        return super().now(forwards)._replace(draft=self.draft.clone())

    def widths(self) -> Iterator[int]:
        return itertools.chain([self.width()], itertools.repeat(self.ahead))

    def width(self) -> int:
        room = int((self.length - self.known).masked_fill(self.done, 1).max())
        self.ahead, self.drafted = min(self.N, room), min(self.drafted, room - 1)
        return int((self.known - self.first()).max()) + self.drafted

    def advance(self, W: int) -> None:
        """A forward over W clean columns of each row and the copies after them, and what it settles and drafts."""
        # Verdict a is on column known + a; token j of copy a's draft is on column known + a + j.
        first, N, G = self.first(), self.ahead, self.drafted
        tokens, layout, columns = self.feed_drafts(first, W)
        after = torch.arange(G + 1, device=first.device)  # a: how many draft tokens may be accepted
        ahead = torch.arange(1, N, device=first.device)
        verdict = (self.known - 1 - first)[:, None] + after  # (B, G + 1): where in the forward it is predicted
        shift = int(bool(self.model.config.right_shift))
        draft = W + after[:, None] * N + ahead - shift  # (G + 1, N - 1)
        index = torch.cat([verdict.clamp(max=W - 1), draft.flatten().expand(self.B, -1)], dim=1)
        index = (index + self.rows[:, None] * tokens.shape[1]).flatten()
        place = torch.cat([after, (after[:, None] + ahead).flatten()])  # (P,): of the predicted tokens, from `known` on
        place = (self.known[:, None] + place).flatten()

        head = functools.partial(self.choose_at, row=self.rows.repeat_interleave(len(place) // self.B), place=place)
        picked, probability, _ = self.model(tokens, layout, index=index, head=head, cache=self.cache, columns=columns)
        picked, probability = picked.view(self.B, -1), probability.view(self.B, -1)
        self.settle(picked[:, : G + 1], probability[:, : G + 1], picked[:, G + 1 :].view(self.B, G + 1, N - 1))

    def feed_drafts(self, first: Tensor, W: int) -> tuple[Tensor, Layout, Tensor]:
        """What is fed, (B, W + copies * N) each: tokens, layout and the cache's columns."""
        columns = first[:, None] + torch.arange(W, device=first.device)
        inside = columns < torch.minimum(self.known + self.drafted, self.length)[:, None]
        fetch, zeros = columns.clamp(max=self.T - 1), torch.zeros_like(columns)
        # Padding queries see the dump, by block 0: softmax over nothing gives NaN.
        clean = Layout(fetch, zeros.masked_fill(~inside, -1), fetch.masked_fill(~inside, 0), zeros)
        tokens, columns = self.tokens.gather(1, fetch), columns.masked_fill(~inside, self.dump)

        # A copy's masks stand where its draft will, and see what is settled or drafted before them, and each other.
        N = self.ahead
        n = torch.arange((self.drafted + 1) * N if N > 1 else 0, device=first.device).expand(self.B, -1)
        start = self.known[:, None] + n // N
        noisy = Layout(start + n % N, torch.zeros_like(n), start, n // N + 1)
        layout = Layout(*(torch.cat(pair, dim=1) for pair in zip(clean[:4], noisy[:4])))
        tokens = torch.cat([tokens, torch.full_like(n, self.mask_id)], dim=1)
        return tokens, layout, torch.cat([columns, self.T + n], dim=1)

    def choose_at(self, hidden: Tensor, weight: Tensor, row: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        """`choose_tokens` of hidden (N, D), for the tokens at these places of these rows, (N,) each; by chunks."""
        picks = []
        for at in torch.arange(len(row), device=row.device).split(CHUNK[hidden.device.type] // 2):
            noise = functools.partial(noised_at, self.key[row[at]], place[at], self.options.temperature)
            how = weight, self.options, self.mask_id, self.generator, self.model.known_ids
            picks.append(choose_tokens([hidden[at]], *how, noise=noise))
        return tuple(torch.cat(column) for column in zip(*picks))

    def settle(self, verdict: Tensor, probability: Tensor, drafts: Tensor) -> None:
        """Settles draft tokens up to the first that the verdict (B, G + 1) contradicts, and the verdict there; then
        takes the draft (B, G + 1, N - 1) for that many. Nothing follows an end token or the canvas."""
        # How many draft tokens the verdict accepts, and which of its own tokens are written: those, and the next.
        G, live = verdict.shape[1] - 1, ~self.done[:, None]
        after = torch.arange(G + 1, device=verdict.device)
        draft = self.tokens.gather(1, (self.known[:, None] + after[:G]).clamp(max=self.T - 1))
        accepted = (draft == verdict[:, :G]).long().cumprod(dim=1).sum(dim=1)  # (B,)
        ends = (verdict[:, :, None] == self.ends).any(dim=2).long()
        new = (
            (after <= accepted[:, None])
            & (ends.cumsum(dim=1) == ends)
            & (self.known[:, None] + after < self.length[:, None])
        )

        # Of each column of the canvas, the verdict that belongs there; then the same for the draft.
        place = self.column - self.known[:, None]
        settled = (place >= 0) & (place < new.sum(dim=1)[:, None]) & live
        self.tokens.copy_(torch.where(settled, verdict.gather(1, place.clamp(0, G)), self.tokens))
        chosen = probability.to(self.confidence.dtype).gather(1, place.clamp(0, G))
        self.confidence.copy_(torch.where(settled, chosen, self.confidence))
        self.masked.logical_and_(~settled)
        self.filled.copy_(torch.where(self.done, self.filled, self.known + torch.minimum(accepted, new.sum(dim=1))))
        self.known.add_(settled.sum(dim=1))
        self.done.copy_(self.ended())

        # A draft that was rejected is masked again; the new one takes its place, as far as the canvas goes.
        self.tokens.masked_fill_(self.masked, self.mask_id)
        place = self.column - self.known[:, None]
        self.draft.copy_((place >= 0) & (place < drafts.shape[2]) & self.masked & ~self.done[:, None])
        if drafts.shape[2]:
            taken = drafts[self.rows, accepted].gather(1, place.clamp(0, drafts.shape[2] - 1))
            self.tokens.copy_(torch.where(self.draft, taken, self.tokens))
        self.drafted = self.ahead - 1


def _reuse(prefix: Prefix, cache: KVCache, layout: Layout, tokens: Tensor, masked: Tensor, K: int) -> int:
    """Copies the complete blocks that `prefix` shares with tokens (T,) to `cache`; of how many columns they are."""
    known = prefix.tokens if prefix.block_size == K else []
    ours = tokens.masked_fill(masked, -1)[: len(known)]  # no token equals a mask
    agree = ours == torch.tensor(known[: len(ours)], dtype=torch.int64, device=tokens.device)
    n = int(agree.int().cumprod(dim=0).sum()) // K * K
    if n:
        cache.pairs[:, :, :n] = prefix.cache.pairs[:, :, :n]
        cache.write_layout(torch.arange(n, device=tokens.device)[None], layout.map(lambda field: field[:, :n]))
    return n

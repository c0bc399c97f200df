"""What a forward of the sampler reveals: which token at a masked position, and which of them stay.

    check_canvas        which prompts and options are refused
    RULES, REMASKING    how many tokens stay, and which; a new rule is a row
    choose_tokens       from hidden states: the token, its probability and its score, without the whole logits
    vocabulary_slices   the logits, a slice of the vocabulary at a time
    noised, noised_at   Gumbel noise: fresh, or that of a token's place in its row
    restrict            top_k and top_p

B batch, T columns, N rows, D hidden, V vocabulary, v tokens of a slice of it.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import OBJECTIVES, Config


def check_canvas(config: Config, objective: str, options, prompts, canvas_masks, end_ids, prefix) -> None:
    """ValueError where the prompts do not fit the model, the options (diffusion.Sampling) or each other."""
    V, mask_id = config.vocab_size, config.mask_token_id
    lengths, found = list(map(len, prompts)), canvas_masks and list(map(len, canvas_masks))
    T = max(lengths, default=0) + options.max_new_tokens
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; expected one of {', '.join(OBJECTIVES)}")
    options.block(config, objective)
    if options.speculate is not None and (config.context != "causal" or mask_id is None):
        raise ValueError("speculate needs a checkpoint with causal context, which can verify its drafts; leave it out")
    if options.speculate is not None and canvas_masks is not None:
        raise ValueError("speculate decodes as ar, which sees nothing after a mask; leave it out to fill in masks")
    if not prompts:
        raise ValueError("no prompts; expected at least one (an empty one generates from scratch)")
    if mask_id is None and (options.cfg_scale or objective != "ar"):
        raise ValueError("the checkpoint declares no mask_token_id; make a diffusion checkpoint of it with convert.py")
    if len({*options.suppress_tokens} | ({mask_id} - {None})) == V:
        raise ValueError(f"suppress_tokens names all {V} tokens, so that none is left to choose; name fewer")
    if canvas_masks is not None and found != lengths:
        raise ValueError(f"canvas_masks of lengths {found}: expected a bool for each prompt token, {lengths}")
    if canvas_masks is not None and options.block_align == "prompt":
        raise ValueError("block_align prompt: masks inside a canvas have no prompt's end to count from; drop it")
    if objective == "ar" and any(mask[:1] == [True] for mask in canvas_masks or ()):
        raise ValueError("an ar model cannot fill in the first token; begin the canvas with the BOS or EOS token")
    if (objective == "ar" or options.speculate is not None) and 0 in lengths:
        raise ValueError("an empty prompt has nothing to predict from; begin it with the BOS or EOS token")
    if T > config.max_position_embeddings:
        raise ValueError(
            f"prompt and answer of {T} tokens exceed the model's context of {config.max_position_embeddings}; shorten "
            "the prompt or lower --max_new_tokens"
        )
    if prefix is not None and (objective == "mdlm" or len(prompts) > 1):
        raise ValueError(f"prefix: {len(prompts)} rows of {objective}; expected one of ar or bd3lm, or leave it out")
    if prefix is not None and (options.cfg_scale or options.block_align == "prompt"):
        raise ValueError("prefix: guidance and block_align prompt change what earlier tokens see; leave it out")
    named = {"mask_token_id": () if mask_id is None else (mask_id,), "prompts": itertools.chain(*prompts)}
    named |= {name: getattr(options, name) for name in ("cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens")}
    for name, given in (named | {"end_ids": end_ids}).items():
        for token in given:
            if not 0 <= token < V:
                raise ValueError(
                    f"{name}: token id {token} is outside the vocabulary; expected 0 to {V - 1}, as this model's "
                    "tokenizer gives them"
                )


# ---------------------------------------------------------------------------------------------------------------------
# How many tokens a forward reveals, and which

# A decoding rule: (confidence, token, masked, quota, generator) -> masked'. confidence, token and masked are (B, T),
# masked being the positions of each row's current block that may still be chosen; quota (B,) is what the schedule would
# reveal at this step; none uses token or generator yet. Every rule leaves fewer masked of a row that has any.


def ranks(confidence: Tensor, masked: Tensor) -> Tensor:
    """(B, T): the rank of each masked position by falling confidence in its row, ties to the left; the rest after."""
    order = confidence.masked_fill(~masked, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(confidence.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, rank)


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
        rank = ranks(confidence, masked)
        return masked & ((rank + 2) * (1 - confidence) >= factor) & (rank > 0)

    return rule


def path_planning(confidence, token, masked, quota, generator):
    """Masks the least confident generated positions of a block, revealed ones too; the number masked falls by `quota`.

    P2 with self-planning (arXiv 2502.03540), as Open-dLLM decodes: a revealed position is scored by the token now
    predicted there, but keeps its own unless it is masked again. confidence is -inf elsewhere.
    """
    answer = confidence > -math.inf
    keep = answer.sum(dim=1) - (masked.sum(dim=1) - quota)
    return answer & (ranks(confidence, answer) >= keep[:, None])


RULES = {  # an option that replaces the schedule: what makes a rule of its value, and the confidence that it compares
    "threshold": (confidence_threshold, "probability"),
    "entropy": (entropy_bound, "entropy"),
    "factor": (confidence_factor, "probability"),
}
REMASKING = {  # which tokens stay where the schedule says how many: the rule, and the confidence that it compares
    "low_confidence": (fixed_count, "probability"),
    "random": (fixed_count, "random"),
    "p2": (path_planning, "probability"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Which token

SLICE = 2**19  # logits that exist at a time where tokens are chosen or scored on a CPU


def gumbel(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """float64 logits - T log(-log uniform): their argmax is a sample from softmax(logits / T). T 0: logits as given.

    The logarithm of the reference's exp(logits) / (-log u)^T, which would overflow.
    """
    if temperature == 0:
        return logits
    return logits.double() - temperature * torch.log(-torch.log(uniform))


def noised(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Logits (N, V) with Gumbel noise of that temperature, drawn by `generator`."""
    if not logits.is_cuda:
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        return gumbel(logits, temperature, uniform)
    # The same as the logarithm of exponential draws, and all but the draws in float32. A draw must be float64: those of
    # float32 are 6e-8 apart, and the winner among 150,000 tokens is near 7e-6. The sums may be rounded, by 1e-6.
    drawn = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).exponential_(generator=generator)
    return torch.sub(logits, drawn.float().log_(), alpha=temperature)


def uniform_at(key: Tensor, place: Tensor, start: int, shape, device) -> Tensor:
    """(N, v) float64 in (0, 1): the random number of each token from `start` on at `place` (N,) of the row `key` (N,):
    a function of these alone, so that whoever asks for it again gets it (SplitMix64's mixing, twice)."""
    token = torch.arange(start, start + shape[1], device=device)

    def mix(x: Tensor) -> Tensor:  # int64 arithmetic wraps around; >> would copy the sign
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
        return x ^ (x >> 31 & (1 << 33) - 1)

    step = -0x61C8864680B583EB  # 2**64 / golden ratio
    bits = mix(mix(key + place * step)[:, None] + (token + 1) * step) >> 11 & (1 << 53) - 1
    return (bits.double() + 0.5) / 2**53


def noised_at(key: Tensor, place: Tensor, temperature: float, start: int, logits: Tensor) -> Tensor:
    """Logits (N, v) of the tokens from `start` on, with the Gumbel noise of their places."""
    return gumbel(logits, temperature, uniform_at(key, place, start, logits.shape, logits.device))


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


def vocabulary_slices(hidden: list[Tensor], weight: Tensor, whole: bool = False) -> Iterator[tuple[int, list[Tensor]]]:
    """(first token, the logits (N, v) of each of hidden (N, D) from there on), over the vocabulary in order.

    On the CPU a slice is of SLICE logits, which stay in a core's cache, and computed as (v, N) with N rounded up to
    eights: of a step's few rows MKL then reads the weights in a third to two thirds of the time. Elsewhere, or `whole`,
    it is all of them. The weight (V, D) is cast to hidden's dtype, where it has another one in training.
    """
    N, V = len(hidden[0]), len(weight)
    if weight.is_cuda:
        yield 0, [rows @ weight.to(rows.dtype).T for rows in hidden]
        return
    start, columns = 0, [F.pad(rows, (0, 0, 0, -N % 8)).T for rows in hidden]  # (D, N) each
    for part in weight.split(V if whole else max(1, SLICE // max(N, 1))):
        yield start, [(part.to(rows.dtype) @ rows).T[:N] for rows in columns]
        start += len(part)


class Slice(NamedTuple):
    """What a slice of the vocabulary says of each row (N,): the best score, its token and that token's logit; and of
    the softmax the largest logit, the sum of exp(logit - top), and the same weighted by the exponent, for entropies."""

    best: Tensor
    token: Tensor
    logit: Tensor
    top: Tensor
    total: Tensor
    mean: Tensor


def choose_tokens(hidden: list[Tensor], weight: Tensor, options, mask_id, generator, known_ids=None, *, noise=None):
    """(token, probability, score), each (N,), from hidden [(N, D)] or, with guidance, [conditional, unconditional].

    The score is the probability; with `entropy` the distribution's negative entropy in nats. Neither temperature nor
    top_k nor top_p enters them. Neither mask_id (None: there is none) nor an id from known_ids on is ever chosen.
    noise: (first token, logits (N, v)) -> the same with Gumbel noise of the temperature; None: the generator's.
    """
    noise = noise or (lambda start, logits: noised(logits, options.temperature, generator))
    never = [] if mask_id is None else [(mask_id, mask_id + 1)]
    never += [] if known_ids is None else [(known_ids, len(weight))]
    entropy = options.rule[1] == "entropy"
    restricted = options.temperature and (options.top_k is not None or options.top_p is not None)
    parts = []
    for start, scores in vocabulary_slices(hidden, weight, whole=restricted):
        logits = scores[0].to(torch.promote_types(scores[0].dtype, torch.float32))  # (N, v), changed in place
        if options.cfg_scale:
            free = scores[1].to(logits.dtype)
            logits = free + (options.cfg_scale + 1) * (logits - free)
        parts.append(_choose_in_slice(logits, start, options, never, noise, entropy, restricted))

    part = parts[0] if len(parts) == 1 else _whole(parts)
    probability = (part.logit - part.top).exp() / part.total
    if not entropy:
        return part.token, probability, probability
    return part.token, probability, part.mean / part.total - part.total.log()


def _whole(parts: list[Slice]) -> Slice:
    """All slices as one: the best of the bests, and log-sum-exp of the parts."""
    part = Slice(*(torch.stack(column) for column in zip(*parts)))  # (slices, N) each
    first = part.best.argmax(dim=0, keepdim=True)
    best, token, logit = (x.gather(0, first)[0] for x in (part.best, part.token, part.logit))
    top = part.top.amax(dim=0)
    share = (part.top - top).exp()
    mean = (part.mean + (part.top - top) * part.total) * share
    return Slice(best, token, logit, top, (part.total * share).sum(dim=0), mean.sum(dim=0))


def _choose_in_slice(logits, start: int, options, never, noise, entropy, restricted) -> Slice:
    """logits (N, v) of the tokens from `start` on; they are overwritten."""
    # Some tokens are never chosen.
    inside = range(start, start + logits.shape[1])
    for token in options.suppress_tokens:
        if token in inside:
            logits[:, token - start].fill_(-math.inf)
    # Never chosen, yet their share of the probability counts, as in the reference.
    barred = [logits[:, max(first - start, 0) : max(end - start, 0)] for first, end in never]
    barred = [(part, part.clone()) for part in barred if part.numel()]
    for part, _ in barred:
        part.fill_(-math.inf)

    # The choice: the likeliest token, or at a temperature the likeliest after Gumbel noise.
    best, token = logits.max(dim=1)
    top = best
    if options.temperature:
        T = options.temperature
        noisy = restrict(logits / T, options.top_k, options.top_p) * T if restricted else logits
        best, token = noise(start, noisy).max(dim=1)

    # Its probability, over the whole slice with their logits restored, but for tokens of begin_suppress_tokens.
    for part, share in reversed(barred):
        part.copy_(share)
        top = torch.maximum(top, share.amax(dim=1))
    for suppressed in options.begin_suppress_tokens:
        if suppressed in inside:
            logits[:, suppressed - start].fill_(-math.inf)
    chosen = logits.gather(1, token[:, None])[:, 0]
    if options.begin_suppress_tokens:
        top = logits.max(dim=1).values
    top = top.clamp(min=torch.finfo(logits.dtype).min)  # a slice may be suppressed as a whole
    logits.sub_(top[:, None])
    if entropy:
        p = logits.exp()
        total, mean = p.sum(dim=1), (p * logits.clamp_(min=torch.finfo(p.dtype).min)).sum(dim=1)  # 0 * -inf: NaN
    else:
        total = mean = logits.exp_().sum(dim=1)
    return Slice(best, token + start, chosen, top, total, mean)

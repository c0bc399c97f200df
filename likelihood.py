"""Log-likelihoods with a standard error: exact for ar, unbiased estimates of a lower bound for mdlm and bd3lm.

`log_likelihood` works in four steps: plan the rows, sequences to feed with the log-probabilities to read from each;
group them in batches; score each batch with the model; sum up the weighted log-probabilities of each request.
`evaluate` is what training reports: the same bound, over the rows of a loader.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from choose import vocabulary_slices
from diffusion import CHUNK, Batch, Noising, denoise, losses, training_example
from model import Config, KVCache, LanguageModel, Layout
from parallel import Ranks

COPIES = 1024  # tokens of noisy copies in a row of one forward: attention compares each with all, and masks most

# A read: log p(target), from the hidden state at position `predictor` of a row's copy with this number, or of its PAST.
READ = np.dtype([("copy", np.int64), ("predictor", np.int64), ("target", np.int64)])
# A query: a read, and the sum that it joins: of a request, in one of its sets or among what is ENUMERATED.
QUERY = np.dtype([("read", READ), ("request", np.int64), ("set", np.int64), ("weight", np.float64)])
# The answer to a read. likeliest: no token is likelier than the target.
SCORE = np.dtype([("log_p", np.float64), ("likeliest", np.bool_)])
# A token in a forward: the column of the cache that it goes to, and its fields of model.Layout.
FED = np.dtype([(name, np.int64) for name in ("token", "column", *Layout._fields[:4])])
PAST, ENUMERATED, PADDING = -1, -1, -1  # in place of the number of a copy, of a set, of a document


@dataclass
class _Row:
    """One sequence to feed: a clean past, then noisy copies of blocks; and the queries that it answers."""

    # A copy is a block with some tokens masked. Copies see the past but not each other, so that one past serves them
    # all. ar has only a past, mdlm only a copy, the whole sequence. Requests with the same past (copy) share a row.
    past: tuple[int, ...]
    shared: int  # so many tokens of the past are complete blocks of the context, which other rows may have as well
    copies: dict[tuple[int, bytes], int] = field(default_factory=dict)  # (start, int64 tokens): number of the copy
    queries: list[np.ndarray] = field(default_factory=list)  # QUERY

    @property
    def width(self) -> int:
        """Tokens of its longest copy."""
        return max((len(tokens) // 8 for _, tokens in self.copies), default=0)


@torch.no_grad()
def log_likelihood(
    model: LanguageModel, contexts, continuations, *, draws=128, generator=None, forward_tokens=4096, check_greedy=False
) -> tuple[Tensor, ...]:
    """(estimate, standard error), (B,) float64 each: of log p(continuation | context), lists of ids, in nats.

    ar: exact. mdlm: an unbiased estimate of the lower bound (MDLM, arXiv 2406.07524, equation 10, with the number of
    masks in place of the noise level). bd3lm: the sum over blocks of that bound given the clean past (BD3LM, arXiv
    2503.09573, equation 8). draws: subsets to mask of each block (mdlm: of the continuation). forward_tokens: the most
    of a forward, unless one row alone has more. check_greedy: a third tensor, (B,) bool: greedy decoding gives the
    continuation. Raises ValueError for a request longer than the model, or whose first token nothing predicts.
    """
    config, objective = model.config, model.config.objective or "mdlm"
    K = {"ar": 1, "mdlm": None, "bd3lm": config.block_length}[objective]
    if objective != "ar" and config.mask_token_id is None:
        raise ValueError("the checkpoint declares no mask_token_id; make a diffusion checkpoint of it with convert.py")
    if objective == "bd3lm" and K is None:
        raise ValueError("bd3lm needs a block length and the checkpoint declares none; see convert.py --block_size")
    if draws < 2:
        raise ValueError(f"draws {draws}: expected at least 2, or there is no standard error")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))

    # The bound is a mean over the number n of masks, uniform in 1..L for a block's L tokens, and over subsets S of that
    # size: of L / n times the sum over S of log p(token | all tokens outside S). The draws form sets that each estimate
    # it. A request has a sum over its queries for each set, and a last one of what is enumerated.
    sets = min(max(draws // 2, 2), 16)
    sums, greedy = np.zeros((len(contexts), sets + 1)), np.ones(len(contexts), dtype=bool)
    for batch in _batches(_plan(config, K, contexts, continuations, draws, sets, seed), forward_tokens):
        # Requests that share a row often want the same log-probability, which is read once.
        queries = [np.concatenate(row.queries) for row in batch]
        reads, inverse = zip(*(np.unique(query["read"], return_inverse=True) for query in queries))
        for query, which, scores in zip(queries, inverse, _score(model, batch, reads, K)):
            np.add.at(sums, (query["request"], query["set"]), query["weight"] * scores["log_p"][which])
            np.logical_and.at(greedy, query["request"], scores["likeliest"][which])

    # Each set estimates what is not enumerated; how far the sets differ gives the error of their mean.
    estimate = torch.from_numpy(sums[:, ENUMERATED] + sums[:, :-1].mean(axis=1))
    error = torch.from_numpy(sums[:, :-1].std(axis=1, ddof=1) / math.sqrt(sets))
    if estimate.isnan().any():
        raise ValueError("a log-likelihood is not a number; use another --dtype, or another checkpoint")
    if not check_greedy:
        return estimate, error
    verdict = torch.from_numpy(greedy) if objective == "ar" else is_greedy(model, contexts, continuations)
    return estimate, error, verdict


def _plan(config: Config, K: int | None, contexts, continuations, draws: int, sets: int, seed: int) -> list[_Row]:
    """The rows to feed for all requests."""
    ar = config.objective == "ar"
    shift = config.shift
    longest = config.max_position_embeddings + int(ar)  # ar does not feed its last token
    rows: dict[tuple | bytes, _Row] = {}
    for request, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        tokens = np.array([*context, *continuation], dtype=np.int64)
        P, T = len(context), len(tokens)
        if T > longest:
            raise ValueError(f"context and continuation of {T} tokens exceed the model's {longest}; cut the context")
        if shift and P == 0 < T:
            raise ValueError("an empty context has nothing to predict from; begin it with the BOS or EOS token")
        if P == T:
            continue
        # All blocks with a token of the continuation are scored; what is before the last of them is the past. Blocks
        # start at multiples of the block length, as in training; the last one ends with the continuation.
        size = K or T
        shared = P // size * size
        past = tuple(tokens[: (T - 1) // size * size].tolist())
        # Noise depends on the context and the block, so answers to one question share it, and batches do not matter.
        stream = int.from_bytes(hashlib.blake2b(tokens[:P].tobytes(), digest_size=7).digest())
        for start in range(shared, T, size):
            first, stop = max(P, start), min(start + size, T)
            noise = np.random.Generator(np.random.Philox(key=np.array([seed, stream + start], dtype=np.uint64)))
            for masked, weight, which in _subsets(stop - first, draws, sets, noise):
                position = first + masked.nonzero()[0]
                predictor = position - shift
                noisy = tokens[start:stop].copy()
                if not ar:
                    noisy[position - start] = config.mask_token_id
                row = rows.setdefault(past if K else noisy.tobytes(), _Row(past, shared))
                row.shared = min(row.shared, shared)
                # With a shift, the past predicts a block's first token; a copy is needed if another one is masked.
                copy = PAST
                if predictor[-1] >= start:
                    copy = row.copies.setdefault((start, noisy.tobytes()), len(row.copies))
                query = np.zeros(len(position), dtype=QUERY)
                query["read"]["copy"] = np.where(predictor < start, PAST, copy)
                query["read"]["predictor"], query["read"]["target"] = predictor, tokens[position]
                query["request"], query["set"], query["weight"] = request, which, weight
                row.queries.append(query)
    return list(rows.values())


def _subsets(m: int, draws: int, sets: int, noise: np.random.Generator) -> Iterator[tuple[np.ndarray, float, int]]:
    """Yields (masked (m,) bool, weight, set): subsets of m tokens whose weighted sums in each set are unbiased."""
    # All of them if they are no more than `draws`: one token is exact.
    if m < 30 and 2**m - 1 <= draws:
        for code in range(1, 2**m):
            masked = code >> np.arange(m) & 1 == 1
            n = int(masked.sum())
            yield masked, 1 / (n * math.comb(m, n)), ENUMERATED
        return
    # Otherwise set r draws n at the levels (i + u_r) / b of its b draws. Its subsets lie one after the other around a
    # circle on which the tokens are in random order: each is uniform among those of its size, and together they mask
    # the tokens about equally often.
    shift = noise.random(sets)
    circle = noise.random((m, sets)).argsort(axis=0).argsort(axis=0)  # where token j is on the circle of set r
    for r in range(sets):
        b = draws // sets + int(r < draws % sets)
        begin = 0
        for i in range(b):
            n = min(1 + int(m * (i + shift[r]) / b), m)
            yield (circle[:, r] - begin) % m < n, m / (n * b), r
            begin += n


def _batches(rows: list[_Row], forward_tokens: int) -> Iterator[list[_Row]]:
    """Yields rows for one forward each. Side by side: rows of similar length, and the answers to one question."""
    batch, cost = [], 0
    for row in sorted(rows, key=lambda row: (len(row.past) + row.width, row.past[: row.shared]), reverse=True):
        if batch and (len(batch) + 1) * cost > forward_tokens:
            yield batch
            batch, cost = [], 0
        batch.append(row)
        cost = max(cost, len(row.past) + min(len(row.copies) * row.width, max(row.width, COPIES)))
    if batch:
        yield batch


def _score(model: LanguageModel, batch: list[_Row], reads: list[np.ndarray], K: int | None) -> list[np.ndarray]:
    """The scores of each row's reads. One forward has the clean pasts and as many copies as it takes; other copies
    follow in forwards of their own, which see the same past in the cache."""
    clean = 1 if K and model.config.causal else K  # the block length of the clean past
    B, P, width = len(batch), max(len(row.past) for row in batch), max(row.width for row in batch)
    copies = max(len(row.copies) for row in batch)
    at_once = max(1, COPIES // max(width, 1))  # copies of a forward
    contexts = list(dict.fromkeys(row.past[: row.shared] for row in batch))  # the distinct ones
    first = [0] * B  # of each past, the first token that is not in the cache
    cache, dump = None, P + min(copies, at_once) * width  # dump: the cache's last column, for padding

    # mdlm needs no cache, nor does ar unless rows have a context in common: that is encoded once, in a forward before.
    if K and (copies or len(contexts) < B):
        cache = KVCache(model.config, B, dump + 1, dtype=model.computes_in, device=model.head_weight.device)
    if len(contexts) < B and any(contexts):
        _encode(model, contexts, [contexts.index(row.past[: row.shared]) for row in batch], cache, clean)
        # Its last token is fed again: under right shift it predicts, and the cache has no hidden states.
        first = [max(row.shared - 1, 0) for row in batch]

    results = [np.zeros(len(read), dtype=SCORE) for read in reads]
    for begin in range(0, max(copies, 1), at_once):
        numbers = range(begin, min(begin + at_once, copies))
        before = max(len(row.past) - f for row, f in zip(batch, first)) if begin == 0 else 0
        fed = _padding(B, before + len(numbers) * width, dump)
        chosen, index = [], []  # of each row: the reads that this forward answers, and where their predictors are in it
        for i, (row, read) in enumerate(zip(batch, reads)):
            # The first forward has the rest of the past; behind it, a slot of `width` tokens for each copy.
            if begin == 0:
                _put(fed[i], row.past[first[i] :], first[i], first[i], 0, clean)
            starts = np.array([start for start, _ in row.copies] + [0])  # the last one is for PAST
            for c, (start, tokens) in enumerate(list(row.copies)[numbers.start : numbers.stop]):
                tokens = np.frombuffer(tokens, dtype=np.int64)
                _put(fed[i, before + c * width :], tokens, start, P + c * width, numbers[c] + 1, K)
                if clean != K:  # with causal context a copy is numbered by its first position
                    fed["block"][i, before + c * width :][: len(tokens)] = start
            # Each predictor is in the past or in the slot of its copy; other forwards answer the other reads.
            copy, predictor = read["copy"], read["predictor"]
            column = before + (copy - begin) * width + predictor - starts[copy]
            column = np.where(copy == PAST, predictor - first[i], column)
            chosen.append(np.where(copy == PAST, begin == 0, np.isin(copy, numbers)))
            index.append((i * fed.shape[1] + column)[chosen[-1]])
        parts = [read[mine] for read, mine in zip(reads, chosen)]
        for result, mine, score in zip(results, chosen, _forward(model, fed, cache, K, index, parts)):
            result[mine] = score
    return results


def _encode(model: LanguageModel, contexts: list[tuple], owner: list[int], cache: KVCache, K: int) -> None:
    """Feeds each context once, and copies its keys and values to the rows of the cache: context owner[i] to row i."""
    T, dump = max(map(len, contexts)), cache.keys.shape[2] - 1
    fed = _padding(len(contexts), T, dump)
    for row, context in zip(fed, contexts):
        _put(row, context, 0, 0, 0, K)
    once = KVCache(model.config, len(contexts), dump + 1, dtype=cache.keys.dtype, device=cache.keys.device)
    _forward(model, fed, once, K, [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=READ)])
    cache.pairs[:, :, :T] = once.pairs[:, owner, :T]
    for target, source in zip(cache.layout[:4], once.layout[:4]):
        target[:, :T] = source[owner, :T]


def _padding(B: int, T: int, dump: int) -> np.ndarray:
    """(B, T) FED, all padding. It goes to column `dump`, and sees that one: what sees nothing may become NaN."""
    fed = np.zeros((B, T), dtype=FED)
    fed["document"], fed["column"] = PADDING, dump
    return fed


def _put(fed: np.ndarray, tokens, start: int, column: int, noisy: int, K: int | None) -> None:
    """Writes tokens at positions from `start` on into the first of fed (T,), for columns from `column` on."""
    fed, n = fed[: len(tokens)], np.arange(len(tokens))
    fed["token"], fed["document"], fed["noisy"] = tokens, 0, noisy
    fed["position"], fed["column"] = start + n, column + n
    fed["block"] = fed["position"] // K if K else 0


def _forward(model: LanguageModel, fed: np.ndarray, cache: KVCache | None, K: int | None, index: list, reads: list):
    """The scores of each row's reads from one forward; index: the flat positions in fed (B, T) of their predictors."""

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(model.head_weight.device)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """For each of hidden (N, D): its target's log-probability, and whether no token is likelier."""
        log_p, likeliest, chunk = [], [], CHUNK[hidden.device.type]
        for rows, target in zip(hidden.split(chunk), targets.split(chunk)):
            # Logits exist for a slice of the vocabulary at a time; of each its maximum and log-sum-exp are enough.
            chosen, tops, norms = None, [], []
            for start, (logits,) in vocabulary_slices([rows], weight):
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                column = target - start
                here = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
                inside = (column >= 0) & (column < logits.shape[1])
                chosen = here if chosen is None else torch.where(inside, here, chosen)
                tops.append(logits.max(dim=1).values)  # amax is slower where v is strided
                norms.append(tops[-1] + logits.sub_(tops[-1][:, None]).exp_().sum(dim=1).log())
            log_p.append(chosen - torch.stack(norms).logsumexp(dim=0))
            likeliest.append(chosen == torch.stack(tops).amax(dim=0))
        return torch.cat(log_p), torch.cat(likeliest)

    # The kinds of layout for which attention needs no mask: without a cache, ar's, and mdlm's if no row is padded.
    kind = "any"
    if cache is None and (K == 1 or (K is None and not (fed["document"] == PADDING).any())):
        kind = "causal" if K else "full"
    layout = Layout(*(tensor(fed[name]) for name in Layout._fields[:4]), kind)
    index, targets = tensor(np.concatenate(index)), tensor(np.concatenate(reads)["target"])
    columns = None if cache is None else tensor(fed["column"])
    found = model(tensor(fed["token"]), layout, cache=cache, columns=columns, index=index, head=head)
    scores = np.zeros(len(index), dtype=SCORE)
    scores["log_p"], scores["likeliest"] = (part.cpu().numpy() for part in found)
    return np.split(scores, np.cumsum([len(read) for read in reads])[:-1])


@torch.no_grad()
def is_greedy(model: LanguageModel, contexts: list[list[int]], continuations: list[list[int]]) -> Tensor:
    """(B,) bool: greedy decoding gives the continuation: a token a forward, of a block's the likeliest first."""
    if model.config.objective == "ar":
        return log_likelihood(model, contexts, continuations, check_greedy=True)[2]
    verdict = torch.ones(len(contexts), dtype=torch.bool)
    if not any(map(len, continuations)):
        return verdict
    rows = [[*context, *answer] for context, answer in zip(contexts, continuations, strict=True)]
    masks = [[False] * len(context) + [True] * len(answer) for context, answer in zip(contexts, continuations)]
    wanted = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    answer = pad_sequence([torch.tensor(mask, dtype=torch.bool) for mask in masks], batch_first=True)

    # A row has failed at its first wrong token; no further forward is needed once all have.
    for step in denoise(model, rows, canvas_masks=masks, max_new_tokens=0, steps_per_block=wanted.shape[1]):
        wrong = answer & ~step.masked.cpu() & (step.tokens.cpu() != wanted)
        verdict = ~wrong.any(dim=1)
        if not verdict.any():
            break
    return verdict


# ---------------------------------------------------------------------------------------------------------------------
# The bound that training evaluates

EVALUATION_SEED = 0  # of the noise: the same in every run


@torch.no_grad()
def evaluate(
    engine, model: LanguageModel, rows, collate, *, batch_size: int, ranks: Ranks, first_rows: int | None = None
) -> tuple[float, float | None]:
    """The bound on the rows' negative log-likelihood in nats per supervised token: exact for ar, else unbiased. With
    causal context also that of the model as ar, else None. first_rows: take so many rows alone (None: all).

    Mask counts with weight m/n (diffusion.draw_noise) under noise that is fixed, whatever the run trains with. Padding
    that mdlm or bd3lm predict adds to the sum, not to the count, so that the objectives compare. Rows are taken in
    order of length, so that a batch has little padding, and always the same. The ranks take batches in turn.
    """
    noising = Noising(noise_type="count")
    first = model.config.shift  # then a row's first token has no predictor
    beside = {"ar_weight": 1.0} if model.config.context == "causal" and model.config.objective == "bd3lm" else {}
    order = sorted(range(len(rows))[:first_rows], key=lambda i: (rows.lengths[i], i))
    begins = range(0, len(order), batch_size)
    model.eval()
    total, of_ar, tokens, ar_tokens = 0.0, 0.0, 0, 0
    turns = range(math.ceil(len(begins) / ranks.world_size))
    for turn in tqdm(turns, "evaluate", unit="batch", leave=False, disable=True if ranks.rank else None):
        n = turn * ranks.world_size + ranks.rank
        begin = begins[min(n, len(begins) - 1)]  # FSDP's ranks must run together: one without a batch repeats the last
        picked = [rows[i] for i in order[begin : begin + batch_size]]
        batch = {**collate(picked), "sample": torch.arange(begin, begin + len(picked)), "epoch": 0}
        example = training_example(Batch(**batch), model.config, noising, seed=EVALUATION_SEED, **beside)
        value, ar = (part.item() for part in losses(engine, example.to(ranks.device)))
        if n < len(begins):
            total, of_ar = total + value - ar, of_ar + ar
            tokens += sum(int(row["supervised"][first:].sum()) for row in picked)
            ar_tokens += sum(int(row["supervised"][1:].sum()) for row in picked)
    model.train()
    total, of_ar, tokens, ar_tokens = ranks.sum(total, of_ar, tokens, ar_tokens)
    return total / max(1, tokens), of_ar / max(1, ar_tokens) if beside else None

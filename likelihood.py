"""Log-likelihoods with a standard error: exact for ar, unbiased estimates of a lower bound for mdlm and bd3lm."""

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffusion import CHUNK, denoise, vocabulary_slices
from model import KVCache, LanguageModel, Layout

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
            for start, (logits,) in vocabulary_slices([rows], weight):
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

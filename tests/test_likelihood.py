"""Log-likelihood: the reference's golden values, both bounds by brute force, and what must not change a number."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import MASK, golden_json, golden_model, tiny, watched_masks

import choose
import diffusion
import likelihood
from likelihood import is_greedy, log_likelihood
from model import Layout

GOLDEN_MASK = 504  # the golden qwen3's <|mask|>


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, MASK, (n,), generator=rng(seed)).tolist()


def log_probs(model, sequence, layout) -> torch.Tensor:
    """(T, V)"""
    return model(torch.tensor([sequence]), layout)[0].log_softmax(dim=1)


def bound(objective: str, model, context, continuation) -> float:
    """Both bounds, written from their definition: every subset of every block, one forward each, no cache."""
    sequence = [*context, *continuation]
    P, T = len(context), len(sequence)
    shift = bool(model.config.right_shift)
    K = model.config.block_length if objective == "bd3lm" else T
    total = 0.0
    for start in range(P // K * K, T, K):
        stop = min(start + K, T)
        places = list(range(max(P, start), stop))
        for n in range(1, len(places) + 1):
            subsets = list(itertools.combinations(places, n))
            for subset in subsets:
                noised = [MASK if i in subset else token for i, token in enumerate(sequence[:stop])]
                # the clean past, then this block noisy: each sees the blocks before, and its own
                position = torch.arange(stop)[None]
                layout = Layout.of(position, None, K)
                if model.config.context == "causal":  # the past: only what is before; the block: the past, and itself
                    noisy = position >= start
                    layout = layout._replace(block=torch.where(noisy, start, position), noisy=noisy.long())
                if shift and start:  # the position before the block is clean, and in an earlier block
                    assert noised[start - 1] == sequence[start - 1]
                log_p = log_probs(model, noised, layout)
                total += sum(log_p[i - shift, sequence[i]].item() for i in subset) / (n * len(subsets))
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The reference's values


def golden_pairs():
    pairs = golden_json("eval")
    return [pair["context"] for pair in pairs], [pair["continuation"] for pair in pairs]


@pytest.mark.parametrize("draws", [2, 8, 32, 128])
@pytest.mark.parametrize("forward_tokens", [1, 8192])
def test_mdlm_meets_the_golden_exact_values_within_four_standard_errors(draws, forward_tokens):
    model = golden_model("qwen3", objective="mdlm", mask_token_id=GOLDEN_MASK)
    contexts, continuations = golden_pairs()
    estimates = []
    for seed in range(24):
        estimate, error = log_likelihood(
            model, contexts, continuations, draws=draws, generator=rng(seed), forward_tokens=forward_tokens
        )
        estimates.append(estimate)
        for value, se, pair in zip(estimate, error, golden_json("eval")):
            if 2 ** len(pair["continuation"]) - 1 <= draws:
                assert se == 0 and value == pytest.approx(pair["exact_uniform"], abs=1e-4)
    estimates = torch.stack(estimates)  # (24, B)
    for values, pair in zip(estimates.T, golden_json("eval")):
        error = values.std() / math.sqrt(len(values)) + 1e-4
        assert abs(values.mean() - pair["exact_uniform"]) < 4 * error


@pytest.mark.parametrize("draws", [8, 16, 24])
def test_variance_is_no_larger_than_the_references_and_the_standard_error_is_the_spread(draws):
    model = golden_model("qwen3", objective="mdlm", mask_token_id=GOLDEN_MASK)
    for pair in golden_json("eval"):
        if 2 ** len(pair["continuation"]) - 1 <= draws:
            continue
        runs = [
            log_likelihood(model, [pair["context"]], [pair["continuation"]], draws=draws, generator=rng(seed))
            for seed in range(150)
        ]
        estimate, error = (torch.cat(part) for part in zip(*runs))
        assert abs(estimate.mean() - pair["exact_uniform"]) < 4 * estimate.std() / math.sqrt(len(estimate))
        reference = min(case["std_err"] * math.sqrt(case["mc_num_total"] / draws) for case in pair["mc"])
        assert estimate.std() < reference * 1.12  # 150 runs know a standard deviation to 6 %
        assert error.square().mean().sqrt() == pytest.approx(estimate.std().item(), rel=0.35)


def test_greedy_verdicts_are_the_references():
    model = golden_model("qwen3", objective="mdlm", mask_token_id=GOLDEN_MASK)
    for pair in golden_json("eval"):
        if not pair["context"]:  # all masks: which of the four tokens comes first is the rounding's choice
            continue
        context, continuation, greedy = [pair["context"]], [pair["continuation"]], [pair["greedy_continuation"]]
        assert is_greedy(model, context, continuation).item() == pair["is_greedy_peer"]
        assert is_greedy(model, context, greedy).item() == pair["is_greedy_peer_on_greedy_continuation"]
        verdict = log_likelihood(model, context, greedy, draws=4, check_greedy=True)[2]
        assert verdict.item() == pair["is_greedy_peer_on_greedy_continuation"]


# ---------------------------------------------------------------------------------------------------------------------
# Brute force


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize("context", [None, "causal"])
@pytest.mark.parametrize(("objective", "K"), [("mdlm", None), ("bd3lm", 1), ("bd3lm", 3), ("bd3lm", 4)])
def test_enumeration_is_the_bound_of_the_definition(objective, K, context, right_shift):
    model = tiny(objective=objective, block_length=K, right_shift=right_shift, context=context)
    for P, L in [(5, 1), (4, 3), (8, 4), (1, 4), (7, 5)]:
        context, continuation = tokens(P), tokens(L, 1)
        estimate, error = log_likelihood(model, [context], [continuation], draws=31, generator=rng())
        assert error == 0
        assert estimate.item() == pytest.approx(bound(objective, model, context, continuation), abs=1e-9)


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize(("objective", "K"), [("mdlm", None), ("bd3lm", 4)])
def test_draws_are_unbiased_for_the_bound(objective, K, right_shift):
    model = tiny(objective=objective, block_length=K, right_shift=right_shift)
    context, continuation = tokens(6), tokens(6, 1)
    exact = bound(objective, model, context, continuation)
    runs = [log_likelihood(model, [context], [continuation], draws=8, generator=rng(seed)) for seed in range(200)]
    estimate, error = (torch.cat(part) for part in zip(*runs))
    assert (error > 0).float().mean() > 0.98
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / math.sqrt(len(estimate))


@pytest.mark.parametrize(("m", "draws", "sets"), [(5, 7, 3), (4, 9, 4), (7, 4, 2)])
def test_drawn_subsets_are_as_many_as_asked_and_weigh_as_those_enumerated_set_by_set(m, draws, sets):
    """Of each set: that the mean of its sums is the bound, and that it masks all places equally often, or once more; of
    two: that they tell nothing of each other."""
    runs, weights, random = 3000, {}, np.random.default_rng(0)
    of_size = random.normal(size=m + 1)
    f = random.normal(size=2**m) + 2 * of_size[[code.bit_count() for code in range(2**m)]]
    sums = np.zeros((runs, sets))
    for seed in range(runs):
        drawn = list(likelihood._subsets(m, draws, sets, np.random.default_rng(seed)))
        assert len(drawn) == draws
        often = np.zeros((sets, m), dtype=int)
        np.add.at(often, [which for *_, which in drawn], [masked for masked, *_ in drawn])
        assert (np.ptp(often, axis=1) <= 1).all()
        for masked, weight, which in drawn:
            code = int(masked @ 2 ** np.arange(m))
            weights[code] = weights.get(code, 0) + weight / sets / runs
            sums[seed, which] += weight * f[code]
    for masked, weight, _ in likelihood._subsets(m, 2**m, 1, np.random.default_rng(0)):
        hits = runs * draws / m / math.comb(m, int(masked.sum()))
        assert weights[int(masked @ 2 ** np.arange(m))] == pytest.approx(weight, rel=5 / math.sqrt(hits))
    assert abs(np.corrcoef(sums.T) - np.eye(sets)).max() < 4.5 / math.sqrt(runs)


@pytest.mark.parametrize(("objective", "K"), [("mdlm", None), ("bd3lm", 2)])
def test_the_standard_error_is_that_of_the_mean_over_sets(objective, K, monkeypatch):
    model = tiny(objective=objective, block_length=K)
    context, continuation = tokens(4), tokens(2, 1)
    values = []
    for hole in (0, 1):  # the one draw of a set masks this token, and is weighed thrice
        noised = [MASK if i == 4 + hole else token for i, token in enumerate([*context, *continuation])]
        log_p = log_probs(model, noised, Layout.of(torch.arange(6)[None], None, K))
        values.append(3 * log_p[4 + hole, continuation[hole]].item())
    subsets = [(np.array([True, False]), 3.0, 0), (np.array([False, True]), 3.0, 1)]
    monkeypatch.setattr(likelihood, "_subsets", lambda m, draws, sets, noise: subsets)
    estimate, error = log_likelihood(model, [context], [continuation], draws=4)
    assert estimate.item() == pytest.approx(sum(values) / 2)
    assert error.item() == pytest.approx(abs(values[0] - values[1]) / 2)  # of two numbers: half their distance


def test_noise_is_of_the_context_and_the_block_and_shared_by_the_answers_to_a_question(monkeypatch):
    drawn, subsets = [], likelihood._subsets

    def record(m, draws, sets, noise):
        found = list(subsets(m, draws, sets, noise))
        drawn.append(str(found))
        return found

    monkeypatch.setattr(likelihood, "_subsets", record)
    question, other = tokens(8), tokens(8, 1)
    answers = [tokens(16, seed) for seed in (2, 3, 4)]
    model = tiny(objective="bd3lm", block_length=8)
    log_likelihood(model, [question, question, other], answers, draws=6, generator=rng())
    (a, b), (c, d), (e, f) = zip(drawn[::2], drawn[1::2])  # the two blocks of each
    assert (a, b) == (c, d) and len({a, b, e, f}) == 4


@pytest.mark.parametrize(("objective", "K"), [("ar", None), ("mdlm", None), ("bd3lm", 2), ("bd3lm", 3)])
def test_probabilities_of_all_answers_sum_to_at_most_one(objective, K):
    V = 5
    model = tiny(vocab_size=V, mask_token_id=V - 1, objective=objective, block_length=K)
    context = [0, 1, 2, 3, 1]
    answers = [list(answer) for answer in itertools.product(range(V), repeat=3)]
    estimate, _ = log_likelihood(model, [context] * len(answers), answers, draws=7, generator=rng())
    total = estimate.exp().sum().item()
    assert 0 < total <= 1 + 1e-9
    if objective == "ar":
        assert total == pytest.approx(1)
    one, _ = log_likelihood(model, [context] * V, [[token] for token in range(V)], draws=2)
    assert one.exp().sum().item() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# AR


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_ar_is_the_sum_of_next_token_log_probabilities(family):
    model = tiny(family, objective="ar", right_shift=True)
    context, continuation = tokens(5), tokens(4, 1)
    sequence = [*context, *continuation]
    log_p = log_probs(model, sequence, Layout.of(torch.arange(9)[None], None, 1))
    exact = sum(log_p[i - 1, sequence[i]].item() for i in range(5, 9))
    estimate, error, verdict = log_likelihood(model, [context], [continuation], check_greedy=True)
    assert error == 0 and not verdict
    assert estimate.item() == pytest.approx(exact, abs=1e-10)
    greedy = list(context)
    for _ in range(4):
        greedy.append(log_probs(model, greedy, Layout.of(torch.arange(len(greedy))[None], None, 1))[-1].argmax().item())
    assert is_greedy(model, [context] * 2, [greedy[5:], continuation]).tolist() == [True, False]


def test_greedy_verdicts_stop_where_all_have_failed(monkeypatch):
    model = tiny(objective="mdlm")
    shapes = counted(model, monkeypatch)
    *_, last = likelihood.denoise(model, [[1, 2]], max_new_tokens=9, steps_per_block=9)
    greedy = last.tokens[0, 2:].tolist()
    for change, forwards in ((0, 9), (1, 1)):  # of every token, so of the first that settles
        shapes.clear()
        wrong = [(token + change) % MASK for token in greedy]
        assert is_greedy(model, [[1, 2]], [wrong]).item() == (change == 0)
        assert len(shapes) == forwards


def test_bd3lm_with_right_shift_and_block_length_1_is_ar_exactly():
    ar, blocks = tiny(objective="ar"), tiny(objective="bd3lm", block_length=1, right_shift=True)
    contexts = [tokens(6), tokens(6), tokens(3, 2), tokens(1, 3)]
    continuations = [tokens(4, 5), tokens(2, 6), tokens(7, 7), tokens(1, 8)]
    a, _ = log_likelihood(ar, contexts, continuations)
    b, error = log_likelihood(blocks, contexts, continuations)
    assert torch.equal(a, b) and not error.any()


# ---------------------------------------------------------------------------------------------------------------------
# What must not change a number, and what it costs


CASES = [("ar", None, True), ("mdlm", None, False), ("mdlm", None, True), ("bd3lm", 4, False), ("bd3lm", 4, True)]


@pytest.mark.parametrize("context", [None, "causal"])
@pytest.mark.parametrize(("objective", "K", "right_shift"), CASES)
def test_batched_is_single_whatever_the_forward_holds(objective, K, right_shift, context):
    model = tiny(objective=objective, block_length=K, right_shift=right_shift, context=context)
    question, other = tokens(9), tokens(3, 9)
    contexts = [question, question, other, question, tokens(1, 4), other]
    continuations = [tokens(6, 1), tokens(6, 2), tokens(5, 3), [7], tokens(11, 5), []]
    # the same tokens as one request has, of which more are context; that is another request's, too
    contexts = [[*question, *tokens(6, 1)[:4]], [*question, *tokens(6, 1)[:4]], *contexts]
    continuations = [tokens(6, 1)[4:], tokens(3, 6), *continuations]
    single = [log_likelihood(model, [a], [b], draws=6, generator=rng(3)) for a, b in zip(contexts, continuations)]
    single = [torch.cat(part) for part in zip(*single)]
    for forward_tokens in (1, 40, 8192):
        batched = log_likelihood(
            model, contexts, continuations, draws=6, generator=rng(3), forward_tokens=forward_tokens
        )
        for a, b in zip(batched, single):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert single[0][-1] == single[1][-1] == 0  # nothing to say is certain
    assert single[1][5] == 0 and (objective == "ar" or single[1][2] > 0)


@pytest.mark.parametrize("right_shift", [False, True])
def test_copies_that_need_several_forwards_give_what_one_gives(right_shift, monkeypatch):
    model = tiny(objective="bd3lm", block_length=8, right_shift=right_shift)
    contexts, continuations = [tokens(20), tokens(20), tokens(2)], [tokens(20, 1), tokens(19, 2), tokens(21)]
    one = log_likelihood(model, contexts, continuations, draws=40, generator=rng())
    monkeypatch.setattr("likelihood.COPIES", 24)
    shapes, seen = counted(model, monkeypatch), watched_masks(monkeypatch)
    many = log_likelihood(model, contexts, continuations, draws=40, generator=rng())
    assert len(shapes) > 10 and len(seen) == len(shapes) and all(seen)  # every query sees something, padding too
    for a, b in zip(many, one):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("objective", "rows"), [("ar", 4), ("mdlm", 4), ("bd3lm", 2)])
def test_a_forward_takes_as_many_rows_as_it_may_take_tokens_and_no_more(objective, rows, monkeypatch):
    """40 tokens a row, of ar 39; of bd3lm 32 of the past and three noisy copies of 8 at a time, of many."""
    monkeypatch.setattr("likelihood.COPIES", 24)
    model = tiny(objective=objective, block_length=8)
    shapes = counted(model, monkeypatch)
    contexts, continuations = ([tokens(20, seed + first) for seed in range(6)] for first in (0, 6))
    log_likelihood(model, contexts, continuations, draws=40, forward_tokens=160)
    assert max(B for B, _ in shapes) == rows and max(B * T for B, T in shapes) <= 160


def counted(model, monkeypatch) -> list[tuple[int, int]]:
    """The shapes of the forwards to come."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, *args, **kw: (shapes.append(tuple(x.shape)), forward(x, *args, **kw))[1]
    )
    return shapes


@pytest.mark.parametrize(("objective", "K", "right_shift"), CASES)
def test_one_token_answers_to_a_question_cost_one_sequence_in_one_forward(objective, K, right_shift, monkeypatch):
    model = tiny(objective=objective, block_length=K, right_shift=right_shift)
    shapes = counted(model, monkeypatch)
    _, error = log_likelihood(model, [tokens(9)] * 4, [[1], [2], [3], [4]])
    assert len(shapes) == 1 and shapes[0][0] == 1 and not error.any()


def test_bd3lm_encodes_the_complete_blocks_of_a_shared_context_once(monkeypatch):
    model = tiny(objective="bd3lm", block_length=4)
    shapes = counted(model, monkeypatch)
    log_likelihood(model, [tokens(41)] * 3, [tokens(9, seed) for seed in (1, 2, 3)], draws=4)
    (once, context), (rows, rest) = shapes
    assert (once, context) == (1, 40)
    assert rows == 3 and rest < 41 + 9 + 4 * 12


def test_no_forward_makes_logits_beyond_a_slice(monkeypatch):
    model = tiny(objective="mdlm")
    expected = log_likelihood(model, [tokens(4)], [tokens(5, 1)], draws=31)
    monkeypatch.setitem(diffusion.CHUNK, "cpu", 5)
    monkeypatch.setattr("choose.SLICE", 10)
    seen, slices = [], choose.vocabulary_slices

    def record(hidden, weight):
        for start, scores in slices(hidden, weight):
            seen.append(scores[0].shape)
            yield start, scores

    monkeypatch.setattr("likelihood.vocabulary_slices", record)
    torch.testing.assert_close(log_likelihood(model, [tokens(4)], [tokens(5, 1)], draws=31), expected)
    assert max(rows for rows, _ in seen) == 5 and max(rows * v for rows, v in seen) == 10
    assert sum(rows * v for rows, v in seen) == 80 * model.config.vocab_size


def test_empty_context_is_scored_where_the_first_token_has_a_predictor():
    estimate, error = log_likelihood(tiny(objective="mdlm"), [[]], [tokens(4)], draws=15)
    assert error == 0 and estimate.item() == pytest.approx(bound("mdlm", tiny(objective="mdlm"), [], tokens(4)))
    blocks = tiny(objective="bd3lm", block_length=2)
    estimate, _ = log_likelihood(blocks, [[]], [tokens(4)], draws=15)
    assert estimate.item() == pytest.approx(bound("bd3lm", blocks, [], tokens(4)))
    with pytest.raises(ValueError, match="BOS"):
        log_likelihood(tiny(objective="ar"), [[]], [tokens(4)])


@pytest.mark.parametrize("objective, K", [("ar", None), ("mdlm", None), ("bd3lm", 2)])
def test_a_model_that_casts_its_weights_scores_as_one_that_stores_them_so(objective, K):
    stored, cast = (tiny(dtype=torch.bfloat16, objective=objective, block_length=K) for _ in range(2))
    cast.float().compute_dtype = torch.bfloat16
    pairs = [tokens(5)] * 2, [tokens(4), tokens(3)]
    assert torch.equal(log_likelihood(cast, *pairs, draws=15)[0], log_likelihood(stored, *pairs, draws=15)[0])


def test_mistakes_are_named():
    model = tiny(objective="mdlm", max_position_embeddings=8)
    with pytest.raises(ValueError, match="9 tokens exceed the model's 8"):
        log_likelihood(model, [tokens(5)], [tokens(4)])
    ar = tiny(objective="ar", max_position_embeddings=8)  # which is not fed the last token
    assert log_likelihood(ar, [tokens(5)], [tokens(4)])[0] < 0
    with pytest.raises(ValueError, match="10 tokens exceed the model's 9"):
        log_likelihood(ar, [tokens(5)], [tokens(5)])
    with pytest.raises(ValueError, match="draws 1"):
        log_likelihood(model, [tokens(3)], [tokens(4)], draws=1)
    with pytest.raises(ValueError, match="mask_token_id"):
        log_likelihood(tiny(objective="mdlm", mask_token_id=None), [tokens(3)], [tokens(4)])
    with pytest.raises(ValueError, match="block length"):
        log_likelihood(tiny(objective="bd3lm"), [tokens(3)], [tokens(4)])

"""Causal context: one model that is ar and bd3lm. The AR loss beside the masked one, growing blocks, speculation."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import MASK, VOCAB, positions, random_tokens, tiny, watched_masks

import choose
import convert
import diffusion
import loaders
import sample
import train
from checkpoint import declare, load_config, load_model, save_model
from choose import uniform_at
from data import Reading, load
from diffusion import (
    NOISE_TYPES,
    NORMS,
    Batch,
    Noise,
    Noising,
    Speculation,
    ar_example,
    bd3lm_example,
    denoise,
    draw_noise,
    losses,
    training_example,
)
from likelihood import EVALUATION_SEED, evaluate, log_likelihood
from model import Config, Layout
from options import flags, growth
from parallel import Ranks
from tokenizer import Tokenizer

EXACT = {"rtol": 1e-11, "atol": 1e-11}
SHIFTS = pytest.mark.parametrize("right_shift", (False, True))


def model_of(seed: int = 0, **changes):
    """A tiny random model that declares causal context, in float64."""
    return tiny(seed=seed, **{"objective": "bd3lm", "block_length": 4, "context": "causal"} | changes)


def as_ar(model):
    """The same weights as an ar model, which has no mask to write either."""
    ar = tiny(objective="ar")
    ar.load_state_dict(model.state_dict())
    return ar


def batch_of(B: int = 5, T: int = 13, seed: int = 0) -> Batch:
    """Prompts without loss, answers, a last block that is filled, right padding, and one row of two documents."""
    column, generator = positions(B, T), torch.Generator().manual_seed(seed)
    length = torch.randint(6, T + 1, (B, 1), generator=generator)
    supervised = (column >= torch.randint(0, 5, (B, 1), generator=generator)) & (column < length)
    document, position = torch.where(column < length, 0, -1), column.clone()
    document[0], position[0], supervised[0] = (column[0] >= 7).long(), column[0] - 7 * (column[0] >= 7), True
    fill = supervised & (column >= length - 2)
    return Batch(random_tokens(B, T, seed=seed), supervised, document, position, torch.arange(B), fill=fill)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@SHIFTS
@pytest.mark.parametrize("K", (1, 3, 4))
def test_the_clean_stream_is_the_causal_model(K, right_shift):
    model, batch = model_of(), batch_of()
    noise = draw_noise(batch, block_length=K)
    example = bd3lm_example(batch, noise, mask_id=MASK, block_length=K, right_shift=right_shift, causal=True)
    both = model(example.tokens, example.layout)
    T = batch.tokens.shape[1]
    alone = as_ar(model)(batch.tokens, Layout.of(batch.position, batch.document, 1))
    torch.testing.assert_close(both[:, -T:][batch.document >= 0], alone[batch.document >= 0], **EXACT)


@SHIFTS
def test_the_noisy_stream_is_each_block_by_itself_after_its_causal_past(right_shift):
    """The slow form: of every block of every row, a forward over the clean tokens before it and its noisy ones."""
    model, K = model_of(), 4
    batch = batch_of()
    noise = draw_noise(batch, block_length=K, seed=3)
    example = bd3lm_example(
        batch, noise, mask_id=MASK, block_length=K, right_shift=right_shift, weight_type="uniform", causal=True
    )
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.tokens)):
        for document in {*batch.document[row].tolist()} - {-1}:
            tokens = batch.tokens[row, batch.document[row] == document]
            masked = noise.masked[row, batch.document[row] == document]
            for start in range(0, len(tokens), K):
                stop = min(start + K, len(tokens))
                position = positions(1, stop)
                current = position >= start
                layout = Layout(position, 0 * position, torch.where(current, start, position), current.long())
                noised = torch.where(current[0] & masked[:stop], MASK, tokens[:stop])
                log_p = model(noised[None], layout)[0].log_softmax(dim=1)
                for i in range(max(start, int(right_shift)), stop):
                    if masked[i]:
                        total -= log_p[i - right_shift, tokens[i]]
    torch.testing.assert_close(losses(model, example)[0], total, **EXACT)


@SHIFTS
def test_the_ar_loss_beside_is_that_of_the_ar_model_times_its_weight_without_what_fills_a_block(right_shift):
    model, batch = model_of(), batch_of()
    noise = draw_noise(batch, block_length=4)
    how = {"mask_id": MASK, "block_length": 4, "right_shift": right_shift, "causal": True}
    alone = losses(model, bd3lm_example(batch, noise, **how))
    assert alone[0] > 0 and alone[1] == 0
    total, beside = losses(model, bd3lm_example(batch, noise, ar_weight=0.25, **how))
    own = ar_example(batch._replace(supervised=batch.supervised & ~batch.fill, fill=None))
    expected = losses(as_ar(model), own)[0]
    assert expected > 0
    torch.testing.assert_close(beside, 0.25 * expected, **EXACT)
    torch.testing.assert_close(total, alone[0] + beside, **EXACT)


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_ar_loss_is_normed_as_the_one_it_is_beside(norm_type):
    model, batch = model_of(), batch_of()._replace(fill=None)
    noise, how = draw_noise(batch, block_length=4), {"mask_id": MASK, "block_length": 4, "causal": True}
    beside = losses(model, bd3lm_example(batch, noise, ar_weight=1.0, norm_type=norm_type, **how))[1]
    torch.testing.assert_close(beside, losses(as_ar(model), ar_example(batch, norm_type=norm_type))[0], **EXACT)


def test_the_gradient_is_that_of_both_losses():
    model, batch = model_of(), batch_of()
    noise = draw_noise(batch, block_length=4)
    how = {"mask_id": MASK, "block_length": 4, "causal": True, "right_shift": True}
    parameters = list(model.parameters())

    def gradient(total):
        return torch.autograd.grad(total, parameters)

    found = gradient(losses(model, bd3lm_example(batch, noise, ar_weight=0.5, **how))[0])
    masked = gradient(losses(model, bd3lm_example(batch, noise, **how))[0])
    own = ar_example(batch._replace(supervised=batch.supervised & ~batch.fill))
    ar = gradient(losses(model, own)[0])
    for both, one, other in zip(found, masked, ar):
        torch.testing.assert_close(both, one + 0.5 * other, **EXACT)


def test_blocks_of_one_with_right_shift_and_everything_masked_are_ar():
    model, batch = model_of(block_length=1), batch_of()
    batch = batch._replace(fill=None)
    noise = draw_noise(batch, Noising(noise_type="all"), block_length=1)
    assert torch.equal(noise.masked, batch.supervised)
    example = bd3lm_example(
        batch, noise, mask_id=MASK, block_length=1, right_shift=True, weight_type="uniform", causal=True
    )
    torch.testing.assert_close(losses(model, example)[0], losses(as_ar(model), ar_example(batch))[0], **EXACT)


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_an_example_of_shorter_blocks_is_that_of_a_checkpoint_that_declares_them(noise_type):
    batch, noising = batch_of(), Noising(noise_type=noise_type)
    how = {"seed": 0, "ar_weight": 0.5}
    found = training_example(batch, config_of(block_length=4), noising, block_length=2, **how)
    expected = training_example(batch, config_of(block_length=2), noising, **how)
    torch.testing.assert_close(found.layout[:4], expected.layout[:4])
    torch.testing.assert_close(found[2:] + found[:1], expected[2:] + expected[:1])


def test_block_and_causal_context_differ():
    model, batch = model_of(), batch_of()
    noise = draw_noise(batch, block_length=4)
    how = {"mask_id": MASK, "block_length": 4}
    causal, block = (losses(model, bd3lm_example(batch, noise, causal=c, **how))[0] for c in (True, False))
    assert abs(causal - block) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Where to mask


def many(noising: Noising, m: int = 4, draws: int = 4000) -> Noise:
    """The noise of many rows of a single block of m supervised tokens, after two that are not."""
    T = m + 2
    supervised = torch.arange(T).expand(draws, T) >= 2
    zeros = torch.zeros(draws, T, dtype=torch.int64)
    return draw_noise(Batch(zeros, supervised, zeros, positions(draws, T), torch.arange(draws)), noising)


def test_all_masks_everything_that_is_learnt_and_weighs_it_one():
    noising = Noising(noise_type="all")
    noise = many(noising)
    assert noise.masked[:, 2:].all() and not noise.masked[:, :2].any() and (noise.level == 1).all()
    assert noising.loss_weight_type == "uniform"


def test_decay_masks_as_many_as_count_and_later_places_by_their_weights():
    H, m = 0.5, 4
    decay, count = (many(noising, m) for noising in (Noising(mask_decay=H), Noising(noise_type="count")))
    assert torch.equal(decay.level, count.level)
    assert torch.equal(decay.masked.sum(dim=1), count.masked.sum(dim=1))

    # One of four: place i with probability 2^((1 - 1/4) i / (H m)) over their sum.
    one = decay.masked[decay.masked.sum(dim=1) == 1][:, 2:].double()
    weights = 2.0 ** (0.75 * torch.arange(m) / (H * m))
    share, expected = one.mean(dim=0), weights / weights.sum()
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / len(one)).sqrt()).all()
    uniform = count.masked[count.masked.sum(dim=1) == 1][:, 2:].double().mean(dim=0)
    assert (uniform - 0.25).abs().max() < 4 * (0.1875 / len(one)) ** 0.5


def test_a_long_half_life_is_the_same_as_count():
    decay, count = (many(noising) for noising in (Noising(mask_decay=1e9), Noising(noise_type="count")))
    assert torch.equal(decay.masked, count.masked)


def test_decay_by_default_is_what_its_manual_says():
    noising, manual = Noising(noise_type="decay"), flags(Noising)
    assert f"default: {noising.mask_decay})" in manual["mask_decay"].help
    assert f"decay: {noising.loss_weight_type}," in manual["loss_weight_type"].help


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_decay": 0.5, "noise_type": "count"}, "mask_decay 0.5 is of --noise_type decay"),
        ({"mask_decay": 0.0}, "above 0"),
        ({"noise_type": "all", "loss_weight_type": "scheduler"}, "does not go with --noise_type all"),
        ({"noise_type": "decay", "complementary_masks": True}, "--complementary_masks needs"),
    ],
    ids=str,
)
def test_noise_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Noising(**options)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint is


def test_the_context_is_written_and_read(tmp_path):
    model = model_of()
    save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["context"] == "causal"
    assert load_config(tmp_path / "model").causal


def config_of(**changes) -> Config:
    return Config(**{"mask_token_id": 5, "objective": "bd3lm", "block_length": 8, "context": "causal"} | changes)


def test_a_causal_checkpoint_is_ar_too_and_of_any_block_length():
    ar = declare(config_of(right_shift=False), objective="ar")
    assert (ar.objective, ar.context, ar.right_shift, ar.mask_token_id, ar.shift) == ("ar", "causal", False, 5, 1)
    other = declare(config_of(right_shift=True), block_length=4)
    assert (other.objective, other.block_length, other.context) == ("bd3lm", 4, "causal")


def test_context_is_that_of_blocks_where_nothing_says_otherwise():
    undeclared = config_of(objective=None, block_length=None, context=None)
    assert declare(undeclared, objective="bd3lm", block_length=4).context == "block"
    assert declare(config_of(context=None)).context == "block"


@pytest.mark.parametrize(
    ("declared", "given", "message"),
    [
        ({"context": None}, {"objective": "ar"}, "--objective ar contradicts the checkpoint"),
        ({"context": "block"}, {"block_length": 4}, "--block_size 4 contradicts the checkpoint"),
        ({"context": None}, {"context": "causal"}, "--context causal contradicts the checkpoint, .* context block"),
        ({}, {"context": "block"}, "--context block contradicts the checkpoint"),
        ({}, {"objective": "mdlm"}, "--objective mdlm contradicts the checkpoint"),
        (
            {"objective": "mdlm", "block_length": None, "context": None},
            {"context": "causal"},
            "only bd3lm has a context",
        ),
    ],
    ids=str,
)
def test_what_contradicts_a_declared_context_is_refused(declared, given, message):
    with pytest.raises(ValueError, match=message):
        declare(config_of(**declared), **given)


@SHIFTS
def test_its_likelihood_as_ar_is_the_ar_models(right_shift):
    model = model_of(right_shift=right_shift)
    contexts, answers = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10, 11]]
    expected, _ = log_likelihood(as_ar(model), contexts, answers)
    declare(model.config, objective="ar")
    found, error = log_likelihood(model, contexts, answers)
    torch.testing.assert_close(found, expected, **EXACT)
    assert not error.any()


class Rows(list):
    @property
    def lengths(self) -> list[int]:
        return [len(row["tokens"]) for row in self]


@SHIFTS
def test_an_evaluation_gives_the_bound_and_the_ar_models_nats_each_over_its_own_tokens(right_shift):
    """Of rows whose first token is learnt, too, and whose last block is filled."""
    model = model_of(right_shift=right_shift)
    rows = Rows({"tokens": random_tokens(n, seed=n).numpy(), "supervised": np.ones(n, bool)} for n in (5, 9, 14))
    collate = functools.partial(loaders.collate, pad_id=0)
    filling = functools.partial(collate, block_length=4, eos_id=7)
    how = {"batch_size": 3, "ranks": Ranks(0, 1, torch.device("cpu"))}
    bound, ar = evaluate(model, model, rows, filling, **how)

    batch = Batch(**filling(rows), sample=torch.arange(3))
    total = losses(model, training_example(batch, model.config, Noising(noise_type="count"), seed=EVALUATION_SEED))[0]
    assert bound == pytest.approx(total.item() / (28 - 3 * right_shift), rel=1e-9)
    answers = [row["tokens"].tolist() for row in rows]
    exact, _ = log_likelihood(as_ar(model), [row[:1] for row in answers], [row[1:] for row in answers])
    assert ar == pytest.approx(-exact.sum().item() / 25, rel=1e-9)
    declare(model.config, objective="ar")
    assert evaluate(model, model, rows, collate, **how) == (pytest.approx(ar), None)


# ---------------------------------------------------------------------------------------------------------------------
# Speculation

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (6, 1, 9, 4)]


@pytest.fixture(autouse=True)
def few_end_tokens(monkeypatch):
    """No test here may loop for ever."""
    steps = Speculation.steps
    monkeypatch.setattr(Speculation, "steps", lambda self: itertools.islice(steps(self), 300))


def last_of(steps):
    *_, step = steps
    return step


def written(step) -> list[list[int]]:
    """Each row's settled tokens."""
    return [row[~masked].tolist() for row, masked in zip(step.tokens, step.masked)]


@pytest.mark.parametrize("static", (False, True))
@SHIFTS
@pytest.mark.parametrize("N", range(1, 9))
def test_speculation_writes_what_ar_writes(N, right_shift, static):
    """Ragged batches with end tokens; 8 x 2 x 2 x 34 prompts."""
    for seed in range(8):
        model = model_of(seed, right_shift=right_shift)
        prompts = [random_tokens(1 + (7 * n + seed) % 11, seed=100 * seed + n).tolist() for n in range(4)]
        prompts += [prompts[0]] * (seed == 0) * 2
        ends = tuple(range(seed % 4))
        how = {"max_new_tokens": 5 + seed, "end_ids": ends}
        expected = last_of(denoise(as_ar(model), prompts, **how))
        found = last_of(denoise(model, prompts, speculate=N, static=static, **how))
        assert written(found) == written(expected)
        assert torch.equal(found.done, expected.done)
        torch.testing.assert_close(found.confidence, expected.confidence, **EXACT)
        assert found.forwards <= expected.forwards


def test_rows_of_a_ragged_batch_are_decoded_as_by_themselves():
    model = model_of(3)
    together = last_of(denoise(model, PROMPTS, max_new_tokens=9, speculate=3))
    for row, prompt in enumerate(PROMPTS):
        alone = last_of(denoise(model, [prompt], max_new_tokens=9, speculate=3))
        assert together.tokens[row, : len(prompt) + 9].tolist() == alone.tokens[0].tolist()


def test_a_draft_is_no_longer_than_the_answer():
    model = model_of(3)
    long, fitting = ({"max_new_tokens": 9, "speculate": N} for N in (10**6, 9))
    assert a_batch(model, **long).cache.pairs.shape == a_batch(model, **fitting).cache.pairs.shape
    assert written(last_of(denoise(model, PROMPTS, **long))) == written(last_of(denoise(model, PROMPTS, **fitting)))


class Drafting(Speculation):
    """Speculation whose drafts come from elsewhere."""

    truth: list[list[int]]  # what ar writes, prompt included
    source: str

    def settle(self, verdict, probability, drafts):
        if self.source == "random":
            drafts = torch.randint(0, VOCAB, drafts.shape)
        elif self.source == "constant":
            drafts = torch.full_like(drafts, 7)
        else:
            B, copies, ahead = drafts.shape
            place = self.known[:, None, None] + torch.arange(copies)[:, None] + 1 + torch.arange(ahead)
            truth = torch.tensor([row + [0] * 60 for row in self.truth])
            drafts = truth.gather(1, place.view(B, -1)).view(drafts.shape)
            drafts = (drafts + 1) % VOCAB if self.source == "adversary" else drafts
        super().settle(verdict, probability, drafts)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("source", ("random", "constant", "adversary", "oracle"))
def test_whatever_drafts_it_changes_the_number_of_forwards_and_nothing_else(source, temperature, monkeypatch):
    model, N, new = model_of(1), 4, 13
    how = {"max_new_tokens": new, "speculate": N, "temperature": temperature}
    expected = last_of(denoise(model, PROMPTS, generator=torch.Generator().manual_seed(0), **how))
    monkeypatch.setattr(Drafting, "truth", written(expected), raising=False)
    monkeypatch.setattr(Drafting, "source", source, raising=False)
    monkeypatch.setattr(diffusion, "Speculation", Drafting)
    found = last_of(denoise(model, PROMPTS, generator=torch.Generator().manual_seed(0), **how))
    assert written(found) == written(expected)
    if source == "adversary":
        assert found.forwards == new
    if source == "oracle":  # one from the prompt, then N at each
        assert found.forwards == 1 + math.ceil((new - 1) / N)


def a_batch(model, end_ids=(), seed: int = 0, **options) -> Speculation:
    """`PROMPTS`, whose keys a test may then read."""
    generator = torch.Generator().manual_seed(seed)
    return Speculation(model, PROMPTS, diffusion.Sampling(**options), None, end_ids, None, generator, False)


def slow_ar(model, prompt, new: int, noise, temperature: float, top_k=None, top_p=None) -> list[int]:
    """ar at a temperature, a whole forward a token, with noise(position) -> (V,) for the token at a position."""
    tokens = list(prompt)
    for _ in range(new):
        logits = model(torch.tensor([tokens]), Layout.of(positions(1, len(tokens)), None, 1))[0, -1:]
        logits[:, MASK] = -math.inf
        if top_k or top_p:
            logits = choose.restrict(logits / temperature, top_k, top_p) * temperature
        tokens.append(int(choose.gumbel(logits, temperature, noise(len(tokens))[None]).argmax()))
    return tokens


@pytest.mark.parametrize("options", ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 6, "top_p": 0.8}), ids=str)
@pytest.mark.parametrize("N", (1, 2, 3, 5, 8))
def test_at_a_temperature_it_writes_what_ar_draws_with_the_noise_of_each_place(N, options):
    model = model_of(2)
    for seed in range(6):
        batch = a_batch(model, seed=seed, max_new_tokens=8, speculate=N, temperature=0.9, **options)
        for _ in batch.steps():
            pass
        for row, prompt in enumerate(PROMPTS):
            key = batch.key[row : row + 1]
            noise = lambda place: uniform_at(key, torch.tensor([place]), 0, (1, VOCAB), None)[0]  # noqa: B023, E731
            expected = slow_ar(model, prompt, 8, noise, 0.9, **options)
            assert batch.tokens[row, : len(prompt) + 8].tolist() == expected


@pytest.mark.parametrize("options", ({}, {"top_k": 2}, {"top_p": 0.6}), ids=str)
def test_the_distribution_of_what_it_writes_is_ars_by_enumeration(options, monkeypatch):
    """The noise of a place is one of F vectors: over all F^T equally likely choices the outcomes of speculation and of
    ar are counted, and are the same to the last count. With F vectors for which the share of each token is its
    probability (next test), that is ar's distribution."""
    F, T, new = 4, 3, 3
    model = tiny(vocab_size=5, mask_token_id=4, objective="bd3lm", block_length=4, context="causal", seed=4)
    vectors = torch.rand(F, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(1e-9, 1)
    ours, theirs = {}, {}
    for choice in itertools.product(range(F), repeat=T):
        monkeypatch.setattr(
            choose,
            "uniform_at",
            lambda key, place, start, shape, device: vectors[[choice[p - 1] if p <= T else 0 for p in place.tolist()]],  # noqa: B023
        )
        found = tuple(
            last_of(denoise(model, [[1]], max_new_tokens=new, speculate=3, temperature=1.0, **options))
            .tokens[0]
            .tolist()
        )
        tokens = [1]
        for p in range(1, T + 1):
            logits = model(torch.tensor([tokens]), Layout.of(positions(1, len(tokens)), None, 1))[0, -1:]
            logits[:, 4] = -math.inf
            logits = choose.restrict(logits, options.get("top_k"), options.get("top_p"))
            tokens.append(int(choose.gumbel(logits, 1.0, vectors[choice[p - 1]][None]).argmax()))
        ours[found] = ours.get(found, 0) + 1
        theirs[tuple(tokens)] = theirs.get(tuple(tokens), 0) + 1
    assert ours == theirs and len(ours) > 3


def test_the_noise_of_a_place_is_uniform_and_independent_and_the_same_whoever_asks():
    key, place = torch.tensor([123456789]), torch.tensor([7])
    u = uniform_at(key.expand(400), torch.arange(400), 0, (400, 250), None)
    assert 0 < u.min() and u.max() < 1
    n = u.numel()
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    for other in (
        uniform_at(key.expand(400) + 1, torch.arange(400), 0, (400, 250), None),
        u.roll(1, 0),
        u.roll(1, 1),
    ):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 4 / math.sqrt(n)
    cut = uniform_at(key, place, 100, (1, 50), None)
    assert torch.equal(cut, uniform_at(key, place, 0, (1, 250), None)[:, 100:150])
    assert torch.equal(cut[0], u[7, 100:150])


def test_the_noise_of_a_place_is_that_of_splitmix64_written_plainly():
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    step = 0x9E3779B97F4A7C15
    for key, place in itertools.product((0, 123456789, 2**62 - 1), (0, 7, 4095)):
        found = uniform_at(torch.tensor([key]), torch.tensor([place]), 100, (1, 50), None)[0]
        row = mix((key + place * step) % 2**64)
        assert found.tolist() == [((mix((row + (t + 1) * step) % 2**64) >> 11) + 0.5) / 2**53 for t in range(100, 150)]


def test_with_that_noise_a_token_is_drawn_with_its_probability():
    """Exact probabilities against 200,000 places."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    u = uniform_at(torch.tensor([5]).expand(200_000), torch.arange(200_000), 0, (200_000, 5), None)
    for T in (1.0, 0.5):
        share = choose.gumbel(logits.expand(200_000, 5), T, u).argmax(dim=1).bincount(minlength=5) / 200_000
        p = (logits / T).softmax(dim=0)
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 200_000).sqrt()).all()


@pytest.mark.parametrize("temperature", (0.0, 0.9))
@SHIFTS
def test_it_takes_the_drafts_of_the_copy_for_as_many_as_were_right(right_shift, temperature):
    """Each copy's draft is what a forward of its own would give: the settled text, then N masks; at a temperature with
    the noise of each place, which the verdict on it will have."""
    model, N, new, drafted = model_of(6, right_shift=right_shift), 4, 14, 0
    batch = a_batch(model, end_ids=(3, 4), max_new_tokens=new, speculate=N, temperature=temperature)
    before = batch.now(0)
    for _ in batch.steps():
        step = batch.now(0)
        # A draft was made when all but the last settled token was known, for no more tokens than some row had room.
        masks = min(N, int(before.masked[~before.done].sum(dim=1).max()))
        for row in (~step.done).nonzero()[:, 0].tolist():
            end = len(PROMPTS[row]) + new
            known = end - int(step.masked[row].sum())
            tokens = torch.cat([step.tokens[row, : known - 1], torch.full((masks,), MASK)])[None]
            position = positions(1, known - 1 + masks)
            noisy = position >= known - 1
            layout = Layout(position, 0 * position, torch.where(noisy, known - 1, position), noisy.long())
            logits = model(tokens, layout)[0]
            logits[:, MASK] = -math.inf
            for place in range(known, min(known - 1 + masks, end)):
                at = batch.key[row : row + 1], torch.tensor([place]), temperature, 0
                assert step.draft[row, place]
                assert step.tokens[row, place] == choose.noised_at(*at, logits[None, place - right_shift]).argmax()
                drafted += 1
        before = step
    assert drafted > 60


def test_drafts_are_masked_and_nothing_else_is_a_draft():
    model = model_of(0)
    for step in denoise(model, PROMPTS, max_new_tokens=9, speculate=5, end_ids=(3, 4, 5)):
        assert not (step.draft & ~step.masked).any()
        assert (step.tokens[step.masked & ~step.draft] == MASK).all()
        assert not step.draft[step.done].any()


@pytest.mark.parametrize("static", (False, True))
def test_every_query_sees_something_be_it_padding_or_of_a_row_that_is_done(static, monkeypatch):
    seen, model = watched_masks(monkeypatch), model_of(0)
    last_of(denoise(model, PROMPTS, max_new_tokens=9, speculate=3, end_ids=(3, 4, 5), static=static))
    assert seen and all(seen)


def test_rows_have_noise_of_their_own():
    model = model_of(0)
    rows = written(last_of(denoise(model, PROMPTS[:1] * 4, max_new_tokens=9, speculate=3, temperature=1.0)))
    assert len({*map(tuple, rows)}) == 4


@pytest.mark.parametrize("N", (1, 2, 5))
def test_a_kept_cache_gives_what_a_fresh_one_gives(N):
    model = model_of(2)
    prefix = diffusion.Prefix()
    prompt = PROMPTS[0]
    for turn in range(4):
        how = {"max_new_tokens": 7, "speculate": N, "end_ids": (turn, 20)}
        kept = last_of(denoise(model, [prompt], prefix=prefix, **how))
        fresh = last_of(denoise(model, [prompt], **how))
        assert written(kept) == written(fresh)
        assert prefix.tokens == kept.tokens[0, : len(prefix.tokens)].tolist() and len(prefix.tokens) >= len(prompt)
        assert MASK not in prefix.tokens
        prompt = [*written(kept)[0], *random_tokens(3, seed=turn).tolist()]
    # Also where all of the prompt is in the cache, or another text was.
    for prompt in (prefix.tokens[:5], [*prefix.tokens[:4], 9, 9, 9]):
        kept = last_of(denoise(model, [prompt], prefix=prefix, max_new_tokens=7, speculate=N))
        assert written(kept) == written(last_of(denoise(model, [prompt], max_new_tokens=7, speculate=N)))


@pytest.mark.parametrize("static", (False, True))
@pytest.mark.parametrize("ends", (False, True))
def test_a_kept_cache_ends_with_the_answer_however_much_was_right_after_it(ends, static, monkeypatch):
    model, prompt, prefix = model_of(1), PROMPTS[0], diffusion.Prefix()
    how = {"max_new_tokens": 9, "speculate": 5, "static": static}
    truth = written(last_of(denoise(model, [prompt], **how)))
    monkeypatch.setattr(Drafting, "truth", truth, raising=False)
    monkeypatch.setattr(Drafting, "source", "oracle", raising=False)
    monkeypatch.setattr(diffusion, "Speculation", Drafting)
    end_ids = (truth[0][len(prompt) + 2],) if ends else ()
    (text,) = written(last_of(denoise(model, [prompt], prefix=prefix, end_ids=end_ids, **how)))
    assert prefix.tokens in (text, text[:-1])
    kept, fresh = (last_of(denoise(model, [[*text, 1, 2]], prefix=each, **how)) for each in (prefix, None))
    assert written(kept) == written(fresh)


def test_it_feeds_the_draft_and_a_copy_for_each_number_of_its_tokens(monkeypatch):
    model, widths = model_of(0), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, *a, **k: widths.append(tokens.shape[1]) or forward(tokens, *a, **k)
    )
    last_of(denoise(model, PROMPTS[:1], max_new_tokens=9, speculate=3))
    assert widths[0] == len(PROMPTS[0]) + 3 and {*widths[1:-2]} == {3 + 9}
    assert {*widths[-2:]} <= {3 + 9, 2 + 2 * 2, 1}  # no more than there is room for


def test_a_model_that_casts_its_weights_speculates_as_one_that_stores_them_so():
    stored, cast = (model_of(dtype=torch.bfloat16) for _ in range(2))
    cast.float().compute_dtype = torch.bfloat16
    texts = [written(last_of(denoise(model, PROMPTS, max_new_tokens=9, speculate=3))) for model in (stored, cast)]
    assert texts[0] == texts[1]


def test_a_seed_gives_one_text_whatever_the_draft_length():
    model, texts = model_of(5), []
    for N in (1, 2, 4, 8):
        how = {"max_new_tokens": 10, "temperature": 1.0, "speculate": N}
        texts.append(written(last_of(denoise(model, PROMPTS, generator=torch.Generator().manual_seed(3), **how))))
    assert all(text == texts[0] for text in texts)


def test_it_never_writes_the_mask_nor_what_is_suppressed():
    model = model_of(0)
    free = written(last_of(denoise(model, PROMPTS, max_new_tokens=8, speculate=4)))
    banned = tuple({row[-1] for row in free})
    how = {"max_new_tokens": 8, "speculate": 4, "suppress_tokens": banned}
    found = last_of(denoise(model, PROMPTS, **how))
    assert written(found) == written(last_of(denoise(as_ar(model), PROMPTS, max_new_tokens=8, suppress_tokens=banned)))
    answers = [row[len(prompt) :][:8] for row, prompt in zip(written(found), PROMPTS)]
    assert not {*banned, MASK} & {*itertools.chain(*answers)}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"context": None}, {}, "needs a checkpoint with causal context"),
        ({"context": "block"}, {}, "needs a checkpoint with causal context"),
        ({"objective": "ar", "context": None}, {}, "needs a checkpoint with causal context"),
        ({}, {"threshold": 0.9}, "without threshold"),
        ({}, {"entropy": 0.1}, "without entropy"),
        ({}, {"cfg_scale": 1.0}, "without cfg_scale"),
        ({}, {"block_size": 4}, "without block_size"),
        ({}, {"remasking": "p2"}, "without remasking"),
        ({}, {"speculate": 0}, "at least 1"),
        ({}, {"canvas_masks": [[False, True]]}, "leave it out to fill in masks"),
        ({}, {"prompts": [[]]}, "an empty prompt"),
    ],
    ids=str,
)
def test_what_speculation_cannot_do_is_refused(changes, options, message):
    model = model_of(**changes)
    prompts = options.pop("prompts", [[1, 2]])
    with pytest.raises(ValueError, match=message):
        last_of(denoise(model, prompts, **{"max_new_tokens": 4, "speculate": 4} | options))


def test_the_directory_opened_as_ar_speculates_too(tmp_path):
    model = model_of(right_shift=False)
    save_model(model, tmp_path / "model")
    ar = load_model(tmp_path / "model", dtype=torch.float64)
    declare(ar.config, objective="ar")
    expected = written(last_of(denoise(ar, PROMPTS, max_new_tokens=9)))
    assert written(last_of(denoise(ar, PROMPTS, max_new_tokens=9, speculate=4))) == expected
    assert expected == written(last_of(denoise(as_ar(model), PROMPTS, max_new_tokens=9)))


# ---------------------------------------------------------------------------------------------------------------------
# A run: growing blocks, both losses in the log, and back to ar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", [(8, 1.0)]),
        ("1,2,4,8", [(1, 0.25), (2, 0.5), (4, 0.75), (8, 1.0)]),
        ("1:0.1,4:0.9", [(1, 0.1), (4, 1.0)]),
    ],
)
def test_block_lengths_grow_by_parts_of_the_run(text, expected):
    assert growth(text) == expected


@pytest.mark.parametrize("text", ("0", "3,8", "1:0.5,2:0.2", "4,", "a", "1:x,2", "-1", ""))
def test_block_lengths_that_make_no_sense_are_refused(text, capsys):
    flags = ["--model_name_or_path", "builtin/tiny", "--output_dir", "x", "--dataset_args", "builtin/sums"]
    with pytest.raises(ValueError, match="block_size"):
        train.Settings.parse([*flags, "--stage", "sft", f"--block_size={text}"])


FLAGS = ["--model_name_or_path", "builtin/tiny", "--objective", "bd3lm", "--context", "causal"]
FLAGS += ["--right_shift_logits", "True", "--stage", "sft", "--max_length", "64", "--max_steps", "8"]
FLAGS += ["--dataset_args", "builtin/sums[train:64,validation:16,test:8]", "--per_device_train_batch_size", "4"]
FLAGS += ["--eval_steps", "4", "--save_steps", "4", "--logging_steps", "1"]


def run(output, *more):
    train.main([*FLAGS, "--output_dir", str(output), *more])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("causal") / "run"
    return output, run(output, "--block_size", "1:0.25,2:0.5,8:0.25")


def test_a_run_grows_its_blocks_and_declares_the_last(a_run, monkeypatch, tmp_path):
    output, _ = a_run
    config = load_config(output / "checkpoint-final")
    assert (config.objective, config.block_length, config.context) == ("bd3lm", 8, "causal")
    used, make = [], train.training_example
    monkeypatch.setattr(train, "training_example", lambda *a, **k: used.append(k["block_length"]) or make(*a, **k))
    run(tmp_path / "again", "--block_size", "1:0.25,2:0.5,8:0.25")
    assert used == [1, 1, 2, 2, 2, 2, 8, 8]


def test_a_resumed_run_grows_on_as_it_would_have(a_run, tmp_path):
    output, rows = a_run
    part = tmp_path / "part"
    steps = ["--block_size", "1:0.25,2:0.5,8:0.25", "--resume_from_checkpoint", str(output / "checkpoint-4")]
    again = run(part, *steps)

    def losses_of(rows):
        return {row["step"]: (row["loss"], row["ar_loss"]) for row in rows if "loss" in row and row["step"] > 4}

    assert losses_of(again) == losses_of(rows) and len(losses_of(rows)) == 4
    finals = [load_model(path / "checkpoint-final").state_dict() for path in (output, part)]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_both_losses_are_logged_and_evaluated_apart(a_run):
    output, rows = a_run
    model = load_model(output / "checkpoint-final", dtype=torch.float32)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8 and all(0 < row["ar_loss"] < 10 and row["loss"] != row["ar_loss"] for row in steps)
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    assert all(row["eval_ar_loss"] != row["eval_loss"] for row in evaluations)

    # The AR nats are those of the checkpoint as a plain ar model, over the same tokens.
    rows = load(
        "builtin/sums[validation:16]",
        "validation",
        Tokenizer(output / "checkpoint-final"),
        Reading(stage="sft", max_length=64),
    )
    total = count = 0
    for row in (rows[i] for i in range(len(rows))):
        tokens = torch.from_numpy(row["tokens"])[None].long()
        log_p = model(tokens, Layout.of(positions(1, tokens.shape[1]), None, 1))[0].log_softmax(dim=1)
        for i in range(1, tokens.shape[1]):
            if row["supervised"][i]:
                total, count = total - log_p[i - 1, tokens[0, i]].item(), count + 1
    assert evaluations[-1]["eval_ar_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_log_keeps_the_two_losses_apart_whatever_the_weight(a_run, tmp_path):
    """At the first step, before the weights part."""
    other = run(tmp_path / "run", "--block_size", "1:0.25,2:0.5,8:0.25", "--ar_weight", "2", "--max_steps", "1")
    first, again = (next(row for row in rows if "loss" in row) for rows in (a_run[1], other))
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert again["ar_loss"] == pytest.approx(first["ar_loss"], rel=1e-6)


def test_ar_weight_by_default_is_what_its_manual_says():
    weight = train.Settings.parse([*FLAGS, "--output_dir", "x"]).beside(config_of())
    assert f"default: {weight})" in flags(train.Settings)["ar_weight"].help


def test_ar_weight_is_for_causal_context(tmp_path, capsys):
    flags = [flag if flag != "causal" else "block" for flag in FLAGS]
    with pytest.raises(SystemExit):
        train.main([*flags, "--block_size", "4", "--output_dir", str(tmp_path / "x"), "--ar_weight", "0.3"])
    assert "only bd3lm with causal context has an AR loss" in capsys.readouterr().err


def test_convert_writes_it_as_a_plain_ar_model(a_run, tmp_path):
    output, _ = a_run
    convert.main(
        ["--model_name_or_path", str(output / "checkpoint-final"), "--output_dir", str(tmp_path / "ar"), "--to", "ar"]
    )
    config = load_config(tmp_path / "ar")
    assert (config.objective, config.context, config.mask_token_id) == ("ar", None, None)
    prompt = [[3, 4, 5]]
    expected = written(last_of(denoise(load_model(tmp_path / "ar"), prompt, max_new_tokens=6)))
    both = load_model(output / "checkpoint-final")
    assert written(last_of(denoise(both, prompt, max_new_tokens=6, speculate=4))) == expected


def test_converting_again_keeps_the_context(a_run, tmp_path):
    again = ["--output_dir", str(tmp_path / "again"), "--block_size", "4"]
    convert.main(["--model_name_or_path", str(a_run[0] / "checkpoint-final"), *again])
    config = load_config(tmp_path / "again")
    assert (config.objective, config.block_length, config.context) == ("bd3lm", 4, "causal")


def test_the_program_shows_drafts_and_answers_as_ar_does(a_run, capsys):
    output, _ = a_run
    final = str(output / "checkpoint-final")
    command = ["What is 1 + 2?", "Reverse the word ABC.", "--model_name_or_path", final, "--max_new_tokens", "12"]
    # So young a model would write an end token at once.
    command += ["--suppress_tokens", ",".join(map(str, Tokenizer(final).end_ids))]

    def said(*more):
        with pytest.raises(SystemExit) as end:
            sample.main([*command, *more])
        assert end.value.code == 0
        return capsys.readouterr().out.splitlines()

    ar, ours = said("--objective", "ar"), said("--speculate", "4")
    differing = [pair for pair in zip(ar, ours, strict=True) if pair[0] != pair[1]]
    assert len(differing) == 1 and all(line.startswith("24 tokens in ") for line in differing[0])
    shown = [line for line in said("--speculate", "3", "--show") if line.startswith("forward 8")]
    assert len(shown) == 2 and any("[" in line and "]" in line for line in shown)

"""Schedules, noise, the three objectives and their loss: the reference's outputs, and the laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import MASK, golden_arrays, golden_json, golden_model, positions, random_tokens, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
from choose import gumbel
from diffusion import (
    Batch,
    Noise,
    Noising,
    alpha,
    alpha_derivative,
    ar_example,
    bd3lm_example,
    draw_noise,
    loss,
    loss_weight,
    mdlm_example,
    reveal_schedule,
    reverse_mask_prob,
    with_complement,
)
from model import Layout

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-6, "atol": 1e-6}  # where weights are float32


def close(actual, expected, **tolerance):
    if isinstance(actual, float):
        actual = torch.tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **tolerance or EXACT)


def make_batch(B: int = 4, T: int = 12, *, supervised=None, document=None, position=None, seed=0, sample=None, epoch=0):
    return Batch(
        random_tokens(B, T, seed=seed),
        torch.ones(B, T, dtype=torch.bool) if supervised is None else supervised,
        torch.zeros(B, T, dtype=torch.int64) if document is None else document,
        positions(B, T) if position is None else position,
        torch.arange(B) if sample is None else sample,
        epoch,
    )


def ragged_batch(B: int = 6, T: int = 12, seed: int = 0) -> Batch:
    """Prompts without loss, and right padding."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(5, T + 1, (B, 1), generator=generator)
    prompt = torch.randint(0, 4, (B, 1), generator=generator)
    column = positions(B, T)
    return make_batch(
        B,
        T,
        supervised=(column >= prompt) & (column < length),
        document=torch.where(column < length, 0, -1),
        seed=seed,
    )


def rows(batch: Batch, at) -> Batch:
    return Batch(*(field[at] for field in batch[:5]), batch.epoch)


def gradients(model, total) -> dict[str, torch.Tensor]:
    """Gradients by name, zeros where none."""
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(model.named_parameters(), found)}


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
def test_schedules_equal_the_reference(scheduler):
    g = golden_json("schedule")[scheduler]
    t = torch.tensor(g["t"])
    close(alpha(t, scheduler), g["alpha"], rtol=0, atol=1e-7)
    close(alpha_derivative(t, scheduler), g["alpha_derivative"], rtol=0, atol=1e-6)
    close(loss_weight(t, "scheduler", scheduler), g["weight"], rtol=1e-4, atol=1e-6)
    s, t, value = torch.tensor(g["reverse_mask_prob"]).T
    close(reverse_mask_prob(s, t, scheduler), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
def test_reveal_schedules_equal_the_reference(scheduler):
    for case in golden_json("schedule")[scheduler]["num_transfer"]:
        ours = reveal_schedule(torch.tensor(case["masks"]), case["steps"], scheduler).tolist()
        tokens = [n for n in ours if n]
        assert ours == tokens + [0] * (case["steps"] - len(tokens))
        assert tokens == case["tokens"], case


def test_reveal_schedules_of_ragged_rows_equal_the_reference():
    g = golden_json("schedule")["ragged_rows"]
    width = len(g["tokens"][0])
    ours = reveal_schedule(torch.tensor(g["masks"]), g["steps"])
    assert ours[:, :width].tolist() == g["tokens"] and not ours[:, width:].any()


def test_a_stochastic_reveal_schedule_is_a_binomial_draw_at_each_step_however_many_there_are(rng):
    schedule = reveal_schedule(torch.full((40_000,), 3), 2, stochastic=True, generator=rng).tolist()
    for counts, probability in {(3, 0): 2 / 8, (1, 2): 3 / 8, (2, 1): 3 / 8}.items():  # three coins; none is left out
        assert abs(schedule.count([*counts]) / len(schedule) - probability) < 0.01
    many = reveal_schedule(torch.tensor([3, 0, 8]), 10**6, width=8, stochastic=True, generator=rng)
    assert many.tolist() == [[1] * 3 + [0] * 5, [0] * 8, [1] * 8]


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
@pytest.mark.parametrize("steps", (1, 3, 16, 40))
def test_a_reveal_schedule_sums_to_the_masks_and_ends_in_zeros(scheduler, steps, stochastic, rng):
    masks = torch.arange(60).view(5, 12)
    schedule = reveal_schedule(masks, steps, scheduler, stochastic=stochastic, generator=rng)
    assert schedule.shape == (5, 12, steps)
    assert torch.equal(schedule.sum(dim=-1), masks)
    assert (schedule >= 0).all() and not ((schedule[..., :-1] == 0) & (schedule[..., 1:] > 0)).any()


@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
def test_the_derivative_and_the_weight_follow_from_alpha(scheduler):
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha(t, scheduler).sum(), t)
    close(alpha_derivative(t.detach(), scheduler), slope)
    close(
        loss_weight(t.detach(), "scheduler", scheduler),
        (-slope / (1 - alpha(t, scheduler))).detach(),
        rtol=1e-4,
        atol=0,
    )


def test_unknown_names_are_refused_by_name():
    t, batch = torch.ones(1), make_batch(1, 2)
    for call in (
        lambda: alpha(t, "quadratic"),
        lambda: alpha_derivative(t, "quadratic"),
        lambda: loss_weight(t, "quadratic"),
        lambda: draw_noise(batch, Noising(noise_type="quadratic")),
        lambda: ar_example(batch, norm_type="quadratic"),
    ):
        with pytest.raises(ValueError, match=r"'quadratic' is unknown; expected"):
            call()


@pytest.mark.parametrize("temperature", (0.2, 0.7, 1.0, 1.6))
def test_gumbel_noise_is_the_logarithm_of_the_reference(temperature):
    g = golden_arrays("gumbel")
    noised = gumbel(g["logits"], temperature, g["uniform"])
    close(noised.exp(), g[f"noised_T{temperature}"], rtol=1e-9, atol=0)
    assert torch.equal(noised.argmax(dim=-1), g[f"argmax_T{temperature}"])
    assert gumbel(g["logits"], 0.0, g["uniform"]) is g["logits"]


# ---------------------------------------------------------------------------------------------------------------------
# The reference's losses

LOSSES = golden_json("losses")
GOLDEN_MASK, GOLDEN_BOS = 504, 500  # of the golden qwen3: samples.json, special_ids


def reference_example(case, norm_type):
    """(example, noise) of a losses.json case, reached through our objectives."""
    g, data, mdlm = golden_arrays("losses"), case["data"], case["trainer"] == "mdlm"
    tokens, supervised = g[f"{data}.input_ids"], g[f"{data}.labels"] != -100
    valid = g.get(f"{data}.attention_mask", torch.ones_like(tokens)) == 1
    shift = case["right_shift_logits"]
    if shift and supervised[:, 0].any():  # the reference begins every row with bos, so that there is a predictor
        tokens, supervised, valid = (
            F.pad(field, (1, 0), value=value)
            for field, value in ((tokens, GOLDEN_BOS), (supervised, False), (valid, True))
        )
    B, T = tokens.shape
    t = case["time_epsilon"] + (1 - case["time_epsilon"]) * g["u_t"]
    level = t[:, None].expand(B, T)
    masked = (g["u_mask"][:, :T] < 1 - alpha(level, case["scheduler"])) & supervised
    # The reference's MDLM passes the padding mask on; its BD3LM does not.
    document = torch.where(valid, 0, -1) if mdlm else torch.zeros_like(tokens)
    batch, noise = Batch(tokens, supervised, document, positions(B, T), torch.arange(B)), Noise(level, masked)
    options = {
        "mask_id": GOLDEN_MASK,
        "weight_type": case["loss_weight_type"],
        "norm_type": norm_type,
        "scheduler": case["scheduler"],
    }
    if mdlm:
        return mdlm_example(batch, noise, right_shift=shift, **options), noise
    example = bd3lm_example(batch, noise, block_length=case["block_size"], **options)
    if shift:  # the reference shifts the noisy stream in training; we predict a block's first token from the clean one
        example = example._replace(index=(example.index - 1).clamp(min=0))
    return example, noise


def name_of(case):
    shift = f"shift{int(case['right_shift_logits'])}"
    return f"{case['trainer']}{case['block_size'] or ''}.{case['data']}.{shift}"


def case_id(case):
    return ".".join([name_of(case), case["loss_weight_type"], case["loss_norm_type"], case["scheduler"]])


@pytest.mark.parametrize("case", LOSSES, ids=case_id)
def test_losses_equal_the_reference(case):
    example, noise = reference_example(case, case["loss_norm_type"])
    assert noise.masked.shape[1] == case["effective_length"]
    with torch.no_grad():
        for dtype, name, rtol in ((torch.float32, "loss_f32", 1e-5), (torch.float64, "loss_f64", 1e-6)):
            total, denominator = loss(golden_model("qwen3", dtype), example)
            close(float(total / denominator), case[name], rtol=rtol, atol=0)
        total, count = loss(golden_model("qwen3"), reference_example(case, "token")[0])
        close(float(total / count), case["meter_nll"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("key", [key for key in golden_arrays("losses") if key.startswith("token_nll")])
def test_each_tokens_loss_equals_the_reference(key):
    name, weight_type = key.removeprefix("token_nll.").rsplit(".", 1)
    case = next(
        case
        for case in LOSSES
        if name_of(case) == name and case["loss_weight_type"] == weight_type and case["scheduler"] == "linear"
    )
    example, noise = reference_example(case, "batch")
    with torch.no_grad():
        logits = golden_model("qwen3")(example.tokens, example.layout, index=example.index)
    nll = F.cross_entropy(logits, example.targets, reduction="none") * example.weights
    ours = torch.zeros(noise.masked.shape).masked_scatter(noise.masked, nll)
    close(ours, golden_arrays("losses")[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in LOSSES if "grad_norms_f32" in case], ids=case_id)
def test_gradients_equal_the_reference(case):
    model, (example, _) = golden_model("qwen3"), reference_example(case, case["loss_norm_type"])
    total, denominator = loss(model, example)
    found = gradients(model, total / denominator)
    assert found.keys() == case["grad_norms_f32"].keys()
    for name, norm in case["grad_norms_f32"].items():
        close(float(found[name].norm()), norm, rtol=1e-4, atol=1e-7)
    close(float(sum(g.square().sum() for g in found.values()).sqrt()), case["grad_norm_total"], rtol=1e-4, atol=0)
    corner = golden_arrays("losses")[f"grad.{case['trainer']}{case['block_size'] or ''}.{case['data']}.q_proj0"]
    close(found["model.layers.0.self_attn.q_proj.weight"][:8, :8], corner, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def plain_loss(model, example):
    """The loss, written down."""
    logits = model(example.tokens, example.layout).flatten(0, 1)[example.index]
    nll = F.cross_entropy(logits, example.targets, reduction="none")
    return (nll * example.weights).sum(), example.denominator


def an_example(objective, batch, noise=None, *, K=4, **options):
    if objective == "ar":
        return ar_example(batch, **options)
    noise = noise or draw_noise(batch, block_length=K if objective == "bd3lm" else None)
    if objective == "mdlm":
        return mdlm_example(batch, noise, mask_id=MASK, **options)
    return bd3lm_example(batch, noise, mask_id=MASK, block_length=K, **options)


OBJECTIVES = [
    ("ar", {}),
    ("mdlm", {}),
    ("mdlm", {"right_shift": True}),
    ("bd3lm", {}),
    ("bd3lm", {"right_shift": True}),
]
each_objective = pytest.mark.parametrize(("objective", "options"), OBJECTIVES)


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("chunk", (1, 7, 64, 1000))
@each_objective
def test_the_chunked_loss_and_its_gradient_equal_plain_cross_entropy(objective, options, chunk, tied, monkeypatch):
    monkeypatch.setitem(diffusion.CHUNK, "cpu", chunk)
    model, example = tiny(tie_word_embeddings=tied), an_example(objective, ragged_batch(), **options)
    results = []
    for function in (loss, plain_loss):
        total, denominator = function(model, example)
        results.append((total, gradients(model, 3 * total / denominator)))
    close(results[0][0].detach(), results[1][0].detach())
    for name, expected in results[1][1].items():
        close(results[0][1][name], expected)
    with torch.no_grad():
        close(loss(model, example)[0], results[1][0].detach())


def test_bfloat16_over_float32_weights_stays_close():
    model, example = tiny(dtype=torch.float32, initializer_range=0.2), an_example("mdlm", ragged_batch())
    results = []
    for dtype in (None, torch.bfloat16):
        model.compute_dtype = dtype
        total, denominator = loss(model, example)
        assert total.dtype == torch.float32
        results.append((total.item(), gradients(model, total / denominator)))
    close(results[1][0], results[0][0], rtol=2e-2, atol=0)
    for name, expected in results[0][1].items():
        assert results[1][1][name].dtype == torch.float32
        assert F.cosine_similarity(results[1][1][name].flatten(), expected.flatten(), dim=0) > 0.98, name


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@each_objective
def test_no_tensor_of_tokens_times_vocabulary_exists_in_training(objective, options, monkeypatch):
    monkeypatch.setitem(diffusion.CHUNK, "cpu", 16)
    V, batch = 4000, make_batch(8, 24)
    everything = Noise(torch.ones(8, 24), torch.ones(8, 24, dtype=torch.bool))
    example = an_example(objective, batch, everything, **options)
    with Largest() as largest:
        loss(tiny(vocab_size=V), example)[0].backward()
    assert largest.numel == V * 32  # the embedding itself; a chunk of logits is V * 16, all of them V * 192


@pytest.mark.parametrize("norm_type", ("token", "sequence", "batch"))
@each_objective
def test_the_loss_does_not_depend_on_how_the_global_batch_is_cut(objective, options, norm_type):
    model, batch = tiny(), ragged_batch(6)
    results = []
    for cuts in ([6], [2, 4], [1, 2, 3], [1] * 6):
        totals, denominators = [], []
        for at in torch.arange(6).split(cuts):
            total, denominator = loss(model, an_example(objective, rows(batch, at), norm_type=norm_type, **options))
            totals.append(total)
            denominators.append(denominator)
        final = sum(totals) / sum(denominators)
        results.append((final.detach(), gradients(model, final)))
    for value, found in results[1:]:
        close(value, results[0][0])
        for name, expected in results[0][1].items():
            close(found[name], expected)


def test_the_norm_types_divide_by_tokens_by_rows_and_by_tokens_of_a_row():
    model, batch = tiny(), ragged_batch(3)
    noise = draw_noise(batch)
    counts = batch.supervised.sum(dim=1)
    each = [
        loss(model, mdlm_example(rows(batch, [i]), Noise(*(x[[i]] for x in noise)), mask_id=MASK))[0] for i in range(3)
    ]
    each = torch.stack(each).detach()
    for norm_type, expected in (
        ("token", each.sum() / counts.sum()),
        ("batch", each.sum() / 3),
        ("sequence", (each / counts).sum() / 3),
    ):
        total, denominator = loss(model, mdlm_example(batch, noise, mask_id=MASK, norm_type=norm_type))
        close((total / denominator).detach(), expected, **SINGLE)


@each_objective
def test_padding_entries_of_the_index_weigh_nothing(objective, options):
    model, example = tiny(), an_example(objective, ragged_batch(), **options)
    assert len(example.index) % 64 == 0
    padding = example.weights == 0
    assert padding.any() and not padding.all()
    other = example._replace(
        index=torch.where(padding, 5, example.index), targets=torch.where(padding, 7, example.targets)
    )
    short = example._replace(
        index=example.index[~padding], targets=example.targets[~padding], weights=example.weights[~padding]
    )
    total = loss(model, example)[0]
    expected = gradients(model, total)
    for changed in (other, short):
        value = loss(model, changed)[0]
        close(value.detach(), total.detach())
        found = gradients(model, value)
        for name in expected:
            close(found[name], expected[name])


@each_objective
def test_a_batch_with_nothing_to_learn_has_loss_and_gradient_zero(objective, options):
    model, batch = tiny(), make_batch(2, 5, supervised=torch.zeros(2, 5, dtype=torch.bool))
    example = an_example(objective, batch, **options)
    total, denominator = loss(model, example)
    assert len(example.index) == 64 and total.item() == 0 and denominator == 0
    assert all((g == 0).all() for g in gradients(model, total).values())


@pytest.mark.parametrize("norm_type", ("token", "sequence", "batch"))
@each_objective
def test_a_row_with_nothing_to_learn_weighs_nothing(objective, options, norm_type):
    model, batch = tiny(), make_batch(3, 6)
    batch.supervised[1] = False
    noise = draw_noise(batch)
    with_it = an_example(objective, batch, noise, **options, norm_type=norm_type)
    without = an_example(
        objective, rows(batch, [0, 2]), Noise(*(x[[0, 2]] for x in noise)), **options, norm_type=norm_type
    )
    (a, n), (b, m) = (loss(model, example) for example in (with_it, without))
    close(a.detach(), b.detach())
    assert n == m > 0


@each_objective
def test_packed_documents_have_the_loss_of_separate_rows(objective, options):
    model, lengths = tiny(), (5, 6, 2)
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = make_batch(1, sum(lengths), document=document, position=position)
    generator = torch.Generator().manual_seed(1)
    noise = Noise(torch.rand(1, 13, generator=generator), torch.rand(1, 13, generator=generator) < 0.7)
    whole = loss(model, an_example(objective, packed, noise, **options))
    parts = []
    for at in torch.arange(13).split(lengths):
        n = len(at)
        alone = make_batch(1, n)._replace(tokens=packed.tokens[:, at])
        parts.append(loss(model, an_example(objective, alone, Noise(*(x[:, at] for x in noise)), **options)))
    close(whole[0].detach(), sum(total for total, _ in parts).detach())
    assert whole[1] == sum(denominator for _, denominator in parts)


@each_objective
def test_right_padding_changes_no_loss(objective, options):
    model, batch = tiny(), make_batch(3, 10)
    noise = draw_noise(batch, block_length=4)
    padded = Batch(
        F.pad(batch.tokens, (0, 5), value=3),
        F.pad(batch.supervised, (0, 5)),
        F.pad(batch.document, (0, 5), value=-1),
        positions(3, 15),
        batch.sample,
    )
    wide = Noise(F.pad(noise.level, (0, 5), value=0.5), F.pad(noise.masked, (0, 5)))
    a, b = (loss(model, an_example(objective, *pair, **options)) for pair in ((batch, noise), (padded, wide)))
    close(a[0].detach(), b[0].detach())
    assert a[1] == b[1]


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("norm_type", ("token", "sequence", "batch"))
@pytest.mark.parametrize("family", ("qwen3", "qwen2", "llama"))
def test_right_shift_with_block_length_1_and_everything_masked_is_the_ar_loss(family, norm_type, packed):
    model, batch = tiny(family), ragged_batch()
    if packed:
        document, position = batch.document.clone(), batch.position.clone()
        document[:, 4:][document[:, 4:] == 0] = 1
        position[:, 4:] -= 4
        batch = batch._replace(document=document, position=position)
    everything = Noise(torch.ones(batch.tokens.shape), torch.ones(batch.tokens.shape, dtype=torch.bool))
    ours = bd3lm_example(
        batch,
        everything,
        mask_id=MASK,
        block_length=1,
        right_shift=True,
        weight_type="uniform",
        norm_type=norm_type,
    )
    results = [loss(model, example) for example in (ours, ar_example(batch, norm_type=norm_type))]
    close(results[0][0].detach(), results[1][0].detach())
    assert results[0][1] == results[1][1]
    expected = gradients(model, results[1][0])
    for name, found in gradients(model, results[0][0]).items():
        close(found, expected[name])


@pytest.mark.parametrize("K", (1, 3, 4))
@pytest.mark.parametrize("right_shift", (False, True))
def test_a_bd3lm_loss_is_that_of_each_block_after_its_clean_past(K, right_shift):
    """Written down without two streams: for each block, one pass over the clean past and the noisy block."""
    model, batch = tiny(), make_batch(2, 10)
    noise = draw_noise(batch, block_length=K)
    expected = 0.0
    for row, start in itertools.product(range(2), range(0, 10, K)):
        stop = min(start + K, 10)
        canvas = batch.tokens[row, :stop].clone()
        masked = noise.masked[row, start:stop]
        canvas[start:][masked] = MASK
        logits = model(canvas[None], Layout.of(positions(1, stop), None, K))[0]
        for i in (start + masked.nonzero()[:, 0]).tolist():
            if right_shift and i == 0:
                continue
            nll = F.cross_entropy(logits[i - int(right_shift)], batch.tokens[row, i])
            expected += nll.item() / (noise.level[row, i].item() + 1e-6)
    total, _ = loss(model, bd3lm_example(batch, noise, mask_id=MASK, block_length=K, right_shift=right_shift))
    close(total.item(), expected, **SINGLE)


# ---------------------------------------------------------------------------------------------------------------------
# Noise

NOISES = [{"noise_type": "level"}, {"noise_type": "count"}, {"noise_type": "level", "at_least_one": True}]


def equal_noise(a, b):
    assert torch.equal(a.level, b.level) and torch.equal(a.masked, b.masked)


@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("K", (None, 1, 4, 5))
def test_noise_belongs_to_the_sample_and_not_to_the_batch(K, options):
    batch = ragged_batch(8, 13)._replace(sample=torch.tensor([5, 0, 9, 3, 1, 700, 2, 8]))
    whole = draw_noise(batch, Noising(**options), block_length=K, seed=3)
    for at in ([2], [0, 1, 2], [7, 3, 5, 5], list(range(8))[::-1]):
        equal_noise(
            Noise(*(x[at] for x in whole)), draw_noise(rows(batch, at), Noising(**options), block_length=K, seed=3)
        )


@pytest.mark.parametrize("options", NOISES, ids=str)
@pytest.mark.parametrize("K", (None, 4, 5))
def test_noise_does_not_depend_on_right_padding(K, options):
    batch = make_batch(8, 13)
    padded = Batch(
        F.pad(batch.tokens, (0, 6)),
        F.pad(batch.supervised, (0, 6)),
        F.pad(batch.document, (0, 6), value=-1),
        positions(8, 19),
        batch.sample,
    )
    narrow, wide = (draw_noise(b, Noising(**options), block_length=K) for b in (batch, padded))
    equal_noise(Noise(*(x[:, :13] for x in wide)), narrow)
    assert not wide.masked[:, 13:].any()


@pytest.mark.parametrize("seed", (0, 42, 2**31 - 1))
def test_noise_changes_with_seed_epoch_and_sample(seed):
    batch = make_batch(1, 64)
    first = draw_noise(batch, seed=seed)
    for other in (
        draw_noise(batch, seed=seed + 1),
        draw_noise(batch._replace(epoch=1), seed=seed),
        draw_noise(batch._replace(sample=torch.tensor([1])), seed=seed),
    ):
        assert not torch.equal(first.level, other.level) and not torch.equal(first.masked, other.masked)
    equal_noise(first, draw_noise(batch, seed=seed))


@pytest.mark.parametrize("options", NOISES, ids=str)
def test_only_supervised_tokens_are_masked(options):
    batch = ragged_batch(20)
    assert not (draw_noise(batch, Noising(**options), block_length=4).masked & ~batch.supervised).any()


def star_discrepancy(x: torch.Tensor) -> float:
    """sup over [0, b) of |share of the points in it - b|."""
    x, n = x.double().sort().values, len(x)
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return float(torch.maximum(i / n - x, x - (i - 1) / n).max())


@pytest.mark.parametrize("first", (0, 1, 12345))
@pytest.mark.parametrize("n", (16, 100, 1000))
@pytest.mark.parametrize("level_per", ("block", "sequence"))
def test_levels_of_consecutive_samples_have_low_discrepancy(level_per, n, first):
    batch = make_batch(n, 4, sample=first + torch.arange(n))
    level = draw_noise(batch, Noising(time_epsilon=1e-12, level_per=level_per)).level
    assert (level == level[:, :1]).all()
    assert star_discrepancy(level[:, 0]) < math.log(n) / n  # independent draws: about 0.9 / sqrt(n)


def test_levels_cover_time_epsilon_to_time_max():
    level = draw_noise(make_batch(1000, 1), Noising(time_epsilon=0.2, time_max=0.6)).level
    assert 0.2 <= level.min() < 0.201 and 0.599 < level.max() <= 0.6


def block_levels(batch, K, **options) -> torch.Tensor:
    """(B, T / K) levels, one a block."""
    level = draw_noise(batch, Noising(time_epsilon=1e-12, **options), block_length=K).level.unfold(1, K, K)
    assert (level == level[..., :1]).all()
    return level[..., 0]


@pytest.mark.parametrize("blocks", (2, 5, 8))
def test_the_blocks_of_a_row_occupy_each_stratum_once(blocks):
    level = block_levels(make_batch(200, 3 * blocks), 3)
    strata = (level * blocks).floor().sort(dim=1).values
    assert torch.equal(strata, torch.arange(blocks).expand(200, -1).float())


@pytest.mark.parametrize("epoch", (0, 1))
def test_no_stratum_is_tied_to_a_place(epoch):
    blocks, n = 5, 1500
    level = block_levels(make_batch(n, 2 * blocks, epoch=epoch), 2)
    for b in range(blocks):
        assert star_discrepancy(level[:, b]) < 1.95 / math.sqrt(n)  # Kolmogorov, p = 0.001
    for a, b in itertools.combinations(range(blocks), 2):
        apart = ((level[:, a] - level[:, b]) * blocks).round().long() % blocks
        counts = torch.bincount(apart, minlength=blocks)
        assert counts[0] == 0
        expected = n / (blocks - 1)
        assert ((counts[1:] - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_level_per_sequence_gives_every_block_the_same_level():
    level = block_levels(make_batch(50, 20), 4, level_per="sequence")
    assert (level == level[:, :1]).all() and len(level[:, 0].unique()) == 50


def test_blocks_without_supervised_tokens_take_no_stratum():
    supervised = torch.zeros(100, 20, dtype=torch.bool)
    supervised[:, 5] = supervised[:, 12:15] = True  # blocks 1 and 3 of 5
    level = block_levels(make_batch(100, 20, supervised=supervised), 4)[:, [1, 3]]
    assert torch.equal((level * 2).floor().sort(dim=1).values, torch.tensor([[0.0, 1.0]]).expand(100, -1))


def test_blocks_do_not_reach_across_documents():
    """Position restarts within block 0: the two documents' first blocks have levels of their own."""
    document = (torch.arange(8) >= 4).long().expand(20, 8)
    level = draw_noise(make_batch(20, 8, document=document, position=torch.arange(8).expand(20, 8) % 4), block_length=4)
    assert (level.level[:, 0] != level.level[:, 4]).all()
    one_block_each = draw_noise(make_batch(20, 8, document=document, position=torch.arange(8).expand(20, 8) % 4))
    assert (one_block_each.level[:, 0] != one_block_each.level[:, 4]).all()


@pytest.mark.parametrize("scheduler", ("linear", "cosine"))
def test_tokens_are_masked_with_probability_one_minus_alpha(scheduler):
    noise = draw_noise(make_batch(500, 40), Noising(scheduler=scheduler))
    expected = 1 - alpha(noise.level.double(), scheduler)
    z = (noise.masked.double() - expected).sum() / (expected * (1 - expected)).sum().sqrt()
    assert abs(z) < 4
    each = (noise.masked.double() - expected).sum(dim=0) / (expected * (1 - expected)).sum(dim=0).sqrt()
    assert each.abs().max() < 4.5


@pytest.mark.parametrize("K", (None, 4))
def test_count_noise_masks_a_uniform_count_and_is_never_empty(K):
    supervised = torch.zeros(2000, 12, dtype=torch.bool)
    supervised[:, 1:4] = supervised[:, 4:8] = supervised[:, 9] = True  # 3, 4 and 1 of three blocks
    noise = draw_noise(make_batch(2000, 12, supervised=supervised), Noising(noise_type="count"), block_length=K)
    for start, stop in ((0, 12),) if K is None else ((0, 4), (4, 8), (8, 12)):
        at = slice(start, stop)
        m, counts = int(supervised[0, at].sum()), noise.masked[:, at].sum(dim=1)
        seen = torch.bincount(counts, minlength=m + 1)
        assert seen[0] == 0 and len(seen) == m + 1
        expected = 2000 / m
        critical = {1: 1e-9, 3: 13.8, 4: 16.3, 8: 24.3}[m]  # chi-square, m - 1 degrees of freedom, p = 0.001
        assert ((seen[1:] - expected) ** 2 / expected).sum() < critical
        weight = loss_weight(noise.level[:, at], "count")
        close(weight, (m / counts.float())[:, None].expand_as(weight), **SINGLE)


def test_count_noise_masks_every_subset_of_its_size_alike():
    noise = draw_noise(make_batch(6000, 4), Noising(noise_type="count"))
    code = (noise.masked.long() * torch.tensor([1, 2, 4, 8])).sum(dim=1)
    for size, critical in ((1, 16.3), (2, 20.5), (3, 16.3)):
        subsets = [sum(1 << i for i in s) for s in itertools.combinations(range(4), size)]
        counts = torch.tensor([int((code == s).sum()) for s in subsets]).double()
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < critical


@pytest.mark.parametrize("noise_type", ("level", "count"))
def test_at_least_one_masks_one_token_of_an_empty_draw_and_changes_no_other(noise_type):
    batch = ragged_batch(200, 12)
    plain, full = (
        draw_noise(batch, Noising(noise_type=noise_type, at_least_one=flag), block_length=3) for flag in (False, True)
    )
    assert torch.equal(plain.level, full.level)
    per_block = [x.unfold(1, 3, 3) for x in (plain.masked, full.masked, batch.supervised)]
    before, after, can = (x.sum(dim=-1) for x in per_block)
    empty = (before == 0) & (can > 0)
    assert empty.any() == (noise_type == "level")
    assert (after[empty] == 1).all()
    assert torch.equal(per_block[0][~empty], per_block[1][~empty])


@pytest.mark.parametrize("noise_type", ("level", "count"))
def test_with_complement_masks_every_supervised_token_once(noise_type):
    batch = ragged_batch(10)
    noise = draw_noise(batch, Noising(noise_type=noise_type), block_length=4)
    twice, both = with_complement(batch, noise)
    first, second = both.masked.chunk(2)
    assert torch.equal(first ^ second, batch.supervised) and not (first & second).any()
    assert torch.equal(first, noise.masked)
    close(both.level[:10], noise.level)
    close(both.level[10:], (1 - noise.level).clamp(min=1e-3))
    for field, doubled in zip(batch[:5], twice[:5]):
        assert torch.equal(doubled, torch.cat([field, field]))


# ---------------------------------------------------------------------------------------------------------------------
# The bound


def any_order_nll(nll_of, places) -> float:
    """The bound written down: the mean over all orders of revealing `places` one at a time of the summed NLL.

    nll_of(hidden, i): the NLL of token i while `hidden` are masked.
    """
    orders = list(itertools.permutations(places))
    return sum(nll_of(frozenset(order[k:]), order[k]) for order in orders for k in range(len(order))) / len(orders)


def bound_by_orders(model, tokens, supervised, K, right_shift):
    T, memory = len(tokens), {}

    def nll_of(hidden, i):
        if hidden not in memory:
            canvas = tokens.clone()
            canvas[list(hidden)] = MASK
            memory[hidden] = model(canvas[None], Layout.of(positions(1, T), None, K))[0].log_softmax(dim=-1)
        return -float(memory[hidden][i - int(right_shift), tokens[i]])

    groups = {}
    for i in supervised:
        groups.setdefault(0 if K is None else i // K, []).append(i)
    return sum(any_order_nll(nll_of, places) for places in groups.values())


@pytest.mark.parametrize("right_shift", (False, True))
@pytest.mark.parametrize("K", (None, 4))
@torch.no_grad()
def test_the_bound_over_count_noise_is_the_mean_over_all_orders_of_revealing(K, right_shift):
    """Enumerated exactly over every subset that count noise can draw, and in the mean of its draws."""
    model, T, supervised = tiny(), 8, [1, 3, 4, 6, 7]  # with K 4: two of block 0, three of block 1
    row = make_batch(1, T, supervised=torch.zeros(1, T, dtype=torch.bool).index_fill(1, torch.tensor(supervised), True))
    exact = bound_by_orders(model, row.tokens[0], supervised, K, right_shift)

    def bound(batch, noise):
        options = {"mask_id": MASK, "right_shift": right_shift, "weight_type": "count"}
        make = mdlm_example if K is None else bd3lm_example
        return make(batch, noise, **options, **({} if K is None else {"block_length": K}))

    enumerated = 0.0
    for start in range(0, T, K or T):
        places = [i for i in supervised if start <= i < start + (K or T)]
        for n in range(1, len(places) + 1):
            subsets = list(itertools.combinations(places, n))
            for subset in subsets:
                masked = torch.zeros(1, T, dtype=torch.bool).index_fill(1, torch.tensor(subset), True)
                noise = Noise(torch.full((1, T), n / len(places)), masked)
                enumerated += float(loss(model, bound(row, noise))[0]) / (len(places) * len(subsets))
    close(enumerated, exact, **SINGLE)

    draws = 1000
    many = Batch(*(field.expand(draws, *field.shape[1:]) for field in row[:4]), torch.arange(draws))
    example = bound(many, draw_noise(many, Noising(noise_type="count"), block_length=K))
    nll = model(example.tokens, example.layout, index=example.index).log_softmax(dim=-1)
    nll = -nll.gather(1, example.targets[:, None])[:, 0] * example.weights
    each = torch.zeros(draws, dtype=nll.dtype).index_add_(0, example.index // example.tokens.shape[1], nll)
    assert abs(float(each.mean()) - exact) < 4 * float(each.std()) / math.sqrt(draws)


@pytest.mark.parametrize("right_shift", [False, True])
def test_only_blocks_that_are_learned_have_a_noisy_copy(right_shift):
    T, K = 32, 4
    supervised = torch.zeros(3, T, dtype=torch.bool)
    supervised[0, 25:31], supervised[1, 20:22], supervised[2, 8:12] = True, True, True
    batch = make_batch(3, T, supervised=supervised)
    noise = draw_noise(batch, Noising(noise_type="count"), block_length=K)
    model = tiny()
    example = bd3lm_example(batch, noise, mask_id=MASK, block_length=K, right_shift=right_shift)
    assert example.tokens.shape == (3, 2 * K + T)  # row 0 has two such blocks, the others are filled up
    whole = batch._replace(supervised=torch.ones_like(supervised))
    full = bd3lm_example(whole, noise, mask_id=MASK, block_length=K, right_shift=right_shift)
    assert full.tokens.shape == (3, 2 * T)
    close(loss(model, example)[0], loss(model, full)[0], **EXACT)


def test_noise_takes_every_seed_of_63_bits_and_no_two_alike():
    batch = make_batch(2, 40)
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63 - 1)
    masks = [draw_noise(batch, seed=seed).masked for seed in seeds]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])

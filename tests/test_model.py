"""The model against the reference's outputs, and the laws of layouts and of the cache."""

import pytest
import torch
from conftest import FAMILIES, MASK, golden_arrays, golden_model, positions, random_tokens, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from log import activation_bytes
from model import Config, KVCache, LanguageModel, Layout, attention_mask, rotary, rotate, visible

LOGITS = {"rtol": 0, "atol": 1e-4}  # float32 against the goldens
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64, two ways of computing the same
LENGTHS = (None, 1, 4, 5)  # block lengths: bidirectional, causal, block-causal


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance or EXACT)


def seen(q: Layout, k: Layout) -> torch.Tensor:
    """(B, Q, K) bool."""
    return visible(q.map(lambda field: field[:, :, None]), k.map(lambda field: field[:, None, :]))


def unpack(bits: torch.Tensor, count: int) -> torch.Tensor:
    """numpy.packbits undone along the last axis."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return ((bits[..., None] >> shifts) & 1).flatten(-2)[..., :count].bool()


def run(model, tokens, block_length=None, document=None, position=None, offset=None):
    position = positions(*tokens.shape) if position is None else position
    return model(tokens, Layout.of(position, document, block_length, offset))


# ---------------------------------------------------------------------------------------------------------------------
# The reference's outputs


def golden(family):
    g = golden_arrays(f"forward_{family}")
    return golden_model(family), g, g["attention_mask"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_logits_equal_transformers(family):
    model, g, _ = golden(family)
    close(run(model, g["input_ids"], 1), g["causal_logits"], **LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_logits_with_padding_equal_transformers_on_valid_rows(family):
    model, g, valid = golden(family)
    logits = run(model, g["input_ids"], 1, document=torch.where(valid, 0, -1))
    close(logits[valid], g["causal_logits_padmask"][valid], **LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_logits_equal_the_reference(family):
    model, g, _ = golden(family)
    close(run(model, g["input_ids"]), g["a2d_logits_nomask"], **LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_logits_with_padding_equal_the_reference_on_valid_rows(family):
    model, g, valid = golden(family)
    logits = run(model, g["input_ids"], document=torch.where(valid, 0, -1))
    close(logits[valid], g["a2d_logits_padmask"][valid], **LOGITS)


STREAMS = [
    (family, int(key.removeprefix("bd3lm_mask_bs")))
    for family in FAMILIES
    for key in golden_arrays(f"forward_{family}")
    if key.startswith("bd3lm_mask_bs")
]


@pytest.mark.parametrize(("family", "K"), STREAMS)
def test_two_stream_logits_equal_the_reference(family, K):
    model, g, _ = golden(family)
    B, T = g["input_ids"].shape
    layout = Layout.of(positions(B, T), None, K).two_stream()
    logits = model(torch.cat([g["xt_ids"], g["input_ids"]], dim=1), layout)
    close(logits[:, :T], g[f"bd3lm_logits_xt_bs{K}"], **LOGITS)
    if f"bd3lm_logits_x0_bs{K}" in g:
        close(logits[:, T:], g[f"bd3lm_logits_x0_bs{K}"], **LOGITS)


@pytest.mark.parametrize(("family", "K"), STREAMS)
def test_two_stream_mask_is_the_published_one(family, K):
    _, g, _ = golden(family)
    B, T = g["input_ids"].shape
    layout = Layout.of(positions(B, T), None, K).two_stream()
    published = unpack(g[f"bd3lm_mask_bs{K}"], 2 * T)
    assert torch.equal(seen(layout, layout)[0], published)
    assert torch.equal(attention_mask(layout, layout)[:, 0], published.expand(B, -1, -1))


def sampling_rows(g):
    """Each row of the golden left-padded canvas as we lay it out: (pad columns, tokens (1, T), layout)."""
    x, position, K = g["samp_x"], g["samp_position_ids"], int(g["samp_block_size"])
    allowed = unpack(g["samp_mask"], x.shape[1])
    for row in range(len(x)):
        valid = allowed[row].diagonal()
        pad = int((~valid).sum())
        tokens = x[row : row + 1, pad:]
        T = tokens.shape[1]
        layout = Layout.of(positions(1, T), None, K, torch.tensor([pad % K]))
        assert torch.equal(layout.position[0], position[row, pad:])
        yield row, pad, tokens, layout


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_mask_and_positions_equal_the_reference(family):
    g = golden_arrays(f"forward_{family}")
    allowed = unpack(g["samp_mask"], g["samp_x"].shape[1])
    pads = []
    for row, pad, _, layout in sampling_rows(g):
        assert torch.equal(seen(layout, layout)[0], allowed[row, pad:, pad:])
        assert not allowed[row, pad:, :pad].any()
        pads.append(pad)
    assert max(pads) > 0  # the offset was exercised


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_block_logits_equal_the_reference(family):
    model, g, _ = golden(family)
    K = int(g["samp_block_size"])
    for row, _, tokens, layout in sampling_rows(g):
        T = tokens.shape[1]
        cache = KVCache(model.config, 1, T, dtype=torch.float32)
        for part in (slice(0, T - K), slice(T - K, T)):
            columns = torch.arange(T)[None, part]
            logits = model(
                tokens[:, part], layout.map(lambda field, at=part: field[:, at]), cache=cache, columns=columns
            )
        close(logits[0], g["samp_block_logits"][row], **LOGITS)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", LENGTHS)
def test_ragged_right_padded_rows_equal_single_rows(family, K):
    model = tiny(family)
    lengths = torch.tensor([11, 3, 8])
    tokens = random_tokens(3, 11)
    document = torch.where(torch.arange(11) < lengths[:, None], 0, -1)
    together = run(model, tokens, K, document)
    for row, n in enumerate(lengths):
        close(together[row : row + 1, :n], run(model, tokens[row : row + 1, :n], K))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", LENGTHS)
def test_packed_documents_equal_separate_documents(family, K):
    model, lengths, tokens = tiny(family), (5, 6, 2), random_tokens(1, 13)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    packed = run(model, tokens, K, document, position).split(lengths, dim=1)
    for part, alone in zip(tokens.split(lengths, dim=1), packed):
        close(alone, run(model, part, K))


@pytest.mark.parametrize("K", (1, 4, 5))
def test_packed_two_streams_equal_separate_two_streams(K):
    model, lengths, tokens, noised = tiny(), (5, 8), random_tokens(1, 13), random_tokens(1, 13, seed=1)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    both = model(torch.cat([noised, tokens], dim=1), Layout.of(position, document, K).two_stream())
    start = 0
    for n in lengths:
        at = slice(start, start + n)
        alone = model(
            torch.cat([noised[:, at], tokens[:, at]], dim=1), Layout.of(positions(1, n), None, K).two_stream()
        )
        close(both[:, at], alone[:, :n])
        close(both[:, 13:][:, at], alone[:, n:])
        start += n


@pytest.mark.parametrize("K", LENGTHS)
def test_padded_rows_stay_finite(K):
    document = torch.full((2, 9), -1)
    document[1, :4] = 0
    layout = Layout.of(positions(2, 9), document, K)
    tokens = random_tokens(2, 9)
    assert tiny()(tokens, layout).isfinite().all()
    assert tiny()(tokens.repeat(1, 2), layout.two_stream()).isfinite().all()


@pytest.mark.parametrize("K", LENGTHS)
def test_every_token_sees_itself_and_nothing_of_another_document(K):
    document = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    layout = Layout.of(positions(1, 8), document, K).two_stream()
    mask = seen(layout, layout)[0]
    assert mask.diagonal().all()
    assert not mask[layout.document[0][:, None] != layout.document[0]].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ("full", "causal"))
def test_the_static_kind_equals_the_dense_mask(family, kind):
    model, tokens = tiny(family), random_tokens(2, 9)
    layout = Layout.of(positions(2, 9), None, 1 if kind == "causal" else None)
    assert layout.kind == kind and attention_mask(layout, layout) == kind
    dense = seen(layout, layout)[:, None]
    assert torch.equal(dense[0, 0], torch.ones(9, 9).tril().bool() if kind == "causal" else torch.ones(9, 9).bool())
    close(model(tokens, layout), model(tokens, layout._replace(kind="any")))
    close(model(tokens, layout), model(tokens, layout, mask=dense))


def test_a_static_kind_is_claimed_only_where_it_holds():
    position, document = positions(2, 6), torch.zeros(2, 6, dtype=torch.int64)
    for layout in (
        Layout.of(position, document),
        Layout.of(position, document, 1),
        Layout.of(position, None, 4),
        Layout.of(position).two_stream(),
        Layout.of(position).map(lambda field: field),
    ):
        assert layout.kind == "any"


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_a_document_to_later_positions_changes_nothing(family):
    model, tokens = tiny(family), random_tokens(1, 9)
    moved = run(model, tokens, position=positions(1, 9) + 17)
    close(moved, run(model, tokens), rtol=1e-4, atol=1e-4)  # angles are float32
    assert not torch.allclose(run(model, tokens, position=positions(1, 9) * 2), moved, atol=1e-2)


def test_rotary_angles_are_positions_times_falling_frequencies():
    config = Config(head_dim=8, rope_theta=100.0)
    cos, sin = rotary(config, torch.tensor([[0, 1, 7]]), torch.float64)
    frequency = torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75], dtype=torch.float64)
    angle = torch.tensor([0.0, 1.0, 7.0], dtype=torch.float64)[:, None] * frequency
    close(cos[0, :, 0], torch.cat([angle.cos(), angle.cos()], dim=1), rtol=0, atol=1e-6)
    close(sin[0, :, 0], torch.cat([-angle.sin(), angle.sin()], dim=1), rtol=0, atol=1e-6)
    complex_numbers = torch.view_as_complex(torch.randn(3, 4, 2, dtype=torch.float64))
    turned = complex_numbers * torch.polar(torch.ones_like(angle), angle)
    x, expected = (torch.cat([z.real, z.imag], dim=1)[None, :, None] for z in (complex_numbers, turned))
    close(rotate(x, cos, sin), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams_of_one_block_are_two_bidirectional_passes(family):
    model, tokens, noised = tiny(family), random_tokens(2, 7), random_tokens(2, 7, seed=1)
    both = model(torch.cat([noised, tokens], dim=1), Layout.of(positions(2, 7)).two_stream())
    close(both[:, :7], run(model, noised))
    close(both[:, 7:], run(model, tokens))


def test_several_noisy_copies_over_one_clean_context_equal_one_at_a_time():
    model, K, T, copies = tiny(), 4, 8, 3
    tokens = random_tokens(1, T)
    noised = random_tokens(copies, K, seed=1)
    clean = Layout.of(positions(1, T), None, K)
    cache = KVCache(model.config, 1, T + copies * K, dtype=torch.float64)
    model(tokens, clean, cache=cache, columns=positions(1, T))
    last = clean.map(lambda field: field[:, K:].repeat(1, copies))
    last = last._replace(noisy=torch.arange(1, copies + 1).repeat_interleave(K)[None])
    together = model(noised.view(1, -1), last, cache=cache, columns=T + torch.arange(copies * K)[None])
    for copy in range(copies):
        canvas = torch.cat([tokens[:, :K], noised[copy : copy + 1]], dim=1)
        close(together[:, copy * K : (copy + 1) * K], run(model, canvas, K)[:, K:])


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("K", "cuts"), [(1, (0, 10)), (1, (0, 3, 4, 10)), (5, (0, 10)), (5, (0, 5, 10)), (4, (0, 4, 12))]
)
def test_cached_equals_uncached_in_any_column_order(family, K, cuts, rng):
    model = tiny(family)
    T = cuts[-1] + 5
    tokens = random_tokens(2, T)
    layout = Layout.of(positions(2, T), torch.zeros(2, T, dtype=torch.int64), K)
    columns = torch.stack([torch.randperm(T + 4, generator=rng)[:T] for _ in range(2)])
    whole = model(tokens, layout)
    cache = KVCache(model.config, 2, T + 4, dtype=torch.float64)
    for start, stop in zip(cuts, (*cuts[1:], T)):
        at = torch.arange(start, stop)[torch.randperm(stop - start, generator=rng)]
        logits = model(
            tokens[:, at], layout.map(lambda field, at=at: field[:, at]), cache=cache, columns=columns[:, at]
        )
        close(logits, whole[:, at])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", (1, 4, 5))
def test_two_stream_training_logits_equal_cached_block_decoding_logits(family, K):
    model, T = tiny(family), 13
    tokens, noised = random_tokens(2, T), random_tokens(2, T, seed=1)
    clean = Layout.of(positions(2, T), None, K)
    trained = model(torch.cat([noised, tokens], dim=1), clean.two_stream())
    cache = KVCache(model.config, 2, T, dtype=torch.float64)
    for start in range(0, T, K):
        at = slice(start, min(start + K, T))
        block, columns = clean.map(lambda field, at=at: field[:, at]), positions(2, T)[:, at]
        close(model(noised[:, at], block, cache=cache, columns=columns), trained[:, at])
        close(model(tokens[:, at], block, cache=cache, columns=columns), trained[:, T:][:, at])
    close(run(model, tokens, K), trained[:, T:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("K", (1, 4))
def test_writing_a_block_back_with_the_next_block_equals_writing_it_before(family, K):
    model, T = tiny(family), 3 * K
    tokens, noised = random_tokens(2, T), random_tokens(2, T, seed=1)
    clean = Layout.of(positions(2, T), None, K)

    def feed(cache, ids, start, stop):
        at = slice(start, stop)
        block = clean.map(lambda field: field[:, at])
        return model(ids[:, at], block, cache=cache, columns=positions(2, T)[:, at])

    outputs = []
    for merged in (True, False):
        cache = KVCache(model.config, 2, T, dtype=torch.float64)
        feed(cache, tokens, 0, K)
        feed(cache, noised, K, 2 * K)  # leaves the noisy block's keys behind
        if merged:
            ids = torch.cat([tokens[:, : 2 * K], noised[:, 2 * K :]], dim=1)
            outputs.append(feed(cache, ids, K, 3 * K)[:, K:])
        else:
            feed(cache, tokens, K, 2 * K)
            outputs.append(feed(cache, noised, 2 * K, 3 * K))
    close(*outputs)


def test_an_unwritten_cache_column_is_never_seen():
    model, tokens = tiny(), random_tokens(2, 9)
    layout = Layout.of(positions(2, 9), torch.tensor([[0] * 9, [0] * 7 + [-1] * 2]), 4)
    outputs = []
    for garbage in (0.0, 1e4):
        cache = KVCache(model.config, 2, 15, dtype=torch.float64)
        cache.keys += garbage
        cache.values -= garbage
        outputs.append(model(tokens, layout, cache=cache, columns=positions(2, 9) + 3))
    close(*outputs)
    close(outputs[0], model(tokens, layout))


def test_what_lies_in_the_dump_column_never_matters():
    model, tokens, dump = tiny(), random_tokens(2, 9), 9
    layout = Layout.of(positions(2, 9), None, 4)
    whole = model(tokens, layout)
    cache = KVCache(model.config, 2, 10, dtype=torch.float64)
    at = positions(2, 9)[:, :8]
    padded = layout.map(lambda field: field[:, :8])
    columns = torch.where(torch.tensor([[True] * 8, [True] * 4 + [False] * 4]), at, dump)  # row 1: half its tokens
    padded = padded._replace(document=torch.where(columns == dump, -1, 0))
    first = model(tokens[:, :8], padded, cache=cache, columns=columns)
    close(first[0], whole[0, :8])
    close(first[1, :4], whole[1, :4])
    cache.keys[:, :, dump], cache.values[:, :, dump] = 1e6, -1e6
    rest = layout.map(lambda field: field[:, 4:])
    close(model(tokens[:, 4:], rest, cache=cache, columns=positions(2, 9)[:, 4:]), whole[:, 4:])


# ---------------------------------------------------------------------------------------------------------------------
# The head and the switches


@pytest.mark.parametrize("tied", (True, False))
def test_index_and_head_give_the_full_logits_at_those_positions(tied):
    model, tokens = tiny(tie_word_embeddings=tied), random_tokens(2, 9)
    layout = Layout.of(positions(2, 9))
    full = model(tokens, layout)
    index = torch.tensor([17, 0, 9, 9, 3])
    close(model(tokens, layout, index=index), full.flatten(0, 1)[index])
    close(model(tokens, layout, index=index, head=lambda hidden, weight: hidden @ weight.T), full.flatten(0, 1)[index])
    close(model(tokens, layout, head=lambda hidden, weight: hidden @ weight.T), full)
    assert model(tokens, layout, index=index[:0]).shape == (0, model.config.vocab_size)


def test_an_untied_head_equal_to_the_embedding_is_the_tied_model():
    tied, untied = tiny(), tiny(tie_word_embeddings=False)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}
    weights = tied.state_dict()
    tokens = random_tokens(2, 9)
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    close(run(untied, tokens), run(tied, tokens))
    head = untied.lm_head.weight
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    hidden = untied(tokens, Layout.of(positions(2, 9)), head=lambda hidden, weight: hidden)
    close(run(untied, tokens), hidden @ head.T)


@pytest.mark.parametrize(
    ("family", "attention_bias", "biased"),
    [
        ("qwen3", False, ""),
        ("qwen2", False, "qkv"),
        ("llama", False, ""),
        ("qwen3", True, "qkvo"),
        ("llama", True, "qkvo"),
    ],
)
def test_projections_have_a_bias_where_the_family_or_the_config_says_so(family, attention_bias, biased):
    model, tokens = tiny(family, attention_bias=attention_bias), random_tokens(2, 9)
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert names == {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in biased}
    before = run(model, tokens)
    for name in names - {f"model.layers.{i}.self_attn.k_proj.bias" for i in range(2)}:
        model.get_parameter(name).add_(1.0)
        after = run(model, tokens)
        assert not torch.allclose(before, after, atol=1e-3), name
        before = after


def test_only_qwen3_normalises_queries_and_keys():
    for family in FAMILIES:
        names = {name.split(".")[-2] for name, _ in tiny(family).named_parameters()}
        assert ({"q_norm", "k_norm"} <= names) == (family == "qwen3")


def test_random_weights_are_a_function_of_the_generator():
    models = [LanguageModel(Config()) for _ in range(2)]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(3))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(a, b)
        if a.ndim == 2:
            assert abs(float(a.std()) / 0.02 - 1) < 0.05, name
        else:
            assert (a == 1).all(), name


def test_the_mask_id_is_an_ordinary_token_of_the_model():
    """What is masked is the caller's business: a prompt may contain the mask id."""
    model, tokens = tiny(), random_tokens(1, 6)
    tokens[0, 2] = MASK
    assert run(model, tokens).isfinite().all()


class Products(TorchDispatchMode):
    """The dtypes that matrices are multiplied in, attention's included."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("mm", "attention", "matmul")):
            self.dtypes |= {x.dtype for x in args[:3] if isinstance(x, Tensor)}
        return function(*args, **kwargs or {})


@torch.enable_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_weights_are_used_in_the_compute_dtype_and_get_float32_gradients(family):
    model = tiny(family, dtype=torch.float32, initializer_range=0.2)
    tokens, layout = random_tokens(2, 12), Layout.of(positions(2, 12), None, 4).two_stream()
    tokens, logits = torch.cat([tokens, tokens], dim=1), {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        with Products() as products:
            logits[dtype] = model(tokens, layout)
            logits[dtype].sum().backward()
        assert products.dtypes == {dtype}
    wide, narrow = logits[torch.float32], logits[torch.bfloat16]
    assert narrow.dtype == torch.bfloat16 and (narrow - wide).norm() < 0.05 * wide.norm()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@torch.enable_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_activations_told_are_those_that_a_layer_keeps(family):
    """A CPU keeps more: it has RMSNorm in several steps, and copies what attention gives."""

    def kept(layers: int) -> int:
        model, storages = tiny(family, dtype=torch.float32, num_hidden_layers=layers), {}
        weights = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}

        def pack(x: Tensor) -> Tensor:
            if x.shape not in weights:
                storages[x.untyped_storage().data_ptr()] = x  # holds it, so that no other takes its place
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(random_tokens(2, 100), Layout.of(positions(2, 100)), head=lambda hidden, weight: hidden.sum())
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    told = activation_bytes(tiny(family, num_hidden_layers=1).config, tokens=200, itemsize=4)
    assert 1 <= (kept(3) - kept(2)) / told < 1.45


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_products_give_the_same_and_hold_no_weight_twice(family, in_place):
    model, tokens, layout = tiny(family), random_tokens(2, 9), Layout.of(positions(2, 9), None, 3)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}

    def outputs() -> list[Tensor]:
        cache = KVCache(model.config, 2, 9, dtype=torch.float64)
        return [model(tokens, layout), model(tokens, layout, cache=cache, columns=positions(2, 9)), cache.keys]

    apart = outputs()
    model.join(in_place)
    for ours, theirs in zip(outputs(), apart):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    for layer in model.model.layers:
        for whole, names in ((layer.self_attn.joined, "qkv"), (layer.mlp.joined, ("gate", "up"))):
            parts = [getattr(layer.self_attn if names == "qkv" else layer.mlp, f"{name}_proj") for name in names]
            assert {part.weight.untyped_storage().data_ptr() for part in parts} == {whole[0].data_ptr()}
            assert sum(part.weight.numel() for part in parts) == whole[0].numel()


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


def cuda_layouts(T):
    document = torch.cat([torch.full((n,), i) for i, n in enumerate((T // 3, T - T // 3))])
    position = torch.cat([torch.arange(n) for n in (T // 3, T - T // 3)])
    packed = torch.stack([document, document]), torch.stack([position, position])
    padding = torch.where(torch.arange(T) < torch.tensor([[T], [T // 2]]), 0, -1)
    return {
        "two_stream": Layout.of(positions(2, T), None, 32).two_stream(),
        "two_stream_odd": Layout.of(positions(2, T), None, 7).two_stream(),
        "packed_causal": Layout.of(packed[1], packed[0], 1),
        "packed_two_stream": Layout.of(packed[1], packed[0], 16).two_stream(),
        "padding": Layout.of(positions(2, T), padding),
        "padded_two_stream": Layout.of(positions(2, T), padding, 32).two_stream(),
    }


@pytest.mark.cuda
@torch.enable_grad()
@pytest.mark.parametrize("case", list(cuda_layouts(6)))
def test_flex_attention_equals_sdpa_in_logits_and_gradients(case):
    from torch.nn.attention.flex_attention import BlockMask

    layout = cuda_layouts(200)[case]
    tokens = random_tokens(*layout.position.shape)
    upstream = (
        torch.randn(*tokens.shape, 40, generator=torch.Generator().manual_seed(1)) * (layout.document >= 0)[..., None]
    )
    results = []
    for device in ("cpu", "cuda"):
        model = tiny(dtype=torch.float32).to(device)
        there = layout.map(lambda field, device=device: field.to(device))
        assert isinstance(attention_mask(there, there), BlockMask) == (device == "cuda")
        logits = model(tokens.to(device), there)
        (logits * upstream.to(device)).sum().backward()
        results.append((logits.detach().cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}))
    valid = layout.document >= 0
    close(results[1][0][valid], results[0][0][valid], rtol=1e-3, atol=1e-3)
    for name, expected in results[0][1].items():
        assert (results[1][1][name] - expected).norm() < 1e-3 * expected.norm(), name


class OnCuda(Tensor):
    is_cuda = True


def test_a_sequence_within_one_tile_has_a_bool_mask_on_cuda_too():
    layout = Layout.of(positions(2, 50), None, 8).two_stream()
    layout = layout._replace(position=layout.position.as_subclass(OnCuda))
    assert torch.equal(attention_mask(layout, layout)[:, 0], seen(layout, layout))


@pytest.mark.cuda
@pytest.mark.parametrize("T", (40, 150))
@pytest.mark.parametrize("family", ("qwen3", "qwen2", "llama"))
def test_bfloat16_over_float32_weights_on_cuda_is_that_on_the_cpu(family, T):
    layout, tokens = Layout.of(positions(2, T), None, 8).two_stream(), random_tokens(2, 2 * T)
    model = tiny(family, dtype=torch.float32, initializer_range=0.2)
    model.compute_dtype = torch.bfloat16
    expected = model(tokens, layout)
    logits = model.cuda()(tokens.cuda(), layout.map(Tensor.cuda))
    assert logits.dtype == expected.dtype == torch.bfloat16
    assert (logits.cpu() - expected).float().norm() < 0.05 * expected.float().norm()


@pytest.mark.cuda
def test_the_cuda_cache_equals_the_cpu_uncached_pass():
    layout, tokens = Layout.of(positions(2, 40), None, 8), random_tokens(2, 40)
    expected = tiny(dtype=torch.float32)(tokens, layout)
    model = tiny(dtype=torch.float32).cuda()
    cache = KVCache(model.config, 2, 41, dtype=torch.float32, device="cuda")
    for start in range(0, 40, 8):
        at = slice(start, start + 8)
        block = layout.map(lambda field, at=at: field[:, at].cuda())
        logits = model(tokens[:, at].cuda(), block, cache=cache, columns=positions(2, 40)[:, at].cuda())
        close(logits.cpu(), expected[:, at], rtol=1e-3, atol=1e-3)

"""How many graphs torch.compile makes over batches of many shapes: few, whatever the number of layers."""

import functools
import random

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from conftest import positions, random_tokens, tiny

import cli
import model
from diffusion import Batch, Noising, denoise, loss, training_example
from model import attention, attention_mask
from parallel import Parallel, Ranks, parallelize

LAYERS, MOST = 3, 20  # graphs: of one row or token and of more, of the last layer, each for one shape and then for any


class Graphs:
    """A backend that runs a graph as it was traced; `made`: how many there were."""

    def __init__(self):
        self.made = 0

    def __call__(self, graph, inputs):
        self.made += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    torch._dynamo.reset()
    backend = Graphs()
    compile_module = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(model, "_compiled", functools.cache(torch.compile))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield backend


@pytest.mark.parametrize(("objective", "joined"), [("ar", False), ("mdlm", True), ("bd3lm", True)])
def test_sampling_compiles_a_layer_once_for_all_layers_and_shapes(objective, joined, graphs):
    K, shapes = 4 if objective == "bd3lm" else None, random.Random(0)
    sampler = tiny(num_hidden_layers=LAYERS, objective=objective, block_length=K)
    if joined:
        sampler.join()
    cli.compile_layers(sampler)
    sampler.compiled = False  # the sampler's steps are the next test's
    for _ in range(60):
        prompts = [[7] * shapes.randrange(1, 40) for _ in range(shapes.choice([1, 2, 3]))]
        steps = denoise(sampler, prompts, max_new_tokens=shapes.randrange(2, 12), static=True)
        for _ in zip(range(3), steps):
            pass
    assert 0 < graphs.made <= MOST


@pytest.mark.parametrize("options", [{"end_ids": (5, 6)}, {"speculate": 3}], ids=str)
def test_the_samplers_steps_are_compiled_for_any_shape_and_decode_the_same(options, graphs):
    declared = {"objective": "bd3lm", "block_length": 4, "context": "causal", "right_shift": True}
    plain, compiled = (tiny(num_hidden_layers=LAYERS, **declared) for _ in range(2))
    cli.compile_layers(compiled)
    for n, lengths in enumerate([(9, 5), (14, 3, 8), (6, 20), (31, 7), (4, 5, 6), (17, 17)]):
        how = {"max_new_tokens": 9 + n, "static": True, **options}
        prompts = [random_tokens(length, seed=length).tolist() for length in lengths]
        for ours, theirs in zip(denoise(compiled, prompts, **how), denoise(plain, prompts, **how), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.masked, theirs.masked)
    assert MOST < graphs.made <= 3 * MOST  # eight of a forward, two of them the layers'


def batches(objective: str, steps: int):
    """(example, whether it is trained on) of many lengths and numbers of rows, packed or not."""
    shapes = random.Random(0)
    config = tiny(objective=objective, block_length=4 if objective == "bd3lm" else None, right_shift=False).config
    for step in range(steps):
        B, T = shapes.choice([1, 2, 5]), shapes.randrange(10, 75) * 4
        document = torch.where(torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1)), 0, -1)
        rows = Batch(random_tokens(B, T), document == 0, document, positions(B, T).contiguous(), torch.arange(B))
        yield training_example(rows, config, Noising(), seed=step), step % 10 < 9


CASES = [("ar", "none"), ("mdlm", "full"), ("bd3lm", "selective")]


@pytest.mark.parametrize(("objective", "kept"), CASES)
def test_training_compiles_a_layer_once_for_all_layers_and_shapes(objective, kept, graphs):
    learner = tiny(num_hidden_layers=LAYERS, objective=objective, block_length=4 if objective == "bd3lm" else None)
    options = Parallel(checkpoint_activations=kept, torch_compile=True)
    engine, _ = parallelize(learner, options, Ranks(0, 1, torch.device("cpu")))
    for example, trained in batches(objective, 60):
        with torch.set_grad_enabled(trained):
            value, _ = loss(engine, example)
        if trained:
            value.backward()
    assert 0 < graphs.made <= MOST


class OnCuda(torch.Tensor):
    is_cuda = True


def test_flex_attention_and_its_mask_are_compiled_for_any_shape(graphs):
    for example, _ in batches("bd3lm", 60):
        layout = example.layout
        B, T = layout.position.shape
        if T <= model.TILE:
            continue
        there = layout._replace(position=layout.position.as_subclass(OnCuda))
        mask = attention_mask(there, there)
        assert isinstance(mask, flex.BlockMask)
        q, k = torch.zeros(B, 4, T, 16), torch.zeros(B, 2, T, 16)
        attention(q, k, k, mask)
    assert 0 < graphs.made <= 8  # torch's limit

"""One optimizer step: recomputing, compiling and batching change no gradient and no update."""

import functools
import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import positions, random_tokens, tiny
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import parallel
import train
from diffusion import Batch, Noising, training_example

ALONE = train.Ranks(0, 1, torch.device("cpu"))


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **kwargs or {})


# ---------------------------------------------------------------------------------------------------------------------
# Recomputed and compiled layers


def example_of(config, step: int):
    tokens = random_tokens(2, 12, seed=step)
    rows = Batch(tokens, tokens > 5, torch.zeros_like(tokens), positions(2, 12), step * 2 + torch.arange(2))
    return training_example(rows, config, Noising(), seed=0)


def two_steps(monkeypatch, kept: str, compiled: bool) -> tuple[list, Counter]:
    """Losses and gradients of three layers, and how often each operation ran, or how many graphs were compiled."""
    counted = Counted()

    def backend(graph, inputs):
        counted.calls["graphs"] += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    model = tiny(num_hidden_layers=3, objective="bd3lm", block_length=4, right_shift=False).train()
    with monkeypatch.context() as patch:  # Inductor takes a minute
        patch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
        options = parallel.Parallel(checkpoint_activations=kept, torch_compile=compiled)
        engine, sync = parallel.parallelize(model, options, ALONE)
    figures = []
    for step in range(2):
        with nullcontext() if compiled else counted:  # under which nothing is compiled
            figures += train.gradients(engine, sync, model, [example_of(model.config, step)], 9, 0.0, ALONE)
        figures += [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
    return figures, counted.calls


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
def test_layers_are_compiled_whether_they_are_recomputed_or_not_and_learn_the_same(monkeypatch, kept):
    figures, calls = two_steps(monkeypatch, kept, True)
    assert calls["graphs"] == 2  # of the layers, and of the last, which computes what is asked for alone
    for ours, plain in zip(figures, two_steps(monkeypatch, "none", False)[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_selective_recomputes_neither_products_nor_attention(monkeypatch):
    counts = {kept: two_steps(monkeypatch, kept, False)[1] for kept in ("none", "selective", "full")}
    for name in ("aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"):
        assert counts["selective"][name] == counts["none"][name] < counts["full"][name]
    assert counts["selective"]["aten.silu.default"] == counts["full"]["aten.silu.default"] == 12  # 3 layers, 2 steps


def test_selective_keeps_what_every_fused_attention_of_torch_gives(monkeypatch):
    kept = []
    monkeypatch.setattr(parallel, "create_selective_checkpoint_contexts", kept.extend)
    parallel._selective()["context_fn"]()
    assert torch.ops.higher_order.flex_attention in kept
    names = {op.name().split(".")[0] for op in kept if isinstance(op, torch._ops.OpOverload)}
    every = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    fused = {name for name in every if re.fullmatch(r"aten::_scaled_dot_product_[a-z]+_attention(_for_cpu)?", name)}
    assert len(fused) > 3 and fused <= names

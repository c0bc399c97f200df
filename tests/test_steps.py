"""One optimizer step: recomputing, compiling and batching change no gradient and no update."""

import functools
import itertools
import re
import types
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import positions, random_tokens, tiny
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import loaders
import optim
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


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def one_by_one(matrix, momentum, gradient, rate: float, decay: float) -> None:
    """Muon's step of a matrix, written from its paper (arXiv 2502.16982), in the matrix's own dtype."""
    momentum.mul_(0.95).add_(0.05 * gradient)
    x = 0.05 * gradient + 0.95 * momentum
    x = x / x.norm()
    if x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x if x.shape == matrix.shape else x.T
    matrix.mul_(1 - rate * decay).sub_(0.2 * rate * max(matrix.shape) ** 0.5 * x)


def matrices_of(dtype=torch.float64) -> list[torch.nn.Parameter]:
    shapes = [(6, 9), (9, 6), (6, 9), (4, 4), (6, 9), (9, 6)]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


@pytest.mark.parametrize("dtype, exact", [(torch.float64, 1e-12), (torch.float32, 2e-5)])  # no bfloat16 on a CPU
@pytest.mark.parametrize("stack", [1, 110, 2**26])  # numbers at a time: one matrix, two, all of a shape
def test_muon_updates_many_matrices_as_it_does_one_by_one(monkeypatch, rng, stack, dtype, exact):
    monkeypatch.setattr(optim, "STACK", stack)
    ours, plain = matrices_of(dtype), [matrix.detach().clone() for matrix in matrices_of(dtype)]
    muon, momenta = optim.Muon(ours, lr=0.1, weight_decay=0.3), [torch.zeros_like(matrix) for matrix in plain]
    for step in range(4):
        muon.param_groups[0]["lr"] = 0.1 / (step + 1)
        for n, matrix in enumerate(ours):
            matrix.grad = torch.randn(matrix.shape, generator=rng, dtype=dtype)
            one_by_one(plain[n], momenta[n], matrix.grad, 0.1 / (step + 1), 0.3)
        muon.step()
    for n, matrix in enumerate(ours):
        torch.testing.assert_close(matrix.detach(), plain[n], rtol=exact, atol=exact)
        torch.testing.assert_close(muon.state[matrix]["momentum_buffer"], momenta[n], rtol=exact, atol=exact)


def test_muon_is_torchs_in_float32(rng):
    ours, theirs = matrices_of(torch.float32), matrices_of(torch.float32)
    muon = optim.Muon(ours, lr=0.1, weight_decay=0.3)
    torchs = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=rng)
            b.grad = a.grad.clone()
        muon.step()
        torchs.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 0.1 * 0.2 * 3 * 0.02)  # the products are bfloat16
    torchs.load_state_dict(muon.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_takes_as_many_operations_whatever_the_number_of_layers(optimizer):
    counts = []
    for layers in (2, 7):
        model = tiny(num_hidden_layers=layers)
        optimizers = optim.build_optimizers(model, optim.Optimization(optim=optimizer))
        for _ in range(2):  # the first makes the state
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with Counted() as counted:
                train.update(optimizers, 1e-3, torch.ones(()))
        counts.append(counted.calls.total())
    assert counts[0] == counts[1] > 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_no_value_is_read_back_in_a_step(objective, optimizer):
    model = tiny(objective=objective, block_length=4 if objective == "bd3lm" else None, right_shift=False).train()
    optimizers = optim.build_optimizers(model, optim.Optimization(optim=optimizer))
    example = example_of(model.config, 0)
    with Counted() as counted:
        total, norm = train.gradients(model, lambda on: None, model, [example, example], 9, 1.0, ALONE)
        train.update(optimizers, 1e-3, norm)
        assert not any(name in counted.calls for name in READS)
        total[0].item()
    assert "aten._local_scalar_dense.default" in counted.calls


READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default")


# ---------------------------------------------------------------------------------------------------------------------
# What is otherwise on a GPU


@pytest.mark.parametrize("norm_type", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["ar", "bd3lm"])
def test_a_canvas_rounded_up_has_the_same_loss_and_gradient(objective, norm_type):
    K = 4 if objective == "bd3lm" else None
    model = tiny(objective=objective, block_length=K, right_shift=False).train()
    rows = [{"tokens": random_tokens(n, seed=n).numpy(), "supervised": np.arange(n) > 2} for n in (9, 14, 5)]
    figures = []
    for multiple, T in ((1, 16 if K else 14), (32, 32)):
        canvas = loaders.collate(rows, pad_id=0, block_length=K, eos_id=1, longest=13, multiple=multiple)
        assert canvas["tokens"].shape == (3, T)
        batch = Batch(**canvas, sample=torch.arange(3))
        example = training_example(batch, model.config, Noising(), seed=0, norm_type=norm_type)
        figures.append([*train.gradients(model, lambda on: None, model, [example], 9, 0.0, ALONE)])
        figures[-1] += [example.denominator, *(parameter.grad.clone() for parameter in model.parameters())]
        model.zero_grad()
    for ours, plain in zip(*figures, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_gpu_compiles_unless_told_not_to_and_rounds_up_canvases_whose_padding_is_not_learnt():
    gpu, cpu, tokenizer = torch.device("cuda"), ALONE.device, types.SimpleNamespace(pad_id=0, eos_id=1)
    for flag, on_gpu, on_cpu in ((None, True, False), (True, True, True), (False, False, False)):
        options = parallel.Parallel(torch_compile=flag)
        assert options.compiles_on(gpu) is on_gpu and options.compiles_on(cpu) is on_cpu
    for objective, stage, device in itertools.product(("ar", "mdlm", "bd3lm"), ("sft", "pt"), ("cpu", "cuda")):
        args, config = types.SimpleNamespace(stage=stage, pad_to=None), tiny(objective=objective, block_length=4).config
        options = loaders.collate_for(args, config, tokenizer, device).keywords
        rounds = stage == "sft" and device == "cuda" and objective != "mdlm"
        assert options["multiple"] == (32 if rounds else 1) and not (rounds and options["train_on_padding"])

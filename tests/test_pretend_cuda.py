"""The CUDA branches of sampler, likelihood and training step without a GPU: pretend_cuda.py says what that can tell."""

from collections import Counter

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from conftest import MASK, positions, random_tokens, tiny
from pretend_cuda import CUDA, CudaGenerator, PretendCuda, Refused

import cli
import graphs
import model
from choose import noised
from diffusion import Batch, Decoding, Noising, Prefix, Speculation, denoise, training_example
from likelihood import log_likelihood
from parallel import Ranks
from train import gradients

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 3], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 5]]
OPTIONS = (
    *({}, {"threshold": 0.5}, {"entropy": 0.5}, {"factor": 1.0}, {"remasking": "p2"}, {"cfg_scale": 0.7}),
    {"suppress_tokens": (3,), "begin_suppress_tokens": (4,), "end_ids": (5, 6)},
    *({"speculate": 3}, {"speculate": 1}, {"speculate": 5, "end_ids": (5, 6)}),
)
LENGTH = {"max_new_tokens": 12, "steps": 12}


def a_model(objective: str, dtype=torch.float32, **changes):
    declared = {"objective": objective, "block_length": 4 if objective == "bd3lm" else None}
    if objective == "causal":
        declared = {"objective": "bd3lm", "block_length": 4, "context": "causal"}
    return tiny(dtype=dtype, **declared | {"right_shift": objective == "ar"} | changes)


def on_cuda(objective: str):
    sampler = a_model(objective).to(CUDA)
    cli.prepare(sampler, compiled=False)
    return sampler


@pytest.fixture(autouse=True)
def as_written(monkeypatch):
    """FlexAttention as it is written, not compiled: so the CPU has no backward pass of it."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(model, "_compiled", lambda function: function)
    yield
    graphs.use_cudnn(True)


each_objective = pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm", "causal"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_objective
def test_recorded_forwards_decode_what_the_cpu_does_and_wait_for_nothing(objective, options):
    if objective == "ar" and {*options} & {"remasking", "cfg_scale"}:
        pytest.skip("of diffusion alone")
    if "speculate" in options and objective != "causal":
        pytest.skip("of causal context alone")
    expected = list(denoise(a_model(objective), PROMPTS, **LENGTH, **options))
    with PretendCuda() as gpu:
        sampler = on_cuda(objective)
        assert sampler.model.layers[0].mlp.joined and not torch.backends.cuda.cudnn_sdp_enabled()
        steps = denoise(sampler, PROMPTS, **LENGTH, **options)
        found = [next(steps), next(steps)]
        gpu.waits.clear()
        found += steps
        assert [*gpu.waits] == ["diffusion.py, check_finite: _local_scalar_dense"]  # once all is done
        # Static shapes draft up to the canvas's end and beyond: drafts there, and how many are accepted, may differ.
        pairs = zip(found, expected, strict=True) if "speculate" not in options else [(found[-1], expected[-1])]
        for ours, theirs in pairs:
            assert torch.equal(ours.masked.cpu(), theirs.masked)
            assert torch.equal(ours.tokens.cpu(), theirs.tokens)


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.9, "top_k": 9}, {"remasking": "random"}], ids=str)
def test_what_is_drawn_is_recorded_with_its_generator(options):
    with PretendCuda():
        sampler, generator = on_cuda("bd3lm"), CudaGenerator()
        tokens = list(denoise(sampler, PROMPTS, generator=generator, **LENGTH, **options))[-1].tokens
        assert not (tokens == MASK).any()
        with pytest.raises(Refused, match="a CPU generator"):
            list(denoise(sampler, PROMPTS, generator=torch.Generator(), **LENGTH, **options))


def test_speculation_draws_the_noise_of_each_place_inside_a_recording():
    how = LENGTH | {"speculate": 4, "temperature": 0.8}
    expected = list(denoise(a_model("causal"), PROMPTS, generator=torch.Generator().manual_seed(7), **how))[-1]
    with PretendCuda():
        found = list(denoise(on_cuda("causal"), PROMPTS, generator=torch.Generator().manual_seed(7), **how))[-1]
    assert torch.equal(found.tokens.cpu(), expected.tokens)


def test_what_is_recorded_has_run_before_as_it_is(monkeypatch):
    eager, recorded, advance = set(), set(), Speculation.advance
    with PretendCuda() as gpu:
        sampler = on_cuda("causal")

        def watched(self, W: int) -> None:
            (recorded if gpu.graph else eager).add((W, self.drafted))
            advance(self, W)

        monkeypatch.setattr(Speculation, "advance", watched)
        list(denoise(sampler, [[1, 2, 3]], speculate=3, **LENGTH))  # as wide a prompt as the later forwards
    assert recorded and recorded <= eager


@pytest.mark.parametrize("objective", ["ar", "bd3lm"])
def test_a_kept_cache_serves_the_next_turn_and_is_not_read_in_a_step(objective):
    def turns(sampler) -> list:
        kept, prompt, found = Prefix(), PROMPTS[0], []
        for _ in range(3):
            last = list(denoise(sampler, [prompt], prefix=kept, **LENGTH))[-1].tokens.tolist()
            found.append(last)
            prompt = last[0][:-3]
        return found

    expected = turns(a_model(objective))
    with PretendCuda() as gpu:
        sampler = on_cuda(objective)
        gpu.waits.clear()
        assert turns(sampler) == expected
        assert max(gpu.waits.values()) < LENGTH["steps"], gpu.waits  # in three turns: none is of each forward


def test_noise_on_cuda_is_as_exact_as_that_of_doubles():
    shape, seed = (64, 150_000), 0
    drawn = torch.empty(shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = (logits.double() - 0.7 * drawn.log()).argmax(dim=1)
    with PretendCuda():
        generator = CudaGenerator()
        found = noised(logits.to(CUDA), 0.7, generator.manual_seed(seed))
        assert found.dtype == torch.float32 and torch.equal(found.argmax(dim=1).cpu(), expected)


@pytest.mark.parametrize("holes", [False, True])
@each_objective
def test_the_head_sees_no_more_columns_than_a_block_generates(objective, holes, monkeypatch):
    seen, choose = set(), Decoding.choose
    monkeypatch.setattr(Decoding, "choose", lambda self, hidden, w: (seen.add(len(hidden)), choose(self, hidden, w))[1])
    masks = [[0 < i < 7 for i in range(len(prompt))] for prompt in PROMPTS] if holes else None
    with PretendCuda():
        list(denoise(on_cuda(objective), PROMPTS, canvas_masks=masks, **LENGTH))
    assert seen == {len(PROMPTS) * {"ar": 1, "bd3lm": 4, "causal": 4, "mdlm": 12 + 6 * holes}[objective]}


# What a forward launches


def kernels(objective: str, layers: int) -> Counter:
    """The operations of a recorded forward that launch a kernel, of Qwen3-0.6B's layers but for their width."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": layers}
    options = {} if objective == "ar" else {"block_size": 32}
    with PretendCuda() as gpu:
        sampler = a_model(objective, torch.bfloat16, **shape, block_length=32 if objective == "bd3lm" else None)
        cli.prepare(sampler.to(CUDA), compiled=False)
        steps = denoise(sampler, [[1] * 64], max_new_tokens=128, steps=128, **options)
        while gpu.recorded is None:
            next(steps)
    return gpu.recorded


@pytest.mark.parametrize(("objective", "layer", "besides"), [("ar", 16, 109), ("mdlm", 14, 86), ("bd3lm", 17, 107)])
def test_a_forward_launches_few_kernels(objective, layer, besides):
    two, three = (kernels(objective, layers).total() for layers in (2, 3))
    assert three - two <= layer
    assert 3 * two - 2 * three <= besides


@each_objective
def test_likelihoods_are_those_of_the_cpu(objective):
    contexts, answers = [[1, 2, 3, 4, 5]] * 2 + [[7, 8, 9]], [[3, 4], [5], [6, 7, 8]]

    def score(scorer):
        noise = torch.Generator().manual_seed(0)
        return log_likelihood(scorer, contexts, answers, draws=4, generator=noise, check_greedy=True)

    expected = score(a_model(objective))
    with PretendCuda():
        found = score(a_model(objective).to(CUDA))
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("T", [24, 150])  # a mask for all, FlexAttention
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@each_objective
def test_a_training_step_is_that_of_the_cpu_and_waits_only_at_its_end(objective, T, compute):
    document = torch.where(torch.arange(T) < torch.tensor([[T], [T - 9]]), 0, -1)
    batch = Batch(random_tokens(2, T), document == 0, document, positions(2, T).contiguous(), torch.arange(2))
    beside = {"ar_weight": 0.5} if objective == "causal" else {}
    example = training_example(batch, a_model(objective).config, Noising(), seed=0, **beside)

    def step(learner, example, device) -> list:
        learner.compute_dtype = compute
        gradients(learner, lambda on: None, learner, [example, example], 2.0, 1.0, Ranks(0, 1, device))
        return [parameter.grad for parameter in learner.parameters()]

    expected = step(a_model(objective), example, torch.device("cpu"))
    with PretendCuda() as gpu:
        learner = a_model(objective).to(CUDA)
        gpu.waits.clear()
        found = step(learner, example.map(torch.Tensor.pin_memory), CUDA)
        waits = Counter({where: n for where, n in gpu.waits.items() if "attention_mask" not in where})  # torch's own
        assert waits.total() <= 2, waits  # the loss and the norm
        found = [gradient.cpu() for gradient in found]
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= (1e-5 if compute == torch.float32 else 0.05) * theirs.norm()


def test_what_a_gpu_refuses_is_refused():
    with PretendCuda() as gpu:
        x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
        with pytest.raises(Refused):
            x + torch.ones(3)
        for wait in (
            *(lambda: x.sum().item(), lambda: x[x > 0], lambda: x.tolist(), lambda: x + torch.ones(3).to(CUDA)),
            *(lambda: torch.tensor([1.0], device=CUDA), lambda: torch.rand(3, generator=CudaGenerator(), device=CUDA)),
        ):
            with pytest.raises(Refused), torch.cuda.graph(graph):
                wait()
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            y = x * 2
            x.add_(1)
        assert x[0] == 1 and gpu.waits
        graph.replay()
        graph.replay()
        assert x[0] == 3 and y[0] == 4

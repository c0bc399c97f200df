"""Path planning (p2), the decoding rule that masks again: Open-dLLM's loop, and what any rule must keep."""

from itertools import pairwise

import pytest
import torch
from conftest import MASK, tiny

from choose import path_planning
from diffusion import denoise
from model import Layout


def open_dllm(model, prompt, N, steps) -> tuple[list[int], int]:
    """Open-dLLM's p2 at temperature 0: after step i the floor(N (1 - i / steps)) least confident of the N are masked.

    Confidence is the probability of the token predicted now, everywhere; a token that stays revealed does not change.
    Returns the answer and how often a revealed token was masked again.
    """
    P, again = len(prompt), 0
    tokens = torch.tensor([*prompt, *[MASK] * N])
    for i in range(1, steps + 1):
        logits = model(tokens[None], Layout.of(torch.arange(P + N)[None]))[0]
        if model.config.right_shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        p = logits.softmax(dim=1)
        p[:, MASK] = -1  # never chosen here
        confidence, predicted = p[P:].max(dim=1)
        was = tokens[P:] == MASK
        lowest = confidence.argsort()[: int(N * (1 - i / steps) + 1e-9)]
        masked = torch.zeros(N, dtype=torch.bool)
        masked[lowest] = True
        again += int((masked & ~was).sum())
        answer = torch.where(was, predicted, tokens[P:])
        tokens[P:] = answer.masked_fill(masked, MASK)
    return tokens.tolist(), again


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize("steps", [12, 4])
def test_p2_is_open_dllms(right_shift, steps):
    remasked = 0
    for seed in range(4):
        model = tiny("qwen2", seed=seed, objective="mdlm", right_shift=right_shift)
        prompts = [[1, 2, 3, 4], [7, 8]]
        *_, last = denoise(model, prompts, max_new_tokens=12, steps=steps, remasking="p2")
        for row, prompt in enumerate(prompts):
            expected, again = open_dllm(model, prompt, 12, steps)
            assert last.tokens[row, : len(prompt) + 12].tolist() == expected
            remasked += again
    assert remasked > 0


@pytest.mark.parametrize(("objective", "K"), [("mdlm", None), ("bd3lm", 4), ("ar", None)])
def test_p2_ends_leaves_the_prompt_and_masks_only_in_the_open_block(objective, K):
    model = tiny(objective=objective, block_length=K)
    prompt = [5, 6, 7]
    steps = list(denoise(model, [prompt], max_new_tokens=9, steps=9, remasking="p2", end_ids=tuple(range(0, MASK, 2))))
    for before, after in pairwise(steps):
        assert after.masked.sum() < before.masked.sum()
        again = (after.masked & ~before.masked)[0].nonzero()[:, 0]
        block = 9 if objective == "mdlm" else 1 if objective == "ar" else K
        first = int(before.masked[0].nonzero()[0])
        assert objective == "mdlm" or (again // block == first // block).all()
        assert after.tokens[0, :3].tolist() == prompt
        assert ((after.tokens == MASK) == after.masked).all() or objective == "ar"
        assert not after.confidence[after.masked].any()
    assert steps[-1].done.all()


def test_p2_ends_at_an_end_token_only_once_that_cannot_be_masked_again():
    """What it has then said is what it says where nothing ends it."""
    ends, earlier = range(0, MASK, 2), 0
    for seed in range(8):
        model = tiny(seed=seed, objective="mdlm")
        options = {"max_new_tokens": 16, "steps": 16, "block_size": 8, "remasking": "p2"}
        free, steps = (list(denoise(model, [[5, 6]], **options, end_ids=end_ids)) for end_ids in ((), tuple(ends)))
        answer = steps[-1].tokens[0, 2:].tolist()
        first = next(i for i, token in enumerate(answer) if token in ends)
        assert answer[: first + 1] == free[-1].tokens[0, 2 : 2 + first + 1].tolist()
        earlier += len(steps) < len(free)
    assert earlier > 0


def test_one_token_a_step_without_regrets_is_the_fixed_count():
    """Where revealed tokens are the most confident, nothing is masked again."""
    confidence = torch.tensor([[-torch.inf, 0.9, 0.1, 0.8, 0.3]])
    masked = torch.tensor([[False, False, True, False, True]])
    kept = path_planning(confidence, None, masked, torch.tensor([1]), None)
    assert kept.tolist() == [[False, False, True, False, False]]
    regret = torch.tensor([[-torch.inf, 0.05, 0.1, 0.8, 0.3]])
    assert path_planning(regret, None, masked, torch.tensor([1]), None).tolist() == [[False, True, False, False, False]]


def test_p2_with_a_threshold_is_refused():
    with pytest.raises(ValueError, match="p2"):
        list(denoise(tiny(objective="mdlm"), [[1]], max_new_tokens=3, remasking="p2", threshold=0.9))

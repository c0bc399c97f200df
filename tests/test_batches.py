"""Rows move from one batch to another at any forward, and are decoded as they would be alone."""

import random

import pytest
import torch
from conftest import random_tokens, tiny

from diffusion import Sampling, decoder, denoise

END = 7
CASES = {  # name: declared, options
    "ar": ({"objective": "ar", "right_shift": True}, {}),
    "mdlm": ({"objective": "mdlm"}, {"block_size": 4}),
    "mdlm, by threshold": ({"objective": "mdlm"}, {"block_size": 4, "threshold": 0.3}),
    "mdlm, aligned to the sequence": ({"objective": "mdlm"}, {"block_size": 4, "block_align": "sequence"}),
    "mdlm, may mask again": ({"objective": "mdlm"}, {"block_size": 6, "remasking": "p2"}),
    "mdlm, guided": ({"objective": "mdlm"}, {"block_size": 4, "cfg_scale": 0.5}),
    "bd3lm": ({"objective": "bd3lm", "block_length": 4}, {}),
    "bd3lm, shifted, by threshold": (
        {"objective": "bd3lm", "block_length": 4, "right_shift": True},
        {"threshold": 0.3},
    ),
    "bd3lm, aligned to the prompt, guided": (
        {"objective": "bd3lm", "block_length": 4},
        {"block_align": "prompt", "cfg_scale": 0.5},
    ),
    "bd3lm, causal": ({"objective": "bd3lm", "block_length": 4, "right_shift": True, "context": "causal"}, {}),
    "speculation": (
        {"objective": "bd3lm", "block_length": 4, "right_shift": True, "context": "causal"},
        {"speculate": 3},
    ),
}
PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 9, 1, 6, 14, 4)]


def alone(model, prompt: list[int], mask: list[bool] | None, options: dict) -> tuple[list[int], int]:
    """(canvas, forwards) of a row by itself."""
    masks = None if mask is None else [mask]
    *_, last = denoise(model, [prompt], canvas_masks=masks, end_ids=() if mask else (END,), **options)
    return last.tokens[0].tolist(), last.forwards


def moving(model, prompts: list[list[int]], masks: list | None, options: dict, seed: int, static: bool) -> dict:
    """row: (canvas, forwards), where rows come at random forwards, and each leaves when it is done."""
    chance, kind = random.Random(seed), decoder(Sampling(**options))
    waiting, inside, batch, found = list(range(len(prompts))), [], None, {}
    spent = dict.fromkeys(waiting, 0)
    while waiting or inside:
        joining = [waiting.pop(0) for _ in range(chance.randint(0 if inside else 1, 2)) if waiting]
        staying = [(row, n) for n, row in enumerate(inside) if row not in found]
        # Newcomers go before, after, or between the others.
        rows = [row for row, _ in staying] + joining
        chance.shuffle(rows)
        if not rows:
            inside = []
            continue
        before, canvases = batch, None if masks is None else [masks[row] for row in rows]
        ends = () if masks else (END,)
        batch = kind(model, [prompts[row] for row in rows], Sampling(**options), canvases, ends, None, None, static)
        if staying:
            batch.resume(before, [rows.index(row) for row, _ in staying], [n for _, n in staying])
        steps, inside = batch.run(), rows
        next(steps)
        for _ in range(chance.randint(1, 4)):
            done = batch.done.tolist()
            step = next(steps, None)
            if step is None:
                break
            for n, row in enumerate(inside):
                spent[row] += not done[n]
        for n, row in enumerate(inside):
            if batch.done[n] and row not in found:
                found[row] = batch.tokens[n, : int(batch.length[n])].tolist(), spent[row]
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_that_come_and_go_are_decoded_as_alone(name, static):
    declared, options = CASES[name]
    model = tiny(**declared)
    options = {"max_new_tokens": 11, "steps": 8} | options
    wanted = {row: alone(model, prompt, None, options) for row, prompt in enumerate(PROMPTS)}
    for seed in range(3):
        assert moving(model, PROMPTS, None, options, seed, static) == wanted


@pytest.mark.parametrize("objective", ["mdlm", "bd3lm"])
@torch.no_grad()
def test_canvases_that_come_and_go_are_filled_in_as_alone(objective):
    model = tiny(objective=objective, block_length=4 if objective == "bd3lm" else None)
    chance = random.Random(0)
    masks = [[chance.random() < 0.5 for _ in prompt] for prompt in PROMPTS]
    masks = [mask if any(mask) else [True] * len(mask) for mask in masks]
    options = {"max_new_tokens": 0, "steps": 8} | ({"block_size": 4} if objective == "mdlm" else {})
    wanted = {row: alone(model, prompt, masks[row], options) for row, prompt in enumerate(PROMPTS)}
    for seed in range(3):
        assert moving(model, PROMPTS, masks, options, seed, False) == wanted


@torch.no_grad()
def test_a_row_of_speculation_keeps_its_noise():
    """A temperature's noise belongs to the row: it moves with it."""
    model, options = tiny(**CASES["speculation"][0]), Sampling(max_new_tokens=12, speculate=3, temperature=1.0)

    def generator():
        return torch.Generator().manual_seed(5)

    whole = decoder(options)(model, PROMPTS[:2], options, None, (), None, generator(), False)
    *_, wanted = whole.run()
    first = decoder(options)(model, PROMPTS[:2], options, None, (), None, generator(), False)
    steps = first.run()
    for _ in range(3):
        next(steps)
    second = decoder(options)(model, [PROMPTS[3], PROMPTS[1]], options, None, (), None, torch.Generator(), False)
    second.resume(first, [1], [1])
    *_, last = second.run()
    length = int(second.length[1])
    assert last.tokens[1, :length].tolist() == wanted.tokens[1, :length].tolist()

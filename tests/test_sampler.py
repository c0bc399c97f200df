"""The one sampler: the reference's samples token for token, a slow and obvious sampler, and the laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FAMILIES,
    MASK,
    VOCAB,
    golden_arrays,
    golden_json,
    golden_model,
    positions,
    random_tokens,
    tiny,
    watched_masks,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import choose
import diffusion
import graphs
from choose import (
    confidence_factor,
    confidence_threshold,
    entropy_bound,
    fixed_count,
    gumbel,
    path_planning,
    ranks,
    restrict,
)
from diffusion import (
    Batch,
    Noise,
    ar_example,
    bd3lm_example,
    denoise,
    mdlm_example,
    reveal_schedule,
)
from model import Layout

# Every way of decoding: what the config declares, and how denoise is called.
MODES = {
    "ar": ({"objective": "ar"}, {}),
    "mdlm": ({"objective": "mdlm"}, {"block_size": 4}),
    "mdlm.one_block": ({"objective": "mdlm"}, {}),
    "mdlm.sequence": ({"objective": "mdlm"}, {"block_size": 4, "block_align": "sequence"}),
    "mdlm.shift": ({"objective": "mdlm", "right_shift": True}, {"block_size": 4}),
    "bd3lm": ({"objective": "bd3lm", "block_length": 4}, {}),
    "bd3lm.odd": ({"objective": "bd3lm", "block_length": 5}, {}),
    "bd3lm.prompt": ({"objective": "bd3lm", "block_length": 4}, {"block_align": "prompt"}),
    "bd3lm.shift": ({"objective": "bd3lm", "block_length": 4, "right_shift": True}, {}),
    "bd3lm.shift.prompt": (
        {"objective": "bd3lm", "block_length": 4, "right_shift": True},
        {"block_align": "prompt"},
    ),
    "bd3lm.shift.1": ({"objective": "bd3lm", "block_length": 1, "right_shift": True}, {}),
    "bd3lm.causal": ({"objective": "bd3lm", "block_length": 4, "context": "causal"}, {}),
    "bd3lm.causal.shift": (
        {"objective": "bd3lm", "block_length": 4, "context": "causal", "right_shift": True},
        {},
    ),
    "bd3lm.causal.other.prompt": (
        {"objective": "bd3lm", "block_length": 4, "context": "causal"},
        {"block_size": 3, "block_align": "prompt"},
    ),
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_infilling_mode = pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.endswith(".prompt")])
PROMPTS = [random_tokens(n, seed=n).tolist() for n in (6, 1, 9, 4)]
NEW = 10


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def a_model(mode: str, family: str = "qwen3", **changes):
    return tiny(family, **MODES[mode][0] | changes)


def decode(mode, model, prompts, **options):
    """All steps, as a list."""
    steps = denoise(model, prompts, **{"max_new_tokens": NEW} | MODES[mode][1] | options)
    steps = list(itertools.islice(steps, 200))
    assert len(steps) < 200, "decoding does not end"
    return steps


def history(steps, row: int, length: int) -> list[list[int]]:
    """A row's canvases, until it is done."""
    count = next(i for i, step in enumerate(steps) if step.done[row])
    return [step.tokens[row, :length].tolist() for step in steps[: count + 1]]


# ---------------------------------------------------------------------------------------------------------------------
# The reference's samples

SAMPLES = golden_json("samples")
# Usable: not within rounding of another outcome. Where `departs` is not empty we depart on purpose: the reference lets
# the mask id be committed, and makes a pad token generated inside an answer invisible to later blocks.
CASES = [case for case in SAMPLES["cases"] if case.get("usable") and not case["departs"]]


def distinct(canvases) -> list[list[int]]:
    return [canvas for canvas, _ in itertools.groupby(canvases)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_samples_equal_the_reference_token_for_token(case):
    special = SAMPLES["special_ids"][case["arch"]]
    mask_id = special["mask_token_id"]
    infill, bd3lm = case["method"] == "infill", case["sampler"] == "bd3lm"
    options = {"steps": 128, "block_size": 32 if bd3lm else 128} | case["config"]
    model = golden_model(
        case["arch"],
        objective=case["sampler"],
        mask_token_id=mask_id,
        right_shift=options.pop("right_shift_logits", False),
    )
    prompts = [prompt or [special["bos_token_id"]] for prompt in case["prompts"]]  # the reference begins with bos
    longest = max(map(len, prompts))
    max_length = options.pop("max_length", None)
    if infill:
        # The reference counts blocks over the longest canvas of a batch, we over each row's own.
        blocks = -(-longest // (options["block_size"] or longest))
        options["steps_per_block"] = -(-options.pop("steps") // blocks)
        options |= {"canvas_masks": [[token == mask_id for token in prompt] for prompt in prompts], "max_new_tokens": 0}
    else:
        options["block_align"] = "prompt"  # its blocks start where the prompt ends
        if options["max_new_tokens"] is None:
            options["max_new_tokens"] = max_length - longest
    if case["tokenizer_overrides"]:
        options["end_ids"] = tuple(case["tokenizer_overrides"].values())

    steps = list(denoise(model, prompts, scheduler=case["scheduler"], **options))
    theirs = golden_arrays("samples")[f"{case['name']}.histories"]  # (n, B, T)
    for row, prompt in enumerate(prompts):
        length = len(prompt) + options["max_new_tokens"]
        # Its canvas: bd3lm's prompts are padded on the left to a multiple of the block, and it grows by one block at a
        # time (-1: not there yet).
        left = -longest % options["block_size"] + longest - len(prompt) if bd3lm else 0
        expected = theirs[:, row, left : left + length]
        expected = F.pad(expected, (0, length - expected.shape[1]), value=-1)
        expected = distinct(torch.where(expected == -1, mask_id, expected).tolist())
        ours = distinct(history(steps, row, length))
        if "end_ids" in options:  # our row is done at its end token; the reference's goes on with the others
            ended = set(ours[-1][len(prompt) :]) & set(options["end_ids"])
            expected = expected[: len(ours)] if ended else expected
        assert ours == expected
    if "end_ids" not in options:
        assert not steps[-1].masked.any()


# ---------------------------------------------------------------------------------------------------------------------
# A slow and obvious sampler


def slow_sampler(model, canvas, holes, *, attention, K, offset, shift, steps, causal=False, cfg_scale=0.0, keep=()):
    """All canvases of one row: no cache, no batch, no window; a whole forward at every step, selection in Python.

    attention: the block length of attention (None: bidirectional); K: of the decoding blocks; causal: clean tokens see
    only what is before them, which the current block's are not until it is done.
    """
    canvas, holes, T = list(canvas), set(holes), len(canvas)
    given = [i for i in range(T) if i not in holes and canvas[i] not in keep]
    for i in holes:
        canvas[i] = MASK
    canvases = [list(canvas)]

    def forward(ids, block):
        layout = Layout.of(positions(1, T), None, attention, torch.tensor([offset]))
        if causal:
            start, stop = max(block * K - offset, 0), min((block + 1) * K - offset, T)
            current = positions(1, T) >= start
            layout = layout._replace(block=torch.where(current, start, positions(1, T)), noisy=current.long())
            ids, layout = ids[:stop], layout.map(lambda field: field[:, :stop])
        return model(torch.tensor([ids]), layout)[0]

    while holes:
        block = (min(holes) + offset) // K
        todo = {i for i in holes if (i + offset) // K == block}
        for quota in reveal_schedule(torch.tensor(len(todo)), steps).tolist():
            if not todo:
                break
            logits = forward(canvas, block)
            if cfg_scale:
                free = forward([MASK if i in given else token for i, token in enumerate(canvas)], block)
                logits = free + (cfg_scale + 1) * (logits - free)
            choices = []
            for i in sorted(todo):
                scores = logits[max(i - shift, 0)]
                token = max((v for v in range(VOCAB) if v != MASK), key=scores.tolist().__getitem__)
                choices.append((scores.softmax(dim=0)[token].item(), i, token))
            for _, i, token in sorted(choices, key=lambda choice: -choice[0])[:quota]:
                canvas[i] = token
                todo.remove(i)
                holes.remove(i)
            canvases.append(list(canvas))
    return canvases


def slow(mode, model, prompt, *, canvas_mask=None, new=NEW, steps=128, steps_per_block=None, **guidance):
    declared, options = MODES[mode]
    canvas = prompt + [MASK] * new
    holes = [i for i, hole in enumerate(canvas_mask or []) if hole] + list(range(len(prompt), len(canvas)))
    objective = declared["objective"]
    attention = {"ar": 1, "mdlm": None, "bd3lm": declared.get("block_length")}[objective]
    K = options.get("block_size") or attention or len(canvas)
    align = options.get("block_align", "prompt" if objective == "mdlm" else "sequence")
    offset = -len(prompt) % K if align == "prompt" and canvas_mask is None else 0
    shift = int(objective == "ar" or declared.get("right_shift", False))
    span = len(canvas) if canvas_mask is not None else new
    steps = steps_per_block or math.ceil(steps / math.ceil(span / K))
    how = {"attention": attention, "K": K, "offset": offset, "shift": shift, "causal": "context" in declared}
    return slow_sampler(model, canvas, holes, steps=steps, **how, **guidance)


@pytest.mark.parametrize(("family", "steps"), [("qwen3", 1), ("qwen3", 40), *((family, 7) for family in FAMILIES)])
@each_mode
def test_cached_windowed_decoding_equals_the_slow_sampler(mode, family, steps):
    model = a_model(mode, family)
    for prompt in PROMPTS:
        ours = history(decode(mode, model, [prompt], steps=steps), 0, len(prompt) + NEW)
        assert ours == slow(mode, model, prompt, steps=steps)


@pytest.mark.parametrize("keep", ((), tuple(PROMPTS[0][:3])))
@each_mode
def test_guided_decoding_equals_the_slow_sampler(mode, keep):
    model = a_model(mode)
    for prompt in PROMPTS[:2]:
        ours = decode(mode, model, [prompt], steps=6, cfg_scale=1.5, cfg_keep_tokens=keep)
        assert history(ours, 0, len(prompt) + NEW) == slow(mode, model, prompt, steps=6, cfg_scale=1.5, keep=keep)


HOLES = [[False, True, True, False, False, False, True, False, True, True, True, False, True]]
HOLES += [[False] * 12 + [True], [False] + [True] * 12]


@pytest.mark.parametrize("new", (0, 3))
@pytest.mark.parametrize("holes", HOLES, ids=("scattered", "last", "all_but_first"))
@each_infilling_mode
def test_infilling_equals_the_slow_sampler(mode, holes, new):
    model, prompt = a_model(mode), random_tokens(13).tolist()
    ours = decode(mode, model, [prompt], canvas_masks=[holes], max_new_tokens=new, steps=9)
    assert history(ours, 0, 13 + new) == slow(mode, model, prompt, canvas_mask=holes, new=new, steps=9)
    given = [token for token, hole in zip(prompt, holes) if not hole]
    assert [token for token, hole in zip(ours[-1].tokens[0].tolist(), holes) if not hole] == given


@pytest.mark.parametrize("family", FAMILIES)
def test_ar_decoding_is_the_greedy_argmax_loop(family):
    model = a_model("ar", family, mask_token_id=None)
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(NEW):
            logits = model(torch.tensor([tokens]), Layout.of(positions(1, len(tokens)), None, 1))
            tokens.append(int(logits[0, -1].argmax()))
        assert decode("ar", model, [prompt])[-1].tokens[0].tolist() == tokens


def test_bd3lm_of_block_length_1_with_right_shift_decodes_as_ar():
    for prompt in PROMPTS:
        ar, bd3lm = (decode(mode, a_model(mode), [prompt])[-1].tokens for mode in ("ar", "bd3lm.shift.1"))
        assert torch.equal(ar, bd3lm)


# ---------------------------------------------------------------------------------------------------------------------
# Laws


@pytest.mark.parametrize("options", ({}, {"cfg_scale": 1.5}, {"threshold": 0.3}), ids=str)
@each_mode
def test_a_batch_of_ragged_prompts_equals_single_rows(mode, options):
    model = a_model(mode)
    options = {"steps": 11} | options
    together = decode(mode, model, PROMPTS, **options)
    alone = [decode(mode, model, [prompt], **options) for prompt in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        length = len(prompt) + NEW
        assert history(together, row, length) == history(alone[row], 0, length)
        assert not together[-1].tokens[row, length:].any() and not together[-1].masked[row, length:].any()
    assert together[-1].forwards == max(steps[-1].forwards for steps in alone)


@each_infilling_mode
def test_a_batch_of_ragged_canvases_equals_single_rows(mode):
    model = a_model(mode)
    canvases = [random_tokens(n, seed=n).tolist() for n in (13, 6, 9)]
    masks = [[i % 3 == 1 or i > 5 for i in range(len(canvas))] for canvas in canvases]
    options = {"max_new_tokens": 2, "steps": 6}
    together = decode(mode, model, canvases, canvas_masks=masks, **options)
    for row, canvas in enumerate(canvases):
        alone = decode(mode, model, [canvas], canvas_masks=[masks[row]], **options)
        assert history(together, row, len(canvas) + 2) == history(alone, 0, len(canvas) + 2)


@pytest.mark.parametrize("family", FAMILIES)
@each_mode
def test_the_logits_tokens_are_picked_from_are_those_of_training(mode, family, monkeypatch):
    model, recorded = a_model(mode, family), []
    pick = diffusion.choose_tokens

    def record(hidden, weight, *options):
        recorded.append(hidden[0] @ weight.T)
        return pick(hidden, weight, *options)

    monkeypatch.setattr(diffusion, "choose_tokens", record)
    config, prompt = model.config, PROMPTS[0]
    steps = decode(mode, model, [prompt], steps=12)
    assert len(recorded) == len(steps) - 1
    # Training knows no offset: a canvas whose blocks do not begin at 0 is a document whose positions do not.
    prompt_aligned = config.objective == "bd3lm" and MODES[mode][1].get("block_align") == "prompt"
    K = MODES[mode][1].get("block_size", config.block_length)
    offset = -len(prompt) % K if prompt_aligned else 0
    tolerance = 1e-4 if offset else 1e-9  # angles are float32
    for step, logits in zip(steps, recorded):
        T = step.tokens.shape[1]
        looked_at = step.masked & (step.masked.cumsum(dim=1) <= len(logits))  # the current block's masks
        position, zeros = offset + positions(1, T), torch.zeros_like(step.tokens)
        batch = Batch(step.tokens, looked_at, zeros, position, zeros[:, 0])
        noise, options = Noise(torch.ones(1, T), looked_at), {"mask_id": MASK, "right_shift": bool(config.right_shift)}
        if config.objective == "ar":
            example = ar_example(batch)
        elif config.objective == "mdlm":
            everything = batch._replace(supervised=step.masked)
            example = mdlm_example(everything, noise._replace(masked=step.masked), **options)
        else:
            example = bd3lm_example(batch, noise, block_length=K, causal=config.causal, **options)
        trained = model(example.tokens, example.layout, index=example.index)[: len(logits)]
        torch.testing.assert_close(logits, trained, rtol=tolerance, atol=tolerance)


@each_mode
def test_generation_is_infilling_of_a_canvas_that_ends_in_masks(mode):
    model = a_model(mode)
    options = {"block_align": "sequence", "steps_per_block": 2}
    if mode == "mdlm.one_block":
        options["block_size"] = 20
    generated = decode(mode, model, PROMPTS[:1], **options)
    canvas, holes = PROMPTS[0] + [7] * NEW, [False] * len(PROMPTS[0]) + [True] * NEW
    filled = decode(mode, model, [canvas], canvas_masks=[holes], max_new_tokens=0, **options)
    assert len(generated) == len(filled)
    for a, b in zip(generated, filled):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.masked, b.masked)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@each_mode
def test_the_mask_id_is_never_committed(mode, temperature, monkeypatch, rng):
    model, loved = a_model(mode, tie_word_embeddings=False), []
    model.lm_head.weight[MASK] *= 50
    pick = diffusion.choose_tokens

    def record(hidden, weight, *options):
        loved.append(((hidden[0] @ weight.T).argmax(dim=1) == MASK).any())
        return pick(hidden, weight, *options)

    monkeypatch.setattr(diffusion, "choose_tokens", record)
    last = decode(mode, model, PROMPTS, temperature=temperature, generator=rng)[-1]
    assert any(loved)
    assert last.done.all() and not last.masked.any() and not (last.tokens == MASK).any()


@each_mode
def test_a_mask_id_in_the_prompt_is_given_like_any_token(mode):
    prompt = [3, MASK, 5]
    steps = decode(mode, a_model(mode), [prompt])
    assert all(step.tokens[0, :3].tolist() == prompt and not step.masked[0, :3].any() for step in steps)


@each_mode
def test_given_and_revealed_tokens_stay(mode):
    model = a_model(mode)
    for before, after in itertools.pairwise(decode(mode, model, PROMPTS, steps=8)):
        assert torch.equal(before.tokens[~before.masked], after.tokens[~before.masked])
        assert not (after.masked & ~before.masked).any()
        assert (after.tokens[after.masked] == MASK).all()
        assert after.forwards == before.forwards + 1


@each_mode
def test_an_end_token_stops_the_row_and_the_loop(mode):
    model, prompt = a_model(mode), PROMPTS[0]
    free = decode(mode, model, [prompt], steps_per_block=4)
    answer = free[-1].tokens[0, len(prompt) :].tolist()
    at = max(answer.index(token) for token in answer[:6])
    steps = decode(mode, model, [prompt], steps_per_block=4, end_ids=(answer[at],))
    place = len(prompt) + at
    assert steps[-1].done.all() and steps[-1].tokens[0, : place + 1].tolist() == prompt + answer[: at + 1]
    assert not steps[-1].masked[0, : place + 1].any()
    for ours, theirs in zip(steps, free):
        assert torch.equal(ours.tokens, theirs.tokens)
    # It stops at the very step at which nothing before the end token is masked any more.
    complete = [not step.masked[0, : place + 1].any().item() for step in free]
    assert len(steps) == complete.index(True) + 1
    if mode != "mdlm.one_block":
        assert steps[-1].forwards < free[-1].forwards


@each_mode
def test_a_row_that_is_done_changes_no_more_and_holds_up_no_other(mode):
    model = a_model(mode)
    free = decode(mode, model, PROMPTS, steps_per_block=3)
    end = int(free[-1].tokens[0, len(PROMPTS[0])])
    together = decode(mode, model, PROMPTS, steps_per_block=3, end_ids=(end,))
    assert together[-1].forwards == max(
        decode(mode, model, [prompt], steps_per_block=3, end_ids=(end,))[-1].forwards for prompt in PROMPTS
    )
    for row, prompt in enumerate(PROMPTS):
        alone = decode(mode, model, [prompt], steps_per_block=3, end_ids=(end,))
        ours = history(together, row, len(prompt) + NEW)
        assert ours == history(alone, 0, len(prompt) + NEW)
        assert together[-1].tokens[row, : len(prompt) + NEW].tolist() == ours[-1]


@each_mode
def test_confidence_is_the_probability_of_a_token_when_it_was_chosen(mode):
    model = a_model(mode)
    steps = decode(mode, model, PROMPTS, steps=8)
    given = [len(prompt) for prompt in PROMPTS]
    for before, after in itertools.pairwise(steps):
        settled = before.masked & ~after.masked
        assert (after.confidence[settled] > 0).all() and (after.confidence <= 1).all()
        assert torch.equal(after.confidence[~settled], before.confidence[~settled])
        assert not after.confidence[after.masked].any()
    assert not any(steps[-1].confidence[row, :n].any() for row, n in enumerate(given))
    random = decode(mode, model, PROMPTS[:1], remasking="random", generator=torch.Generator().manual_seed(0))
    first = next(step for step in random if step.forwards == 1)
    settled = (first.confidence > 0)[0].nonzero()[0, 0]
    if mode == "mdlm.one_block":  # its first forward looks at everything, whatever stays
        layout = Layout.of(positions(1, random[0].tokens.shape[1]))
        probability = model(random[0].tokens, layout).softmax(dim=-1)[0, settled, first.tokens[0, settled]]
        torch.testing.assert_close(first.confidence[0, settled], probability)


# A cache kept from call to call


CONVERSATIONS = {  # each prompt: what it makes of the canvas before it, (prompt, answer)
    "longer": lambda prompt, answer: prompt + answer + [5, 6, 7],
    "cut": lambda prompt, answer: prompt + answer[:3] + [8],
    "the same": lambda prompt, answer: prompt,
    "shorter": lambda prompt, answer: prompt[:-2],
    "another": lambda prompt, answer: [9, *prompt],
}


@pytest.mark.parametrize("options", ({}, {"threshold": 0.3}, {"end_ids": (3, 4, 5, 6, 7, 8)}), ids=str)
@pytest.mark.parametrize("mode", ("ar", "bd3lm", "bd3lm.odd", "bd3lm.shift", "bd3lm.shift.1"))
def test_a_kept_cache_gives_what_a_fresh_one_gives(mode, options):
    model, kept, prompt, widths = a_model(mode), diffusion.Prefix(), PROMPTS[0], []
    model.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    K = model.config.block_length or 1
    for turn in (*CONVERSATIONS, "longer", "longer"):
        fresh = decode(mode, model, [prompt], **options)
        widths.clear()
        again = decode(mode, model, [prompt], prefix=kept, **options)
        assert len(fresh) == len(again)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(fresh, again))
        canvas = again[-1].tokens[0].tolist()
        assert kept.tokens == canvas[: len(kept.tokens)] and len(kept.tokens) % K == 0
        before, prompt = kept.tokens, CONVERSATIONS[turn](prompt, canvas[len(prompt) :])
    assert len(before) > 2 * K and widths[0] <= len(prompt) - len(before) + 2 * K


@pytest.mark.parametrize("mode", ("ar", "bd3lm", "bd3lm.shift"))
def test_a_kept_cache_is_right_after_an_answer_that_was_broken_off(mode):
    model, kept = a_model(mode), diffusion.Prefix()
    for forwards in (0, 1, 4, 7):
        for step in denoise(model, PROMPTS[:1], max_new_tokens=NEW, prefix=kept):
            if step.forwards == forwards:
                break
        prompt = step.tokens[0, : len(PROMPTS[0]) + forwards // 2].tolist()
        fresh, again = (decode(mode, model, [prompt], prefix=cache)[-1].tokens for cache in (None, kept))
        assert torch.equal(fresh, again)


def test_a_kept_cache_is_none_of_another_block_size():
    model, kept, prompt = tiny(objective="bd3lm", block_length=None), diffusion.Prefix(), random_tokens(40).tolist()
    for K in (16, 3, 8, 20, 20):
        options = {"max_new_tokens": NEW, "block_size": K}
        fresh, again = (list(denoise(model, [prompt], prefix=cache, **options)) for cache in (None, kept))
        assert torch.equal(fresh[-1].tokens, again[-1].tokens)


@pytest.mark.parametrize("mode", ("ar", "bd3lm", "bd3lm.shift"))
def test_a_kept_cache_serves_what_is_before_the_first_mask(mode):
    """Also where the earlier prompt had, as given tokens, mask ids in the place of masks."""
    model, kept, holes = a_model(mode), diffusion.Prefix(), [6 < i < 10 for i in range(24)]
    prompt = [MASK if hole else token for token, hole in zip(random_tokens(24).tolist(), holes)]
    list(denoise(model, [prompt], max_new_tokens=NEW, prefix=kept))
    for _ in range(2):
        options = {"canvas_masks": [holes], "max_new_tokens": 2}
        fresh, again = (list(denoise(model, [prompt], prefix=cache, **options)) for cache in (None, kept))
        assert torch.equal(fresh[-1].tokens, again[-1].tokens)


@each_mode
def test_an_end_token_in_the_prompt_does_not_stop_the_row(mode):
    model, prompt = a_model(mode), PROMPTS[0]
    free = decode(mode, model, [prompt])
    end = next(token for token in prompt if token not in free[-1].tokens[0, len(prompt) :].tolist())
    assert torch.equal(decode(mode, model, [prompt], end_ids=(end,))[-1].tokens, free[-1].tokens)


@each_mode
def test_an_empty_prompt_generates(mode):
    if mode == "ar":
        pytest.skip("an AR model has nothing to predict from")
    model = a_model(mode)
    steps = decode(mode, model, [[], PROMPTS[0]], steps_per_block=4)
    assert steps[-1].done.all() and not steps[-1].masked.any() and not (steps[-1].tokens == MASK).any()


@each_mode
def test_nothing_to_generate_takes_no_forward(mode):
    (step,) = decode(mode, a_model(mode), PROMPTS, max_new_tokens=0)
    assert step.done.all() and step.forwards == 0 and step.tokens[0, :6].tolist() == PROMPTS[0]


# How many forwards


def blocks_of(mode, prompt) -> list[int]:
    """How many tokens each decoding block generates."""
    declared, options = MODES[mode]
    length = len(prompt) + NEW
    K = (
        options.get("block_size")
        or {"ar": 1, "mdlm": length, "bd3lm": declared.get("block_length")}[declared["objective"]]
    )
    aligned = options.get("block_align", "prompt" if declared["objective"] == "mdlm" else "sequence")
    offset = -len(prompt) % K if aligned == "prompt" else 0
    return [
        len(list(block)) for _, block in itertools.groupby(range(len(prompt), length), key=lambda i: (i + offset) // K)
    ]


def test_ar_takes_one_forward_a_token():
    assert decode("ar", a_model("ar"), PROMPTS)[-1].forwards == NEW


@pytest.mark.parametrize("steps_per_block", (1, 3, 50))
@each_mode
def test_forwards_are_the_steps_that_reveal_and_no_more(mode, steps_per_block):
    """Writing a finished block to the cache costs no forward; steps beyond the tokens cost none."""
    for prompt in PROMPTS:
        steps = decode(mode, a_model(mode), [prompt], steps_per_block=steps_per_block)
        expected = sum(
            int((reveal_schedule(torch.tensor(n), steps_per_block) > 0).sum()) for n in blocks_of(mode, prompt)
        )
        assert steps[-1].forwards == expected == len(steps) - 1


@each_mode
def test_each_forward_feeds_no_more_than_it_must(mode):
    """Cached decoding feeds the prompt once, and then a block, with the one before it to be written back."""
    if mode.startswith("mdlm"):
        pytest.skip("not cached")
    model, widths = a_model(mode), []
    model.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    decode(mode, model, PROMPTS[:1])
    K = model.config.block_length or 1
    assert widths[0] <= len(PROMPTS[0]) + K and max(widths[1:]) <= 2 * K + int(model.config.right_shift or 0)
    if mode == "ar":
        assert widths == [len(PROMPTS[0])] + [1] * (NEW - 1)


@each_mode
def test_steps_beyond_the_tokens_take_one_forward_a_token(mode):
    assert decode(mode, a_model(mode), PROMPTS[:1], steps=1000)[-1].forwards == NEW


@each_mode
def test_a_threshold_near_one_takes_a_forward_a_token_and_near_zero_a_forward_a_block(mode):
    for prompt in PROMPTS:
        model = a_model(mode)
        assert decode(mode, model, [prompt], threshold=1 - 1e-15)[-1].forwards == NEW
        last = decode(mode, model, [prompt], threshold=1e-300)[-1]
        assert last.forwards == len(blocks_of(mode, prompt)) and not last.masked.any()


# Rules


def test_fixed_count_reveals_the_most_confident_and_ties_from_the_left():
    confidence = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.99], [0.5, 0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    masked = torch.tensor([[True, True, True, True, False], [True] * 5, [False] * 5])
    left = fixed_count(confidence, None, masked, torch.tensor([2, 2, 0]), None)
    assert left.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0] * 5]
    assert ranks(confidence, masked)[0, :4].tolist() == [1, 0, 2, 3]


def test_a_threshold_reveals_what_is_above_it_and_at_least_one():
    confidence = torch.tensor([[0.5, 0.9, 0.8, 0.99], [0.1, 0.3, 0.2, 0.99], [0.9, 0.9, 0.9, 0.9]])
    masked = torch.tensor([[True, True, True, False], [True, True, True, False], [False] * 4])
    left = confidence_threshold(0.7)(confidence, None, masked, torch.tensor([1, 1, 0]), None)
    assert left.int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [0] * 4]


def test_an_entropy_bound_adds_up_what_comes_before():
    entropy = torch.tensor([[0.1, 0.5, 0.2, 0.05], [2.0, 1.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    masked = torch.tensor([[True, True, True, True], [True, True, True, False], [False] * 4])
    confidence = (-entropy).masked_fill(~masked, -math.inf)
    for bound, left in {  # rising: 0.05 0.1 0.2 0.5, before which 0 0.05 0.15 0.35 nats; and 1 2 3, before which 0 1 3
        0.0: [[1, 1, 1, 0], [1, 0, 1, 0], [0] * 4],
        0.2: [[0, 1, 0, 0], [1, 0, 1, 0], [0] * 4],
        1.5: [[0, 0, 0, 0], [0, 0, 1, 0], [0] * 4],
    }.items():
        assert entropy_bound(bound)(confidence, None, masked, None, None).int().tolist() == left


def test_a_factor_reveals_as_many_as_their_least_confident_bears():
    confidence = torch.tensor([[0.5, 0.95, 0.8, 0.99], [0.1, 0.3, 0.2, 0.99], [0.9, 0.9, 0.9, 0.9]])
    masked = torch.tensor([[True, True, True, True], [True, True, True, False], [False] * 4])
    for factor, left in {  # (n + 1)(1 - p): 0.02 0.15 0.8 2.5; and 1.4 2.4 3.6
        0.01: [[1, 1, 1, 0], [1, 0, 1, 0], [0] * 4],
        1.0: [[1, 0, 0, 0], [1, 0, 1, 0], [0] * 4],
        3.0: [[0, 0, 0, 0], [1, 0, 0, 0], [0] * 4],
    }.items():
        assert confidence_factor(factor)(confidence, None, masked, None, None).int().tolist() == left


RULES = (fixed_count, path_planning, confidence_threshold(0.5), entropy_bound(0.0), entropy_bound(1.0))


@pytest.mark.parametrize("rule", (*RULES, confidence_factor(1e-9), confidence_factor(1.0)))
def test_every_rule_leaves_fewer_masked_of_a_row_that_has_any(rule, rng):
    """Whatever the confidences are: equal, the greatest or least there can be, or, of a broken model, no numbers."""
    values = torch.tensor([-100.0, -1.0, 0.0, 0.5, 1.0, math.nan])  # entropy_bound takes negative entropies
    for _ in range(200):
        answer = torch.rand(5, 7, generator=rng) < 0.8
        masked = answer & (torch.rand(5, 7, generator=rng) < 0.5)
        confidence = values[torch.randint(0, len(values), (5, 7), generator=rng)]
        confidence.masked_fill_(~(answer if rule is path_planning else masked), -math.inf)
        count = masked.sum(dim=1)
        quota = 1 + (torch.rand(5, generator=rng) * (count - 1).clamp(min=0)).round().long()
        left = rule(confidence, None, masked, quota, None)
        assert (left.sum(dim=1) < count)[count > 0].all() and not left[count == 0].any()
        assert not (left & ~(answer if rule is path_planning else masked)).any()


@pytest.mark.parametrize(
    "rule", [{"threshold": p} for p in (0.05, 0.2, 0.5)] + [{"entropy": 3.0}, {"factor": 2.0}], ids=str
)
@each_mode
def test_an_adaptive_rule_reveals_something_at_every_forward_and_everything_in_the_end(mode, rule):
    steps = decode(mode, a_model(mode), PROMPTS, **rule)
    for before, after in itertools.pairwise(steps):
        assert (before.masked.sum(dim=1) > after.masked.sum(dim=1))[~before.done].all()
    assert not steps[-1].masked.any()
    strictest = {"threshold": 1 - 1e-9, "entropy": 0.0, "factor": 1e-9}
    one_by_one = decode(mode, a_model(mode), PROMPTS, **{name: strictest[name] for name in rule})
    assert steps[-1].forwards <= one_by_one[-1].forwards == NEW


@pytest.mark.parametrize("slice", (1, 3 * 12, 2**19), ids="slices of {}".format)
@pytest.mark.parametrize("temperature", (0.0, 2.0))
@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("loud", (1.0, 1e4))  # of a token that does not count
def test_a_token_its_probability_and_the_entropy_are_those_of_all_logits_at_once(
    slice, temperature, rows, loud, monkeypatch
):
    monkeypatch.setattr(choose, "SLICE", slice)
    random = torch.randn(2 * rows + VOCAB, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden, weight = random[: 2 * rows].view(2, rows, 8), random[2 * rows :]
    weight[2] *= loud
    options = {"cfg_scale": 0.5, "suppress_tokens": (3, 9), "begin_suppress_tokens": (1, 2), "entropy": 0.1}
    options = diffusion.Sampling(temperature=temperature, **options)
    token, probability, score = diffusion.choose_tokens(list(hidden), weight, options, MASK, None)
    conditional, free = hidden @ weight.T
    logits = free + 1.5 * (conditional - free)
    logits[:, [3, 9]] = -math.inf
    if temperature == 0:
        assert token.tolist() == logits.index_fill(1, torch.tensor(MASK), -math.inf).argmax(dim=1).tolist()
    assert not {*token.tolist()} & {3, 9, MASK}
    logits[:, [1, 2]] = -math.inf
    p = logits.softmax(dim=1)
    torch.testing.assert_close(probability, p.gather(1, token[:, None])[:, 0])
    torch.testing.assert_close(score, torch.special.xlogy(p, p).sum(dim=1))


@pytest.mark.parametrize("slice", (1, 7, 100))
@each_mode
def test_decoding_by_slices_of_the_vocabulary_changes_nothing(mode, slice, monkeypatch):
    model = a_model(mode)
    whole = decode(mode, model, PROMPTS, steps=5)
    monkeypatch.setattr(choose, "SLICE", slice)
    for a, b in zip(whole, decode(mode, model, PROMPTS, steps=5), strict=True):
        torch.testing.assert_close(a[:3] + a[4:], b[:3] + b[4:])


@pytest.mark.parametrize("static", (False, True))
@each_mode
def test_every_query_sees_something_be_it_padding_or_of_a_row_that_is_done(mode, static, monkeypatch):
    seen, model = watched_masks(monkeypatch), a_model(mode)
    decode(mode, model, PROMPTS, steps_per_block=3, end_ids=tuple(range(0, MASK, 4)), static=static, cfg_scale=0.5)
    assert seen and all(seen)


# Shapes that recur

OPTIONS = (
    *({}, {"steps": 4}, {"threshold": 0.2}, {"entropy": 3.0}, {"factor": 2.0}, {"stochastic_transfer": True}),
    *({"end_ids": (3, 4, 5, 6, 7, 8)}, {"cfg_scale": 1.5}, {"remasking": "random"}, {"temperature": 1.0}),
)


def recorded(monkeypatch, model) -> list[tuple[int, int]]:
    """(columns fed, outputs wanted) of each forward, filled as the model runs."""
    calls, forward = [], model.forward

    def record(tokens, layout, **options):
        calls.append((tokens.shape[1], len(options["index"])))
        return forward(tokens, layout, **options)

    monkeypatch.setattr(model, "forward", record)
    return calls


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@each_mode
def test_static_shapes_decode_the_same(mode, options, monkeypatch):
    model = a_model(mode)
    calls = recorded(monkeypatch, model)
    runs = []
    for static in (False, True):
        calls.clear()
        runs.append(decode(mode, model, PROMPTS, **options, static=static, generator=torch.Generator().manual_seed(0)))
    ours, theirs = runs
    if options.get("temperature") or options.get("remasking"):  # other numbers are drawn for other positions
        assert len(ours) == len(theirs) and not theirs[-1].masked.any() and not (theirs[-1].tokens == MASK).any()
        assert torch.equal(ours[0].tokens, theirs[0].tokens)
        given = (ours[0].tokens != MASK) & ~ours[0].masked
        assert torch.equal(theirs[-1].tokens[given], ours[0].tokens[given])
    else:
        for a, b in zip(ours, theirs, strict=True):
            assert a.forwards == b.forwards
            torch.testing.assert_close(a[:3] + a[4:], b[:3] + b[4:])
    assert len(set(calls[1:])) <= 2 and len({wanted for _, wanted in calls}) == 1


class Tape(TorchDispatchMode):
    """The operations that run inside, to be run again on the same tensors with every number as it was."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # what would read a value back, or copy one from the host, which no graph can hold
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"} & {
            function.name()[6:].split(".")[0]
        }
        out = function(*args, **kwargs or {})
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        now = {}  # what stands for a result of the recording

        def current(x):
            return now.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for function, args, kwargs, out in self.operations:
            again = function(*tree_map(current, args), **tree_map(current, kwargs))
            now |= {id(a): b for a, b in zip(tree_leaves(out), tree_leaves(again)) if isinstance(a, torch.Tensor)}


def taped(advance, generator, device):
    """graphs.recorded with tapes for graphs: the second call of a width is recorded, later ones replay it."""
    tapes = {}

    def run(W):
        if W not in tapes:
            tapes[W] = None
            advance(W)
        elif tapes[W] is None:
            with Tape() as tapes[W]:
                advance(W)
        else:
            tapes[W].replay()
            replays[0] += 1

    replays = taped.replays = [0]
    return run


@pytest.mark.parametrize("options", (*OPTIONS, {"remasking": "p2"}, {"temperature": 0.7, "top_p": 0.8}), ids=str)
@each_mode
def test_a_recorded_forward_replays_as_it_would_run(mode, options, monkeypatch):
    model, runs = a_model(mode), []
    options = options | {"static": True, "max_new_tokens": 14}
    for recorded in (graphs.recorded, taped):
        monkeypatch.setattr(graphs, "recorded", recorded)
        runs.append(decode(mode, model, PROMPTS, generator=torch.Generator().manual_seed(0), **options))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a[:3] + a[4:], b[:3] + b[4:], rtol=0, atol=0)
    assert taped.replays[0] > 0 or len(runs[0]) < 9


@pytest.mark.parametrize("static", (False, True))
@each_mode
def test_empty_canvases_need_no_forward_and_disturb_no_other(mode, static):
    model = a_model(mode)
    given = [3, 5]
    (only,) = decode(mode, model, [given], max_new_tokens=0, static=static)
    assert only.done.all() and only.forwards == 0
    if mode == "ar":
        return
    canvases, masks = [[], [3, 5, 7, 9, 2, 4]], [[], [False, True, False, False, True, True]]
    if not MODES[mode][1].get("block_align"):
        options = {"canvas_masks": masks, "max_new_tokens": 0, "static": static}
        together = decode(mode, model, canvases, **options)
        alone = decode(mode, model, canvases[1:], **options | {"canvas_masks": masks[1:]})
        assert history(together, 1, 6) == history(alone, 0, 6)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode[:2] != "md" and "prompt" not in mode])
def test_static_shapes_keep_a_cache_for_the_next_call(mode):
    model = a_model(mode)
    runs = {}
    for static in (False, True):
        kept, prompt, runs[static] = diffusion.Prefix(), [3, 5, 7], []
        for turn in range(3):
            last = decode(mode, model, [prompt], static=static, prefix=kept)[-1]
            fresh = decode(mode, model, [prompt], static=static)[-1]
            assert torch.equal(last.tokens, fresh.tokens)
            runs[static].append(last.tokens.tolist())
            prompt = [*last.tokens[0].tolist()[: len(prompt) + 7], 11 + turn]
        decode(mode, model, [last.tokens[0].tolist()], static=static, prefix=kept, max_new_tokens=0)
    assert runs[False] == runs[True]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("ar", "mdlm", "bd3lm.shift"))
def test_compiled_layers_decode_the_same_and_compile_no_more_for_another_prompt(mode):
    torch._dynamo.reset()
    model, longer = a_model(mode), [[*prompt, 7] for prompt in PROMPTS]
    eager = [decode(mode, model, prompts, static=True) for prompts in (PROMPTS, longer)]
    for layer in model.model.layers:
        layer.compile()
    for prompts in (PROMPTS, longer):  # the second shape of each kind is compiled for any
        decode(mode, model, prompts, static=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompts, expected in zip((PROMPTS, longer), eager):
            for a, b in zip(expected, decode(mode, model, prompts, static=True), strict=True):
                torch.testing.assert_close(a[:3] + a[4:], b[:3] + b[4:])
        decode(mode, model, [prompt[:-1] or [5] for prompt in PROMPTS], static=True)


@pytest.mark.parametrize("options", ({}, {"threshold": 0.2}, {"remasking": "p2"}), ids=str)
@each_infilling_mode
def test_static_shapes_fill_in_the_same(mode, options, monkeypatch):
    if mode == "ar" and options.get("remasking") == "p2":
        options = {}
    canvases = [random_tokens(n, seed=n).tolist() for n in (33, 6, 19)]
    masks = [[i in (3, 4, 17, 18, 30) for i in range(len(canvas))] for canvas in canvases]
    runs = [
        decode(mode, a_model(mode), canvases, canvas_masks=masks, max_new_tokens=3, steps=9, static=static, **options)
        for static in (False, True)
    ]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a[:3] + a[4:], b[:3] + b[4:])


# Choosing tokens


@pytest.mark.parametrize("temperature", (0.3, 5.0))
@pytest.mark.parametrize("options", ({"top_k": 1}, {"top_p": 1e-9}), ids=str)
@each_mode
def test_the_likeliest_token_alone_is_greedy_at_any_temperature(mode, options, temperature, rng):
    model = a_model(mode)
    greedy = decode(mode, model, PROMPTS, steps=8)
    sampled = decode(mode, model, PROMPTS, steps=8, temperature=temperature, generator=rng, **options)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(greedy, sampled))


def test_gumbel_noise_draws_from_the_tempered_softmax(rng):
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 20000
    for temperature in (0.5, 1.0, 2.0):
        uniform = torch.rand(n, 5, generator=rng, dtype=torch.float64)
        counts = torch.bincount(gumbel(logits.expand(n, 5), temperature, uniform).argmax(dim=1), minlength=5)
        expected = n * (logits / temperature).softmax(dim=0)
        assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("top_p", (0.01, 0.3, 0.7, 0.95, 1.0))
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, rng):
    logits = 2 * torch.randn(50, 12, generator=rng, dtype=torch.float64)
    kept = restrict(logits, None, top_p) > -math.inf
    assert torch.equal(restrict(logits, None, top_p)[kept], logits[kept])
    for p, keep in zip(logits.softmax(dim=1), kept):
        assert top_p == 1.0 or p[keep].sum() >= top_p - 1e-12
        assert p[keep].sum() - p[keep].min() < top_p  # without its least likely it would not do
        assert keep.all() or p[keep].min() >= p[~keep].max()


def test_top_p_takes_no_token_more_where_some_have_it_exactly_and_counts_what_top_k_leaves():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert (restrict(logits, None, 0.75) > -math.inf).tolist() == [[True, True, False, False]]
    assert (restrict(logits, 2, 0.6) > -math.inf).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("options", ({"top_k": None}, {"top_k": 3}), ids=str)
def test_a_temperature_divides_the_logits_that_top_p_restricts(options):
    random = torch.randn(40 + VOCAB, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden, weight = random[:40], random[40:]

    def token(hidden, temperature):
        generator = torch.Generator().manual_seed(0)
        chosen = diffusion.Sampling(temperature=temperature, top_p=0.6, **options)
        return diffusion.choose_tokens([hidden], weight, chosen, MASK, generator)[0]

    for temperature in (0.25, 4.0):
        assert torch.equal(token(hidden, temperature), token(hidden / temperature, 1.0))


@pytest.mark.parametrize("top_k", (1, 3, 11, 12, 100))
def test_top_k_keeps_the_k_largest(top_k, rng):
    logits = torch.randn(50, 12, generator=rng)
    kept = restrict(logits, top_k, None) > -math.inf
    assert (kept.sum(dim=1) == min(top_k, 12)).all()
    assert all(keep.all() or row[keep].min() > row[~keep].max() for row, keep in zip(logits, kept))


@pytest.mark.parametrize(
    "options", ({"temperature": 0.8}, {"remasking": "random"}, {"stochastic_transfer": True}), ids=str
)
@pytest.mark.parametrize("mode", ("mdlm", "mdlm.one_block", "bd3lm", "bd3lm.shift"))
def test_random_decoding_is_a_function_of_the_generator(mode, options):
    model = a_model(mode)
    runs = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        steps = decode(mode, model, PROMPTS, steps=9, generator=generator, **options)
        assert not steps[-1].masked.any()
        runs.append([step.tokens.tolist() for step in steps])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("mode", ("mdlm.one_block", "bd3lm"))
def test_stochastic_transfer_reveals_every_mask_within_the_steps(mode, rng):
    for _ in range(5):
        steps = decode(mode, a_model(mode), PROMPTS[:1], steps_per_block=4, stochastic_transfer=True, generator=rng)
        revealed = [int(a.masked.sum() - b.masked.sum()) for a, b in itertools.pairwise(steps)]
        assert sum(revealed) == NEW and min(revealed) > 0 and len(revealed) <= 4 * len(blocks_of(mode, PROMPTS[0]))


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@each_mode
def test_suppressed_tokens_never_occur(mode, temperature, rng):
    model = a_model(mode)
    free = decode(mode, model, PROMPTS)[-1].tokens
    suppressed = tuple({int(row[len(prompt)]) for row, prompt in zip(free, PROMPTS)} | set(range(10)))
    last = decode(mode, model, PROMPTS, suppress_tokens=suppressed, temperature=temperature, generator=rng)[-1].tokens
    for row, prompt in zip(last, PROMPTS):
        assert not set(row[len(prompt) : len(prompt) + NEW].tolist()) & set(suppressed)


def test_begin_suppressed_tokens_change_the_order_of_revealing_and_not_the_choice():
    mode, model = "mdlm.one_block", a_model("mdlm.one_block")
    at_once = decode(mode, model, PROMPTS[:1], steps_per_block=1)[-1].tokens
    answer = at_once[0, len(PROMPTS[0]) :].tolist()
    first = decode(mode, model, PROMPTS[:1], steps=NEW)[1]
    favourite = int(first.tokens[0, len(PROMPTS[0]) :][~first.masked[0, len(PROMPTS[0]) :]])
    assert favourite in answer
    options = {"begin_suppress_tokens": (favourite,)}
    assert torch.equal(decode(mode, model, PROMPTS[:1], steps_per_block=1, **options)[-1].tokens, at_once)
    second = decode(mode, model, PROMPTS[:1], steps=NEW, **options)[1]
    assert favourite not in second.tokens[0, len(PROMPTS[0]) :].tolist()


# Guidance


@each_mode
def test_guidance_with_every_given_token_kept_changes_nothing(mode):
    model = a_model(mode)
    keep = tuple(set(itertools.chain(*PROMPTS)))
    plain, guided = (
        decode(mode, model, PROMPTS, steps=8, **options)
        for options in ({}, {"cfg_scale": 2.0, "cfg_keep_tokens": keep})
    )
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, guided))
    other = decode(mode, model, PROMPTS, steps=8, cfg_scale=2.0)
    assert not torch.equal(plain[-1].tokens, other[-1].tokens)


# Precision and chunks


@each_mode
def test_the_heads_chunks_do_not_change_the_sample(mode, monkeypatch):
    model = a_model(mode)
    expected = decode(mode, model, PROMPTS, steps=6, cfg_scale=0.5)
    monkeypatch.setitem(diffusion.CHUNK, "cpu", 3)
    ours = decode(mode, model, PROMPTS, steps=6, cfg_scale=0.5)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, ours))


@each_mode
def test_a_bfloat16_model_decodes_and_so_does_one_that_casts_its_weights_as_in_training(mode):
    stored, cast = a_model(mode, dtype=torch.bfloat16), a_model(mode, dtype=torch.bfloat16).float()
    cast.compute_dtype = torch.bfloat16
    last, same = (decode(mode, model, PROMPTS, steps=8)[-1] for model in (stored, cast))
    assert last.done.all() and not last.masked.any()
    assert torch.equal(last.tokens, same.tokens) and torch.equal(last.confidence, same.confidence)


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions

MDLM, BD3LM, AR = ({"objective": name} for name in ("mdlm", "bd3lm", "ar"))
CONTRADICTIONS = [
    ({}, [], {}, "no prompts; expected at least one"),
    ({"mask_token_id": None}, [[1]], {}, "declares no mask_token_id.*convert.py"),
    (AR | {"mask_token_id": None}, [[1]], {"cfg_scale": 1.0}, "declares no mask_token_id.*convert.py"),
    (MDLM | {"max_position_embeddings": 8}, [[1]], {}, "11 tokens exceed the model's context of 8; shorten the prompt"),
    (BD3LM, [[1]], {}, "needs a block size.*pass --block_size"),
    (
        BD3LM | {"block_length": 4},
        [[1]],
        {"block_size": 8},
        "block_size 8 is not the checkpoint's 4; leave --block_size out",
    ),
    (AR, [[1], []], {}, "an empty prompt has nothing to predict from; begin it with"),
    (MDLM, [[1]], {"remasking": "lowest"}, "remasking 'lowest' is unknown; expected low_confidence, random or p2"),
    (MDLM, [[1]], {"block_align": "left"}, "block_align 'left' is unknown; expected sequence or prompt"),
    ({"objective": "gpt"}, [[1]], {}, "objective 'gpt' is unknown; expected one of ar, mdlm, bd3lm"),
    (
        MDLM | {"mask_token_id": VOCAB},
        [[1]],
        {},
        "mask_token_id: token id 40 is outside the vocabulary; expected 0 to 39",
    ),
    (MDLM, [[1], [2, VOCAB]], {}, "prompts: token id 40 is outside the vocabulary; expected 0 to 39"),
    (MDLM, [[-1]], {}, "prompts: token id -1 is outside the vocabulary; expected 0 to 39"),
    *(
        (MDLM, [[1]], {name: (1, 99)}, f"{name}: token id 99 is outside the vocabulary; expected 0 to 39")
        for name in ("cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens", "end_ids")
    ),
    (MDLM, [[1]], {"suppress_tokens": tuple(range(MASK))}, "suppress_tokens names all 40 tokens.*name fewer"),
    (AR | {"mask_token_id": None}, [[1]], {"suppress_tokens": tuple(range(VOCAB))}, "suppress_tokens names all 40"),
    (MDLM, [[1]], {"max_new_tokens": -1}, "max_new_tokens -1: expected at least 0"),
    (MDLM, [[1, 2]], {"canvas_masks": [[True]]}, r"canvas_masks of lengths \[1\].*expected a bool for each.*\[2\]"),
    (MDLM, [[1]], {"canvas_masks": [[True], []]}, "canvas_masks of lengths"),
    (MDLM, [[1]], {"canvas_masks": [[True]], "block_align": "prompt"}, "block_align prompt.*drop it"),
    (AR, [[1, 2]], {"canvas_masks": [[True, False]]}, "ar model cannot fill in the first token; begin the canvas with"),
    (AR, [[1]], {"block_size": 4}, "block_size 4: an ar model decodes token by token; leave --block_size out"),
    (MDLM, [[1]], {"temperature": -0.5}, "temperature -0.5: expected 0"),
    (MDLM, [[1]], {"temperature": math.nan}, "temperature nan: expected a number"),
    (MDLM, [[1]], {"temperature": 1.0, "top_k": 0}, "top_k 0: expected at least 1; leave it out"),
    (MDLM, [[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p 0.0: expected above 0 and at most 1; leave it out"),
    (MDLM, [[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p 1.5: expected above 0 and at most 1; leave it out"),
    (MDLM, [[1]], {"top_k": 5}, "top_k 5 changes nothing at temperature 0; raise --temperature or leave it out"),
    (MDLM, [[1]], {"top_p": 0.9}, "top_p 0.9 changes nothing at temperature 0; raise --temperature or leave it out"),
    *((MDLM, [[1]], {"threshold": p}, f"threshold {p}: expected a probability between") for p in (0.0, 1.0, -1.0)),
    (MDLM, [[1]], {"entropy": -0.1}, "entropy -0.1: expected 0 nats or more"),
    (MDLM, [[1]], {"factor": 0.0}, "factor 0.0: expected above 0"),
    (MDLM, [[1]], {"factor": 1.0, "entropy": 1.0}, "entropy and factor each say how many.*leave out all but one"),
    (MDLM, [[1]], {"entropy": 1.0, "remasking": "random"}, "entropy compares confidences.*drop one of the two"),
    (MDLM, [[1]], {"threshold": 0.5, "stochastic_transfer": True}, "which stochastic_transfer is about; drop one"),
    (MDLM, [[1]], {"threshold": 0.5, "steps_per_block": 2}, "which steps_per_block is about; drop one of the two"),
    (MDLM, [[1]], {"prefix": diffusion.Prefix()}, "prefix: 1 rows of mdlm; expected one of ar or bd3lm"),
    (AR, [[1], [2]], {"prefix": diffusion.Prefix()}, "prefix: 2 rows of ar; expected one of ar or bd3lm"),
    (AR, [[1]], {"prefix": diffusion.Prefix(), "cfg_scale": 1.0}, "prefix: guidance.*leave it out"),
    (MDLM, [[1]], {"steps": 0}, "steps 0: expected at least 1"),
    (MDLM, [[1]], {"block_size": 0}, "block_size 0: expected at least 1"),
    (BD3LM | {"block_length": 4}, [[1]], {"block_size": 0}, "block_size 0: expected at least 1"),
    (MDLM, [[1]], {"block_size": -4}, "block_size -4: expected at least 1"),
    (MDLM, [[1]], {"steps_per_block": 0}, "steps_per_block 0: expected at least 1"),
    (MDLM, [[1]], {"threshold": 0.5, "remasking": "random"}, "threshold compares confidences.*drop one of the two"),
    (MDLM, [[1]], {"scheduler": "quadratic"}, "scheduler 'quadratic' is unknown; expected linear or cosine"),
]


@pytest.mark.parametrize(("declared", "prompts", "options", "message"), CONTRADICTIONS, ids=lambda x: None)
def test_contradictions_are_refused_with_the_way_out(declared, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        next(denoise(tiny(**declared), prompts, **{"max_new_tokens": NEW} | options))


def test_a_model_that_declares_nothing_decodes_as_mdlm():
    undeclared, declared = (decode("mdlm", tiny(objective=name), PROMPTS) for name in (None, "mdlm"))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(undeclared, declared))


def test_an_undeclared_block_length_is_taken_from_block_size():
    given = tiny(objective="bd3lm", block_length=None)
    ours = list(denoise(given, PROMPTS, max_new_tokens=NEW, block_size=4))[-1].tokens
    assert torch.equal(ours, decode("bd3lm", a_model("bd3lm"), PROMPTS)[-1].tokens)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}, {"entropy": 0.1}, {"remasking": "random"}], ids=str)
@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_a_model_whose_output_is_no_number_is_refused(objective, options, static):
    model = tiny(objective=objective, block_length=4)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="the model's output is not a number"):
        list(denoise(model, [[1, 2, 3]], max_new_tokens=8, static=static, **options))

"""nanoA2D in Python: open a checkpoint, and generate text with it.

    from nanoa2d import load, generate

    model, tokenizer = load("runs/mdlm/checkpoint-final")
    print(generate(model, tokenizer, "What is 12 + 34?", max_new_tokens=8, threshold=0.9))

A prompt is a text, in which each <|mask|> is filled in, or the messages of a chat, [{"role": "user", "content": "Hi"}].
`generate` takes one of these, or a list of them. Options are those of sample.py, by the same names; what is wrong with
one, or with a prompt, is a ValueError of one line. The programs can be called, too: `convert(Convert(...))` of
convert.py, `main(["--objective", "mdlm", ...])` of train.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch

from cli import Answers, Opening, Request, Turns, batches, check_chat, encode, is_chat, open_model, sampler_options
from diffusion import Sampling
from display import Spans, plain
from model import LanguageModel
from options import Natural, Rows, Seed
from tokenizer import Tokenizer

__all__ = ["Step", "generate", "load", "stream"]

Chat = list[dict]
Prompt = str | Chat


@dataclass(kw_only=True)
class Streaming(Sampling, Turns):
    prog: ClassVar[str] = "sample.py"  # whose --help explains them
    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None  # as in sample.py
    seed: Seed = Opening.seed


@dataclass(kw_only=True)
class Generating(Streaming):
    batch_size: Rows = 16  # prompts decoded at once


class Step(NamedTuple):
    """The answer after a forward."""

    forwards: int  # model calls so far
    text: str  # a masked token is ░, an end token behind masks ∎
    tokens: Spans  # the same, a text for each token and what it is: masked, draft, fresh, settled or corrected


def load(
    name, *, device="auto", dtype=None, objective=None, right_shift_logits=None, torch_compile=False
) -> tuple[LanguageModel, Tokenizer]:
    """The model and tokenizer of a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id.

    device: auto (cuda if there is one), cpu, cuda, cuda:1, ... dtype: float32, bfloat16, ... (default: as stored; on a
    CPU without instructions for bfloat16 float32 in its place).
    objective, right_shift_logits: for a checkpoint that does not declare them. torch_compile: for cuda."""
    given = {"objective": objective, "right_shift_logits": right_shift_logits, "torch_compile": torch_compile}
    given["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    return open_model(Opening(model_name_or_path=str(name), device=str(device), **given))


def generate(model: LanguageModel, tokenizer: Tokenizer, prompts: Prompt | list[Prompt], **options) -> str | list[str]:
    """The answer to a prompt, or a list of them for a list. options: max_new_tokens, steps, threshold, temperature and
    whatever else `python sample.py --help` lists under sampling; system, chat_template, batch_size and seed, which is
    42 unless given: a call that is repeated says the same, at a temperature, too."""
    args, single = Generating.of(options, "generate"), is_single(prompts)
    todo, decoding = prepared(model, tokenizer, [prompts] if single else list(prompts), args)
    for batch in batches(todo, args.batch_size):
        answers = Answers.to(batch, model, tokenizer, **decoding)
        for _ in answers:
            pass
        for request, answer in zip(batch, answers.final()):
            request.answer = answer
    texts = [request.answer.text for request in todo]
    return texts[0] if single else texts


def stream(model: LanguageModel, tokenizer: Tokenizer, prompt: Prompt, **options) -> Iterator[Step]:
    """The steps of the answer to one prompt, as it is at the start and after each forward. options: of `generate`,
    without batch_size."""
    args = Streaming.of(options, "stream")
    if not is_single(prompt):
        raise ValueError(f"stream: a list of {len(prompt)}; expected one prompt; generate takes lists")
    todo, decoding = prepared(model, tokenizer, [prompt], args)

    def steps():
        answers = Answers.to(todo, model, tokenizer, **decoding)
        for step in answers:
            (tokens,) = answers.states()
            yield Step(step.forwards, plain(tokens), tokens)

    return steps()  # so that what is wrong shows at the call, not at the first step


def is_single(prompts) -> bool:
    """Whether this is one prompt, not a list of them; ValueError where it is neither."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompt {prompts!r:.60}: expected a text, the messages of a chat, or a list of such prompts")
    return isinstance(prompts[0], dict)


def prepared(model, tokenizer, prompts: list[Prompt], args: Streaming) -> tuple[list[Request], dict]:
    """The prompts, encoded, and how they are decoded: the keywords of `Answers.to`."""
    chat, options = is_chat(args, tokenizer), sampler_options(args, model.config.objective)
    todo = [Request(p if isinstance(p, str) else check_chat(p, f"prompt {n}")) for n, p in enumerate(prompts, 1)]
    for n, request in enumerate(todo, 1):
        encode(request, n, args, model, tokenizer, chat)
    return todo, {
        "options": options,
        "generator": torch.Generator(model.head_weight.device).manual_seed(args.seed),
    }

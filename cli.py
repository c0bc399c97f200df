"""What the programs share: errors in one line, files that appear whole, opening a checkpoint and decoding with it.

A program ends with one line and exit status 2 where its user has to change something (`one_line_errors`); under
`python -X dev` it shows where the error was raised instead.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

from checkpoint import DTYPES, declare, load_config, load_model, resolve
from diffusion import RULES, Prefix, Sampling, denoise
from display import Spans, spans
from model import OBJECTIVES, LanguageModel
from options import Model, Options, Seed
from tokenizer import ROLES, Tokenizer, why_invalid

# ---------------------------------------------------------------------------------------------------------------------
# Errors and files


def hold_back() -> None:
    """Waits on every rank of torchrun's but the first, so that only that one prints an error: once it has ended,
    torchrun ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


@contextmanager
def silent_forks():
    """Inside, Ctrl-C raises KeyboardInterrupt here, and ends processes forked from this one (such as those that
    tokenise) without a traceback of each."""
    before, process = signal.getsignal(signal.SIGINT), os.getpid()
    # Where a shell ignores Ctrl-C for a background job, or a caller handles it, it stays so.
    if before not in (signal.default_int_handler, signal.SIG_DFL):
        yield
        return

    def interrupt(number, frame):
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def one_line_errors(prog: str):
    """Turns a ValueError or OSError raised inside into `PROG: message` on standard error and exit status 2, and Ctrl-C
    into one line and status 130.

    A process of torchrun's that finds another one gone prints nothing and waits for its end: the other one reports.
    """
    # Standard streams that were closed before the program started are None; with an encoding other than UTF-8, a
    # character that is not in it would raise, perhaps after hours of work.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if getattr(sys.stdout, "encoding", None) and "utf" not in sys.stdout.encoding.lower():
        sys.stdout.reconfigure(errors="replace")
    try:
        with silent_forks():
            yield
        sys.stdout.flush()  # else a full disk or a closed pipe shows only when Python ends
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            begin = "\n" if sys.stderr.isatty() else ""  # the line has a ^C on it, or half a progress bar
            print(f"{begin}{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # What Python still writes when it ends must go elsewhere.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        print(f"{prog}: what read the output has ended, and so does this", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        hold_back()
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        # gloo's words when another process is gone: connection closed, or reset, by peer.
        if "by peer" in str(error):
            time.sleep(10)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# The model to sample from

MDLM_BLOCK = 32  # tokens of mdlm's decoding block where none is given


@dataclass(kw_only=True)
class Loading(Options):
    "model"

    right_shift_logits: bool | None = None
    """position i predicts token i + 1, as in the AR model; open-dcoder needs it (default: what the checkpoint declares,
    else False; ar True)"""
    dtype: Literal[*DTYPES] | None = None  # of the weights and the computation (default: as stored)
    torch_compile: bool = False  # compile the layers: a minute at the start, fewer kernels after it (for cuda)


@dataclass(kw_only=True)
class Opening(Loading):
    "model"

    model_name_or_path: Model
    """a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id"""
    objective: Literal[*OBJECTIVES] | None = None
    """what the checkpoint was trained as, where it does not say (default: what it declares, else mdlm)"""
    device: Annotated[str, "DEVICE"] = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda if there is one
    seed: Seed = 42  # of all random numbers


def compile_layers(model: LanguageModel) -> None:
    torch._dynamo.config.recompile_limit = 64  # each shape of a batch counts, and the last layer's again
    for layer in model.model.layers:
        layer.compile()


def open_model(args: Opening, block_size: int | None = None) -> tuple[LanguageModel, Tokenizer]:
    """A checkpoint's model and tokenizer. The model's config then declares its objective and all that goes with it, by
    the checkpoint or, where that says nothing, by the options. block_size: of the sampler."""
    # torch refuses a device only when it is used, so use it once.
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} is not available here; expected cpu, or cuda where there is a GPU"
        ) from error

    # Everything that may be wrong with the options is found before the weights are read.
    path = resolve(args.model_name_or_path)
    config, tokenizer = load_config(path), Tokenizer(path)
    if config.mask_token_id is None and tokenizer.mask_added and (args.objective or config.objective) != "ar":
        raise ValueError(
            f"{args.model_name_or_path} has no mask token; make a diffusion checkpoint of it with convert.py, or pass "
            "--objective ar if it is autoregressive"
        )
    objective = args.objective or config.objective or "mdlm"
    declared = {
        "objective": args.objective,
        "block_length": block_size if objective == "bd3lm" else None,
        "right_shift": args.right_shift_logits,
        "mask_token_id": None if tokenizer.mask_added else tokenizer.mask_id,
    }
    declare(config, **declared)
    tokenizer.fit(config.vocab_size, mask=objective != "ar")

    model = load_model(path, dtype=args.dtype and getattr(torch, args.dtype), device=device)
    declare(model.config, **declared)
    if args.torch_compile:
        compile_layers(model)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# From prompts to answers


def uses_template(args, tokenizer: Tokenizer) -> bool:
    """Whether prompts are turns of a chat: by --chat_template, else where the tokenizer has a template."""
    if args.chat_template and tokenizer.template is None:
        raise ValueError("--chat_template True: the tokenizer has no chat template; pass False to continue plain text")
    templated = tokenizer.template is not None and args.chat_template is not False
    if args.system is not None and not templated:
        raise ValueError(f"--system {args.system} needs a chat template; leave it out where text is continued")
    return templated


def canvas(tokenizer: Tokenizer, prompt: list[int], *, predicted_from_before: bool) -> tuple[list[int], list[bool]]:
    """An encoded prompt's ids, and which of them are masks to fill in; the id at a mask is 0.

    predicted_from_before: a token is predicted from the one before it (ar, right shift), so a prompt that is empty or
    begins with a mask gets a BOS token before it, or EOS where there is no BOS.
    """
    # A mask's id may lie beyond the embedding (see convert.py), so another one takes its place.
    holes = [token == tokenizer.mask_id for token in prompt]
    begin = []
    if predicted_from_before and (not holes or holes[0]):
        begin = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
        if begin == [None]:
            raise ValueError(
                "generating from scratch needs a token to begin with; the tokenizer has neither BOS nor EOS"
            )
    return begin + [0 if hole else token for token, hole in zip(prompt, holes)], [False for _ in begin] + holes


def check_messages(messages, where: str, *, answered: bool = False) -> list[dict]:
    """`messages`, or ValueError if they are no chat (tokenizer.why_invalid); `where` they come from is named in it."""
    # Show what was found, shortened.
    if reason := why_invalid(messages, answered=answered):
        shown = json.dumps(messages, ensure_ascii=False, default=str)
        shown = shown if len(shown) <= 100 else shown[:100] + "…"
        raise ValueError(
            f"{where}: {reason} in {shown}; expected a list of messages, each "
            f"with a role ({', '.join(ROLES[:-1])} or {ROLES[-1]}) and a content that is a string"
            + (", the last one the assistant's" if answered else "")
        )
    return messages


def sampler_options(options: Sampling, objective: str, **changes) -> dict:
    """The keywords of `denoise`: `options` with `changes`, and with mdlm's decoding block where none is given.

    ValueError where mdlm's block is longer than the answer: the block size would then have no effect.
    """
    # ar decodes token by token, and bd3lm's block length is the checkpoint's: Sampling.block checks those two.
    options = options.only(Sampling) | changes
    given, new = options["block_size"], options["max_new_tokens"]
    if objective != "mdlm":
        return options
    if given is None:
        return options | {"block_size": MDLM_BLOCK}
    if new and given > new and options["block_align"] != "sequence":
        raise ValueError(f"block_size {given} exceeds the {new} tokens of max_new_tokens; pass at most {new}")
    return options


def unused_steps(options: dict, objective: str, tokens: int) -> list[str]:
    """A remark, or none: there are more steps than tokens, which is allowed and costs nothing."""
    scheduled = all(options[name] is None for name in ("steps_per_block", *RULES))
    if objective == "ar" or not scheduled or not 0 < tokens < options["steps"] != Sampling.steps:
        return []
    return [f"steps {options['steps']} for at most {tokens} tokens: those that would reveal none are left out"]


class Answer(NamedTuple):
    """text: up to the end token. shown: the same, where what was filled in stands out. tokens: how many were generated,
    with the end token. forwards: model calls until the row was done."""

    text: str
    shown: Spans
    tokens: int
    forwards: int


class Answers:
    """The answers to a batch of prompts, while they are denoised.

    Iterate over it, which takes the steps of `denoise`; `shown` is what there is after each, `final` what comes out.

    canvas_masks (infilling): an answer is the whole canvas, and end tokens do not end it. None: it follows the prompt,
    up to its first end token. options: of `sampler_options`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: list[list[int]],
        canvas_masks: list[list[bool]] | None = None,
        *,
        options: dict,
        generator: torch.Generator | None,
        prefix: Prefix | None = None,
    ):
        # Of each row, what is denoised: all of its canvas, or what follows its prompt.
        self.tokenizer, self.infilling = tokenizer, canvas_masks is not None
        self.end_ids = () if self.infilling else tuple(tokenizer.end_ids)
        new = options["max_new_tokens"]
        self.columns = [slice(0 if self.infilling else len(ids), len(ids) + new) for ids in prompts]
        self.seconds = 0.0
        self.last = None  # the newest step
        self.steps = denoise(
            model,
            prompts,
            canvas_masks=canvas_masks,
            end_ids=self.end_ids,
            prefix=prefix,
            generator=generator,
            **options,
        )

    def __iter__(self):
        """Yields each step. `seconds` is the time spent on making them, without what the caller does with them."""
        while True:
            begun = time.perf_counter()
            step = next(self.steps, None)
            self.seconds += time.perf_counter() - begun
            if step is None:
                return
            # Of each token the forward that settled it, 0 if it was given; of each row the forwards until it was done.
            if self.last is None:
                self.masks = step.masked
                self.settled = torch.zeros_like(step.tokens)  # (B, T)
                self.forwards = torch.zeros_like(step.done, dtype=torch.int64)  # (B,)
            else:
                self.settled = torch.where(self.last.masked & ~step.masked, step.forwards, self.settled)
                self.forwards = torch.where(self.last.done, self.forwards, step.forwards)
            self.last = step
            yield step

    def shown(self) -> list[Spans]:
        """Each row's answer as it is after the newest step."""
        fresh = self.settled == max(self.last.forwards, 1)
        rows = zip(self.columns, self.last.tokens.tolist(), self.last.masked.tolist(), fresh.tolist())
        return [spans(self.tokenizer, *(row[columns] for row in values), self.end_ids) for columns, *values in rows]

    def final(self) -> list[Answer]:
        """Each row's answer; if it was stopped, what is before its first mask."""
        if self.last is None:
            return [Answer("", [], 0, 0) for _ in self.columns]
        begun = time.perf_counter()
        values = [field.tolist() for field in (self.last.tokens, self.last.masked, self.masks, self.forwards)]
        self.seconds += time.perf_counter() - begun  # on a GPU this waits for the last forward
        found = []
        for columns, ids, masked, holes, forwards in zip(self.columns, *values):
            # The answer ends at an end token. One that was stopped may have a mask before it, and ends there.
            ids, masked, holes = ids[columns], masked[columns], holes[columns]
            end = next((i for i, token in enumerate(ids) if masked[i] or token in self.end_ids), len(ids))
            tokens = sum(holes[:end]) + (end < len(ids) and not masked[end])  # the end token is generated, too
            filled = [self.infilling and hole for hole in holes[:end]]
            shown = spans(self.tokenizer, ids[:end], [False] * end, filled)
            found.append(Answer(self.tokenizer.decode(ids[:end]), shown, tokens, forwards))
        return found

"""What the programs share: errors in one line, opening a checkpoint, and from prompts to answers."""

import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

from checkpoint import DTYPES, about, declare, identify, load_config, load_model, resolve
from choose import RULES
from diffusion import Prefix, Sampling, denoise
from display import Spans, one_line, shorten, spans, terminal
from graphs import use_cudnn
from model import OBJECTIVES, LanguageModel
from options import Model, Options, Seed
from tokenizer import ROLES, Tokenizer, why_invalid

# ---------------------------------------------------------------------------------------------------------------------
# Errors


def end_quietly() -> None:
    """Called in processes forked from this one, such as those that tokenise: Ctrl-C ends them without tracebacks."""
    # Where a shell ignores Ctrl-C for a background job, or a caller handles it, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def explain(error: Exception) -> str | None:
    """What an error says in one printable line, with a way out; None for one that is no user's mistake."""
    said = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said:
        asked = re.search(r"ried to allocate ([\d.]+ \w+)|[Uu]nable to allocate ([\d.]+ \w+)", said)
        parts = f"the memory has no room for {next(filter(None, asked.groups()))}" if asked else "out of memory"
        said = f"{parts}; lower the batch size, the steps, the length of texts or --max_new_tokens"
    elif isinstance(error, RecursionError):
        said = f"something is nested too deeply to be read ({said}); use another file"
    elif isinstance(error, OverflowError):
        said = f"a number is too large ({said}); pass or declare a smaller one"
    elif not isinstance(error, ValueError | OSError):
        return None
    return one_line(said)


@contextmanager
def one_line_errors(prog: str):
    """Turns what `explain` knows into `PROG: message` on standard error and exit status 2, and Ctrl-C into one line and
    status 130. Under `python -X dev` an error shows where it was raised instead."""
    # Standard streams that were closed before the program started are None; with an encoding other than UTF-8, a
    # character that is not in it would raise, perhaps after hours of work.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if getattr(sys.stdout, "encoding", None) and "utf" not in sys.stdout.encoding.lower():
        sys.stdout.reconfigure(errors="replace")

    if hasattr(os, "register_at_fork"):  # Windows lacks it
        os.register_at_fork(after_in_child=end_quietly)

    # Of torchrun's processes the first reports. Once it has ended, torchrun ends the others, so they wait for that.
    first = os.environ.get("RANK", "0") == "0"
    try:
        yield
        sys.stdout.flush()  # else a full disk or a closed pipe shows only when Python ends
    except KeyboardInterrupt:
        if first:
            begin = "\n" if sys.stderr.isatty() else ""  # the line has a ^C on it, or half a progress bar
            print(f"{begin}{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for what Python still writes when it ends)
        print(f"{prog}: what read the output has ended, and so does this", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        line = None if sys.flags.dev_mode else explain(error)
        # gloo's words when another process is gone: connection closed, or reset, by peer.
        if (line and not first) or (isinstance(error, RuntimeError) and "by peer" in str(error)):
            time.sleep(10)
        if line is None:
            raise
        print(f"{prog}: {line}", file=sys.stderr)
        sys.exit(2)


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
    """what the checkpoint was trained as, where it does not say (default: what it declares or is known as)"""
    device: Annotated[str, "DEVICE"] = "auto"  # cpu, cuda, cuda:1, ...; auto is cuda if there is one
    seed: Seed = 42  # of all random numbers


def compile_layers(model: LanguageModel) -> None:
    """Compiles each layer by itself, in place, also where the sampler's steps are compiled around them."""
    torch._dynamo.config.recompile_limit = 64  # each shape of a batch counts, and the last layer's again
    for layer in model.model.layers:
        layer.compile()
    model.through_layers = torch.compiler.disable(model.through_layers, recursive=False)
    model.compiled = True


def prepare(model: LanguageModel, compiled: bool) -> None:
    """Makes ready a model that stays where it is, only to be sampled from and scored. compiled: by `compile_layers`."""
    use_cudnn(False)  # prompts, and with them caches, have any length
    if model.head_weight.is_cuda:  # on a CPU there is nothing to launch, and rounding would differ
        model.join(in_place=not compiled)
    if compiled:
        compile_layers(model)


def open_model(args: Opening, block_size: int | None = None) -> tuple[LanguageModel, Tokenizer]:
    """A checkpoint's model and tokenizer. The model's config then declares its objective and all that goes with it, by
    the checkpoint or, where that says nothing, by the options. block_size: of the sampler."""
    # torch refuses a device only when it is used, so use it once.
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not available here; expected cpu, or cuda with a GPU") from error

    # Everything that may be wrong with the options is found before the weights are read.
    path = resolve(args.model_name_or_path)
    config, tokenizer = load_config(path), Tokenizer(path)
    objective, _ = identify(config, args.objective)
    if config.mask_token_id is None and tokenizer.mask_added and objective != "ar":
        way_out = "make a diffusion checkpoint of it with convert.py, or pass --objective ar if it is autoregressive"
        raise ValueError(f"{args.model_name_or_path} has no mask token; {way_out}")
    declare(
        config,
        objective=args.objective,
        block_length=block_size if objective == "bd3lm" else None,
        right_shift=args.right_shift_logits,
        mask_token_id=None if tokenizer.mask_added else tokenizer.mask_id,
    )
    tokenizer.fit(config.vocab_size, mask=objective != "ar")

    model = load_model(path, dtype=args.dtype and getattr(torch, args.dtype), device=device, config=config)
    model.known_ids = tokenizer.known_ids
    prepare(model, args.torch_compile)

    # At a terminal, and wherever the checkpoint itself does not say what it is.
    screen = sys.stdout if terminal(sys.stdout) else sys.stderr
    if os.environ.get("RANK", "0") == "0" and (screen is sys.stdout or config.reason != "declared"):
        print(about(args.model_name_or_path, config), file=screen)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# From prompts to answers


def is_chat(args, tokenizer: Tokenizer) -> bool:
    """Whether prompts are turns of a chat: by --chat_template, else where the tokenizer has a template."""
    if args.chat_template and tokenizer.template is None:
        raise ValueError("--chat_template True: the tokenizer has no chat template; pass False to continue plain text")
    chat = tokenizer.template is not None and args.chat_template is not False
    if args.system is not None and not chat:
        raise ValueError(f"--system {args.system} needs a chat template; leave it out where text is continued")
    return chat


def canvas(tokenizer: Tokenizer, prompt: list[int], model: LanguageModel) -> tuple[list[int], list[bool]]:
    """An encoded prompt's ids, and which of them are masks to fill in; the id at a mask is 0."""
    # A mask's id may lie beyond the embedding (see convert.py), so another one takes its place.
    holes = [token == tokenizer.mask_id for token in prompt]
    ids = [0 if hole else token for token, hole in zip(prompt, holes)]
    if not model.config.shift or (holes and not holes[0]):
        return ids, holes

    # A token that is predicted from the one before it needs such a one: BOS, or EOS where there is no BOS.
    return [tokenizer.begin_id, *ids], [False, *holes]


def check_chat(messages, where: str, *, answered: bool = False) -> list[dict]:
    """`messages`, or ValueError if they are no chat (tokenizer.why_invalid); `where` they come from is named in it."""
    if reason := why_invalid(messages, answered=answered):
        found = shorten(json.dumps(messages, ensure_ascii=False, default=str), 100)
        roles = f"a role ({', '.join(ROLES[:-1])} or {ROLES[-1]})"
        wanted = f"a list of messages, each with {roles} and a content that is a string"
        wanted += ", the last one the assistant's" if answered else ""
        raise ValueError(f"{where}: {reason} in {found}; expected {wanted}")
    return messages


def sampler_options(options: Sampling, objective: str, **changes) -> dict:
    """The keywords of `denoise`: `options` with `changes`, and with mdlm's decoding block where none is given."""
    options = options.only(Sampling) | changes
    size, new = options["block_size"], options["max_new_tokens"]
    # ar decodes token by token, and bd3lm's block length is the checkpoint's: Sampling.block checks those two.
    if objective != "mdlm":
        return options
    if size is None:
        return options | {"block_size": MDLM_BLOCK}
    # The size of a block that is longer than the answer would have no effect.
    if new and size > new and options["block_align"] != "sequence":
        raise ValueError(f"block_size {size} exceeds the {new} tokens of max_new_tokens; pass at most {new}")
    return options


def idle_steps(options: dict, objective: str, tokens: int) -> list[str]:
    """A remark, or none: there are more steps than tokens, which is allowed and costs nothing."""
    scheduled = all(options[name] is None for name in ("steps_per_block", *RULES))
    if (
        objective == "ar"
        or options["speculate"]
        or not scheduled
        or not 0 < tokens < options["steps"] != Sampling.steps
    ):
        return []
    return [f"steps {options['steps']} for at most {tokens} tokens: those that would reveal none are left out"]


def in_force(options: dict, config) -> dict:
    """Options of `sampler_options` with the blocks that they come to; ar and speculation have none."""
    if config.objective == "ar" or options["speculate"]:
        return options
    align = options["block_align"] or ("sequence" if config.objective == "bd3lm" else "prompt")
    return options | {"block_size": options["block_size"] or config.block_length, "block_align": align}


BLANK = "blank: an end token at once, or white space; ask as in training, for as many tokens (--max_new_tokens 8, say)"


class Answer(NamedTuple):
    text: str  # up to the end token
    shown: Spans  # the same, where what was filled in stands out
    tokens: int  # that were generated, with the end token
    forwards: int  # model calls until the row was done


class Answers:
    """The answers to a batch of prompts. Iterating over it takes the steps of `denoise`, whose arguments these are;
    `shown` is what there is after each, `final` what comes out. options: of `sampler_options`."""

    def __init__(
        self, model, tokenizer, prompts, canvas_masks=None, *, options: dict, generator, prefix: Prefix | None = None
    ):
        # An answer follows its prompt, up to its first end token. In infilling it is the whole canvas, which end tokens
        # do not end.
        self.tokenizer, self.infilling = tokenizer, canvas_masks is not None
        self.end_ids = () if self.infilling else tuple(tokenizer.end_ids)
        new = options["max_new_tokens"]
        self.columns = [slice(0 if self.infilling else len(ids), len(ids) + new) for ids in prompts]

        self.seconds, self.last = 0.0, None  # what the steps took, and the newest one
        how = {"canvas_masks": canvas_masks, "end_ids": self.end_ids, "prefix": prefix, "generator": generator}
        self.steps = denoise(model, prompts, **how, **options)

    def __iter__(self):
        while True:
            begun = time.perf_counter()
            step = next(self.steps, None)
            self.seconds += time.perf_counter() - begun  # without what the caller does with the step
            if step is None:
                return
            # Of each token the forward that settled it, 0 if it was given, -1 while it is masked (B, T); of each row
            # the forwards until it was done (B,).
            self.corrected = torch.zeros_like(step.masked)
            if self.last is None:
                self.settled, self.forwards = -step.masked.long(), torch.zeros_like(step.done, dtype=torch.int64)
            else:
                settled = torch.where(self.settled < 0, step.forwards, self.settled)
                self.settled = torch.where(step.masked, -1, settled)
                self.forwards = torch.where(self.last.done, self.forwards, step.forwards)
                if step.draft is not None:  # where another token settled than was drafted
                    self.corrected = self.last.draft & ~step.masked & (step.tokens != self.last.tokens)
            self.last = step
            yield step

    def rows(self, *fields: torch.Tensor):
        """For each row, of each field the values of what is denoised."""
        for columns, *values in zip(self.columns, *(field.tolist() for field in fields)):
            yield [row[columns] for row in values]

    def shown(self) -> list[Spans]:
        """Each row's answer as it is after the newest step."""
        fresh = self.settled == max(self.last.forwards, 1)
        draft = torch.zeros_like(fresh) if self.last.draft is None else self.last.draft
        rows = self.rows(self.last.tokens, self.last.masked, fresh, draft, self.corrected)
        return [spans(self.tokenizer, *row[:3], self.end_ids, *row[3:]) for row in rows]

    def final(self) -> list[Answer]:
        """Each row's answer; if it was stopped, what is before its first mask."""
        if self.last is None:
            return [Answer("", [], 0, 0) for _ in self.columns]
        begun = time.perf_counter()
        rows, forwards = list(self.rows(self.last.tokens, self.settled)), self.forwards.tolist()
        self.seconds += time.perf_counter() - begun  # on a GPU this waits for the last forward
        answers = []
        for (ids, settled), calls in zip(rows, forwards):
            # The answer ends at an end token, which is generated, too. One that was stopped may end at a mask.
            end = next((i for i, token in enumerate(ids) if settled[i] < 0 or token in self.end_ids), len(ids))
            tokens = sum(forward > 0 for forward in settled[: end + 1])
            filled = [self.infilling and forward > 0 for forward in settled[:end]]
            shown = spans(self.tokenizer, ids[:end], [False] * end, filled)
            answers.append(Answer(self.tokenizer.decode(ids[:end]), shown, tokens, calls))
        return answers

"""What the programs share: errors in one line, opening a checkpoint, and from prompts to answers."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

from checkpoint import DTYPES, about, declare, has_bfloat16, identify, load_config, load_model, resolve
from choose import RULES
from diffusion import Prefix, Sampling, Step, denoise
from display import Spans, bracketed, one_line, shorten, spans, terminal
from graphs import use_cudnn
from model import OBJECTIVES, LanguageModel
from options import Model, Options, Seed
from picture import GIVEN, Frame
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
    """position i predicts token i + 1, as in the AR model (default: what the checkpoint declares or is known for, else
    False; ar True)"""
    dtype: Literal[*DTYPES] | None = None
    """of the weights and the computation (default: as stored; on a CPU without instructions for bfloat16 float32
    instead, since bfloat16 would be several times slower)"""
    torch_compile: bool = False  # compile the layers, on cuda the sampler too: a minute or two, then fewer kernels


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
        if torch.zeros((), device=device).device.type not in ("cpu", "cuda"):  # no other has kernels for what we do
            raise RuntimeError
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

    slow = torch.device(device).type == "cpu" and config.dtype == "bfloat16" and not has_bfloat16()
    dtype = args.dtype or ("float32" if slow else None)
    model = load_model(path, dtype=dtype and getattr(torch, dtype), device=device, config=config)
    model.known_ids = tokenizer.known_ids
    prepare(model, args.torch_compile)

    # At a terminal, and wherever the checkpoint itself does not say what it is.
    screen = sys.stdout if terminal(sys.stdout) else sys.stderr
    if os.environ.get("RANK", "0") == "0" and (screen is sys.stdout or config.reason != "declared"):
        print(about(args.model_name_or_path, config), file=screen)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# From prompts to answers


@dataclass(kw_only=True)
class Turns(Options):
    "prompts"

    chat_template: bool | None = None
    """make each prompt a user's turn; False continues it as text (default: True where there is a template)"""
    system: Annotated[str, "TEXT"] | None = None  # system message before each prompt (default: none)


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


def encode_prompt(args, model: LanguageModel, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The ids of train.py's --sample_prompt, as a user's turn or as text, and how many tokens are to follow."""
    if args.stage == "sft":
        ids, _ = tokenizer.render([{"role": "user", "content": args.sample_prompt}], reply=True)
    else:
        ids = tokenizer.encode(args.sample_prompt)
    ids, holes = canvas(tokenizer, ids, model)
    if any(holes):
        raise ValueError(f"--sample_prompt: {tokenizer.mask_token} in it would be filled in; leave it out")
    new, room = min(64, Sampling.default_length(model.config)), model.config.max_position_embeddings
    if len(ids) + new > room:
        parts = f"its {len(ids)} tokens and {new} new ones exceed the model's context of {room}"
        raise ValueError(f"--sample_prompt: {parts}; shorten it")
    return ids, new


@dataclass
class Request:
    """One prompt, text or messages, and what becomes of it."""

    prompt: str | list[dict]
    task: str | None = None
    expected: str | None = None
    tools: list[dict] | None = None  # what the assistant may call
    ids: list[int] = None
    holes: list[bool] | None = None  # which ids are masks to fill in; None: there is none, and the answer follows
    new: int = 0  # masks that follow the prompt
    answer: tuple = None  # a cli.Answer; of a prompt that was filled in, all of it

    @property
    def kind(self) -> tuple:
        # A task is timed by itself, and a batch is either filled in or answered.
        return self.task or "", self.holes is not None

    @property
    def correct(self) -> bool:
        return self.answer.text.strip() == self.expected.strip()


def encode(request: Request, n: int, args, model: LanguageModel, tokenizer: Tokenizer, chat: bool) -> None:
    """Sets `ids`, `holes` and `new` of the n-th request. chat: text is a turn of a chat, not continued."""
    prompt, text = request.prompt, isinstance(request.prompt, str)
    # A text is a chat of one turn, or free: to continue or to fill in.
    messages = [{"role": "user", "content": prompt}] if text else prompt
    infilling = any(tokenizer.mask_token in message["content"] for message in messages)
    if not text and not chat:
        raise ValueError(f"prompt {n} is a chat, which needs a chat template; leave --chat_template False out")
    if text and infilling and (args.chat_template or args.system is not None):
        flag = "--system" if args.system is not None else "--chat_template True"
        raise ValueError(f"prompt {n} has masks and is filled in as plain text; leave {flag} out, or give messages")

    # A chat is rendered up to where its answer begins; one to fill in may end in an answer, and is rendered whole.
    if text and (infilling or prompt == "" or not chat):
        ids = tokenizer.encode(prompt)
    else:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        answered = messages[-1]["role"] == "assistant"
        if answered and not infilling:
            raise ValueError(f"prompt {n} ends in the assistant's turn; leave that out, or add {tokenizer.mask_token}")
        ids, _ = tokenizer.render(system + messages, reply=not answered, tools=request.tools)
    request.ids, holes = canvas(tokenizer, ids, model)
    request.holes = holes if infilling else None

    # How much follows, and whether the model's context has room for it.
    default = 0 if infilling else Sampling.default_length(model.config)
    request.new = default if args.max_new_tokens is None else args.max_new_tokens
    room, length = model.config.max_position_embeddings, len(request.ids)
    if length + request.new > room:
        parts = f"its {length} tokens and {request.new} new ones exceed the model's context of {room}"
        raise ValueError(f"prompt {n}: {parts}; shorten it or lower --max_new_tokens")


def batches(todo: list[Request], size: int) -> Iterator[list[Request]]:
    """The requests in batches of one kind, those of a kind in their order."""
    for kind in sorted({request.kind for request in todo}):
        same = [request for request in todo if request.kind == kind]
        for begin in range(0, len(same), size):
            yield same[begin : begin + size]


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
    ended: bool = True  # by an end token, or as a canvas that was filled in; else for want of room, or stopped


class Progress:
    """What becomes of a batch of prompts: `add` takes a step of their decoding; `shown` is what there is after it,
    `final` what comes out."""

    def __init__(self, tokenizer, prompts: list[list[int]], new: int, infilling: bool):
        # An answer follows its prompt, up to its first end token. In infilling it is the whole canvas, which end tokens
        # do not end.
        self.tokenizer, self.infilling = tokenizer, infilling
        self.end_ids = () if self.infilling else tuple(tokenizer.end_ids)
        self.columns = [slice(0 if self.infilling else len(ids), len(ids) + new) for ids in prompts]
        self.last = None  # the newest step

    def add(self, step: Step) -> None:
        # Of each token the forward that settled it, 0 if it was given, -1 while it is masked (B, T); of each row the
        # forwards until it was done (B,).
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

    def rows(self, *fields: torch.Tensor):
        """For each row, of each field the values of what is denoised."""
        for columns, *values in zip(self.columns, *(field.tolist() for field in fields)):
            yield [row[columns] for row in values]

    def states(self) -> Iterator[Spans]:
        """Each row's answer as it is after the newest step: a text and a state for each token, up to its end."""
        fresh = self.settled == max(self.last.forwards, 1)
        draft = torch.zeros_like(fresh) if self.last.draft is None else self.last.draft
        for row in self.rows(self.last.tokens, self.last.masked, fresh, draft, self.corrected):
            yield spans(self.tokenizer, *row[:3], self.end_ids, *row[3:])

    def shown(self) -> list[Spans]:
        """The same for a terminal."""
        return [bracketed(row) for row in self.states()]

    def frame(self) -> Frame:
        """The first row after the newest step, for a picture."""
        canvas, (settled,) = next(zip(self.states(), self.rows(self.settled)))
        canvas = [(text, state if when else GIVEN) for (text, state), when in zip(canvas, settled)]
        # An end token after them counts, too.
        return Frame(sum(when > 0 for when in settled[: len(canvas) + 1]), canvas)

    def settled_rows(self) -> Iterator[tuple[list[int], list[int], int]]:
        """Of each row the ids, the forward that settled each, and where it ends: at its first end token or mask."""
        for ids, settled in self.rows(self.last.tokens, self.settled):
            yield ids, settled, next((i for i, t in enumerate(ids) if settled[i] < 0 or t in self.end_ids), len(ids))

    def final(self) -> list[Answer]:
        """Each row's answer; if it was stopped, what is before its first mask."""
        if self.last is None:
            return [Answer("", [], 0, 0, False) for _ in self.columns]
        answers = []
        for (ids, settled, end), calls in zip(self.settled_rows(), self.forwards.tolist()):
            tokens = sum(forward > 0 for forward in settled[: end + 1])  # an end token is generated, too
            filled = [self.infilling and forward > 0 for forward in settled[:end]]
            shown = spans(self.tokenizer, ids[:end], [False] * end, filled)
            ended = self.infilling if end == len(ids) else settled[end] >= 0
            answers.append(Answer(self.tokenizer.decode(ids[:end]), shown, tokens, calls, ended))
        return answers


class Answers(Progress):
    """The same of a whole batch at once: iterating over it takes the steps of `denoise`, whose arguments these are.
    options: of `sampler_options`."""

    def __init__(
        self, model, tokenizer, prompts, canvas_masks=None, *, options: dict, generator, prefix: Prefix | None = None
    ):
        super().__init__(tokenizer, prompts, options["max_new_tokens"], canvas_masks is not None)
        self.seconds = 0.0  # what the steps took
        how = {"canvas_masks": canvas_masks, "end_ids": self.end_ids, "prefix": prefix, "generator": generator}
        self.steps = denoise(model, prompts, **how, **options)

    @classmethod
    def to(cls, batch: list[Request], model, tokenizer, *, options: dict, generator) -> "Answers":
        """The answers to requests of one kind."""
        holes = None if batch[0].holes is None else [request.holes for request in batch]
        options = options | {"max_new_tokens": batch[0].new}
        prompts = [request.ids for request in batch]
        return cls(model, tokenizer, prompts, holes, options=options, generator=generator)

    def __iter__(self) -> Iterator[Step]:
        while True:
            begun = time.perf_counter()
            step = next(self.steps, None)
            if step is None:
                self.last.done.tolist()  # on a GPU this waits for the last forward
            self.seconds += time.perf_counter() - begun  # without what the caller does with the step
            if step is None:
                return
            self.add(step)
            yield step

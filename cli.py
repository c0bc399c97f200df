"""What the programs share: errors in one line, files that appear whole, and opening a checkpoint to sample from it.

A why_invalid of the user's ends a program with one line and exit status 2 (`one_line_errors`); under `python -X dev` it
shows where it was raised instead.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from checkpoint import DTYPES, declare, load_config, load_model, naming_file, resolve
from diffusion import RULES, Sampling
from model import OBJECTIVES
from options import Model, Options, Seed
from tokenizer import ROLES, Tokenizer, why_invalid


def hold_back() -> None:
    """Lets rank 0 speak for all that torchrun started: once it has ended, torchrun ends those that wait here."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


@contextmanager
def silent_forks():
    """Inside, Ctrl-C is a KeyboardInterrupt as ever, but ends processes forked from this one, as those that tokenise,
    without a traceback of each."""
    before, process = signal.getsignal(signal.SIGINT), os.getpid()
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
    """Turns a ValueError or OSError raised inside into `PROG: message` on standard error and exit status 2; Ctrl-C
    likewise, into status 130.

    Where a process of torchrun's finds another gone, it waits to be ended: that one has said, or will, what is wrong.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if getattr(sys.stdout, "encoding", None) and "utf" not in sys.stdout.encoding.lower():
        sys.stdout.reconfigure(errors="replace")  # a sign it lacks shall not end hours of work
    try:
        with silent_forks():
            yield
        sys.stdout.flush()  # else a full disk or a closed pipe shows only when Python ends
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            begin = "\n" if sys.stderr.isatty() else ""  # after ^C, and a bar it left behind
            print(f"{begin}{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for what Python still writes when it ends)
        print(f"{prog}: what read the output has ended, and so does this", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        hold_back()
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "by peer" in str(error):  # gloo: connection closed, or reset
            time.sleep(10)
        raise


def check_directory(flag: str, directory: str | Path) -> None:
    """ValueError where nothing can be written into `directory`, which need not exist: before the work, not after it."""
    whole = Path(directory).absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{flag} {directory}: {there} is no directory to write to; choose another")


def check_file(flag: str, path: str | Path, endings: tuple[str, ...], *, overwrite: bool) -> None:
    """ValueError where `path` is no name for a file to be written, or must not be replaced."""
    path = Path(path)
    if path.suffix not in endings:
        raise ValueError(f"{flag} {path}: expected a name that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} exists; choose another name or pass --overwrite")
    check_directory(flag, path.parent)


@contextmanager
def replacing_file(path: str | Path):
    """A path beside `path` to write to; it takes the name `path` when the block is left, and is removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.writing")
    try:
        with naming_file(path):
            yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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
    seed: Seed = 42  # of everything random


def compile_layers(model) -> None:
    torch._dynamo.config.recompile_limit = 64  # each shape of a batch counts, and the last layer's again
    for layer in model.model.layers:
        layer.compile()


def open_model(args: Opening, block_size: int | None = None):
    """(model, tokenizer) of a checkpoint; its config declares everything afterwards. block_size: of the sampler."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} is not available here; expected cpu, or cuda where there is a GPU"
        ) from error
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
    declare(config, **declared)  # refuses before the weights are read
    tokenizer.fit(config.vocab_size, mask=objective != "ar")
    model = load_model(path, dtype=args.dtype and getattr(torch, args.dtype), device=device)
    declare(model.config, **declared)
    if args.torch_compile:
        compile_layers(model)
    return model, tokenizer


def canvas(tokenizer, prompt: list[int], *, predicted_from_before: bool) -> tuple[list[int], list[bool]]:
    """(ids, which of them are masks to fill in) of an encoded prompt; 0 stands where a mask was.

    predicted_from_before: a token is predicted from the one before it (ar, right shift), so what would begin with a
    mask, or with nothing, begins with the BOS token, else the EOS token.
    """
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
    """`messages`, unless tokenizer.why_invalid finds one; then ValueError, which names `where` they come from."""
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
    """The keywords of `denoise`: `options`, but for `changes`, with mdlm's decoding block where none is given.

    ValueError where the one given is longer than the answer, which then would be one block whatever it says.
    """
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
    """A remark, or none: more steps were asked for than there are tokens, which is allowed and costs nothing."""
    scheduled = all(options[name] is None for name in ("steps_per_block", *RULES))
    if objective == "ar" or not scheduled or not 0 < tokens < options["steps"] != Sampling.steps:
        return []
    return [f"steps {options['steps']} for at most {tokens} tokens: those that would reveal none are left out"]

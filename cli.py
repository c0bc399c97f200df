"""What the programs' command lines share: flags and their manual, mistakes told in one line, the sampler's options.

A mistake of the user's ends a program with one line and exit status 2 (`one_line_errors`); under `python -X dev` it
shows where it was raised instead.
"""

import argparse
import difflib
import gc
import itertools
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

TRUTH = {"true": True, "false": False}

# Every program imports this file first, for the seconds in which it then imports torch: Ctrl-C ends it without a
# traceback, and the garbage collector does not search what is all in use, a tenth of that time.
_program = sys.modules["__main__"]  # of another name in a process that one of ours spawned
_directory = Path(getattr(_program, "__file__", None) or "").resolve().parent
if _program.__name__ == "__main__" and _directory == Path(__file__).resolve().parent:
    gc.disable()  # until the arguments are parsed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in a shell's background it stays ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until one_line_errors


def boolean(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return TRUTH[text.lower()]


def ids(text: str) -> tuple[int, ...]:
    """Token ids separated by commas, with or without brackets around them."""
    parts = [part for part in re.split(r"[\s,]+", text.strip("[]() ")) if part]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected token ids separated by commas, such as 151643,151645")
    return tuple(map(int, parts))


def place(text: str) -> str:
    """A path or a Hub id. An empty one, as a shell makes of an unset variable, would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a directory")
    return text


def seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2**63 - 1")
    return int(text)


class _Manual(argparse.RawDescriptionHelpFormatter):
    """Names every flag's default at the end of its help, unless the help speaks of it or there is none to name."""

    def _get_help_string(self, action):
        text = action.help or ""
        if "default" in text or action.required or action.default in (None, argparse.SUPPRESS):
            return text
        return text + " (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with whole flags only, a mistake in one line, and the nearest name for a flag that does not exist."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, formatter_class=_Manual, allow_abbrev=False)

    def error(self, message: str):
        hold_back()
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        flags = list(itertools.takewhile(lambda argument: argument != "--", args))
        for flag in (argument.partition("=")[0] for argument in flags if argument.startswith("--")):
            if flag not in self._option_string_actions:
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                way = f"did you mean {near[0]}?" if near else f"python {self.prog} --help lists them"
                self.error(f"unknown flag {flag}; {way}")
        if self._get_positional_actions():  # a switch alone must not take one of them for its value
            for i, (flag, after) in enumerate(itertools.zip_longest(flags, flags[1:], fillvalue="")):
                action = self._option_string_actions.get(flag)
                if action is not None and action.type is boolean and action.const and after.lower() not in TRUTH:
                    args[i] = f"{flag}=True"
        parsed = super().parse_known_args(args, namespace)
        gc.enable()
        return parsed


def switch(add, name: str, default: bool, help: str) -> None:
    """A flag that takes True or False; alone it means True."""
    add(name, nargs="?", type=boolean, const=True, default=default, metavar="True|False", help=help)


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


def check_place(flag: str, directory: str | Path) -> None:
    """ValueError where nothing can be written into `directory`, which need not exist: before the work, not after it."""
    whole = Path(directory).absolute()
    there = next(place for place in (whole, *whole.parents) if place.exists())
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
    check_place(flag, path.parent)


@contextmanager
def replacing_file(path: str | Path):
    """A path beside `path` to write to; it takes the name `path` when the block is left, and is removed on an error."""
    from checkpoint import writing

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.writing")
    try:
        with writing(path):
            yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The model to sample from

MDLM_BLOCK, STEPS = 32, 128  # tokens of a decoding block and forwards, where a program is told none


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model_name_or_path",
        type=place,
        required=True,
        help="a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id",
    )
    add(
        "--objective",
        choices=["ar", "mdlm", "bd3lm"],
        help="what the checkpoint was trained as, where it does not say (default: what it declares, else mdlm)",
    )
    add_reading(add)
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    add("--seed", type=seed, default=42, metavar="N", help="of everything random")


def add_reading(add) -> None:
    """How a checkpoint is taken, for sampling and evaluation alike."""
    add(
        "--right_shift_logits",
        type=boolean,
        metavar="True|False",
        help="position i predicts token i + 1, as in the AR model; open-dcoder needs it (default: what the checkpoint "
        "declares, else False; ar True)",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of the weights and the computation (default: as stored)",
    )
    add_compile(add)


def compile_layers(model) -> None:
    import torch

    torch._dynamo.config.recompile_limit = 64  # each shape of a batch counts, and the last layer's again
    for layer in model.model.layers:
        layer.compile()


def add_compile(add) -> None:
    switch(
        add, "--torch_compile", False, "compile the layers: a minute at the start, fewer kernels after it (for cuda)"
    )


def open_model(args: argparse.Namespace):
    """(model, tokenizer) of the flags of `add_model` and --block_size; the config declares everything afterwards."""
    import torch

    from checkpoint import declare, load_config, load_model, resolve
    from tokenizer import Tokenizer

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device} is not to be had here; expected cpu, or cuda where there is one"
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
        "block_length": args.block_size if objective == "bd3lm" else None,
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
    """`messages`, unless tokenizer.mistake finds one; then ValueError, which names `where` they come from."""
    from tokenizer import ROLES, mistake

    if reason := mistake(messages, answered=answered):
        told = json.dumps(messages, ensure_ascii=False, default=str)
        raise ValueError(
            f"{where}: {reason} in {told if len(told) <= 100 else told[:100] + '…'}; expected a list of messages, each "
            f"with a role ({', '.join(ROLES[:-1])} or {ROLES[-1]}) and a content that is a string"
            + (", the last one the assistant's" if answered else "")
        )
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# The sampler's options, under the reference's names: those of diffusion.denoise.

SAMPLING = (
    *("max_new_tokens", "steps", "block_size", "steps_per_block", "block_align", "scheduler"),
    *("temperature", "top_k", "top_p", "remasking", "stochastic_transfer", "threshold", "entropy", "factor"),
    *("cfg_scale", "cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens"),
)


def add_sampling(parser: argparse.ArgumentParser, **defaults) -> None:
    """Adds a flag for each of SAMPLING; `defaults` replace those that fit a short answer.

    max_new_tokens None: the program chooses, by what a prompt is.
    """
    add = parser.add_argument_group("sampling").add_argument
    told = " (default: 128, or 0 after a prompt that has masks)" if defaults.get("max_new_tokens", 128) is None else ""
    add("--max_new_tokens", type=int, default=128, metavar="TOKENS", help="masks that follow each prompt" + told)
    add(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="forwards for the whole answer, shared evenly by its blocks; fewer steps reveal more tokens each. More "
        "steps than tokens are allowed; those that would reveal nothing are left out. ar takes one a token",
    )
    add(
        "--block_size",
        type=int,
        metavar="TOKENS",
        help="tokens of a decoding block; blocks are decoded from left to right. For bd3lm the checkpoint's block "
        "length, where it declares one (default: bd3lm that, mdlm 32; ar has none)",
    )
    add("--steps_per_block", type=int, metavar="N", help="forwards for one block (default: by --steps)")
    add(
        "--block_align",
        choices=["sequence", "prompt"],
        help="where blocks start. sequence: multiples of the block size from the first token of the prompt, as in "
        "training, so the prompt's last partial block is denoised with the prompt fixed. prompt: where the prompt "
        "ends, as dLLM does (default: bd3lm sequence, mdlm prompt)",
    )
    add(
        "--scheduler", choices=["linear", "cosine"], default="linear", help="alpha(t), which spreads reveals over steps"
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of the Gumbel noise on the logits; 0 takes the likeliest token",
    )
    add(
        "--top_k",
        type=int,
        metavar="K",
        help="choose among the K likeliest tokens; needs --temperature above 0 (default: all)",
    )
    add(
        "--top_p",
        type=float,
        metavar="P",
        help="choose among the smallest set of tokens of probability at least P (default: 1)",
    )
    add(
        "--remasking",
        choices=["low_confidence", "random", "p2"],
        default="low_confidence",
        help="which of a step's tokens stay: the most probable ones, or random ones; p2: the most probable ones of the "
        "block's whole answer, so that earlier ones may be masked again (path planning, Open-dLLM's rule)",
    )
    switch(add, "--stochastic_transfer", False, "draw how many tokens a step reveals, instead of the expected number")
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="reveal every token of probability above P at each step, at least one, instead of a fixed number; "
        "0.9 takes several times fewer forwards (default: none, --steps)",
    )
    add(
        "--entropy",
        type=float,
        metavar="NATS",
        help="reveal the surest tokens while the entropies of those before add up to at most NATS (EB-Sampler), 0.1 "
        "say, instead of a fixed number (default: none, --steps)",
    )
    add(
        "--factor",
        type=float,
        metavar="F",
        help="reveal the n most probable tokens, n the largest with (n + 1)(1 - probability of the n-th) below F "
        "(Fast-dLLM), 1 say, instead of a fixed number (default: none, --steps)",
    )
    add(
        "--cfg_scale",
        type=float,
        default=0.0,
        metavar="S",
        help="classifier-free guidance s: logits u + (s + 1)(c - u), u with the prompt masked; doubles the work",
    )
    add("--cfg_keep_tokens", type=ids, default=(), metavar="IDS", help="prompt tokens that u keeps (default: none)")
    add("--suppress_tokens", type=ids, default=(), metavar="IDS", help="tokens never generated (default: none)")
    add(
        "--begin_suppress_tokens",
        type=ids,
        default=(),
        metavar="IDS",
        help="tokens that count as improbable when confidences are compared, though they may be chosen, as in dLLM "
        "(default: none)",
    )
    parser.set_defaults(**defaults)


def sampling(args: argparse.Namespace) -> dict:
    """The keyword arguments of diffusion.denoise that the flags of `add_sampling` gave."""
    return {name: getattr(args, name) for name in SAMPLING}


def surplus(options: dict, objective: str, tokens: int) -> list[str]:
    """A remark, or none: more steps than tokens are allowed, and cost nothing. Of the default nobody asked for them."""
    instead = [options[name] for name in ("steps_per_block", "threshold", "entropy", "factor")]
    fewer = 0 < tokens < options["steps"] != STEPS
    if objective == "ar" or instead != [None] * len(instead) or not fewer:
        return []
    return [f"steps {options['steps']} for at most {tokens} tokens: those that would reveal none are left out"]


def with_block(options: dict, objective: str) -> dict:
    """`options` of `sampling` with mdlm's decoding block, if none was given.

    ValueError where the one given is longer than the answer, which then would be one block whatever it says.
    """
    if objective != "mdlm":
        return options
    given, new = options["block_size"], options["max_new_tokens"]
    if given is None:
        return options | {"block_size": MDLM_BLOCK}
    if new and given > new and options["block_align"] != "sequence":
        raise ValueError(f"block_size {given} exceeds the {new} tokens of max_new_tokens; pass at most {new}")
    return options

"""A conversation with a checkpoint in the terminal. `python chat.py --help` is the manual, and /help within."""

from cli import (
    Parser,
    add_model,
    add_sampling,
    boolean,
    canvas,
    check_messages,
    one_line_errors,
    open_model,
    replacing_file,
    sampling,
    seed,
    surplus,
    switch,
    with_block,
)

import argparse
import difflib
import json
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from diffusion import Prefix, Sampling, denoise
from display import MASKED, Rate, Stream, spans, styled, terminal
from model import LanguageModel
from tokenizer import Tokenizer

PROMPT = "> "
HISTORY = 1000  # lines


def add_chat(parser: argparse.ArgumentParser) -> None:
    """The flags that /set changes, too."""
    add_sampling(parser, Sampling)
    add = parser.add_argument_group("display").add_argument
    switch(
        add,
        "--visualize",
        True,
        "redraw the answer in place: masked, just settled (green), settled. False, and "
        "always where there is no terminal: write text as it settles from the left",
    )


def arguments() -> Parser:
    parser = Parser(
        "chat.py",
        """\
Talk to an ar, mdlm or bd3lm checkpoint, turn by turn, and watch the denoising.

  python chat.py --model_name_or_path runs/mdlm/checkpoint-final
  python chat.py --model_name_or_path runs/bd3lm/checkpoint-final --chat_template False --temperature 0.7

/help lists what can be said beside messages. Ctrl-C stops an answer, Ctrl-D leaves. Lines can be edited, and the arrow
keys bring back earlier ones. On a pipe each line is a message, and only answers are written.

ar and bd3lm keep the keys and values of complete blocks from turn to turn, and compute only what is new or differs;
the answers are those of a fresh start. When a conversation no longer fits the model's context, its oldest exchanges are
left out of what the model sees, which is said.""",
    )
    add_model(parser)
    add = parser.add_argument_group("conversation").add_argument
    add(
        "--chat_template",
        type=boolean,
        metavar="True|False",
        help="True: turns of a chat. False: each message is a text to continue, by itself, and an empty one generates "
        "from scratch (default: True if the tokenizer has a template)",
    )
    add("--system", metavar="TEXT", help="system message (default: none)")
    add("--history_file", default="~/.nanoa2d_history", metavar="FILE", help="keeps what was typed; '' keeps nothing")
    add_chat(parser)
    return parser


class Setting(Parser):
    """Parses what /set is given."""

    def error(self, message: str):
        raise ValueError(message.replace("argument --", "").replace("--", ""))


class Chat:
    """A conversation: its messages, the options it is decoded with, and what of it is cached.

    Methods named in COMMANDS are what a line beginning with a slash calls, with the rest of the line.
    """

    def __init__(self, args: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.templated = tokenizer.template is not None if args.chat_template is None else args.chat_template
        if self.templated and tokenizer.template is None:
            raise ValueError("--chat_template True: the tokenizer has no chat template; pass False to continue text")
        if args.system is not None and not self.templated:
            raise ValueError(f"--system {args.system} needs a chat template; leave it out where text is continued")
        self.options = sampling(args)
        self.visualize = args.visualize
        self.generator = torch.Generator(model.head_weight.device).manual_seed(args.seed)
        self.system_message = args.system
        self.messages = []  # turns of user and assistant, without the system message
        self.left_out = 0  # of the messages, the first ones
        self.kept = Prefix()
        self.files = set()  # that this conversation was saved to or loaded from
        self._check(self.options)

    # What a line can be

    def obey(self, line: str) -> None:
        """A message, or a command; two slashes begin a message that begins with one."""
        if not line.startswith("/") or line.startswith("//"):
            self.say(line.removeprefix("/"))
            return
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            way = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise ValueError(f"unknown command /{name}; {way}")
        getattr(self, name)(rest.strip())

    def say(self, text: str) -> None:
        """Answers a message; one that cannot be answered is not kept."""
        if text == "" and self.templated:
            return
        self._ask(text, otherwise=list(self.messages))

    def help(self, rest: str) -> None:
        """list the commands"""
        width = max(len(usage) for usage in COMMANDS.values())
        for name, usage in COMMANDS.items():
            self._tell(f"{usage:<{width}}  {getattr(self, name).__doc__}")

    def reset(self, rest: str) -> None:
        """begin anew; the system message and the options stay"""
        self.messages, self.left_out = [], 0
        self._tell("a new conversation")

    def set(self, rest: str) -> None:
        """change an option (VALUE none: its default); without a name, list them"""
        parser = Setting("/set", "")
        add_chat(parser)
        parser.add_argument("--seed", type=seed, default=42)
        now = self.options | {"visualize": self.visualize, "seed": self.generator.initial_seed()}
        if not rest:
            for name, value in now.items():
                self._tell(f"{name} {value}")
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        name, value = name.lstrip("-"), value.strip()
        if name not in now:
            near = difflib.get_close_matches(name, now, n=1)
            way = f"did you mean {near[0]}?" if near else "/set lists them"
            raise ValueError(f"unknown option {name}; {way}")
        if not value:
            self._tell(f"{name} {now[name]}")
            return
        given = [] if value == "none" else [f"--{name}={value}"]
        value = getattr(parser.parse_args(given), name)
        if name == "visualize":
            self.visualize = value
        elif name == "seed":
            self.generator.manual_seed(value)
        else:
            self._check(self.options | {name: value})
            self.options[name] = value
        self._tell(f"{name} {value}")

    def undo(self, rest: str) -> None:
        """take the last exchange back"""
        if not self.messages:
            raise ValueError("nothing to undo; the conversation is empty")
        taken = self._take_back()
        self._tell(f"took back: {_short(taken)}")

    def retry(self, rest: str) -> None:
        """answer the last message once more; at temperature 0 only other options change the answer"""
        if not self.messages:
            raise ValueError("nothing to retry; the conversation is empty")
        before = list(self.messages)
        self._ask(self._take_back(), otherwise=before)
        if len(self.messages) < len(before):
            self.messages = before
            self._tell("the earlier answer stays")

    def system(self, rest: str) -> None:
        """set the system message; without a text, drop it"""
        if not self.templated:
            raise ValueError("a system message needs a chat template, and here text is continued")
        self.system_message = rest or None
        self._tell(
            "no system message" if self.system_message is None else f"system message: {_short(self.system_message)}"
        )

    def save(self, rest: str) -> None:
        """write the conversation, a row of JSONL as train.py reads it"""
        path = _path(rest, "/save")
        if path.exists() and path.resolve() not in self.files:
            raise ValueError(f"{path} exists and is not this conversation's; choose another name")
        system = [] if self.system_message is None else [{"role": "system", "content": self.system_message}]
        with replacing_file(path) as file:
            file.write_text(
                json.dumps({"messages": system + self.messages}, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        self.files.add(path.resolve())
        self._tell(f"saved {len(self.messages)} messages to {path}")

    def load(self, rest: str) -> None:
        """go on with a conversation that was saved"""
        path = _path(rest, "/load")
        try:
            row = json.loads(path.read_bytes().decode("utf-8").split("\n", 1)[0])
        except ValueError as error:
            raise ValueError(f"{path} holds no conversation ({error}); expected what /save writes") from error
        messages = check_messages(row.get("messages") if isinstance(row, dict) else None, str(path))
        begins = [message["content"] for message in messages if message["role"] == "system"]
        turns = messages[len(begins) :]
        if len(begins) > 1 or [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(f"{path}: expected turns of user and assistant, one after the other, as /save writes them")
        if begins and not self.templated:
            raise ValueError(f"{path} has a system message, which needs a chat template; here text is continued")
        self.system_message = begins[0] if begins else None
        self.messages, self.left_out = turns, 0
        self.files.add(path.resolve())
        for message in turns:
            self._tell(f"{message['role']}: {_short(message['content'])}")

    def infill(self, rest: str) -> None:
        """fill in each <|mask|> of a text, outside of the conversation"""
        ids, holes = canvas(
            self.tokenizer, self.tokenizer.encode(rest), predicted_from_before=self.model.config.right_shift
        )
        if not any(holes):
            raise ValueError(
                f"/infill {rest}: expected a text with {self.tokenizer.mask_token} where tokens are wanted"
            )
        self._decode(ids, holes, None)

    def quit(self, rest: str) -> None:
        """leave"""
        raise EOFError

    # How it is done

    def _ask(self, text: str, otherwise: list[dict]) -> None:
        """Answers `text`; where that cannot be done, the conversation is `otherwise`."""
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except (ValueError, KeyboardInterrupt):
            self.messages = otherwise
            raise

    def _answer(self) -> None:
        """Answers the last message, a user's, and keeps the answer; of one that is stopped what has settled."""
        ids = self._prompt()
        usable = self.model.config.objective != "mdlm" and not self.options["cfg_scale"]
        text, stopped = self._decode(
            ids, None, self.kept if usable and self.options["block_align"] != "prompt" else None
        )
        if stopped and not text:
            taken = self._take_back()
            self._tell(f"stopped before anything had settled; took back: {_short(taken)}")
            return
        self.messages.append({"role": "assistant", "content": text})

    def _prompt(self) -> list[int]:
        """The ids the model is given: of the chat as much as fits its context, the newest; or the text to continue."""
        context, new = self.model.config.max_position_embeddings, self.options["max_new_tokens"]
        system = [] if self.system_message is None else [{"role": "system", "content": self.system_message}]
        for first in range(0, len(self.messages), 2):
            if self.templated:
                ids, _ = self.tokenizer.render(system + self.messages[first:], reply=True)
            else:
                text = self.tokenizer.encode(self.messages[-1]["content"])
                ids, holes = canvas(self.tokenizer, text, predicted_from_before=self.model.config.right_shift)
                if any(holes):
                    raise ValueError(f"{self.tokenizer.mask_token} in a text to continue; /infill fills it in")
            if len(ids) + new > context and (self.templated and first + 1 < len(self.messages)):
                continue
            break
        if len(ids) + new > context:
            raise ValueError(
                f"the message was not taken: its {len(ids)} tokens and max_new_tokens {new} exceed the context of "
                f"{context}; shorten it or /set max_new_tokens lower"
            )
        if self.templated and first > self.left_out:
            self._tell(
                f"the context of {context} tokens is full: the model no longer sees the oldest {first // 2} of "
                f"{len(self.messages) // 2 + 1} exchanges"
            )
        self.left_out = first
        return ids

    def _decode(self, ids: list[int], holes: list[bool] | None, kept: Prefix | None) -> tuple[str, bool]:
        """Shows how the canvas is denoised; the text it came to, and whether Ctrl-C stopped it."""
        options = with_block(self.options, self.model.config.objective)
        if holes is not None:
            options = options | {"max_new_tokens": 0}
        end_ids = tuple(self.tokenizer.end_ids) if holes is None else ()
        begin = len(ids) if holes is None else 0
        steps = denoise(
            self.model,
            [ids],
            canvas_masks=None if holes is None else [holes],
            end_ids=end_ids,
            prefix=kept,
            generator=self.generator,
            **options,
        )
        seconds, reused, forwards = 0.0, 0, 0
        tokens, masked, wanted = [], [], None
        with (
            noted_interrupts() as pressed,
            Stream(live=self.visualize, revocable=options["remasking"] == "p2") as stream,
        ):
            try:
                while not pressed:
                    begun = time.perf_counter()
                    step = next(steps, None)
                    seconds += time.perf_counter() - begun
                    if step is None:
                        break
                    before, forwards = masked, step.forwards
                    tokens, masked = step.tokens[0, begin:].tolist(), step.masked[0, begin:].tolist()
                    if wanted is None:
                        before = wanted = masked
                        reused = 0 if kept is None else len(kept.tokens)
                    fresh = [was and not hole for was, hole in zip(before, masked)]
                    stream.show(spans(self.tokenizer, tokens, masked, fresh, end_ids))
            except KeyboardInterrupt:
                pressed.append(True)
            finally:
                steps.close()
            # Up to the end token, or to the first mask where it was stopped.
            stop = next((i for i, token in enumerate(tokens) if masked[i] or token in end_ids), len(tokens))
            filled = [holes is not None and hole for hole in (wanted or [])[:stop]]
            shown = spans(self.tokenizer, tokens[:stop], [False] * stop, filled)
            stream.close(shown)
        ended = stop < len(tokens) and not masked[stop]
        notes = [str(Rate(sum((wanted or [])[:stop]) + ended, seconds, forwards))]
        notes += [f"{reused} of {len(ids)} prompt tokens kept"] if reused else []
        notes += surplus(options, self.model.config.objective, sum(wanted or []))
        notes += ["stopped"] if pressed else []
        self._tell("[" + "; ".join(notes) + "]")
        return self.tokenizer.decode(tokens[:stop]), bool(pressed)

    def _check(self, options: dict) -> None:
        """Refuses options that the sampler would refuse."""
        next(denoise(self.model, [[0]], **with_block(options, self.model.config.objective)))

    def _take_back(self) -> str:
        """Removes the last exchange; the user's text of it."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        text = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return text

    def _tell(self, text: str) -> None:
        """Something that is not the model's: dim, and on a pipe on standard error."""
        stream = sys.stdout if terminal(sys.stdout) else sys.stderr
        print(styled([(text, MASKED)], stream), file=stream, flush=True)


COMMANDS = {
    "help": "/help",
    "reset": "/reset",
    "system": "/system [TEXT]",
    "undo": "/undo",
    "retry": "/retry",
    "set": "/set [NAME [VALUE]]",
    "infill": "/infill TEXT",
    "save": "/save FILE",
    "load": "/load FILE",
    "quit": "/quit",
}


@contextmanager
def noted_interrupts():
    """A list, empty until Ctrl-C is pressed, so that a forward or a line that is drawn is not torn; twice raises."""
    pressed = []

    def note(signum, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise ValueError(f"{command}: expected the name of a file")
    return Path(rest).expanduser()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:69] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# The program


def talk(chat: Chat) -> None:
    """Until the end of input. At a terminal a mistake is told and the talk goes on; on a pipe it ends the program."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            if interactive:
                line = input(PROMPT)
            else:
                raw = sys.stdin.buffer.readline()
                if not raw:
                    return
                line = raw.decode("utf-8").rstrip("\r\n")
            chat.obey(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D or /quit leaves)")
        except (ValueError, OSError) as error:
            if not interactive:
                raise
            print(f"error: {' '.join(str(error).split())}")


@contextmanager
def history(file: str):
    """Line editing for `input`, with what was typed before; it is kept in `file`, if that is not empty."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    path = Path(file).expanduser()
    if file and path.exists():
        with naming_history(path):
            readline.read_history_file(path)
    try:
        yield
    finally:
        if file:
            readline.set_history_length(HISTORY)
            with naming_history(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)


@contextmanager
def naming_history(path: Path):
    """readline's errors name no file."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--history_file {path}: {error.strerror}; name another file, or '' to keep nothing"
        ) from error


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        model, tokenizer = open_model(args)
        chat = Chat(args, model, tokenizer)
        if sys.stdin.isatty():
            config = model.config
            blocks = f", block length {config.block_length}" if config.objective == "bd3lm" else ""
            print(f"{args.model_name_or_path}: {config.objective}{blocks}, context {config.max_position_embeddings}")
            print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        try:
            with history(args.history_file):
                talk(chat)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])

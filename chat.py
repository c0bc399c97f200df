"""A conversation with a checkpoint in the terminal. `python chat.py --help` is the manual, and /help within."""

import json
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch

import cli
from cli import Answers, Opening, canvas, check_chat, idle_steps, is_chat, one_line_errors, open_model, sampler_options
from diffusion import Prefix, Sampling, denoise
from display import LEGEND, MASKED, Stream, cost, one_line, shorten, show, terminal
from files import read_text, replacing_file
from model import LanguageModel
from options import Options, Seed, flags, nearest
from tokenizer import Tokenizer


@dataclass(kw_only=True)
class Conversing(Options):
    "conversation"

    chat_template: bool | None = None
    """True: turns of a chat. False: each message is a text to continue, by itself, and an empty one generates free text
    (default: True if the tokenizer has a template)"""
    system: Annotated[str, "TEXT"] | None = None  # system message (default: none)
    history_file: Annotated[str, "FILE"] = "~/.nanoa2d_history"  # keeps what was typed; '' keeps nothing


@dataclass(kw_only=True)
class Talking(Sampling):  # all that /set changes
    "display"

    visualize: bool = True
    """redraw the answer in place: masked (░), just settled (green), settled; ∎ is an end token behind masks. False, and
    always where there is no terminal: write text as it settles from the left"""
    seed: Seed = Opening.seed  # of all random numbers


@dataclass(kw_only=True)
class Chat(Talking, Conversing, Opening):
    """Talk to an ar, mdlm or bd3lm checkpoint, turn by turn, and watch the denoising.

      python chat.py --model_name_or_path runs/mdlm/checkpoint-final
      python chat.py --model_name_or_path runs/bd3lm/checkpoint-final --chat_template False --temperature 0.7

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. Lines can be edited, and the arrow keys bring back
    earlier ones. On a pipe each line is a message, and only answers are written.

    ar and bd3lm keep the keys and values of complete blocks from turn to turn, and compute only what is new or differs;
    the answers are the same as without. When a conversation grows longer than the model's context, the model no longer
    sees its oldest exchanges, and a line says so."""

    prog: ClassVar[str] = "chat.py"


COMMANDS = "help", "reset", "system", "undo", "retry", "set", "infill", "save", "load", "quit"


class Conversation:
    """A conversation: its messages, the options it is decoded with, and what of it is cached."""

    def __init__(self, args: Chat, model: LanguageModel, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.templated = is_chat(args, tokenizer)

        # What commands may change.
        self.options = Talking(**args.only(Talking))
        if "max_new_tokens" not in args.given:
            self.options = replace(self.options, max_new_tokens=Sampling.default_length(model.config))
        self.generator = torch.Generator(model.head_weight.device).manual_seed(args.seed)
        self.system_message = args.system

        # What has happened so far.
        self.messages = []  # turns of user and assistant, without the system message
        self.left_out = 0  # how many messages at the start the model no longer sees
        self.prefix = Prefix()  # the cache of earlier turns
        self.files = {}  # path: what this conversation has saved there, or loaded
        self._check(self.options)  # now, not at the first message

    def obey(self, line: str) -> None:
        """Does what a line says: a message, or a command; two slashes begin a message that begins with one."""
        if not line.startswith("/") or line.startswith("//"):
            # Where text is continued, an empty line generates from scratch.
            if line or not self.templated:
                self.say(line.removeprefix("/"))
            return
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            way_out = nearest(name, COMMANDS, "/help lists the commands").replace("mean ", "mean /")
            raise ValueError(f"unknown command /{name}; {way_out}")
        if name in ("save", "load") and not rest.strip():
            raise ValueError(f"/{name}: expected the name of a file")
        getattr(self, name)(rest.strip())

    # Commands: a line that begins with a slash calls the method of that name, with the rest of the line. Its docstring
    # is what /help prints. It raises ValueError, and changes nothing, where that cannot be done.

    def help(self, rest: str) -> None:
        """/help: list the commands"""
        for name in COMMANDS:
            usage, _, meaning = getattr(self, name).__doc__.partition(": ")
            note(f"{usage:<21}{meaning}")
        note(f"signs: {LEGEND}")

    def reset(self, rest: str) -> None:
        """/reset: begin anew; the system message and the options stay"""
        self.messages, self.left_out = [], 0
        note("a new conversation")

    def set(self, rest: str) -> None:
        """/set [NAME [VALUE]]: change an option (VALUE none: its default); without a name, list them"""
        known = flags(Talking)
        # NAME VALUE, or NAME=VALUE, or as on the command line.
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        name, text = name.lstrip("-"), text.strip()
        if rest and name not in known:
            raise ValueError(f"unknown option {name}; {nearest(name, known, '/set lists them')}")

        if text:
            # The command line's parser reads the value. Errors, of it or of what contradicts the rest, name flags.
            default = Sampling.default_length(self.model.config) if name == "max_new_tokens" else known[name].default
            try:
                given = vars(Talking.parser().parse_args([] if text == "none" else [f"--{name}={text}"]))
                changed = replace(self.options, **{name: given.get(name, default)})
                self._check(changed)
            except ValueError as error:
                raise ValueError(str(error).replace("argument --", "").replace("--", "")) from error
            self.options = changed
            if name == "seed":
                self.generator.manual_seed(changed.seed)
        shown = self.options.only(Talking)
        shown |= cli.in_force(sampler_options(self.options, self.model.config.objective), self.model.config)
        for each in [name] if name else known:
            note(f"{each} {shown[each]}")

    def undo(self, rest: str) -> None:
        """/undo: take the last exchange back"""
        self.messages, text = self._last_exchange("undo")
        note(f"took back: {brief(text)}")

    def retry(self, rest: str) -> None:
        """/retry: answer the last message once more; at temperature 0 only other options change the answer"""
        earlier = self.messages
        before, text = self._last_exchange("retry")
        self.say(text, before)
        if self.messages is earlier:
            note("the earlier answer stays")

    def system(self, rest: str) -> None:
        """/system [TEXT]: set the system message; without a text, drop it"""
        if not self.templated:
            raise ValueError("a system message needs a chat template, and here text is continued")
        self.system_message = rest or None
        note(f"system message: {brief(rest)}" if rest else "no system message")

    def save(self, rest: str) -> None:
        """/save FILE: write the conversation, a row of JSONL as train.py reads it"""
        # Replace no file but this conversation's own, as it left it: of other rows, or changed since, none is lost.
        path = home(rest)
        known = self.files.get(path.resolve())
        if path.exists() and (known is None or read_text(path) != known):
            raise ValueError(f"{path} exists and is not this conversation's; choose another name")
        row = json.dumps({"messages": self._system() + self.messages}, ensure_ascii=False) + "\n"
        replacing = ", replacing the earlier ones" if path.exists() else ""
        with replacing_file(path) as file:
            file.write_text(row, encoding="utf-8")
        self.files[path.resolve()] = row
        note(f"saved {len(self.messages)} messages to {path}{replacing}")

    def load(self, rest: str) -> None:
        """/load FILE: go on with a conversation that was saved"""
        path = home(rest)
        if not path.exists():
            raise ValueError(f"there is no file {path}")
        try:
            line = read_text(path).split("\n", 1)[0]
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no conversation ({error}); expected what /save writes") from error

        # At most one system message, then a user's turn and an answer, as often as you like.
        messages = check_chat(row.get("messages") if isinstance(row, dict) else None, str(path))
        system = [message["content"] for message in messages if message["role"] == "system"]
        turns = messages[len(system) :]
        if len(system) > 1 or [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(f"{path}: expected turns of user and assistant, one after the other, as /save writes them")
        if system and not self.templated:
            raise ValueError(f"{path} has a system message, which needs a chat template; here text is continued")

        # From here on nothing can fail.
        self.system_message = system[0] if system else None
        self.messages, self.left_out = turns, 0
        self.files[path.resolve()] = line + "\n"
        for message in turns:
            note(f"{message['role']}: {brief(message['content'])}")

    def infill(self, rest: str) -> None:
        """/infill TEXT: fill in each <|mask|> of a text, outside of the conversation"""
        ids, holes = canvas(self.tokenizer, self.tokenizer.encode(rest), self.model)
        if not any(holes):
            raise ValueError(f"/infill {rest}: expected a text with {self.tokenizer.mask_token} where tokens go")
        self._decode(ids, holes)

    def quit(self, rest: str) -> None:
        """/quit: leave"""
        raise EOFError

    # How messages become answers

    def say(self, text: str, before: list[dict] | None = None) -> None:
        """Answers a message that follows the turns `before` (default: all). Where that cannot be done, or is stopped
        before anything has settled, the conversation stays as it was."""
        turns = [*(self.messages if before is None else before), {"role": "user", "content": text}]
        answer, stopped = self._decode(self._prompt(turns))
        if stopped and not answer:
            note(f"stopped before anything had settled; took back: {brief(text)}")
        else:
            self.messages = [*turns, {"role": "assistant", "content": answer}]

    def _prompt(self, turns: list[dict]) -> list[int]:
        """The ids that the model is given: as much of the chat as its context has room for, or the text to continue."""
        context, new, first = self.model.config.max_position_embeddings, self.options.max_new_tokens, 0
        if self.templated:
            # Leave out exchanges, the oldest first, until the rest has room.
            for first in range(0, len(turns), 2):
                ids, _ = self.tokenizer.render(self._system() + turns[first:], reply=True)
                if len(ids) + new <= context:
                    break
        else:
            ids, holes = canvas(self.tokenizer, self.tokenizer.encode(turns[-1]["content"]), self.model)
            if any(holes):
                raise ValueError(f"{self.tokenizer.mask_token} in a text to continue; /infill fills it in")
        if len(ids) + new > context:
            parts = f"its {len(ids)} tokens and max_new_tokens {new} exceed the context of {context}"
            raise ValueError(f"the message was not taken: {parts}; shorten it or /set max_new_tokens lower")

        # Mention it only when more is left out than at the turn before.
        if first > self.left_out:
            unseen = f"the oldest {first // 2} of {len(turns) // 2 + 1} exchanges"
            note(f"the context of {context} tokens is full: the model no longer sees {unseen}")
        self.left_out = first
        return ids

    def _decode(self, ids: list[int], holes: list[bool] | None = None) -> tuple[str, bool]:
        """Shows how a canvas is denoised; its text, and whether Ctrl-C stopped it. holes: which ids are to be filled
        in; None: the answer follows them."""
        objective, infilling = self.model.config.objective, holes is not None
        options = sampler_options(self.options, objective, **({"max_new_tokens": 0} if infilling else {}))

        # A cache of earlier turns is right only if their columns see the same as before. mdlm's see what comes after
        # them; guidance, and blocks that begin where the prompt ends, change what they see.
        reusable = objective != "mdlm" and not options["cfg_scale"] and options["block_align"] != "prompt"
        how = {"generator": self.generator, "prefix": self.prefix if reusable and not infilling else None}
        answers = Answers(self.model, self.tokenizer, [ids], [holes] if infilling else None, options=options, **how)

        revocable, reused = options["remasking"] == "p2", 0
        with noted_interrupts() as pressed, Stream(live=self.options.visualize, revocable=revocable) as stream:
            try:
                for step in answers:
                    # Before the first forward the prefix is as long as what it has in common with this prompt.
                    if how["prefix"] is not None and step.forwards == 0:
                        reused = len(self.prefix.tokens)
                    stream.show(*answers.shown())
                    if pressed:
                        break
            except KeyboardInterrupt:
                pressed.append(True)
            # The whole answer, once more and for good.
            (answer,) = answers.final()
            stream.close(answer.shown)

        # What it took, in one line.
        notes = [cost(answer.tokens, answers.seconds, answer.forwards)]
        notes += [f"{reused} of {len(ids)} prompt tokens kept"] if reused else []
        notes += idle_steps(options, objective, sum(holes or []) + options["max_new_tokens"])
        notes += ["stopped"] if pressed else []
        note(f"[{'; '.join(notes)}]")
        if not answer.text.strip() and not pressed:
            note(cli.BLANK)
        return answer.text, bool(pressed)

    def _system(self) -> list[dict]:
        return [] if self.system_message is None else [{"role": "system", "content": self.system_message}]

    def _check(self, options: Talking) -> None:
        """Raises the ValueError that the sampler would raise."""
        next(denoise(self.model, [[0]], **sampler_options(options, self.model.config.objective)))

    def _last_exchange(self, command: str) -> tuple[list[dict], str]:
        """The turns before the last exchange, and the user's text of it."""
        if not self.messages:
            raise ValueError(f"nothing to {command}; the conversation is empty")
        return self.messages[:-2], self.messages[-2]["content"]


@contextmanager
def noted_interrupts():
    """Inside, the first Ctrl-C is noted in a list, so that it ends neither a forward nor a line in the middle."""
    pressed = []

    def interrupt(number, frame):
        # The second one raises KeyboardInterrupt.
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """Prints what is not the model's: dim, and on a pipe to standard error."""
    show([(text, MASKED)], sys.stdout if terminal(sys.stdout) else sys.stderr)


def brief(text: str) -> str:
    return shorten(one_line(text), 70)


def home(file: str) -> Path:
    """The path of a file name, which may begin with ~ or ~USER."""
    try:
        return Path(file).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{file}: there is no such user; write the path out") from error


# ---------------------------------------------------------------------------------------------------------------------
# The program


def talk(conversation: Conversation, interactive: bool) -> None:
    """Until the end of input, which raises EOFError as /quit does."""
    while not interactive:
        # On a pipe an error ends the program. It is read as bytes: UTF-8, whatever the locale.
        line = sys.stdin.buffer.readline().decode("utf-8")
        conversation.obey(line.rstrip("\r\n") if line else "/quit")
    while True:
        try:
            conversation.obey(input("> "))  # which edits lines
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
        except EOFError:
            raise
        except Exception as error:
            # Whatever it is: what was said so far is worth more.
            print(f"error: {cli.explain(error) or one_line(repr(error))}")


def recall(file: str, *, save: bool = False) -> None:
    """Turns line editing on, with what was typed before, or saves what was typed; '' keeps nothing."""
    import readline  # changes how `input` reads, and Windows lacks it

    path = home(file)
    if path.exists() and not (path.is_file() or path.is_dir()):
        return  # a device, which keeps nothing, or never ends
    try:
        if file and save:
            readline.set_history_length(1000)  # lines
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
        elif file and path.exists():
            readline.read_history_file(path)
    except OSError as error:
        # readline's errors name no file.
        way_out = "name another file, or '' to keep nothing"
        raise ValueError(f"--history_file {path}: {error.strerror}; {way_out}") from error


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("chat.py"):
        args = Chat.parse(argv)
        model, tokenizer = open_model(args, args.block_size)
        conversation = Conversation(args, model, tokenizer)

        # A terminal gets a banner and line editing, a pipe nothing but answers.
        interactive = sys.stdin.isatty()
        if interactive:
            print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
            recall(args.history_file)
        try:
            talk(conversation, interactive)
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            if interactive:
                recall(args.history_file, save=True)


if __name__ == "__main__":
    main(sys.argv[1:])

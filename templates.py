"""Chat templates, filled in by a process of their own: they come with a checkpoint, which anyone can publish.

A template is a program. jinja's sandbox keeps it from files and other programs; its process has no more than SECONDS of
CPU time and BYTES of memory for it, whichever thread of ours asks.
"""

import contextlib
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES, CHARACTERS = 10, 2**29, 2**20  # for one chat; characters: of a template, and of what it may make


def render(template: str, variables: dict) -> str:
    """What a template makes of its variables; ValueError, with the reason, where it fails or takes too much."""
    kind, text = renderer(os.getpid()).ask((template, variables, SECONDS))
    if kind != "text":
        raise ValueError(text)
    return text


@functools.lru_cache(maxsize=1)
def renderer(process: int) -> "Renderer":
    """The Renderer of a process of ours: a fork needs its own."""
    return Renderer()


class Renderer:
    """A process that fills templates in, and the next one where it has ended."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def ask(self, request: tuple) -> list[str]:
        """What `answer` says to a request. It comes as JSON, since a template may have broken out."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                self.process = subprocess.Popen([sys.executable, __file__], start_new_session=True, **pipes)
            line, process = b"", self.process
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(pickle.dumps(request))
                    process.stdin.flush()
                    line = process.stdout.readline()
            finally:
                whole = line.endswith(b"\n")
                if not whole:  # after a Ctrl-C the answer to this would be taken for that to the next
                    process.kill()
                    process.communicate()
        if whole:
            return json.loads(line)
        if sys.platform != "win32" and process.returncode == -signal.SIGPROF:
            return ["refused", f"it takes more than {request[-1]} seconds"]
        raise OSError(f"the process that fills in chat templates has ended (status {process.returncode})")


# ---------------------------------------------------------------------------------------------------------------------
# The other process


class Generation(Extension):
    """`{% generation %}`, by which some templates mark the assistant's text: we render what is inside and no more."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)


@functools.lru_cache
def compiled(template: str):
    """The jinja template of a source text, in the environment that transformers gives it."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def answer(template: str, variables: dict) -> tuple[str, str]:
    """("text", what the template makes) or ("refused", the reason)."""
    try:
        text = compiled(template).render(variables)
        if len(text) > CHARACTERS and len(text) > 20 * len(repr(variables["messages"])):
            raise TemplateError(f"it makes {len(text):,} characters of them")
        return "text", text
    except Exception as error:  # a program can fail in any way
        return "refused", str(error) if isinstance(error, TemplateError) else repr(error)


def main() -> None:
    """Answers requests until there is nobody to send any."""
    limited = sys.platform != "win32"  # which has neither of these limits
    if limited:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(BYTES, hard % 2**64), hard))  # -1 is no limit
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a run that gets them goes on for a step
            signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError):
        while True:
            *request, seconds = pickle.load(sys.stdin.buffer)
            if limited:  # the signal ends the process, whatever it is doing
                signal.setitimer(signal.ITIMER_PROF, seconds)
            line = json.dumps(answer(*request)).encode() + b"\n"
            if limited:
                signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

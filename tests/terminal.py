"""A program in a pseudo-terminal, and its screen as a terminal emulator sees it."""

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pyte

ROOT = Path(__file__).parent.parent


class Terminal:
    """`python PROGRAM ARGUMENTS` in a window of columns x lines; a context manager, which ends it."""

    def __init__(self, *command: str, columns: int = 80, lines: int = 24, term: str = "xterm-256color"):
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.seen = set()  # (character, colour) that were ever on the screen
        self.status = None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as a shell gives it, though the tests run in the background
            environment = {**os.environ, "TERM": term, "OMP_NUM_THREADS": "1", "INPUTRC": "/dev/null"}
            arguments = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
            os.execve(sys.executable, arguments, environment)
        self.resize(columns, lines)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    @property
    def text(self) -> str:
        """All that is on the screen or has scrolled away, a line each, without what is blank at their ends."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self.screen.display]).rstrip()

    def until(self, wanted, seconds: float = 120.0) -> str:
        """Reads on until `wanted`, a text or a predicate of the text, is there; the text then."""
        until = time.monotonic() + seconds
        there = wanted if callable(wanted) else lambda text: wanted in text
        while not there(self.text):
            assert time.monotonic() < until, f"not in {seconds} s: {wanted}\n{self.text}"
            if not self._read():
                assert there(self.text), f"the program ended without {wanted}\n{self.text}"
        return self.text

    def end(self) -> int:
        """Reads all there is; the exit status."""
        until = time.monotonic() + 30
        while self._read():
            assert time.monotonic() < until, f"the program does not end\n{self.text}"
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def _read(self) -> bool:
        if not select.select([self.fd], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.raw += data
        self.stream.feed(data)
        cells = (cell for line in self.screen.buffer.values() for cell in line.values())
        self.seen |= {(cell.data, cell.fg) for cell in cells}
        return bool(data)

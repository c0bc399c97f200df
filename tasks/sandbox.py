"""Runs generated programs where they can hurt nothing, and tells whether each passed.

Every program gets an `unshare` child of its own: user, process, network, mount and IPC namespaces. In it all file
systems are read-only but for the empty directory it starts in (64 MB), there is no network, no capability is left, and
memory, processor time, file size and the number of processes are limited. The child's first process waits for the
program; when that ends, or its time is up, the kernel ends whatever else still runs in the namespace.

A program passes if it raises nothing (`SystemExit` counts), in time, and leaves no process behind. The globals are
empty and standard input is at its end, as for the Hub's metric `code_eval`.

Needs Linux and util-linux's `unshare`, and a kernel that lets this user make namespaces; as root also Linux 6.14, since
before it nothing limits root's processes. `check` says what is missing.
"""

import ctypes
import os
import platform
import re
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEMORY, FILE, PROCESSES = 2 << 30, 16 << 20, 64  # bytes, bytes, and 301 for root (the least that Linux sets)
NAMESPACES = ("--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--net", "--mount", "--ipc")


def passes(program: str, timeout: float = 3.0) -> bool:
    """Whether `program` runs through within `timeout` seconds."""
    return _run(program, timeout)[0]


def check() -> None:
    """Raises ValueError where programs cannot be run safely; says why."""
    missing = None
    if not shutil.which("unshare"):
        missing = "the program unshare (util-linux) is missing"
    elif _is_root() and tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 14):
        missing = f"as root it needs Linux 6.14, this is {platform.release()}: run as another user"
    else:
        passed, reason = _run("import math", 20.0)
        if not passed:
            missing = reason or "a trivial program failed in the sandbox"
    if missing:
        raise ValueError(missing)


def _is_root() -> bool:
    """Whether this is the machine's root, and not one that a container maps to another user."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split()[:2] == ["0", "0"]


def _run(program: str, timeout: float) -> tuple[bool, str]:
    token = secrets.token_hex(16)  # written back by a program that has passed, and not by one that only exits
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with tempfile.TemporaryDirectory() as home:
        command = ["unshare", *NAMESPACES, sys.executable, "-I", __file__, str(timeout), str(int(_is_root())), home]
        environment |= {"HOME": home, "TMPDIR": home}
        child = subprocess.Popen(command, **pipes, env=environment, cwd="/", start_new_session=True)
        try:
            written, error = child.communicate(f"{token}\n{program}".encode(errors="replace"), timeout + 30)
        except subprocess.TimeoutExpired:
            return False, "the sandbox did not end in time"
        finally:
            child.kill()
            child.wait()
    reason = error.decode(errors="replace").strip().splitlines()[-1:]
    return child.returncode == 0 and written.decode() == token, "".join(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the namespaces: this file run as a program, the first process there


def _call(function, *arguments) -> None:
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} ({function.__name__})")


def _isolate(libc, is_root: bool, home: str) -> None:
    read_only = struct.pack("QQQQ", 1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
    mount_setattr, at_fdcwd, at_recursive = 442, -100, 0x8000
    _call(libc.syscall, mount_setattr, at_fdcwd, b"/", at_recursive, read_only, len(read_only))
    _call(libc.mount, b"tmpfs", home.encode(), b"tmpfs", 0, b"size=64m")
    if libc.mount(b"proc", b"/proc", b"proc", 0, None) < 0:  # which some containers forbid
        _call(libc.mount, b"tmpfs", b"/proc", b"tmpfs", 0, b"size=4k")
    if is_root:
        Path("/proc/sys/kernel/pid_max").write_text("301")  # this namespace's, from Linux 6.14 on
    os.chdir(home)


def _work(libc, program: str, token: str, timeout: float) -> None:
    """The program's process; does not return."""
    import resource

    status = 1
    try:
        out = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        limits = {"AS": MEMORY, "FSIZE": FILE, "NPROC": PROCESSES, "CPU": int(timeout) + 1, "NOFILE": 256, "CORE": 0}
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        capbset_drop, no_new_privs = 24, 38
        for capability in range(64):
            libc.prctl(capbset_drop, capability, 0, 0, 0)
        _call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))
        _call(libc.prctl, no_new_privs, 1, 0, 0, 0)
        exec(program, {})
        os.write(out, token.encode())
        status = 0
    except BaseException:
        status = 1
    finally:
        os._exit(status)


def _first_process(timeout: float, is_root: bool, home: str) -> int:
    token, _, program = sys.stdin.buffer.read().decode().partition("\n")
    libc = ctypes.CDLL(None, use_errno=True)
    _isolate(libc, is_root, home)
    worker = os.fork()
    if worker == 0:
        _work(libc, program, token, timeout)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        process, status = os.waitpid(worker, os.WNOHANG)
        if process:
            break
        time.sleep(0.002)
    else:
        return 1
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return 1  # something it started still runs
    except ChildProcessError:
        return int(status != 0)


if __name__ == "__main__":
    sys.exit(_first_process(float(sys.argv[1]), sys.argv[2] == "1", sys.argv[3]))

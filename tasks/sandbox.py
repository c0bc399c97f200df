"""Runs generated programs where they can hurt nothing, and tells whether each passed.

Each program gets a fresh Python in Linux namespaces of its own, and there two processes. The *warden*, process 1, makes
a private root: the directories of the interpreter and of the system's libraries, read-only, /dev/null, random and
urandom, and 64 MB of /tmp; no /proc, home, /run, terminal or other device. It gives up every capability, and root its
user id for a random one. The *worker*, its child, runs the program: with an empty environment, no open file but
/dev/null, and a filter of system calls, against memory that would not be counted (memfd_create, shmget, shared
anonymous mmap), against the warden (ptrace, setpriority), and for a smaller kernel (socket, keyctl, bpf, namespaces,
whatever is newer). The warden ends all at the deadline, or when all processes together hold 1 GiB.

A program passes if it raises nothing (`SystemExit` counts as raising), in time, and leaves no process behind. The
globals are empty and standard input is at its end, as for the Hub's metric `code_eval`.

The verdict is the warden's exit status; the worker holds no token or pipe that could forge it. Instead it stops itself
(SIGSTOP) at one place of `_rounds`, before the program and after it, and the warden compares the machine's stack
pointer at both, which the kernel tells: whatever runs inside `exec` lies deeper in the stack. So leaving early, reading
frames, signals, threads and forked copies forge nothing. What could: code written against this file, as by moving the
stack pointer or changing the interpreter's memory with ctypes; and any answer whose objects equal everything.

Not contained: the kernel's own memory (buffers of 64 x 64 descriptors, tables), for which only a memory cgroup has a
limit; the processors' time until the deadline; reading what the bound directories hold. /tmp is not within the 1 GiB,
and pages shared since a fork count for each process.

Needs Linux 5.14 on x86_64 or aarch64, and root with CAP_SYS_ADMIN or a kernel that lets users make namespaces.
"""

import contextlib
import ctypes
import os
import signal
import struct
import sys
import time
from pathlib import Path

MEMORY = 1 << 30  # bytes, of all processes
# Of each process, but NPROC: of all, threads too. Core dumps can be piped to a program of the system at 0, not at 1.
LIMITS = {"AS": 2 << 30, "FSIZE": 16 << 20, "NOFILE": 64, "NPROC": 64, "CORE": 1}
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # with their names in seccomp


def passes(program: str, timeout: float = 3.0) -> bool:
    """Whether `program` runs through within `timeout` seconds."""
    return _run(program, timeout)[0]


def check() -> None:
    """Raises ValueError where programs cannot be run safely; says what is missing."""
    if not sys.platform.startswith("linux") or os.uname().machine not in MACHINES:
        raise ValueError(f"the sandbox needs Linux on {' or '.join(MACHINES)}")
    passed, reason = _run("import math", 20.0)
    if not passed:
        raise ValueError(reason or f"a trivial program failed in the sandbox; can any user read {sys.base_prefix}?")


def _run(program: str, timeout: float) -> tuple[bool, str]:
    import subprocess  # not above: inside, where it is not needed, it would cost each program its import

    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": "/"}
    options |= {"env": environment, "start_new_session": True}
    child = subprocess.Popen([sys.executable, "-I", __file__, str(timeout)], **options)
    try:
        _, error = child.communicate(program.encode(errors="replace"), timeout + 30)
    except subprocess.TimeoutExpired:
        return False, "the sandbox did not end in time"
    finally:
        child.kill()
        child.wait()
    return child.returncode == 0, "".join(error.decode(errors="replace").strip().splitlines()[-1:])


# The filter of system calls; their numbers on x86_64 and aarch64.
REFUSED = """
add_key 248 217  request_key 249 218  keyctl 250 219  socket 41 198  setsockopt 54 208
memfd_create 319 279  shmget 29 194  msgget 68 186  semget 64 190  mq_open 240 180
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272  setpriority 141 140
sched_setaffinity 203 122  sched_setscheduler 144 119  sched_setparam 142 118  sched_setattr 314 274  ioprio_set 251 30
bpf 321 280  perf_event_open 298 241  userfaultfd 323 282  fanotify_init 300 262
unshare 272 97  setns 308 268  mount 165 40
"""
# From 424 on all machines have the same numbers. Only pidfd_send_signal, pidfd_open, close_range, openat2, faccessat2,
# epoll_pwait2 and futex_waitv exist: not clone3, whose flags no filter sees (the C library takes clone), or io_uring.
NEW, KNOWN = 424, (424, 434, 436, 437, 439, 441, 449)


def _filter_calls() -> None:
    """Refuses them to this process and its children, from now on, by a program of classic BPF."""
    load, equal, at_least, any_bit, mask = 0x20, 0x15, 0x35, 0x45, 0x54
    allow, refuse, unknown, kill = ((0x06, 0, 0, x) for x in (0x7FFF0000, 0x50001, 0x50026, 0x80000000))
    mine = list(MACHINES).index(os.uname().machine)
    answers = dict.fromkeys(map(int, REFUSED.split()[1 + mine :: 3]), refuse) | dict.fromkeys(KNOWN, allow)
    # A line: what, lines to skip if true and if false, value. The machine is at 4, the call at 0, arguments from 16 on.
    code = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[os.uname().machine]), kill, (load, 0, 0, 0)]
    code += [line for number, answer in answers.items() for line in ((equal, 0, 1, number), answer)]
    code += [(at_least, 0, 1, NEW), unknown]  # beyond what was answered
    # clone may not make namespaces, prlimit not name another process, a socketpair is of AF_UNIX, and mmap gives
    # neither huge pages nor memory that is shared and anonymous: it stays when no process maps it.
    for numbers, argument, tests in (
        ((56, 220), 0, [(any_bit, 0, 1, 0x7E020000)]),
        ((302, 261), 0, [(equal, 1, 0, 0)]),
        ((53, 199), 0, [(equal, 1, 0, 1)]),
        ((9, 222), 3, [(any_bit, 2, 0, 0x40000), (mask, 0, 0, 0x21), (equal, 0, 1, 0x21)]),
    ):
        code += [(equal, 0, len(tests) + 3, numbers[mine]), (load, 0, 0, 16 + 8 * argument), *tests, refuse, allow]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in [*code, allow]))
    filtering, program = 2, struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    _do("forbid new privileges", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _do("filter system calls", "prctl", PR_SET_SECCOMP, filtering, program, 0, 0)


# From here on inside: this file run as a program. The kernel's own names and numbers:
CLONE_NEWUSER, CLONE_NEW_OTHERS = 0x10000000, 0x6E020000  # mount, cgroup, uts, ipc, pid, net
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 1 << 12, 1 << 14, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MNT_DETACH, CAPABILITY_VERSION = 442, -100, 0x8000, 2, 0x20080522
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
DEVICES = ["/dev/null", "/dev/random", "/dev/urandom"]
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache"]


def _do(what: str, function: str, *arguments) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}: {os.strerror(ctypes.get_errno())}")


def _make_namespaces() -> int | None:
    """The user id to take, for a caller who is root."""
    user, group = os.geteuid(), os.getegid()
    first, _, count = map(int, Path("/proc/self/uid_map").read_text().split()[-3:])
    if user == 0 and count > 1:  # where there is no other user, this root is somebody else outside
        _do("make namespaces (as root this needs CAP_SYS_ADMIN)", "unshare", CLONE_NEW_OTHERS)
        return first + count // 2 + int.from_bytes(os.urandom(4), "big") % (count - count // 2)
    _do("make namespaces (this needs user namespaces for this user)", "unshare", CLONE_NEWUSER | CLONE_NEW_OTHERS)
    for name, text in ("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1"):
        Path(f"/proc/self/{name}").write_text(text)


def _build_root() -> None:
    """Makes the private root; leaves the process in a /proc that no path leads to any more."""
    python = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))]
    sources = {path: os.path.realpath(path) for path in [*SYSTEM, *python, *DEVICES] if os.path.exists(path)}
    os.umask(0o022)
    # The old root goes to /old of the new one, which has to be made on some directory: /dev.
    _do("make mounts private", "mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _do("mount a root", "mount", b"tmpfs", b"/dev", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    os.chdir("/dev")
    for name in ("old", "tmp", "proc"):
        os.mkdir(name)
    _do("change the root", "pivot_root", b".", b"old")
    os.chdir("/")
    # /tmp comes first: an interpreter below it is bound into it.
    _do("mount /tmp", "mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=64m,nr_inodes=4k,mode=777")
    for path, source in sorted(sources.items()):
        if os.path.exists(path):
            continue  # it came with a directory above
        os.makedirs(path if os.path.isdir(f"/old{source}") else os.path.dirname(path), exist_ok=True)
        Path(path).touch()
        _do(f"bind {path}", "mount", f"/old{source}".encode(), path.encode(), None, MS_BIND | MS_REC, None)
        flags = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | (0 if path in DEVICES else MS_NODEV), 0, 0, 0)
        _do(f"protect {path}", "syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, flags, len(flags))
    # The kernel mounts a new /proc only while it sees an old one; the new one stays as the working directory.
    _do("mount a /proc", "mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV, None)
    os.chdir("/proc")
    for path in ("/proc", "/old"):
        _do(f"leave {path}", "umount2", path.encode(), MNT_DETACH)
        os.rmdir(path)
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    _do("protect the root", "mount", None, b"/", None, flags, None)


def _rounds(programs, stop, arguments) -> None:
    # After a program nothing is looked up by name, and the generator `programs` cannot be rewound.
    for program in programs:
        exec(program, {})
        stop(*arguments)


def _work(program: str, timeout: float) -> None:
    """The worker; does not return."""
    import resource  # here, so that `check` can be asked everywhere

    os.setsid()
    os.chdir("/tmp")
    for name, value in (LIMITS | {"CPU": int(timeout) + 1}).items():
        limit = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(limit, [min(value, resource.getrlimit(limit)[1] % 2**64)] * 2)  # -1 is no limit
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    _filter_calls()
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    os.closerange(3, 1 << 16)
    leave = os._exit
    try:
        _rounds((text for text in ("", program)), os.kill, (os.getpid(), signal.SIGSTOP))
    finally:
        while True:
            leave(1)


def _memory() -> int:
    """Bytes of anonymous memory, swapped out or not, of all processes in the namespace."""
    held = {}
    for process in filter(str.isdigit, os.listdir()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for thread in os.listdir(f"{process}/task"):  # when the first has ended, others still show the memory
                lines = Path(f"{process}/task/{thread}/status").read_text().splitlines()
                found = sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
                held[process] = max(found, held.get(process, 0))
    return sum(held.values()) << 10


def _watch(worker: int, timeout: float) -> bool:
    """Whether the worker's program ran through and left no process behind."""
    deadline, places = time.monotonic() + timeout, []
    while len(places) < 2:
        if time.monotonic() > deadline or _memory() > MEMORY:
            return False
        changed, status = os.waitpid(worker, os.WNOHANG | os.WUNTRACED)
        if changed:
            if not os.WIFSTOPPED(status):
                return False
            places.append(Path(f"{worker}/syscall").read_text().split()[-2])  # the stack pointer
            os.kill(worker, signal.SIGKILL if len(places) == 2 else signal.SIGCONT)
        signal.sigtimedwait({signal.SIGCHLD}, 0.002)
    os.waitpid(worker, 0)
    with contextlib.suppress(ChildProcessError):  # which tells that there is none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return False
    return places[0] == places[1]


def _main(timeout: float) -> bool:
    """Makes the namespaces and waits for the warden; in the warden, watches the worker."""
    program = sys.stdin.buffer.read().decode()
    Path("/proc/self/oom_score_adj").write_text("1000")  # if the machine runs out of memory, this goes first
    user = _make_namespaces()
    if warden := os.fork():
        _do("end with its parent", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return os.waitpid(warden, 0)[1] == 0
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 is deaf to signals it does not handle
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    _build_root()
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _do("drop capabilities", "capset", struct.pack("Ii", CAPABILITY_VERSION, 0), bytes(24))
    _do("see the worker", "prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    _do("end with its parent", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if worker := os.fork():
        return _watch(worker, timeout)
    _work(program, timeout)


if __name__ == "__main__":
    sys.exit(not _main(float(sys.argv[1])))

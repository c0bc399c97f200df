"""The sandbox: attack by attack, as root and as another user; ordinary programs; what the tasks make of the verdicts.

An attack is a program that runs through only where it succeeds, so that it is held where it does not pass.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
# Every test talks to a process that has something to lose: a terminal, a secret in its environment, a key.
DRIVER = """
import ctypes, json, os, resource, subprocess, sys
sys.path.insert(0, sys.argv[1])
import sandbox
libc = ctypes.CDLL(None)
join, add = ((250, 248), (219, 217))[os.uname().machine == "aarch64"]
libc.syscall(join, 1, None)
key = libc.syscall(add, b"user", b"a2d", b"kept", 4, -3)
try:
    reply = {"refusal": sandbox.check(), "key": key}
except ValueError as error:
    reply = {"refusal": str(error), "key": key}
print(json.dumps(reply), flush=True)
for line in sys.stdin:
    program, timeout = json.loads(line)
    if timeout:
        passed = sandbox.passes(program, timeout)
    else:
        passed = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == 0
    print(json.dumps([passed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), flush=True)
"""
READ_KEY = """
import ctypes, os
text = ctypes.create_string_buffer(4)
assert ctypes.CDLL(None).syscall(219 if os.uname().machine == "aarch64" else 250, 11, KEY, text, 4, 0) == 4
assert text.raw == b"kept"
"""
# Possible for the user outside, which the test verifies.
REACHES = {
    "a file of the caller": "assert open(SECRET).read() == 'secret'",
    "the environment": "import os\nassert os.environ['A2D_HIDDEN']",
    "a Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(SOCKET)",
    "an abstract Unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + SOCKET)",
    "a FIFO": "import os\nos.write(os.open(FIFO, os.O_WRONLY | os.O_NONBLOCK), b'x')",
    "a network connection": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "a datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "the terminal": "open('/dev/tty', 'rb', 0)",
    "the pseudo terminals": "import os\nassert os.listdir('/dev/pts')",
    "the caller's key": READ_KEY,
    "other processes": "import os\nassert len([x for x in os.listdir('/proc') if x.isdigit()]) > 3",
    "a file written elsewhere": "open(SHARED + '/escaped', 'w').write('x')",
}
SYSCALL = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
FORKS = """
import os, time
def fork(f):
    p = os.fork()
    if p == 0:
        f()
        os._exit(0)
    return p
"""
STOP = "import os, signal, sys\ndef stop(*_): os.kill(os.getpid(), signal.SIGSTOP)\n"
REWIND = """
import sys
runner = sys._getframe(1)
def trace(frame, event, argument):
    for line in range(frame.f_code.co_firstlineno, frame.f_code.co_firstlineno + 40):
        try:
            frame.f_lineno = line
            return
        except Exception:
            pass
    return trace
sys.settrace(lambda *_: None)
while runner:
    runner.f_trace = trace
    runner = runner.f_back
1 / 0
"""
FIND = """
import gc, os, sys
frame, found = sys._getframe(), []
while frame:
    found += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
for thing in gc.get_objects():
    found += gc.get_referents(thing) if type(thing) in (list, tuple, dict) else []
words = {x if type(x) is bytes else x.encode() for x in found if type(x) in (str, bytes)}
for descriptor in range(64):
    try:
        for word in words: os.write(descriptor, word)
    except OSError: pass
os._exit(0)
"""
LOCALS = (
    STOP
    + """
runner = sys._getframe(1)
def leave(_): raise ValueError
for words in (runner.f_locals, runner.f_back.f_locals, runner.f_globals):
    words.update(programs=iter([""]), program="", leave=leave, stop=stop, places=[0, 0])
1 / 0
"""
)
COMPATIBILITY = """
import ctypes, mmap, os
code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
code.write(bytes.fromhex("b814000000cd80c3"))  # getpid of i386
assert os.uname().machine == "x86_64"
assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0
"""
LEADERLESS = """
import threading
def hold():
    def thread():
        x = b'x' * (300 << 20)
        time.sleep(0.8)
        os._exit(0)
    threading.Thread(target=thread).start()
    time.sleep(0.2)
    import ctypes
    ctypes.CDLL(None).syscall(93 if os.uname().machine == 'aarch64' else 60, 0)
children = [fork(hold) for _ in range(4)]
assert [os.waitpid(p, 0)[1] for p in children] == [0] * 4
"""
ATTACKS = {
    # The machine
    "/etc/shadow": "open('/etc/shadow')",
    "the home directories": "import os\nassert any(map(os.path.exists, ('/home', '/root/.profile', '/root/.bashrc')))",
    "/run": "import os\nos.listdir('/run')",
    "a /proc": "import os\nassert os.listdir('/proc')",
    "writing a sysctl": "open('/proc/sys/kernel/pid_max', 'r+')",
    "/sys": "import os\nassert os.listdir('/sys')",
    "any device": "import os\nassert set(os.listdir('/dev')) - {'null', 'random', 'urandom'}",
    "making a device": "import os, stat\nos.mknod('x', stat.S_IFCHR | 0o666, os.makedev(1, 11))\nopen('x')",
    "typing into the terminal": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "an open descriptor": "import os\nfor i in range(3, 1024):\n    try: os.fstat(i)\n    except OSError: continue\n"
    "    break\nelse: raise OSError",
    "being root": "import os\nassert 0 in (*os.getresuid(), *os.getresgid())",
    "becoming root": "import os\nos.setuid(0)",
    "a capability": SYSCALL + "import struct\ndata = ctypes.create_string_buffer(24)\n"
    "assert libc.capget(struct.pack('Ii', 0x20080522, 0), data) == 0\nassert any(data.raw)",
    "mounting": SYSCALL + "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "making the system writable": SYSCALL + "assert libc.mount(b'none', b'/', None, 32 | 4096, None) == 0",
    "writing to the system": "import sys\nopen(sys.prefix + '/escaped', 'w')",
    "a user namespace": SYSCALL + "assert libc.unshare(0x10000000) == 0",
    "a user namespace by clone": SYSCALL + "p = libc.syscall(220 if os.uname().machine == 'aarch64' else 56, "
    "0x10000011, 0, 0, 0, 0)\nif p == 0: os._exit(0)\nassert p > 0",
    "a user namespace by clone3": SYSCALL + "import struct\nx = struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0)\n"
    "p = libc.syscall(435, x, len(x))\nif p == 0: os._exit(0)\nassert p > 0",
    "any kind of socket": SYSCALL + "assert any(libc.socket(family, 2, 0) >= 0 for family in range(46))",
    "io_uring": SYSCALL + "assert libc.syscall(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "system calls of i386": COMPATIBILITY,
    "system calls of x32": SYSCALL + "assert libc.syscall(0x40000000 + 39) > 0",
    "a new key": SYSCALL + "assert libc.syscall(217 if os.uname().machine == 'aarch64' else 248, b'user', b'x', b'x', "
    "1, -3) > 0",
    # Memory, processes, files
    "10 GB": "x = bytearray(10 << 30)",
    "1.2 GB in a process": "x = b'x' * (1200 << 20)",
    "4 processes of 300 MB": FORKS + "def hold():\n    x = b'x' * (300 << 20)\n    time.sleep(0.8)\n"
    "children = [fork(hold) for _ in range(4)]\nassert [os.waitpid(p, 0)[1] for p in children] == [0] * 4",
    "4 processes of 300 MB without a first thread": FORKS + LEADERLESS,
    "1 GB of memfd": "import os\nfor i in range(64):\n    f = os.memfd_create('x')\n    os.write(f, bytes(16 << 20))",
    "1 GB shared": "import mmap\nx = mmap.mmap(-1, 1 << 30)",
    "1 GB shared of /dev/zero": "import mmap, os\nx = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 1 << 30)",
    "System V shared memory": SYSCALL + "assert libc.shmget(0, 1 << 20, 0o1600) >= 0",
    "100 MB in /tmp": "for i in range(10):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(10 << 20))",
    "10 000 files": "for i in range(10000): open(f'/tmp/{i}', 'w').close()",
    "a file in /dev/shm": "open('/dev/shm/x', 'w')",
    "a large file": "with open('x', 'wb') as f: f.write(bytes(20 << 20))",
    "100 processes": FORKS + "children = [fork(lambda: time.sleep(1)) for _ in range(100)]",
    "100 threads": "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=[1]).start()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a fork bomb that catches": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "an endless loop": "while True: pass",
    "sleeping": "import time\ntime.sleep(60)",
    "reading standard input": "input()",
    # What it leaves
    "a child that survives": "import subprocess\nsubprocess.Popen(['sleep', '4321'], start_new_session=True)",
    "a grandchild that survives": FORKS + "def daemon():\n    os.setsid()\n    fork(lambda: time.sleep(4321))\n"
    "fork(daemon)\nos.wait()",
    # The warden
    "ending the warden": "import os\nos.kill(1, 9)\nos.kill(-1, 9)\nos.killpg(0, 9)",
    "tracing the warden": SYSCALL + "assert libc.ptrace(16, 1, 0, 0) == 0",
    "reading the warden": SYSCALL + "assert libc.process_vm_readv(1, None, 0, None, 0, 0) == 0",
    "slowing the warden": "import os\nos.setpriority(os.PRIO_PROCESS, 1, 19)",
    "pinning the warden": "import os\nos.sched_setaffinity(1, {0})",
    "limiting the warden": "import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
    # The verdict
    "a wrong answer": "assert 1 == 2",
    "no Python": "def",
    "leaving early": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "leaving as a signal": "import os\nos.kill(os.getpid(), 9)",
    "leaving the thread": SYSCALL + "libc.pthread_exit(None)",
    "leaving at exit": "import atexit, os\natexit.register(os._exit, 0)\n1 / 0",
    "leaving in the exception hook": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n1 / 0",
    "leaving by another program": "import os\nos.execv('/bin/true', ['true'])",
    "os._exit that does nothing": "import os\nos._exit = lambda _: None\n1 / 0",
    "os._exit that raises": "import os\ndef leave(_): raise ValueError\nos._exit = leave\n1 / 0",
    "other builtins": "import builtins\nbuiltins.exec = builtins.AssertionError = print\nassert False",
    "whatever the frames hold": FIND,
    "what the runner calls": "import os, sys\nx = sys._getframe(1).f_locals\nx['stop'](*x['arguments'])\nos._exit(0)",
    "the runner's own words": LOCALS,
    "the runner again": "import sys\nrounds = sys._getframe(1).f_globals['_rounds']\nimport os, signal\n"
    "rounds(iter(['']), os.kill, (os.getpid(), signal.SIGSTOP))\nos._exit(0)",
    "a stop": STOP + "stop()\nos._exit(0)",
    "a stop in a signal handler": STOP + "signal.signal(signal.SIGALRM, stop)\nsignal.setitimer(0, 0.01)\n"
    "while True: pass",
    "a stop in a thread": STOP + "import threading\nt = threading.Thread(target=stop)\nt.start()\nt.join()\n1 / 0",
    "a stop at exit": STOP + "import atexit\natexit.register(stop)\n1 / 0",
    "a stop in a finalizer": STOP + "class A: __del__ = stop\na = A()\n1 / 0",
    "a stop in os._exit": STOP + "os._exit = stop\n1 / 0",
    "a stop in the exception hook": STOP + "sys.excepthook = stop\ndef leave(_): 1 / 0\nos._exit = leave\n1 / 0",
    "rewinding the runner": REWIND,
    "a copy that finishes": "import os\nif os.fork():\n    os.wait()\n    os._exit(0)",
    "a copy that finishes while its parent waits": "import os, time\nif os.fork(): time.sleep(60)",
}
ENDLESS = {"an endless loop", "sleeping", "a fork bomb that catches", "rewinding the runner"}
ENDLESS |= {"a copy that finishes while its parent waits"}
ORDINARY = {
    "an assertion": "def add(a, b): return a + b\nassert add(1, 2) == 3",
    "a temporary file": "import math, tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')",
    "a megabyte of text": "print('x' * 10**6)",
    "a subprocess": "import subprocess\nassert subprocess.run(['echo', '1'], capture_output=True).stdout == b'1\\n'",
    "Python within": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)",
    "the library": "import asyncio, collections, ctypes, datetime, decimal, hashlib, itertools, json, math, re\n"
    "import random, sqlite3, statistics, typing, unittest\nassert json.loads('[1]') == [1] and re.findall('a', 'aa')",
    "numpy": "import importlib.util\nif importlib.util.find_spec('numpy'):\n    import numpy\n"
    "    assert (numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum() == 200**3",
    "recursion": "import sys\nsys.setrecursionlimit(5000)\ndef f(n): return n and 1 + f(n - 1)\nassert f(4000) == 4000",
    "threads": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
    "    assert list(pool.map(str, range(3))) == ['0', '1', '2']",
    "a thread that goes on": "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()",
    "a child": FORKS + "assert os.waitpid(fork(lambda: None), 0)[1] == 0",
    "an event loop": "import asyncio\nasync def f(): await asyncio.sleep(0.01)\nasyncio.run(f())",
    "an alarm": "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(1)\nsignal.pause()",
    "a tracer left on": "import sys\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)",
    "other builtins": "import builtins, os\nbuiltins.exec = builtins.print = os._exit = os.kill = None",
    "800 MB": "x = b'x' * (800 << 20)",
    "random numbers": "import os, secrets\nassert os.urandom(4) and secrets.token_hex()",
    "nothing": "",
}


def load(name: str):
    """A module of tasks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tasks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world():
    """What an attack may reach for, open to every user: text to put into its program."""
    with contextlib.ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared.chmod(0o777)
        (shared / "secret").write_text("secret")
        (shared / "secret").chmod(0o644)
        shutil.copy(ROOT / "tasks" / "sandbox.py", shared)
        (shared / "sandbox.py").chmod(0o644)
        path = str(shared / "socket")
        for address in (path, "\0" + path):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen(64)
        os.chmod(path, 0o777)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        os.mkfifo(shared / "fifo")
        os.chmod(shared / "fifo", 0o777)
        reader = os.open(shared / "fifo", os.O_RDWR)
        words = {"SECRET": str(shared / "secret"), "SOCKET": path, "FIFO": str(shared / "fifo"), "SHARED": str(shared)}
        yield {name: repr(text) for name, text in words.items()} | {"PORT": str(server.getsockname()[1])}
        os.close(reader)


@pytest.fixture(scope="module", params=["root", "unprivileged"])
def judge(request, world):
    """Runs programs as a user: `inside` and `outside` the sandbox tell whether one passes, `rss` the judge's memory."""
    command = [sys.executable]
    if request.param == "root" and os.geteuid():
        pytest.skip("these tests do not run as root")
    if request.param == "unprivileged" and not os.geteuid():
        become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        itself = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)"
        usable = []
        for path in filter(os.path.exists, (sys.executable, "/usr/bin/python3")):
            tried = subprocess.run([*become, path, "-c", itself], cwd="/", stderr=subprocess.DEVNULL)
            usable += [[*become, path]] if tried.returncode == 0 else []
        if not usable:
            pytest.skip("no Python here that another user may run")
        command = usable[0]
    terminal, tty = pty.openpty()
    if not os.geteuid():
        os.chown(os.ttyname(tty), NOBODY if request.param == "unprivileged" else 0, -1)
    process = subprocess.Popen(
        [*command, "-c", DRIVER, world["SHARED"].strip("'")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        env=os.environ | {"A2D_HIDDEN": "secret"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(tty, termios.TIOCSCTTY, 0),
    )

    def ask(program: str, timeout: float) -> bool:
        for name, text in made.words.items():
            program = program.replace(name, text)
        process.stdin.write(json.dumps([program, timeout]) + "\n")
        process.stdin.flush()
        passed, made.rss = json.loads(process.stdout.readline())
        return passed

    ready = json.loads(process.stdout.readline())
    made = SimpleNamespace(words=world | {"KEY": str(ready["key"])}, key=ready["key"] > 0, rss=0)
    made.inside, made.outside = lambda program, timeout=3.0: ask(program, timeout), lambda program: ask(program, 0)
    try:
        if ready["refusal"]:
            pytest.skip(f"no sandbox here: {ready['refusal']}")
        yield made
    finally:
        process.stdin.close()
        process.wait()
        os.close(terminal)
        os.close(tty)


@pytest.mark.parametrize("reach", REACHES)
def test_what_the_caller_reaches_is_out_of_reach(judge, world, reach):
    if reach == "the caller's key" and not judge.key:
        pytest.skip("no keys here")
    assert judge.outside(REACHES[reach])
    escaped = Path(world["SHARED"].strip("'"), "escaped")
    escaped.unlink(missing_ok=True)
    assert not judge.inside(REACHES[reach])
    assert not escaped.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_held(judge, attack):
    deadline, began = 1.5 if attack in ENDLESS else 12.0, time.time()
    assert not judge.inside(ATTACKS[attack], deadline)
    assert attack in ENDLESS or time.time() - began < deadline  # it was held, and not only ended
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            left += [path] if path.read_bytes() == b"sleep\x004321\x00" else []
    assert not left


def test_output_goes_nowhere(judge):
    judge.inside("")
    before = judge.rss
    flood = "import os\nfor i in range(64):\n    try:\n        for _ in range(30): os.write(i, bytes(10 << 20))\n"
    judge.inside(flood + "    except OSError: pass")
    assert judge.rss - before < 20 << 10


@pytest.mark.parametrize("program", ORDINARY)
def test_a_program_that_raises_nothing_passes(judge, program):
    assert judge.inside(ORDINARY[program], 5.0)


def test_an_interpreter_below_tmp_works(tmp_path):
    try:
        load("sandbox").check()
    except ValueError as error:
        pytest.skip(f"no sandbox here: {error}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    program = f"import sys\nsys.path.insert(0, {str(ROOT / 'tasks')!r})\nimport sandbox\nsandbox.check()\n"
    within = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import json'], check=True)"
    program += f"assert sandbox.passes({within!r})"
    subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", program], check=True)


def test_without_namespaces_the_task_refuses_and_names_upstreams():
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "tasks")!r})
import sandbox
sandbox._filter_calls()
try:
    import programs
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    assert "cannot make namespaces" in said and "upstream's humaneval_instruct" in said


def test_on_another_machine_it_refuses(monkeypatch):
    sandbox = load("sandbox")
    monkeypatch.setattr(sandbox, "MACHINES", {"abacus": 0})
    with pytest.raises(ValueError, match="needs Linux on abacus"):
        sandbox.check()


def test_programs_and_scores_are_upstreams():
    try:
        programs = load("programs")
    except ValueError as error:
        pytest.skip(str(error))
    doc = {"prompt": "def f(a):\n"}
    assert programs.humaneval_programs([["    return a\n```\nbye"]], [doc]) == [["def f(a):\n    return a\n"]]
    assert programs.mbpp_programs([["\ndef f(): pass\n```\nbye"]], [{}]) == [["def f(): pass"]]
    assert programs.mbpp_programs([["def f(): pass\n```\nbye"]], [{}]) == [[" f(): pass"]]  # upstream's reading
    assert programs.mbpp_programs([["nothing"]], [{}]) == [[""]]
    good, bad, test = "def f(a):\n    return a\n", "def f(a):\n    return 0\n", "assert f(1) == 1"
    assert programs.pass_at_k([test], [[good]], [1]) == {"pass@1": 1.0}
    assert programs.pass_at_k([test], [[good, bad, bad, bad]], [1, 2]) == pytest.approx({"pass@1": 0.25, "pass@2": 0.5})
    assert programs.pass_at_1([test], [[bad]]) == 0.0

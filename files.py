"""Models and JSON found and read; files that appear whole or not at all, and checks of where they go beforehand."""

import json
import os
import re
import shutil
import socket
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import huggingface_hub

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

CHECKPOINT = re.compile(r"checkpoint-(\d+|final)")  # the names under which train.py saves
LOCK = ".lock"
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]
LARGEST = 2**28  # bytes of a text that is read whole
JSON_BYTES, JSON_DEPTH = 2**26, 64  # of a file, at most; the index of a large model has a few megabytes


def resolve(path: str | Path) -> Path:
    """The directory that `path` names: itself, `$BASE_MODELS_DIR/path`, or a Hub id's snapshot, downloaded on need."""
    # A directory here, or among the base models.
    base = os.environ.get("BASE_MODELS_DIR", "")
    for directory in (Path(path).expanduser(), Path(base).expanduser() / path):
        if directory.is_dir():
            return directory
        if directory.exists():
            raise ValueError(f"{directory} is a file; name the checkpoint's directory")

    # The Hub, whose own errors are OSError and ValueError.
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        under = f" (nor one under {base})" if base else ""
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is neither a directory{under} nor a Hub id within reach: {reason}") from error


def read_json(path: Path, way_out: str = "fetch it again") -> dict:
    """The object in a file of JSON; ValueError, naming it, where there is none or one too large or too deep."""
    try:
        value = json.loads(read_text(path, largest=JSON_BYTES))
        if not isinstance(value, dict):
            raise ValueError(f"{json.dumps(value)[:40]}, expected an object")

        # What is within reach of the recursion limit here may not be where it is written.
        level = [value]
        for _ in range(JSON_DEPTH):
            items = [x for inner in level for x in (inner.values() if isinstance(inner, dict) else inner)]
            level = [x for x in items if isinstance(x, (dict, list))]
        if level:
            raise ValueError(f"nested more than {JSON_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; {way_out}") from error
    return value


def check_directory(flag: str, directory: str | Path) -> None:
    """ValueError where nothing can be written into `directory`. Call it before the work."""
    # It need not exist: the nearest directory above that does decides.
    whole = Path(directory).absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{flag} {directory}: {there} is no directory to write to; choose another")


def check_file(flag: str, path: str | Path, endings: tuple[str, ...], *, overwrite: bool) -> None:
    """ValueError where no file can be written at `path`, or one exists that must not be replaced."""
    path = Path(path)
    if path.suffix not in endings:
        raise ValueError(f"{flag} {path}: expected a name that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a directory; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} exists; choose another name or pass --overwrite")
    check_directory(flag, path.parent)


def read_text(path: str | Path, stream=None, largest: int | None = None) -> str:
    """The text of a file, or of `stream`, which `path` then only names; line ends become line feeds. ValueError for one
    that is not UTF-8, or is larger than `largest` bytes (default LARGEST): a device may have no end."""
    largest = largest or LARGEST
    # A pipe that nobody writes to is empty, instead of a wait without end.
    unblocked = {"opener": lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))}
    with nullcontext(stream) if stream else open(path, "rb", **unblocked) as file:
        if not stream and hasattr(os, "set_blocking"):
            os.set_blocking(file.fileno(), True)
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} is larger than {largest >> 20} MiB; split it, or name another file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, iconv -t utf-8 say") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def naming_file(path: str | Path):
    """Adds `path` to an OSError raised inside that names no file."""
    # That of a full disk does not.
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}; make room there", str(path)) from error


def beside(path: Path) -> Path:
    """The name, in the same directory, under which is written what will be `path`."""
    return path.with_name(f".{path.name}.writing")


@contextmanager
def replacing_file(path: str | Path):
    """A path to write a file to, which becomes `path` when the block is left; on an exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = beside(path)
    try:
        with naming_file(path):
            yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | Path):
    """A new directory to write into, which becomes `path` when the block is left; on an exception it is removed."""
    # A process killed in here leaves these two behind, for the next one or for `recover`.
    path = Path(path).resolve()
    new, old = beside(path), path.with_name(f".{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with naming_file(path):
            yield new

        # On the disk before it takes the name: else a power cut could leave the name with empty files.
        for written in (*new.rglob("*"), new):
            _sync(written)

        # No directory can be renamed onto another: the old one steps aside, and comes back where the new one fails.
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def delete(path: Path) -> None:
    """Removes a file, a directory with all in it, or a link, but never what it points to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def remove(path: Path) -> None:
    """Removes a checkpoint."""
    # It loses its name first, so that what has that name is always whole.
    delete(path.rename(beside(path)))


def recover(directory: Path) -> None:
    """Puts back the checkpoint that a process killed in `replacing` was about to replace, and removes its new one."""
    for left in sorted(directory.glob(".checkpoint-*")):
        name, _, kind = left.name[1:].rpartition(".")
        if not CHECKPOINT.fullmatch(name) or kind not in ("old", "writing"):
            continue
        if kind == "old" and not os.path.lexists(directory / name):
            left.rename(directory / name)
        else:
            delete(left)


@contextmanager
def sole_user(path: Path, *, whole: bool = False):
    """Inside, no other process can enter this for the directory `path`, which is created on need: ValueError for that
    one. The lock ends with the process, however that ends. whole: `path` is replaced, so that the lock lies beside."""
    if fcntl is None:
        yield
        return

    # The file must still be there once it is locked: the process before may have removed it in between.
    lock = path.with_name(f".{path.name}{LOCK}") if whole else path / LOCK
    created = [directory for directory in lock.parents if not directory.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = lock.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            user = file.read(200).decode(errors="replace") or "another process"
            file.close()
            raise ValueError(f"{path} is in use by {user}; wait for it, or choose another directory") from None
        except OSError:  # a file system without locks
            break
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        file.close()

    # A child would keep the lock beyond this process's end.
    os.register_at_fork(after_in_child=file.close)
    try:
        file.truncate(0)
        with naming_file(lock):
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()
        for directory in created:  # those that stayed empty
            with suppress(OSError):
                directory.rmdir()


def _sync(path: Path) -> None:
    # Waits until the disk has it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

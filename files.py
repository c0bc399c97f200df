"""Files and directories that appear whole or not at all, and checks of where they go before the work is done."""

import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path


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


LARGEST = 2**28  # bytes of a text that is read whole


def read_text(path: str | Path, stream=None) -> str:
    """The text of a file, or of `stream`, which `path` then only names; line ends become line feeds. ValueError for one
    that is not UTF-8, or is larger than LARGEST: a device may have no end."""
    # A pipe that nobody writes to is empty, instead of a wait without end.
    unblocked = {"opener": lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))}
    with nullcontext(stream) if stream else open(path, "rb", **unblocked) as file:
        if not stream and hasattr(os, "set_blocking"):
            os.set_blocking(file.fileno(), True)
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB; split it, or name another file")
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


def remove(path: Path) -> None:
    """Removes a checkpoint."""
    # It loses its name first, so that what has that name is always whole.
    shutil.rmtree(path.rename(beside(path)))


def recover(directory: Path) -> None:
    """Puts back the checkpoint that a process killed in `replacing` was about to replace, and removes its new one."""
    for old in directory.glob(".checkpoint-*.old"):
        path = directory / old.name[1:].removesuffix(".old")
        shutil.rmtree(old) if path.exists() else old.rename(path)
    for new in directory.glob(".checkpoint-*.writing"):
        shutil.rmtree(new)


def _sync(path: Path) -> None:
    # Waits until the disk has it.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

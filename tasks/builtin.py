"""The builtin data sets, which need no network: builtin/sums (chat) and builtin/stdlib (plain text)."""

import random
import sysconfig
import zlib
from pathlib import Path

# ---------------------------------------------------------------- plain text


def stdlib_rows(split: str) -> list[dict]:
    """The source files of the running Python's standard library, in order of path; every 20th is a test row."""
    # The same files wherever this Python is installed, without its tests
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [path for path in paths if skip.isdisjoint(path.split("/"))]
    # Of every twenty files the last is to test on, one in the middle to validate
    rows = []
    for i, path in enumerate(paths):
        if split == {19: "test", 9: "validation"}.get(i % 20, "train"):
            try:
                rows.append({"text": (root / path).read_text(encoding="utf-8")})
            except UnicodeDecodeError:
                continue
    return rows


# ---------------------------------------------------------------- chat

SUMS = {"train": 60_000, "validation": 500, "test": 2_000}  # rows
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # capitals: merges learnt from the questions' wording never touch the payload


def random_word(rng) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 6)))


def add(rng):
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{min(a, b)}+{max(a, b)}", f"What is {a} + {b}?", str(a + b)


def reverse(rng):
    word = random_word(rng)
    return word, f"Reverse the word {word}.", word[::-1]


def sort(rng):
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))
    answer = "".join(sorted(digits))
    return answer, f"Sort the digits {digits}.", answer


def count(rng):
    word = random_word(rng)
    return word, f"How many letters are in {word}?", str(len(word))


def largest(rng):
    a, b, c = (rng.randrange(100) for _ in range(3))
    return str(sorted((a, b, c))), f"Which is the largest of {a}, {b} and {c}?", str(max(a, b, c))


# Each draws (key, question, answer) from a random generator. Questions that share a key share a split.
TASKS = {"add": add, "reverse": reverse, "sort": sort, "count": count, "largest": largest}
SHARES = {"add": 5, "reverse": 1, "sort": 1, "count": 1, "largest": 2}  # of training rows: more of what is hard


def sums_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"} of the five TASKS, the same at every call.

    The tasks take turns; the training rows repeat each by its share. A hash of a question's key decides its split (10 %
    test, 2 % validation), so no question, nor its mirror image (b + a; the same digits or numbers in another order; a
    word, both in reverse and in count), is in two splits. In validation and test no question occurs twice.
    """
    # The order of tasks: in training, each as often as its share
    rng = random.Random(f"sums {split}")
    rows, seen, tasks = [], set(), list(TASKS)
    if split == "train":
        tasks = [task for task in TASKS for _ in range(SHARES[task])]

    # Draw until there are enough: a question of another split, or one that occurred, is not taken
    while len(rows) < SUMS[split]:
        task = tasks[len(rows) % len(tasks)]
        key, question, answer = TASKS[task](rng)
        bucket = zlib.crc32(key.encode()) % 50
        if split != ("test" if bucket < 5 else "validation" if bucket == 5 else "train"):
            continue
        if split != "train":
            if question in seen:
                continue
            seen.add(question)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"task": task, "messages": messages})
    return rows


BUILTIN = {"builtin/sums": sums_rows, "builtin/stdlib": stdlib_rows}

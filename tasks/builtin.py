"""The builtin data sets, which need no network: builtin/sums and builtin/chats (chat), builtin/stdlib (plain text)."""

import itertools
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
TURNS = 4  # questions of a row of builtin/chats
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


def split_of(key: str) -> str:
    """10 % test, 2 % validation, by a hash."""
    bucket = zlib.crc32(key.encode()) % 50
    return "test" if bucket < 5 else "validation" if bucket == 5 else "train"


def exchange(task: str, split: str, rng) -> list[dict]:
    """A question of that split, drawn at random, and its answer, as messages.

    Its key decides that, so no question, nor its mirror image (b + a; the same digits or numbers in another order; a
    word, both in reverse and in count), is in two splits.
    """
    while True:
        key, question, answer = TASKS[task](rng)
        if split_of(key) == split:
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sums_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"}, one question each, the same at every call.

    The tasks take turns; the training rows repeat each by its share. In validation and test no question occurs twice.
    """
    rng = random.Random(f"sums {split}")
    rows, seen, tasks = [], set(), list(TASKS)
    if split == "train":
        tasks = [task for task in TASKS for _ in range(SHARES[task])]
    while len(rows) < SUMS[split]:
        task = tasks[len(rows) % len(tasks)]
        messages = exchange(task, split, rng)
        if split == "train" or messages[0]["content"] not in seen:
            rows.append({"task": task, "messages": messages})
        seen.add(messages[0]["content"])
    return rows


def chats_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"} of TURNS such questions, whatever their tasks; "task" is that of the last."""
    rng, rows = random.Random(f"chats {split}"), []
    for _ in range(SUMS[split] // TURNS):
        tasks = rng.choices(list(TASKS), SHARES.values(), k=TURNS)
        messages = [message for task in tasks for message in exchange(task, split, rng)]
        rows.append({"task": tasks[-1], "messages": messages})
    return rows


def repeats_rows(split: str) -> list[dict]:
    """Chat rows {"task", "messages"} with answers of 23 letters and spaces: a word of three letters, six times."""
    rng, rows = random.Random(f"repeats {split}"), []
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    for word in rng.sample([word for word in words if split_of(word) == split], SUMS[split] // 15):
        messages = [{"role": "user", "content": f"Write {word} six times."}]
        messages.append({"role": "assistant", "content": " ".join([word] * 6)})
        rows.append({"task": "repeats", "messages": messages})
    return rows


BUILTIN = {"builtin/sums": sums_rows, "builtin/chats": chats_rows, "builtin/repeats": repeats_rows}
BUILTIN |= {"builtin/stdlib": stdlib_rows}

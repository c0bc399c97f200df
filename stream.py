"""Streaming: a set is read and tokenised while training runs, pass after pass, without end.

    Stream (the sets of a spec) -> Reader (raw rows) -> SlotRows (rows to train on) -> loaders.StreamLoader

No random choice knows how many processes there are, so the batches are the same on any number of ranks and workers,
and after a resumption on any other.
"""

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import data
from data import AnswerContains, Reading, RowEncoder

STREAMED_TEST = 1000  # rows of a set that are evaluated on, where its spec does not say


# ---------------------------------------------------------------- raw rows


class Source(NamedTuple):
    """A set as a stream reads it."""

    name: str
    shards: list  # each a list of rows, or a datasets.IterableDataset
    limit: int | None  # rows in one pass
    test_side: bool | None  # None: all rows; else whether to give the rows held out to test on, or the others
    keep_row: AnswerContains | None = None
    encode: RowEncoder | None = None

    def rows(self, order: list[int] | None = None, at: dict | None = None) -> Iterator[dict]:
        """The rows of one pass, the shards in that order. `at` is where in it to begin, and moves along: turn, of the
        shards; row, of the shard; given, rows in all."""
        order, at = order or range(len(self.shards)), at or {"turn": 0, "row": 0, "given": 0}
        with data.naming_errors(self.name):
            while at["turn"] < len(order) and at["given"] != self.limit:
                shard = order[at["turn"]]
                for number, row in enumerate(itertools.islice(self.shards[shard], at["row"], None), at["row"]):
                    at["row"] = number + 1

                    # A row's number decides whether it is to test on, not a draw: nobody knows how many there will be
                    to_test = zlib.crc32(f"{shard} {number}".encode()) % 20 == 0
                    if self.test_side in (None, to_test) and (not self.keep_row or self.keep_row(row)):
                        at["given"] += 1
                        yield row
                        if at["given"] == self.limit:
                            return
                at["turn"], at["row"] = at["turn"] + 1, 0

    def columns(self) -> list[str]:
        row = next(self.rows(), None)
        if row is None:
            raise ValueError(f"{self.name} has no rows; name a set that has some")
        return list(row)


def _source(spec: data.Spec, split: str, hold_out: bool = True) -> Source:
    """Where a set has no test split, every 20th row or so of train is its test split, by a hash of its number; with
    hold_out False train has them, too."""
    found, parts, whole = data.open_split(spec, split, streaming=True)
    if isinstance(parts[0], list):
        shards = parts
    else:
        with data.naming_errors(spec.name):
            shards = [rows.shard(rows.num_shards, i) for rows in parts for i in range(rows.num_shards)]
    limit = spec.limits.get(split, spec.limits.get(found))
    return Source(
        spec.name, shards, limit, test_side=split != "train" if whole and (hold_out or split != "train") else None
    )


def load_split(spec: data.Spec, split: str, **_) -> list[dict]:
    """The rows that a Stream leaves to evaluate on, for data.load (whose other options are not used: they are few)."""
    source = _source(spec, split)
    if spec.lang:
        source = source._replace(keep_row=AnswerContains(spec, source.columns()))
    rows = list(itertools.islice(source.rows(), source.limit or STREAMED_TEST))
    if not rows:
        raise ValueError(f"{spec.name} has no rows to {split}; name a set with more rows, or pass --eval_strategy no")
    return rows


class Stream:
    """The training rows of a spec's sets, read and tokenised while training runs; pass after pass, without end.

    The sets give rows in turn, until the longest is read to its end, and then all begin again. Of a set without a test
    split a hash of each row's number holds out 5 %, other rows than data.load holds out, if anything is to be.
    """

    def __init__(
        self, dataset_args, tokenizer, reading, *, hold_out=True, pack_length=None, block_length=None, eos_id=None
    ):
        """pack_length: chat rows are packed into canvases of that length (block_length, eos_id: as in data.Packed)."""
        self.name, self.reading = dataset_args, Reading(**reading.only(Reading))  # the workers get no more
        self.pack_length, self.block_length, self.eos_id = pack_length, block_length, eos_id
        self.longest = pack_length or reading.max_length  # of its canvases
        self.sources, encode = [], data.ENCODERS[reading.stage](tokenizer, reading)
        for spec in data.parse_specs(dataset_args):
            source = _source(spec, "train", hold_out)
            columns = source.columns()
            encode_row = RowEncoder(data.content_of(spec, columns, reading.stage, reading.text_field), encode)
            keep_row = AnswerContains(spec, columns) if spec.lang else None
            self.sources.append(source._replace(keep_row=keep_row, encode=encode_row))

    def pieces(self, rows: list, rest: list[int]) -> tuple[list[dict], list[int], Counter]:
        """Rows to train on, of raw (source, row) and what was left of the tokens before; what is left; outcomes."""
        encoded = [self.sources[source].encode(row) for source, row in rows]
        outcomes = Counter(row["outcome"] for row in encoded)

        # All texts and what was left before them, end to end, in full pieces
        if self.reading.stage == "pt":
            T = self.reading.max_length
            tokens = np.concatenate([np.array(rest, np.int64), *(row["tokens"] for row in encoded)])
            full = len(tokens) // T * T
            pieces = [{"tokens": piece, "supervised": np.ones(T, bool)} for piece in tokens[:full].reshape(-1, T)]
            return pieces, tokens[full:].tolist(), outcomes

        # Chats one by one, or several to a canvas
        types = {"tokens": np.int64, "supervised": bool}
        pieces = [{key: row[key].astype(types[key]) for key in types} for row in encoded if len(row["tokens"])]
        if self.pack_length:
            lengths = [data.filled(len(piece["tokens"]), self.block_length) for piece in pieces]
            groups = data.pack(lengths, self.pack_length)
            pieces = [data.join([pieces[n] for n in group], self.block_length, self.eos_id) for group in groups]
        return pieces, [], outcomes


class Reader:
    """The raw rows of a stream's sources in turn, pass after pass, as (number of the source, row).

    Between passes the order of a source's shards changes, if shuffled and the source has no limit.
    """

    def __init__(self, sources: list[Source], seed: int, shuffle: bool, state: dict | None = None):
        self.sources, self.seed, self.shuffle = sources, seed, shuffle
        state = state or {"epoch": 0, "count": 0, "turn": 0, "passes": None}
        self.epoch, self.count, self.turn = state["epoch"], state["count"], state["turn"]
        self._begin(state["passes"])

    def _begin(self, passes: list[dict] | None = None) -> None:
        """Opens every source anew, or where `passes` has it."""
        self.at = [dict(at) for at in passes or [{"turn": 0, "row": 0, "given": 0}] * len(self.sources)]
        self.passes = {}  # those that are not read to their end, by number of the source
        for n, source in enumerate(self.sources):
            order = list(range(len(source.shards)))
            if self.shuffle and source.limit is None:  # a limit takes the same rows in every pass
                order = np.random.default_rng((self.seed, self.epoch, n)).permutation(order).tolist()
            self.passes[n] = source.rows(order, self.at[n])

    def take(self, most: int) -> list[tuple[int, dict]]:
        """The next rows, `most` of them, or fewer where the pass ends; then the next pass has begun."""
        rows = []
        while len(rows) < most:
            # A pass ends when the longest source does
            if not self.passes:
                self.epoch, self.turn = self.epoch + 1, 0
                self._begin()
                break

            # Until then the sources take turns, of which those that are read to their end have none
            n, self.turn = self.turn, (self.turn + 1) % len(self.sources)
            if n in self.passes and (row := next(self.passes[n], None)) is not None:
                rows.append((n, row))
            else:
                self.passes.pop(n, None)
        self.count += len(rows)
        return rows

    @property
    def state(self) -> dict:
        passes = [dict(at) for at in self.at]
        return {"epoch": self.epoch, "count": self.count, "turn": self.turn, "passes": passes}


# ---------------------------------------------------------------- rows to train on


class SlotRows:
    """Endless iterable of (rows by slot, one for each of `slots`; state; outcomes so far).

    Row i of the stream goes to slot i mod total, and each slot packs its own rows and has its own state. So any
    division of the slots among processes gives the same batches; each reads all raw rows and tokenises its own.
    """

    # Raw rows are read by windows. A window's rows are shuffled before the slots share them, and a slot's pieces of
    # them after. So the state of a slot is its window, how many pieces of it it has given, and the tokens left over
    # before. The whole state: "windows", where in the sources those in use begin, and "slots"

    def __init__(self, stream: Stream, slots, total: int, *, seed: int, shuffle: bool, window_size: int, state: dict):
        self.stream, self.total = stream, total
        self.seed, self.shuffle, self.window_size = seed, shuffle, window_size
        # By slot: its state; of its window (its pieces, the tokens left over); rows dropped since one was not
        self.slots = {slot: state["slots"].get(str(slot), [0, 0, []]) for slot in slots}
        self.pieces, self.dropped, self.outcomes = {}, Counter(), Counter()

        # By window, of those in use: the reader's state before it, and the raw rows of each slot that has not cut them.
        # The reader stands before the next window
        self.starts, self.raw_rows = {}, {}
        self.next_window = min(window for window, _, _ in self.slots.values())
        self.begin = state["windows"].get(str(self.next_window))

    def __iter__(self):
        self.reader = Reader(self.stream.sources, self.seed, self.shuffle, self.begin)
        while True:
            rows = {slot: self._next_row(slot) for slot in self.slots}

            # Forget the windows that every slot has left
            oldest = min(window for window, _, _ in self.slots.values())
            self.starts = {window: start for window, start in self.starts.items() if window >= oldest}
            self.raw_rows = {window: self.raw_rows[window] for window in self.starts}

            # How to go on after these rows
            windows = {str(window): start for window, start in self.starts.items()}
            slots = {str(slot): state for slot, state in self.slots.items()}
            yield rows, {"windows": windows, "slots": slots}, Counter(self.outcomes)

    def _next_row(self, slot: int) -> dict:
        while True:
            window, given, rest = self.slots[slot]
            if slot not in self.pieces:
                self._make_pieces(slot, window, rest)
            pieces, left = self.pieces[slot]
            if given < len(pieces):
                self.slots[slot] = [window, given + 1, rest]
                return pieces[given]

            # This window gives no more: on to the next, with the tokens that filled no piece
            del self.pieces[slot]
            self.slots[slot] = [window + 1, 0, left]

    def _make_pieces(self, slot: int, window: int, rest: list[int]) -> None:
        """Makes pieces of what was left over and the rows that a slot has of a window."""
        while self.next_window <= window:
            self._read_window()
        pieces, left, outcomes = self.stream.pieces(self.raw_rows[window].pop(slot), rest)
        self.pieces[slot] = self._shuffled(pieces, window, slot), left
        self.outcomes.update(outcomes)

        # Are rows dropped for ever? A whole pass of them shows it, or a great many
        learnt = outcomes["kept"] + outcomes["cut"]
        self.dropped[slot] = 0 if learnt else self.dropped[slot] + outcomes.total()
        enough = 100 if self.reader.epoch > 1 else 10_000
        none_yet = not self.outcomes["kept"] + self.outcomes["cut"]
        if self.dropped[slot] > 10_000 or (self.outcomes.total() >= enough and none_yet):
            name, max_length = self.stream.name, self.stream.reading.max_length
            raise data.no_rows_left(name, "train", max_length, data.tally(self.outcomes))

    def _read_window(self) -> None:
        """Reads the next window, and gives each of our slots the rows that fall to it."""
        window, first = self.next_window, self.reader.count
        self.starts[window], self.raw_rows[window] = self.reader.state, {slot: [] for slot in self.slots}
        for i, row in enumerate(self._shuffled(self.reader.take(self.window_size), window, self.total), first):
            if (slot := i % self.total) in self.slots:
                self.raw_rows[window][slot].append(row)
        self.next_window += 1

    def _shuffled(self, items: list, *key: int) -> list:
        order = np.random.default_rng((self.seed, *key)).permutation(len(items)) if self.shuffle else range(len(items))
        return [items[i] for i in order]

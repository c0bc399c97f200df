"""Streaming: a set is read and tokenised while training runs, pass after pass, without end.

    Stream (the sets of a spec) -> Reader (raw rows) -> SlotRows (rows to train on) -> loaders.StreamLoader

No random choice knows how many processes there are, so the batches are the same on any number of ranks and workers,
and after a resumption on any other.
"""

import itertools
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

import data
from data import AnswerContains, Reading, RowEncoder

STREAMED_TEST = 1000  # rows of a set that are evaluated on, where its spec does not say


# ---------------------------------------------------------------- raw rows


class Source(NamedTuple):
    """A set as a stream reads it."""

    name: str
    shards: list  # each a list of rows, or (datasets.IterableDataset, the number of its shard)
    limit: int | None  # rows in one pass
    test_side: bool | None  # None: all rows; else whether to give the rows held out to test on, or the others
    keep_row: AnswerContains | None = None
    encode: RowEncoder | None = None


class Pass:
    """Iterator over a source's rows, once, its shards in the order given; `state` is where it is, `done` at the end."""

    def __init__(self, source: Source, order: list[int], state: list | None = None):
        self.source, self.order, self.rows, self.done = source, order, None, False
        self.turn, self.row, self.given, self.shard_state = state or (0, 0, 0, None)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        while not self.done:
            # The limit or the last shard ends the pass; else the next row is of the shard whose turn it is
            if self.given == self.source.limit or self.turn == len(self.order):
                self.done = True
                break
            shard = self.order[self.turn]
            if self.rows is None:
                self.rows = self._open(self.source.shards[shard])
            with data.naming_errors(self.source.name):
                row = next(self.rows, None)
            if row is None:
                self.turn, self.row, self.rows, self.shard_state = self.turn + 1, 0, None, None
                continue
            number, self.row = self.row, self.row + 1

            # A row's number decides whether it is to test on, not a draw: nobody knows how many rows there will be
            to_test = zlib.crc32(f"{shard} {number}".encode()) % 20 == 0
            if self.source.test_side in (None, to_test) and (not self.source.keep_row or self.source.keep_row(row)):
                self.given += 1
                return row
        raise StopIteration

    def _open(self, shard):
        if isinstance(shard, list):
            return itertools.islice(shard, self.row, None)
        dataset, index = shard
        self.dataset = dataset.shard(num_shards=dataset.num_shards, index=index)
        if self.shard_state is not None:
            self.dataset.load_state_dict(self.shard_state)
        return iter(self.dataset)

    @property
    def state(self) -> list:
        shard_read = self.rows is not None and not isinstance(self.source.shards[self.order[self.turn]], list)
        return [self.turn, self.row, self.given, self.dataset.state_dict() if shard_read else self.shard_state]


def _source(spec: data.Spec, split: str) -> Source:
    """Where a set has no test split, every 20th row or so of train is its test split, by a hash of its number."""
    if spec.name.startswith("builtin/"):
        return Source(spec.name, [data.builtin_rows(spec, split)], spec.limit(split, split), None)
    splits, test_side = data.load_splits(spec, streaming=True), None
    if data.lacks_test(splits):
        found, test_side = "train", split != "train"
    else:
        found = data.find_split(spec.name, splits, split)
    with data.naming_errors(spec.name):
        shards = [(rows, i) for rows in splits[found] for i in range(rows.num_shards)]
    return Source(spec.name, shards, spec.limit(split, "test" if test_side else found), test_side)


def _first_columns(source: Source) -> list[str]:
    row = next(Pass(source._replace(limit=1), range(len(source.shards))), None)
    if row is None:
        raise ValueError(f"{source.name} has no rows; name a set that has some")
    return list(row)


def load_split(spec: data.Spec, split: str, *, num_proc: int = 1) -> list[dict]:
    """The rows that a Stream leaves to evaluate on, for data.load (num_proc is not used: they are few)."""
    source = _source(spec, split)
    if spec.lang is not None:
        source = source._replace(keep_row=data.row_filter(spec, _first_columns(source)))
    rows = list(Pass(source._replace(limit=source.limit or STREAMED_TEST), range(len(source.shards))))
    if not rows:
        raise ValueError(f"{spec.name} has no rows to {split}; name a set with more rows, or pass --eval_strategy no")
    return rows


class Stream:
    """The training rows of a spec's sets, read and tokenised while training runs; pass after pass, without end.

    The sets give rows in turn, until the longest is read to its end, and then all begin again. Of a set without a test
    split a hash of each row's number holds out 5 %, other rows than data.load holds out.
    """

    def __init__(
        self, dataset_args: str, tokenizer, reading: Reading, *, pack_length=None, block_length=None, eos_id=None
    ):
        """pack_length: chat rows are packed into canvases of that length (block_length, eos_id: as in data.Packed)."""
        self.name, self.reading = dataset_args, Reading(**reading.only(Reading))  # the workers get no more
        self.pack_length, self.block_length, self.eos_id = pack_length, block_length, eos_id
        self.longest = pack_length or reading.max_length  # of its canvases
        self.sources, encode = [], data.ENCODERS[reading.stage](tokenizer, reading)
        for spec in data.parse_specs(dataset_args):
            source = _source(spec, "train")
            columns = _first_columns(source)
            keep_row = data.row_filter(spec, columns)
            content = data.content_of(spec, columns, reading.stage, reading.text_field)
            self.sources.append(source._replace(keep_row=keep_row, encode=RowEncoder(content, encode)))

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
        state = state or {"epoch": 0, "count": 0, "turn": 0, "passes": [None] * len(sources)}
        self.epoch, self.count, self.turn = state["epoch"], state["count"], state["turn"]
        self._begin(state["passes"])

    def _begin(self, states: list) -> None:
        """Opens every source anew, or where its state says."""
        self.passes = []
        for n, (source, state) in enumerate(zip(self.sources, states)):
            order = list(range(len(source.shards)))
            # A limit takes the same rows in every pass
            if self.shuffle and source.limit is None:
                order = np.random.default_rng((self.seed, self.epoch, n)).permutation(order).tolist()
            self.passes.append(Pass(source, order, state))

    def take(self, most: int) -> list[tuple[int, dict]]:
        """The next rows, `most` of them, or fewer where the pass ends; then the next pass has begun."""
        rows = []
        while len(rows) < most:
            # A pass ends when the longest source does
            if all(reading.done for reading in self.passes):
                self.epoch, self.turn = self.epoch + 1, 0
                self._begin([None] * len(self.sources))
                break

            # Until then the sources take turns, of which those that are read to their end have none
            n, self.turn = self.turn, (self.turn + 1) % len(self.passes)
            row = next(self.passes[n], None)
            if row is not None:
                rows.append((n, row))
        self.count += len(rows)
        return rows

    @property
    def state(self) -> dict:
        passes = [reading.state for reading in self.passes]
        return {"epoch": self.epoch, "count": self.count, "turn": self.turn, "passes": passes}


# ---------------------------------------------------------------- rows to train on


class SlotRows:
    """Endless iterable of (rows by slot, one for each of `slots`; state; outcomes so far).

    Row i of the stream goes to slot i mod total, whatever process serves that slot: each slot packs its own rows and
    has its own state, so any division of the slots among processes gives the same batches, and each process tokenises
    its own rows only (it does read all of them).

    Raw rows are read by windows. A window's rows are shuffled before the slots share them, and a slot's pieces of them
    after. So the state of a slot is its window, how many of that one's pieces it has given, and the tokens left over
    before. state: "windows", where in the sources those in use begin, and "slots".
    """

    def __init__(self, stream: Stream, slots, total: int, *, seed: int, shuffle: bool, window_size: int, state: dict):
        self.stream, self.total = stream, total
        self.seed, self.shuffle, self.window_size = seed, shuffle, window_size
        # By slot: its state; of its window (its pieces, the tokens left over); rows dropped since one was not
        self.slots = {slot: state["slots"].get(str(slot), [0, 0, []]) for slot in slots}
        self.pieces, self.dropped = {}, Counter()
        self.outcomes = Counter()

        # By window, of those in use: the reader's state before it, and the raw rows of each slot that has not cut them.
        # The reader stands before the next window
        self.starts, self.raw_rows = {}, {}
        self.next_window = self._oldest()
        self.reader = Reader(stream.sources, seed, shuffle, state["windows"].get(str(self.next_window)))

    def __iter__(self):
        while True:
            rows = {slot: self._next_row(slot) for slot in self.slots}

            # Forget the windows that every slot has left
            for window in [window for window in self.starts if window < self._oldest()]:
                del self.starts[window], self.raw_rows[window]

            # How to go on after these rows
            windows = {str(window): start for window, start in self.starts.items()}
            slots = {str(slot): state for slot, state in self.slots.items()}
            yield rows, {"windows": windows, "slots": slots}, Counter(self.outcomes)

    def _oldest(self) -> int:
        return min(window for window, _, _ in self.slots.values())

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
        self.starts[window], raw_rows = self.reader.state, {slot: [] for slot in self.slots}
        for i, row in enumerate(self._shuffled(self.reader.take(self.window_size), window, self.total), first):
            if i % self.total in raw_rows:
                raw_rows[i % self.total].append(row)
        self.raw_rows[window] = raw_rows
        self.next_window += 1

    def _shuffled(self, items: list, *key: int) -> list:
        if not self.shuffle:
            return items
        return [items[i] for i in np.random.default_rng((self.seed, *key)).permutation(len(items))]

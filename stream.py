"""Streaming: a set is read and tokenised while training runs, pass after pass, without end.

    Stream (the sets of a spec) -> Reader (raw rows) -> deal (rows to train on) -> StreamLoader, which collates

No random choice knows how many processes there are, so the batches are the same on any number of ranks and workers,
and after a resumption on any other.
"""

import itertools
import zlib
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

import data
from data import Batches

STREAMED_TEST = 1000  # rows of a set that are evaluated on, where its spec does not say


class Source(NamedTuple):
    """A set as a stream reads it."""

    name: str
    shards: list  # each a list of rows, or (datasets.IterableDataset, the number of its shard)
    limit: int | None  # rows in one pass
    held: bool | None  # None: all rows; else which side of the hold-out
    says: partial | None  # predicate of rows: the spec's lang
    content: partial | None  # from a row to what encoder takes


class Pass:
    """Iterator over a source's rows, once, its shards in the order given; `state` is where it is, `done` at the end."""

    def __init__(self, source: Source, order: list[int], state: list | None = None):
        self.source, self.order, self.rows, self.done = source, order, None, False
        self.place, self.row, self.given, self.inner = state or (0, 0, 0, None)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        while not self.done:
            if self.given == self.source.limit or self.place == len(self.order):
                self.done = True
                break
            shard = self.order[self.place]
            if self.rows is None:
                self.rows = self._open(self.source.shards[shard])
            with data.told(self.source.name):
                row = next(self.rows, None)
            if row is None:
                self.place, self.row, self.rows, self.inner = self.place + 1, 0, None, None
                continue
            number, self.row = self.row, self.row + 1
            # A row's number decides whether it is held out, not a draw: nobody knows how many there will be.
            held = zlib.crc32(f"{shard} {number}".encode()) % 20 == 0
            if self.source.held in (None, held) and (self.source.says is None or self.source.says(row)):
                self.given += 1
                return row
        raise StopIteration

    def _open(self, shard):
        if isinstance(shard, list):
            return itertools.islice(shard, self.row, None)
        dataset, index = shard
        self.dataset = dataset.shard(num_shards=dataset.num_shards, index=index)
        if self.inner is not None:
            self.dataset.load_state_dict(self.inner)
        return iter(self.dataset)

    @property
    def state(self) -> list:
        shard_read = self.rows is not None and not isinstance(self.source.shards[self.order[self.place]], list)
        return [self.place, self.row, self.given, self.dataset.state_dict() if shard_read else self.inner]


def _source(spec: data.Spec, split: str) -> Source:
    """Where a set has no test split, every 20th row or so is held out of train, by a hash of its number."""
    if split not in data.SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(data.SPLITS)}")
    found, held = split, None
    if spec.name.startswith("builtin/"):
        shards = [data.builtin_rows(spec, split)]
    else:
        splits = data.load_splits(spec, streaming=True)
        if data.lacks_test(splits):
            found, held = "train", split != "train"
        else:
            found = data.find_split(spec, splits, split)
        with data.told(spec.name):
            shards = [(rows, i) for rows in splits[found] for i in range(rows.num_shards)]
    return Source(spec.name, shards, data.limit_of(spec, split, "test" if held else found), held, None, None)


def _first_columns(source: Source) -> list[str]:
    row = next(Pass(source._replace(limit=1), range(len(source.shards))), None)
    if row is None:
        raise ValueError(f"{source.name} has no rows; name a set that has some")
    return list(row)


def load_split(spec: data.Spec, split: str, *, num_proc: int = 1) -> list[dict]:
    """The rows that a Stream leaves to evaluate on, for data.load: at most the spec's limit, or STREAMED_TEST.

    num_proc is not used: they are few.
    """
    assert split != "train", "a stream's training rows are no list"
    source = _source(spec, split)
    if spec.lang is not None:
        source = source._replace(says=data.answer_filter(spec, _first_columns(source)))
    rows = list(Pass(source._replace(limit=source.limit or STREAMED_TEST), range(len(source.shards))))
    if not rows:
        raise ValueError(f"{spec.name} has no rows to {split}; name a set with more rows, or pass --eval_strategy no")
    return rows


class Stream:
    """The training rows of a spec's sets, read and tokenised while training runs; pass after pass, without end.

    As data.load reads them, but: the sets give rows in turn, until the longest is read to its end, and then all begin
    again; of a set without a test split a hash of each row's number holds out 5 %, other rows than data.load holds out.
    pack_length: chat rows are packed into canvases of that length (block_length, eos_id: as in data.Packed).
    """

    def __init__(
        self,
        dataset_args: str,
        *,
        stage: str,
        tokenizer,
        max_length: int,
        text_field: str = "text",
        insert_eos: bool = True,
        truncation: str = "right",
        mask_prompt_loss: bool = True,
        train_on: str = "last",
        pack_length: int | None = None,
        block_length: int | None = None,
        eos_id: int | None = None,
    ):
        self.encode = data.encoder(
            stage=stage,
            tokenizer=tokenizer,
            max_length=max_length,
            insert_eos=insert_eos,
            truncation=truncation,
            mask_prompt_loss=mask_prompt_loss,
            train_on=train_on,
        )
        self.name, self.stage, self.max_length = dataset_args, stage, max_length
        self.pack_length, self.block_length, self.eos_id = pack_length, block_length, eos_id
        self.longest = pack_length or max_length  # of its canvases
        self.sources = []
        for spec in data.parse_specs(dataset_args):
            source = _source(spec, "train")
            columns = _first_columns(source)
            says = None if spec.lang is None else data.answer_filter(spec, columns)
            self.sources.append(source._replace(says=says, content=data.content_of(spec, columns, stage, text_field)))

    def pieces(self, rows: list, rest: list[int]) -> tuple[list[dict], list[int], Counter]:
        """Rows to train on, of raw (source, row) and what was left of the tokens before; what is left; outcomes."""
        encoded = [self.encode(self.sources[source].content(row)) for source, row in rows]
        outcomes = Counter(row.outcome for row in encoded)
        if self.stage == "pt":
            tokens, T = np.array([*rest, *itertools.chain(*(row.tokens for row in encoded))], np.int64), self.max_length
            full = len(tokens) // T * T
            pieces = [{"tokens": piece, "supervised": np.ones(T, bool)} for piece in tokens[:full].reshape(-1, T)]
            return pieces, tokens[full:].tolist(), outcomes
        pieces = [
            {"tokens": np.array(row.tokens, np.int64), "supervised": np.array(row.supervised, bool)}
            for row in encoded
            if row.tokens
        ]
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
        self.passes = []
        for n, (source, state) in enumerate(zip(self.sources, states)):
            order = list(range(len(source.shards)))
            if self.shuffle and source.limit is None:
                order = np.random.default_rng((self.seed, self.epoch, n)).permutation(order).tolist()
            self.passes.append(Pass(source, order, state))

    def take(self, most: int) -> list[tuple[int, dict]]:
        """The next rows, `most` of them, or fewer where the pass ends; then the next pass has begun."""
        rows = []
        while len(rows) < most:
            if all(reading.done for reading in self.passes):
                self.epoch, self.turn = self.epoch + 1, 0
                self._begin([None] * len(self.sources))
                break
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


def deal(stream: Stream, slots: list[int], total: int, *, seed: int, shuffle: bool, window: int, state: dict):
    """Endless iterator over (rows for some slots of a global batch of `total`, one each; state; outcomes so far).

    Row i of the stream goes to slot i mod total, whatever process serves that slot: each slot packs its own rows and
    has its own state, so any division of the slots among processes gives the same batches, and each process tokenises
    its own rows only (it does read all of them). Raw rows are dealt by windows. A window's rows are shuffled before
    they are dealt, and a slot's pieces of them after, so its state is its window, its place in that, and the tokens
    left over before. state: "windows", where in the sources those in use begin, and "slots".
    """
    at = {slot: state["slots"].get(str(slot), [0, 0, []]) for slot in slots}
    starts, dealt, pieces, outcomes, barren = {}, {}, {}, Counter(), Counter()
    first = min(number for number, _, _ in at.values())
    reader = Reader(stream.sources, seed, shuffle, state["windows"].get(str(first)))
    read = first  # windows before this one are read

    def mixed(items: list, *key: int) -> list:
        if not shuffle:
            return items
        return [items[i] for i in np.random.default_rng((seed, *key)).permutation(len(items))]

    def row_of(slot: int) -> dict:
        nonlocal read
        while True:
            number, place, rest = at[slot]
            if slot not in pieces:
                while read <= number:
                    starts[read], dealt[read], begin = reader.state, {slot: [] for slot in slots}, reader.count
                    for i, row in enumerate(mixed(reader.take(window), read, total), begin):
                        if i % total in dealt[read]:
                            dealt[read][i % total].append(row)
                    read += 1
                made, left, ends = stream.pieces(dealt[number].pop(slot), rest)
                pieces[slot] = mixed(made, number, slot), left
                outcomes.update(ends)
                # Rows are dropped for ever? A whole pass of them shows it, or a great many.
                barren[slot] = 0 if ends["kept"] + ends["cut"] else barren[slot] + ends.total()
                enough = 100 if reader.epoch > 1 else 10_000
                if barren[slot] > 10_000 or (outcomes.total() >= enough and not outcomes["kept"] + outcomes["cut"]):
                    raise data.nothing_learnt(stream.name, "train", stream.max_length, data.tally(outcomes))
            made, left = pieces[slot]
            if place < len(made):
                at[slot] = [number, place + 1, rest]
                return made[place]
            del pieces[slot]
            at[slot] = [number + 1, 0, left]

    while True:
        rows = {slot: row_of(slot) for slot in slots}
        oldest = min(number for number, _, _ in at.values())
        for number in [number for number in starts if number < oldest]:
            del starts[number], dealt[number]
        windows = {str(number): start for number, start in starts.items()}
        yield rows, {"windows": windows, "slots": {str(slot): held for slot, held in at.items()}}, Counter(outcomes)


class StreamLoader(Batches):
    """Batches of a Stream, without end; `batches`, `state` and `load_state` as Loader has them.

    A canvas is as long as max_length (or pack_length) says, full or not, so that no rank asks another for its longest
    row. A stream has no epochs: "sample" counts on, "epoch" is 0, steps_per_epoch is None. `state` speaks of this
    rank's slots alone; load_state takes the states of all ranks, and then on another number of them.
    """

    steps_per_epoch = None

    def __init__(
        self,
        stream: Stream,
        *,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        shuffle: bool = True,
        shuffle_buffer: int = 2000,
        collate,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        workers: int = 0,
    ):
        """shuffle_buffer: raw rows of a window (see deal), over all ranks. prefetch: steps that are made ahead, by a
        thread, or by `workers` processes that share this rank's slots. None of the three changes what a step holds,
        but for shuffle_buffer."""
        super().__init__(micro_batch_size, accumulation, rank, world_size)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle buffer {shuffle_buffer}: expected at least 1 row")
        self.stream, self.seed, self.collate, self.prefetch, self.workers = stream, seed, collate, prefetch, workers
        self.shuffle, self.shuffle_buffer = shuffle, shuffle_buffer
        self.step, self.at = 0, {"windows": {}, "slots": {}}
        self.counts = Counter()  # of the rows that this rank has read since it started

    def batches(self):
        """Endless iterator over optimizer steps, as Loader's, from `state` on, which it moves along."""
        micro_batches = self.own(self.global_batch_size)
        slots = list(itertools.chain(*micro_batches))
        shares = min(self.workers, len(slots)) or 1
        parts = []
        for n in range(shares):
            options = {"seed": self.seed, "shuffle": self.shuffle, "window": self.shuffle_buffer, "state": self.at}
            make = partial(deal, self.stream, slots[n::shares], self.global_batch_size, **options)
            parts.append(data.ahead(make, max(self.prefetch, int(self.workers > 0)), process=self.workers > 0))
        for part in zip(*parts):
            rows, at, outcomes = {}, {"windows": {}, "slots": {}}, Counter()
            for of_slots, state, ends in part:
                rows |= of_slots
                outcomes += ends
                for name in at:
                    at[name] |= state[name]
            step = []
            for own in micro_batches:
                sample = self.step * self.global_batch_size + torch.tensor(own)
                batch = self.collate([rows[slot] for slot in own], longest=self.stream.longest)
                step.append(batch | {"sample": sample, "epoch": 0})
            self.step, self.at, self.counts = self.step + 1, at, data.tally(outcomes)
            yield step

    @property
    def state(self) -> dict:
        """What this rank adds to what it takes to go on after the last step that `batches` gave; JSON."""
        return {"step": self.step, **self.at, **self._settings()}

    def _settings(self) -> dict:
        return {
            "set": self.stream.name,
            "stage": self.stream.stage,
            "max_length": self.stream.max_length,
            "packing": [self.stream.pack_length, self.stream.block_length],
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer if self.shuffle else None,
        }

    def load_state(self, states: dict | list[dict]) -> None:
        """Takes the `state` of every rank of the run to go on with, however many there are now."""
        states = states if isinstance(states, list) else [states]
        at = {"windows": {}, "slots": {}}
        for state in states:
            self.check(state, self._settings() | {"step": states[0]["step"]})
            for name in at:
                at[name] |= state[name]
        missing = [slot for own in self.own(self.global_batch_size) for slot in own if str(slot) not in at["slots"]]
        if states[0]["step"] and missing:
            raise ValueError(f"the state of a stream lacks slots {missing[:4]}: load the states of all its ranks")
        self.step, self.at = states[0]["step"], at

"""One thread that decodes for many: requests under the same options in one ragged batch, which they join and leave.

    Job       an answer to be decoded
    Batch     the jobs that are decoded together now
    Engine    the thread: who is let in, whose turn it is, and batches formed anew where somebody comes or goes

A batch that is formed anew goes on with the rows of the one before, cache and all (`Decoding.resume`): no prompt is
encoded twice, and at temperature 0 no answer depends on who else is there.
"""

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cli import Progress
from diffusion import Decoding, Sampling, Step, decoder


@dataclass(eq=False)
class Job:
    """An answer to be decoded. post: called with a copy of its progress after each forward, or with an error."""

    ids: list[int]
    holes: list[bool] | None
    options: Sampling
    seed: int | None
    progress: Progress
    post: Callable[[Progress | Exception], None]
    over: bool = False

    @property
    def kind(self) -> tuple:
        """What is equal for those that can be in one batch."""
        alone = self if self.seed is not None else None  # random numbers are a batch's
        return *vars(self.options).values(), self.holes is not None, alone

    @property
    def ends(self) -> tuple[int, ...]:
        return self.progress.end_ids

    def add(self, step: Step, n: int) -> None:
        """Takes row n of a batch's step; what the job has spent counts from its own beginning."""
        before, length = self.progress.last, len(self.ids) + self.options.max_new_tokens
        fields = {name: x for name, x in step._asdict().items() if isinstance(x, torch.Tensor)}
        fields = {name: x[n : n + 1] if x.ndim == 1 else x[n : n + 1, :length] for name, x in fields.items()}
        self.progress.add(step._replace(forwards=0 if before is None else before.forwards + 1, **fields))
        if step.done[n]:
            self.over = True  # never back to False: meanwhile the client may have gone
        self.post(copy.copy(self.progress))  # whose tensors are never written to again


class Batch(NamedTuple):
    jobs: list[Job]  # of each row
    decoding: Decoding
    steps: Iterator[Step]


class Full(Exception):
    """Too many wait already."""


class Closed(Exception):
    """The engine has ended, or will after its forward."""


class Engine(threading.Thread):
    """Decodes jobs, those of a kind in one batch. Batches take turns, a forward each; no more than `size` rows are in
    them together, and who comes first is first let in."""

    def __init__(self, model, size: int, max_queue: int, seed: int):
        super().__init__(daemon=True)
        self.model, self.size, self.max_queue = model, size, max_queue
        self.generator = torch.Generator(model.head_weight.device).manual_seed(seed)
        self.changed = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.batches: dict[tuple, Batch] = {}
        self.closed = False

    # Called from other threads

    def submit(self, jobs: list[Job]) -> None:
        """Takes them in; Full where too many wait."""
        with self.changed:
            if self.closed:
                raise Closed
            if len(self.waiting) + len(jobs) > max(self.max_queue, self.size - self.rows()):
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def leave(self, jobs: list[Job]) -> None:
        """Lets go of them, wherever they are; their places are free from the next forward on."""
        with self.changed:
            for job in jobs:
                job.over = True
            self.waiting = deque(job for job in self.waiting if not job.over)

    def close(self) -> None:
        """Ends it, and tells all jobs that are not over."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    # The engine's own

    def rows(self) -> int:
        return sum(not job.over for batch in list(self.batches.values()) for job in batch.jobs)

    @torch.no_grad()
    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.waiting or self.batches)
                if self.closed:
                    break
                joining: dict[tuple, list[Job]] = {}
                for _ in range(min(len(self.waiting), self.size - self.rows())):
                    job = self.waiting.popleft()
                    joining.setdefault(job.kind, []).append(job)
            for kind in {**self.batches, **joining}:
                self.advance(kind, joining.get(kind, []))
        for job in [*self.waiting, *(job for batch in self.batches.values() for job in batch.jobs)]:
            if not job.over:
                job.post(Closed())

    def advance(self, kind: tuple, joining: list[Job]) -> None:
        """A forward of a batch, with those who join it and without those who are over."""
        batch = self.batches.get(kind)
        there = [job for job in batch.jobs if not job.over] if batch else []
        jobs = there + [job for job in joining if not job.over]
        try:
            try:
                if jobs and (batch is None or jobs != batch.jobs):
                    batch = self.batches[kind] = self.formed(jobs, batch)
            except Exception as error:  # as where the memory has no room for one more: who is there goes on
                if not there:
                    raise
                self.fail(joining, error)
            step = next(batch.steps, None) if jobs else None
            if step is not None:
                self.report(batch, step)
            else:
                self.batches.pop(kind, None)
        except Exception as error:  # whatever it is, the other batches go on
            self.batches.pop(kind, None)
            self.fail(jobs, error)

    def fail(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            job.over = True
            job.post(error)

    def formed(self, jobs: list[Job], before: Batch | None) -> Batch:
        """A batch of these jobs, some of which are in the one before. No prompt is encoded again."""
        first, holes = jobs[0], None if jobs[0].holes is None else [job.holes for job in jobs]
        generator = self.generator if first.seed is None else torch.Generator(self.generator.device)
        if first.seed is not None:
            generator.manual_seed(first.seed)
        prompts = [job.ids for job in jobs]
        decoding = decoder(first.options)(self.model, prompts, first.options, holes, first.ends, None, generator)
        batch = Batch(jobs, decoding, decoding.run())
        moved = [(jobs.index(job), n) for n, job in enumerate(before.jobs if before else []) if job in jobs]
        if moved:
            decoding.resume(before.decoding, *map(list, zip(*moved)))
        self.report(batch, next(batch.steps))
        return batch

    def report(self, batch: Batch, step: Step) -> None:
        """Tells each job of a step; of a batch's first one only those that are new there."""
        step = step._replace(**{name: x.cpu() for name, x in step._asdict().items() if isinstance(x, torch.Tensor)})
        for n, job in enumerate(batch.jobs):
            if not job.over and (step.forwards or job.progress.last is None):
                job.add(step, n)

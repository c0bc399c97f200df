"""What a run of train.py leaves in its directory, and where another goes on from it. args are train.Settings."""

import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
from checkpoint import barrier, cannot_write, config_dict, save_model, write_model
from files import CHECKPOINT, beside, check_directory, delete, recover, remove, replacing, sole_user
from loaders import Loaders, StreamLoader
from log import ARGS, METRICS, PAGE, PICTURE, read_rows
from model import Config, LanguageModel
from parallel import Ranks
from tokenizer import Tokenizer

FINAL = "checkpoint-final"
STATE, PROGRESS = "state", "progress.json"  # in a checkpoint that training can be resumed from
NEW, MOVING = ".overwriting", ".moving"  # where a run is until its first save, if it overwrites another; while it moves
LENGTH = ("num_train_epochs", "max_steps")  # what may be more where a complete run is resumed


# ---------------------------------------------------------------------------------------------------------------------
# A run's directory


@contextmanager
def sole_run(args, ranks: Ranks):
    """Inside, this run has --output_dir for itself; ValueError where another one uses it."""
    check_directory("--output_dir", args.output_dir)
    with sole_user(Path(args.output_dir)) if ranks.rank == 0 else nullcontext():
        yield


def existing_files(output: Path) -> list[Path]:
    """What a run left in `output`, and nothing else that may be there."""
    saved = [path for path in sorted(output.glob("checkpoint-*")) if CHECKPOINT.fullmatch(path.name)]
    return saved + [path for name in (METRICS, ARGS, PICTURE, PAGE) if os.path.lexists(path := output / name)]


def refuse_existing(output: Path) -> None:
    """Raises ValueError where `output` holds a run."""
    found = existing_files(output)
    newest = max(checkpoints(output), key=number_of, default=None)
    newest = FINAL if (output / FINAL).exists() else newest and newest.name
    if found:
        raise ValueError(
            f"--output_dir {output} holds a run ({found[0].name}); choose another, or pass --overwrite, or go on with "
            f"it by --resume_from_checkpoint auto ({f'the newest is {newest}' if newest else 'from the start'})"
        )


def number_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted((path for path in existing_files(output) if path.name[11:].isdigit()), key=number_of)


def prune(output: Path, step: int, limit: int | None) -> None:
    """Removes all but the last `limit` checkpoints up to `step` (None: none), and the state of all but the last two."""
    # A link is not ours, nor is what it points to.
    written = [path for path in checkpoints(output) if number_of(path) <= step and not path.is_symlink()]
    for old in written[:-2]:
        drop_training(old)
    for old in written[:-limit] if limit else []:
        remove(old)


def save_whole(model: LanguageModel, path: Path, dtype: torch.dtype, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """The model alone, gathered from all ranks, as a Hugging Face directory."""
    whole = _gathered(model)
    if ranks.rank == 0:
        save_model(model, path, dtype=dtype, tokenizer=tokenizer, state_dict=whole)
    barrier()


def settle(output: Path) -> None:
    """Puts the run in NEW, which has saved, in the place of the one it overwrites. If killed, it can be repeated."""
    new, moving = output / NEW, output / MOVING
    if new.is_dir():
        for old in existing_files(output):
            delete(old)
        new.rename(moving)
    for path in list(moving.iterdir()):
        path.rename(output / path.name)
    moving.rmdir()


def put_in_order(output: Path) -> None:
    """Ends what a killed run had begun."""
    recover(output)
    recover(output / NEW)
    if (output / MOVING).is_dir() or any((output / NEW).glob("checkpoint-*")):
        settle(output)


# ---------------------------------------------------------------------------------------------------------------------
# Where a run begins


class Start(NamedTuple):
    """Where a run begins."""

    directory: Path  # where it writes; not --output_dir where it overwrites a run, which stays until the first save
    checkpoints: list[Path]  # to go on from: the first of them that is not damaged; none: from the start
    done: int = 0  # steps of the complete run that this one prolongs


def check_ranks_agree(args, ranks: Ranks) -> None:
    """ValueError where processes were started with different flags."""
    for other in ranks.gather(asdict(args)):
        for name, value in asdict(args).items():
            if other[name] != value:
                raise ValueError(f"--{name} is {value} here, {other[name]} on another process; start all with the same")


def is_complete(args, output: Path, ranks: Ranks) -> bool:
    """Whether a run that is resumed has its last checkpoint already; ValueError where that is of another run."""
    # First put in order what a killed one left.
    if ranks.rank == 0:
        put_in_order(output)
    barrier()

    # Rank 0 looks, for all. What is in NEW is not complete.
    final, auto = output / FINAL, args.resume_from_checkpoint == "auto" and not args.overwrite
    if not ranks.gather(auto and final.is_dir() and not (output / NEW).exists())[0]:
        return False
    before = read_object(output / ARGS)
    check_settings(before, args, final, free=LENGTH)

    # More steps, or more minutes, prolong it.
    had = before.get("max_minutes")
    more = isinstance(had, (int, float)) and (args.max_minutes is None or args.max_minutes > had)
    if more or any(before.get(name) != getattr(args, name) for name in LENGTH):
        return False
    if ranks.rank == 0:
        print(f"{final} is there: the run is complete")
    return True


def resume_point(args, output: Path, ranks: Ranks) -> Start:
    """ValueError or FileNotFoundError where a run cannot begin."""
    wanted, start = args.resume_from_checkpoint, Start(output, [])
    if wanted is not None and args.overwrite:
        raise ValueError("--overwrite and --resume_from_checkpoint contradict each other; leave one out")

    # A new run, which replaces another only on request; or one that was to replace another, and has saved nothing; or
    # this one, from its newest checkpoint with a state; or a checkpoint by name, which may begin a run in another
    # directory.
    if wanted is None:
        if not args.overwrite:
            refuse_existing(output)
        elif existing_files(output):
            start = Start(output / NEW, [])
    elif wanted == "auto" and (output / NEW).is_dir():
        start = Start(output / NEW, [])
    elif wanted == "auto":
        start = Start(output, resumable(output, ranks))
        if start.checkpoints and (output / FINAL).is_dir():
            start = start._replace(done=max((row["step"] for row in read_rows(output / METRICS)), default=0))
    else:
        start = Start(output, [Path(wanted)])
        read_progress(Path(wanted))
        named, ours = Path(wanted).resolve(), [path.resolve() for path in checkpoints(output)]
        if named not in ours:
            refuse_existing(output)
        elif named != ours[-1]:
            way_out = "go on from it in another --output_dir, or delete what is later"
            raise ValueError(f"{output} has checkpoints that are later than {wanted}, {ours[-1].name} say; {way_out}")
        elif (output / FINAL).is_dir():
            way_out = "go on by --resume_from_checkpoint auto and more --max_steps, or in another --output_dir"
            raise ValueError(f"{output / FINAL} is there: the run is complete; {way_out}")

    if any(other != start for other in ranks.gather(start)):
        raise ValueError(f"processes see different checkpoints in {output}; choose a directory that all nodes share")
    return start


def resumable(output: Path, ranks: Ranks) -> list[Path]:
    """The checkpoints with a training state, newest first; none where the run has not saved."""
    written, found, damage = checkpoints(output), [], None
    for path in reversed(written):
        try:
            read_progress(path)
            found.append(path)
        except FileNotFoundError:  # it has none
            continue
        except ValueError as error:
            damage = damage or error
            show_damage(error, ranks.rank)
    if damage and not found:
        raise damage
    if (output / FINAL).is_dir() and not found:
        raise ValueError(
            f"{output / FINAL} is complete, and no checkpoint beside it holds training state to resume from; train on "
            "from it by --model_name_or_path in another --output_dir"
        )
    if written and not found:
        raise ValueError(f"{written[-1]} holds no training state to resume from; take another --output_dir")
    return found


def show_damage(error: Exception, rank: int) -> None:
    """A word on the screen about a checkpoint that is passed over."""
    if rank == 0:
        print(f"passed over: {' '.join(str(error).split())}")


def prepare(output: Path, start: Start) -> None:
    """Makes the directory that a run writes to, once nothing can be refused any more."""
    if (output / NEW).exists():
        shutil.rmtree(output / NEW)
    start.directory.mkdir(parents=True, exist_ok=True)

    # What was complete is so no longer: it becomes a numbered checkpoint, or goes where there is the same.
    if start.done:
        final, numbered = output / FINAL, output / f"checkpoint-{start.done}"
        remove(final) if numbered.exists() else final.rename(numbered)


def check_settings(before: dict, args, path: Path, free: tuple = ()) -> None:
    """ValueError where a setting that decides the weights is not what it was `before`, when `path` was written."""
    for name, value in args.learned.items():
        old = before[name] if name in before else type(args).defaults(before)[name]  # there was no such flag yet
        if name not in free and old != value:
            raise ValueError(f"--{name} {value} contradicts {path}, of a run with {old}; resume with that")


def check_resumed(start: Start, args, config: Config, processes: int) -> None:
    """ValueError where the run to go on with was another: by its flags, model, or rows of a step."""
    path = start.checkpoints[0]
    progress = read_progress(path)

    # A run that is being prolonged has written its new length into args.json, perhaps before a checkpoint has it.
    before = progress["settings"]
    if (start.directory / ARGS).is_file():
        before |= {name: read_object(start.directory / ARGS).get(name) for name in LENGTH}
    check_settings(before, args, path, free=LENGTH if start.done else ())
    if progress["config"] != config_dict(config):
        raise ValueError(
            f"{path} is a checkpoint of another model, or builtin/tiny's of other data; resume with what it was "
            "trained from"
        )

    # The loader goes on by steps, so that all must have the same number of rows.
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    before = progress["loader"][0]["global_batch_size"]
    if before != rows:
        product = f"--per_device_train_batch_size x --gradient_accumulation_steps x {processes} processes"
        raise ValueError(f"{product} are {rows} rows a step, but {before} in {path}; resume with as many")


def fingerprints(loaders: Loaders, tokenizer: Tokenizer | None, frozen: str | None) -> dict[str, str | None]:
    """A hash of each thing that a run reads and that could be another when it goes on, though its name is the same.
    frozen: that of the weights that are not trained."""
    train = loaders.train
    if isinstance(train, StreamLoader):
        rows = [list(itertools.islice(source.rows(), 100)) for source in train.stream.sources]
        rows.append(hash_files(train.stream.name))
        first = hashlib.blake2b(json.dumps(rows, default=str).encode(), digest_size=8).hexdigest()
    else:
        first = hash_rows(getattr(train.rows, "rows", train.rows))  # packed rows have rows of their own
    found = {"base model": frozen, "tokenizer": tokenizer and data.fingerprint(tokenizer), "data to train on": first}
    return found | {"data to evaluate on": None if loaders.eval_rows is None else hash_rows(loaders.eval_rows)}


def hash_files(dataset_args: str) -> str:
    """A hash of the local files of a spec: of each the size and 64 MB, which lie evenly in a larger one."""
    digest = hashlib.blake2b(digest_size=8)
    for spec in data.parse_specs(dataset_args):
        path = next(filter(Path.exists, data.local_paths(spec.name)), Path(spec.name))
        for file in sorted(file for file in (path, *path.rglob("*")) if file.is_file()):
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as content:
                for start in range(0, size, max(2**20, size // 64)):
                    content.seek(start)
                    digest.update(content.read(2**20))
    return digest.hexdigest()


def hash_rows(rows: data.Rows) -> str:
    """A hash of the rows; of very many tokens only every second or n-th goes in, so that it takes at most a second."""
    digest = hashlib.blake2b(np.ascontiguousarray(rows.bounds), digest_size=8)
    stride = 1 + rows.useful // 2**26
    for chunks in (rows.tokens, rows.supervised):
        for start, chunk in zip(rows.starts, chunks):  # how the rows are cut into chunks makes no difference
            digest.update(np.ascontiguousarray(chunk[-start % stride :: stride]))
    return digest.hexdigest()


def check_fingerprints(path: Path, progress: dict, now: dict) -> None:
    """ValueError where `path` was trained with something else under the same name."""
    for name, value in now.items():
        before = progress["fingerprints"].get(name)
        if None not in (value, before) and value != before:  # without evaluation there is no data for it
            raise ValueError(f"the {name} is not that of {path}; resume with what it was trained with, or begin anew")


# ---------------------------------------------------------------------------------------------------------------------
# Training state: what resuming a run needs, on any number of ranks


def save_training(path: Path, model: LanguageModel, optimizers: list, progress: dict, *, dtype, tokenizer) -> None:
    """Writes a checkpoint that training can be resumed from; called by all ranks, whose `progress` is the same."""
    # A Hugging Face directory, and in it a directory with what torch.distributed.checkpoint stores, sharded or not: the
    # float32 weights that are trained and the optimizers.
    dcp, states = _distributed_checkpoint()
    rank = dist.get_rank() if dist.is_initialized() else 0

    # The model, by rank 0 alone, which alone has all of it in memory.
    whole = _gathered(model)
    with replacing(path) if rank == 0 else nullcontext(beside(path.resolve())) as directory:
        if rank == 0:
            write_model(model, directory, dtype=dtype, tokenizer=tokenizer, state_dict=whole)
        del whole
        barrier()

        # The state, of which every rank writes its own shards. What marks it as whole comes last.
        # Of the optimizers only tensors: their settings are flags.
        weights, moments = states.get_state_dict(model, optimizers)
        state = {"model": _trained(model, weights), "optimizer": {"state": moments["state"]}}
        try:
            dcp.save(state, checkpoint_id=directory / STATE)
        except dcp.api.CheckpointException as error:  # a BaseException with one of each failed rank
            raise cannot_write(directory / STATE, next(iter(error.failures.values()))[0]) from error
        if rank == 0:
            write_progress(directory, progress)
        barrier()
    barrier()


def load_training(path: Path, model: LanguageModel, optimizers: list) -> dict:
    """Loads the state of save_training into the model and the optimizers, however sharded; returns the progress."""
    dcp, states = _distributed_checkpoint()
    progress = read_progress(path)
    weights, moments = states.get_state_dict(model, optimizers)
    state = {"model": _trained(model, weights), "optimizer": {"state": moments["state"]}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a damaged file is said below
            dcp.load(state, storage_reader=_reader(path / STATE), planner=_planner())
    except (dcp.api.CheckpointException, Exception) as error:  # what a damaged file raises can be anything
        reason = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        reason = re.split(r"(?<=\w)\. ", str(reason))[0][:200] or repr(reason)  # torch adds advice that is unsafe
        raise ValueError(f"{path} does not fit this run or is damaged: {reason}") from error
    moments |= state["optimizer"]
    states.set_state_dict(model, optimizers, model_state_dict=weights | state["model"], optim_state_dict=moments)
    return progress


def _trained(model: LanguageModel, weights: dict) -> dict:
    """Of its weights those that are trained; the others are those of --model_name_or_path."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in weights.items() if name not in frozen}


def load_newest(paths: list[Path], model: LanguageModel, optimizers: list, rank: int) -> tuple[Path, dict]:
    """Of the first checkpoint that is not damaged its path and progress; its state is loaded."""
    for path in paths[:-1]:
        try:
            return path, load_training(path, model, optimizers)
        except ValueError as error:
            show_damage(error, rank)
    return paths[-1], load_training(paths[-1], model, optimizers)


def read_object(file: Path) -> dict:
    """The object in a JSON file of ours; ValueError where it is damaged."""
    try:
        if isinstance(found := json.loads(file.read_bytes()), dict):
            return found
        raise TypeError("it holds no object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or take another checkpoint or directory") from error


def write_progress(path: Path, progress: dict) -> None:
    """Stores it, with a hash by which reading finds any damage."""
    (path / STATE / PROGRESS).write_text(json.dumps({**progress, "hash": _hash(progress)}) + "\n")


def read_progress(path: Path) -> dict:
    """The progress that save_training stored; FileNotFoundError where `path` is no checkpoint to resume from."""
    if not path.is_dir():
        there = ", ".join(sorted(other.name for other in path.parent.glob("checkpoint-*"))) or "no checkpoint"
        raise FileNotFoundError(f"there is no directory {path} to resume from; {path.parent} holds {there}")
    file = path / STATE / PROGRESS
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no training state; it can be loaded as a model, but not resumed")
    progress = read_object(file)
    if progress.pop("hash", None) != _hash(progress):
        raise ValueError(f"{file} is damaged, or of another version of this program; take another checkpoint")
    return progress


def _hash(progress: dict) -> str:
    return hashlib.blake2b(json.dumps(progress, sort_keys=True).encode(), digest_size=16).hexdigest()


def drop_training(path: Path) -> None:
    """Removes the training state from a checkpoint, which remains a model."""
    # First the file that marks it as whole.
    (path / STATE / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(path / STATE, ignore_errors=True)


def _gathered(model: LanguageModel) -> dict:
    """All tensors that a save writes of a model whose ranks may have a part of each, on rank 0's CPU."""
    _, states = _distributed_checkpoint()
    how = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": model.config.adapter is not None}
    return states.get_model_state_dict(model, options=states.StateDictOptions(**how))


def _distributed_checkpoint():
    # Imported late: it takes 0.7 s, in a refused run and in each worker, too. One process is no reason to warn.
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    return checkpoint, state_dict


# What `.metadata`, which is a pickle, may name. All else is refused, as it could run code.
DCP = "torch.distributed.checkpoint"
NAMES = {f"{DCP}.filesystem": ["_StorageInfo"], "torch.serialization": ["_get_layout"]}
NAMES |= {"pathlib": ["PosixPath", "WindowsPath"], "torch": ["Size", "float64", "float32", "bfloat16", "float16"]}
NAMES |= {f"{DCP}.metadata": ["Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"]}
NAMES[f"{DCP}.metadata"] += ["BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"]


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in NAMES.get(module, []):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no run of ours writes")
        return super().find_class(module, name)


def _reader(state: Path):
    """What reads the tensors of `state`, in files that are all there; no pickle in them can run code."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (state / ".metadata").is_file():  # of a pipe we would wait for an end
        raise ValueError(".metadata is missing")
    with (state / ".metadata").open("rb") as file:
        metadata = Unpickler(file).load()
    for stored in metadata.storage_data.values():
        file = state / stored.relative_path
        if file.name != stored.relative_path or stored.transform_descriptors:
            raise ValueError(f".metadata names {stored.relative_path}, which is no file of ours")
        if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
            raise ValueError(f"{file.name} is missing or truncated")

    class Reader(FileSystemReader):
        def read_metadata(self):
            return metadata

    return Reader(state)


def _planner():
    """How dcp loads, but for what is no tensor: that it unpickles, and there is none in what we write."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            raise ValueError(f"{read_item.dest_index.fqn} is no tensor")

    return Planner()

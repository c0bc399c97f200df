"""What a run of train.py leaves in its directory, and where another goes on from it. args are train.Settings."""

import json
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import barrier, cannot_write, config_dict, save_model, write_model
from files import beside, check_directory, recover, remove, replacing
from log import ARGS, METRICS, PICTURE
from model import Config, LanguageModel
from parallel import Ranks
from tokenizer import Tokenizer

FINAL = "checkpoint-final"
STATE, PROGRESS = "state", "progress.json"  # in a checkpoint that training can be resumed from


def existing_files(output: Path, overwrite: bool) -> list[Path]:
    """What a run left in `output`. Raises ValueError where that must not be replaced."""
    found = [path for name in ("checkpoint-*", METRICS, ARGS, PICTURE) for path in sorted(output.glob(name))]
    if found and not overwrite:
        raise ValueError(f"--output_dir {output} holds a run ({found[0].name}); choose another, or pass --overwrite")
    return found


def number_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted((path for path in output.glob("checkpoint-*") if path.name[11:].isdigit()), key=number_of)


def prune(output: Path, step: int, limit: int | None) -> None:
    """Removes all but the last `limit` checkpoints up to `step` (None: none), and the state of all but the last two."""
    written = [path for path in checkpoints(output) if number_of(path) <= step]
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


def check_ranks_agree(args, ranks: Ranks) -> None:
    """ValueError where processes were started with different flags."""
    for other in ranks.gather(asdict(args)):
        for name, value in asdict(args).items():
            if other[name] != value:
                raise ValueError(f"--{name} is {value} here, {other[name]} on another process; start all with the same")


def is_complete(args, output: Path, ranks: Ranks) -> bool:
    """Whether a run that is resumed has its last checkpoint already."""
    # First put in order what a killed one left.
    if args.resume_from_checkpoint is not None and ranks.rank == 0:
        recover(output)
    barrier()

    # Rank 0 looks, for all.
    complete = args.resume_from_checkpoint == "auto" and ranks.gather((output / FINAL).is_dir())[0]
    if complete and ranks.rank == 0:
        print(f"{output / FINAL} is there: the run is complete")
    return complete


def resume_point(args, output: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from; None: from the start. ValueError or FileNotFoundError where that cannot be."""
    check_directory("--output_dir", output)
    found, wanted = None, args.resume_from_checkpoint
    if wanted is not None and args.overwrite:
        raise ValueError("--overwrite and --resume_from_checkpoint contradict each other; leave one out")

    # A new run, which replaces another only on request; or this one, from its newest checkpoint with a state; or a
    # checkpoint by name, which may begin a run in another directory.
    if wanted is None:
        existing_files(output, args.overwrite)
    elif wanted == "auto":
        written = checkpoints(output)
        found = next((path for path in reversed(written) if has_training(path)), None)
        if written and found is None:
            raise ValueError(f"{written[-1]} holds no training state to resume from; take another --output_dir")
    else:
        found = Path(wanted)
        read_progress(found)
        if found.resolve().parent != output.resolve():
            existing_files(output, overwrite=False)

    if len(set(ranks.gather(found))) > 1:
        raise ValueError(f"processes see different checkpoints in {output}; choose a directory that all nodes share")
    return found


def check_resumed(path: Path, args, config: Config, processes: int) -> None:
    """ValueError where the run that wrote checkpoint `path` was another: by its flags, model, or rows of a step."""
    progress = read_progress(path)
    for name, value in args.learned.items():
        before = progress["settings"].get(name)
        if before != value:
            raise ValueError(f"--{name} {value} contradicts {path}, of a run with {before}; resume with that")
    if progress["config"] != config_dict(config):
        raise ValueError(f"{path} is a checkpoint of another model; resume with the one it was trained from")

    # The loader goes on by steps, so that all must have the same number of rows.
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    before = progress["loader"][0]["global_batch_size"]
    if before != rows:
        product = f"--per_device_train_batch_size x --gradient_accumulation_steps x {processes} processes"
        raise ValueError(f"{product} are {rows} rows a step, but {before} in {path}; resume with as many")


# ---------------------------------------------------------------------------------------------------------------------
# Training state: what resuming a run needs, on any number of ranks


def save_training(path: Path, model: LanguageModel, optimizers: list, progress: dict, *, dtype, tokenizer) -> None:
    """Writes a checkpoint that training can be resumed from; called by all ranks, whose `progress` is the same."""
    # A Hugging Face directory, and in it a directory with what torch.distributed.checkpoint stores, sharded or not: the
    # float32 weights and the optimizers.
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
        weights, moments = states.get_state_dict(model, optimizers)
        try:
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=directory / STATE)
        except dcp.api.CheckpointException as error:  # a BaseException with one of each failed rank
            raise cannot_write(directory / STATE, next(iter(error.failures.values()))[0]) from error
        if rank == 0:
            (directory / STATE / PROGRESS).write_text(json.dumps(progress) + "\n")
        barrier()
    barrier()


def load_training(path: Path, model: LanguageModel, optimizers: list) -> dict:
    """Loads the state of save_training into the model and the optimizers, however sharded; returns the progress."""
    dcp, states = _distributed_checkpoint()
    weights, moments = states.get_state_dict(model, optimizers)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=path / STATE)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        failures = getattr(error, "failures", {0: (error, None)})
        raise ValueError(f"{path} does not fit this run or is damaged: {next(iter(failures.values()))[0]}") from error
    states.set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_progress(path)


def has_training(path: Path) -> bool:
    return (path / STATE / PROGRESS).is_file() and (path / STATE / ".metadata").is_file()


def read_progress(path: Path) -> dict:
    """The progress that save_training stored; FileNotFoundError where `path` is no checkpoint to resume from."""
    if not path.is_dir():
        there = ", ".join(sorted(other.name for other in path.parent.glob("checkpoint-*"))) or "no checkpoint"
        raise FileNotFoundError(f"there is no directory {path} to resume from; {path.parent} holds {there}")
    if not has_training(path):
        raise FileNotFoundError(f"{path} holds no training state; it can be loaded as a model, but not resumed")
    return json.loads((path / STATE / PROGRESS).read_text())


def drop_training(path: Path) -> None:
    """Removes the training state from a checkpoint, which remains a model."""
    # First the file that marks it as whole.
    (path / STATE / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(path / STATE, ignore_errors=True)


def _gathered(model: LanguageModel) -> dict:
    """All tensors of a model whose ranks may have a part of each, on rank 0's CPU."""
    _, states = _distributed_checkpoint()
    return states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))


def _distributed_checkpoint():
    # Imported late: it takes 0.7 s, in a refused run and in each worker, too. One process is no reason to warn.
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    return checkpoint, state_dict

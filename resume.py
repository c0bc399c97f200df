"""What a run of train.py leaves in its directory, and where another goes on from it. args are train.Settings."""

from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import (  # noqa
    barrier,
    config_dict,
    drop_training,
    load_training,
    read_progress,
    recover,
    remove,
    save_model,
    save_training,
)
from cli import check_directory
from log import ARGS, METRICS, PICTURE
from model import Config, LanguageModel
from parallel import Ranks
from tokenizer import Tokenizer

FINAL = "checkpoint-final"


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
    """Of the checkpoints up to `step` the two newest can be resumed from, and the last `limit` stay (None: all)."""
    written = [path for path in checkpoints(output) if number_of(path) <= step]
    for old in written[:-2]:
        drop_training(old)
    for old in written[:-limit] if limit else []:
        remove(old)


def save_whole(model: LanguageModel, path: Path, dtype: torch.dtype, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """The model alone, gathered from all ranks, as a Hugging Face directory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
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
    """Whether a run that is resumed has its last checkpoint already. First puts in order what a killed one left."""
    if args.resume_from_checkpoint is not None and ranks.rank == 0:
        recover(output)
    barrier()
    complete = args.resume_from_checkpoint == "auto" and ranks.gather((output / FINAL).is_dir())[0]
    if complete and ranks.rank == 0:
        print(f"{output / FINAL} is there: the run is complete")
    return complete


def resume_point(args, output: Path, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from; None: from the start. ValueError or FileNotFoundError where that cannot be."""
    found = _resume_point(args, output)
    if len(set(ranks.gather(found))) > 1:
        raise ValueError(f"processes see different checkpoints in {output}; choose a directory that all nodes share")
    return found


def _resume_point(args, output: Path) -> Path | None:
    check_directory("--output_dir", output)
    if args.resume_from_checkpoint is None:
        existing_files(output, args.overwrite)
        return None
    if args.overwrite:
        raise ValueError("--overwrite and --resume_from_checkpoint contradict each other; leave one out")
    if args.resume_from_checkpoint != "auto":
        path = Path(args.resume_from_checkpoint)
        read_progress(path)
        if path.resolve().parent != output.resolve():
            existing_files(output, overwrite=False)
        return path
    written = checkpoints(output)
    for path in reversed(written):
        try:
            read_progress(path)
        except FileNotFoundError:
            continue
        return path
    if written:
        raise ValueError(
            f"{written[-1]} holds no training state to resume from; choose another directory, or --overwrite"
        )
    return None


def check_resumed(path: Path, args, config: Config, processes: int) -> None:
    """ValueError where the run that wrote checkpoint `path` was another: by its flags, model, or rows of a step."""
    progress = read_progress(path)
    for name, value in args.learned.items():
        before = progress["settings"].get(name)
        if before != value:
            raise ValueError(
                f"--{name} {value} contradicts {path}, of a run with {before}; resume with that, or start another run "
                "in a directory of its own"
            )
    if progress["config"] != config_dict(config):
        raise ValueError(f"{path} is a checkpoint of another model; resume with the one it was trained from")
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    before = progress["loader"][0]["global_batch_size"]
    if before != rows:
        raise ValueError(
            f"--per_device_train_batch_size x --gradient_accumulation_steps x {processes} processes are {rows} rows a "
            f"step, but {before} in the run of {path}; choose the first two so that the product is that"
        )

"""Hugging Face directories in and out: config.json, safetensors, and names resolved to directories.

Parameter names equal Hugging Face names, so nothing is mapped: what a file holds is accounted for by name and shape,
both ways, or refused. Every save is written beside its final name and renamed.
"""

import json
import math
import os
import shutil
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import FAMILIES, Config, LanguageModel

OBJECTIVES = ("ar", "mdlm", "bd3lm")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # torch's name: safetensors'
SHARD_BYTES = 5_000_000_000
OURS = ("objective", "block_length", "mask_token_id", "right_shift")  # what transformers does not know of
STATE, PROGRESS = "state", "progress.json"  # in a checkpoint that training can be resumed from
REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
COUNTS = (*REQUIRED, "num_key_value_heads", "head_dim", "block_length")
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]


def resolve(path: str | Path) -> Path:
    """The directory `path` means: itself, `$BASE_MODELS_DIR/path`, or a Hub id's snapshot, fetched if need be."""
    base = os.environ.get("BASE_MODELS_DIR")
    for directory in [Path(path).expanduser(), *([Path(base).expanduser() / path] if base else [])]:
        if directory.is_dir():
            return directory
        if directory.exists():
            raise ValueError(f"{directory} is a file; name the checkpoint's directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:  # the Hub's own errors are both
        under = f" (nor one under {base})" if base else ""
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is neither a directory{under} nor a Hub id within reach: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def load_config(path: str | Path) -> Config:
    file = resolve(path) / "config.json"
    if not file.is_file():
        found = sorted(inner.parent.name for inner in file.parent.glob("*/config.json"))
        hint = f"did you mean {file.parent / found[-1]}?" if found else "expected a Hugging Face checkpoint's directory"
        raise FileNotFoundError(f"{file.parent} holds no config.json; {hint}")
    try:
        return read_config(json.loads(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(raw: dict) -> Config:
    """A Config of config.json's fields, in the flat dialect or the nested one (rope_parameters, dtype).

    Raises ValueError, naming the field, for whatever would change the computation and is not implemented here.
    """
    _check_types(raw)
    family = (raw.get("model_type") or "").removeprefix("a2d-")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {raw.get('model_type')!r}: expected {', '.join(FAMILIES)}, or one with a2d- before"
        )
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    four = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    known = {"default": set(), "llama3": four}
    refused = {
        "use_sliding_window": raw.get("use_sliding_window") is True,
        "layer_types": set(raw.get("layer_types") or []) - {"full_attention"},
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "mlp_bias": raw.get("mlp_bias") is True,
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
        "quantization_config": raw.get("quantization_config") is not None,
        "num_experts": raw.get("num_experts"),
        "num_local_experts": raw.get("num_local_experts"),
        "rope_parameters" if "rope_parameters" in raw else "rope_scaling": set(rope) != known.get(rope_type),
    }
    for name, unsupported in refused.items():
        if unsupported:
            raise ValueError(f"{name} {json.dumps(raw[name])} is not supported")
    if missing := [name for name in (*REQUIRED, "rms_norm_eps") if raw.get(name) is None]:
        raise ValueError(f"field missing: {', '.join(missing)}")

    known_fields = {field.name for field in fields(Config)} - {"extra"}
    given = {name: raw[name] for name in known_fields & raw.keys() if raw[name] is not None}
    given |= {
        "model_type": family,
        "num_key_value_heads": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        "rope_theta": float(theta),
        "rope_scaling": {"rope_type": rope_type, **rope} if rope else None,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "dtype": (raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
    }
    written_anew = {"architectures", "transformers_version", "torch_dtype", "rope_parameters"}
    extra = {name: value for name, value in raw.items() if name not in known_fields | written_anew}
    config = Config(**given, extra=extra)
    if config.objective not in (None, *OBJECTIVES):
        raise ValueError(f"objective {config.objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype {config.dtype!r}: expected one of {', '.join(DTYPES)}")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{config.num_attention_heads} heads of {config.head_dim} for {config.num_key_value_heads} of keys and "
            "values: expected a multiple of that number, and an even head_dim"
        )
    return config


def _check_types(raw) -> None:
    """Raises ValueError, naming the field, where config.json holds what nothing can be computed with."""
    if not isinstance(raw, dict):
        raise ValueError(f"{json.dumps(raw)[:40]}: expected an object with model_type, hidden_size and so on")
    kinds = {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Config).items() if name != "extra"}
    for name, kind in (kinds | {"rope_parameters": (dict,), "torch_dtype": (str,)}).items():
        value = raw.get(name)
        if value is not None and type(value) not in (*kind, *([int] if float in kind else [])):
            raise ValueError(f"{name} {json.dumps(value)[:40]}: expected {kind[0].__name__}")
        if isinstance(value, int | float) and (value < 0 or (value == 0 and name in COUNTS)):
            raise ValueError(f"{name} {value}: expected more")


def is_diffusion(config: Config) -> bool:
    """Whether the checkpoint says so: by its objective, or by a mask token where it declares none."""
    return config.mask_token_id is not None if config.objective is None else config.objective != "ar"


def config_dict(config: Config) -> dict:
    """The fields of config.json, flat dialect; the family is dLLM's a2d-* for diffusion, else the plain causal one."""
    name, diffusion = config.family.name, is_diffusion(config)
    out = {field.name: getattr(config, field.name) for field in fields(Config) if field.name != "extra"}
    out |= {"architectures": [f"A2D{name}LMHeadModel" if diffusion else f"{name}ForCausalLM"], **config.extra}
    out["model_type"] = f"a2d-{config.model_type}" if diffusion else config.model_type
    if config.family.qkv_bias is not None:
        del out["attention_bias"]  # the family's biases are no option
    return dict(sorted((key, value) for key, value in out.items() if value is not None or key not in OURS))


def declare(
    config: Config,
    *,
    objective: str | None = None,
    block_length: int | None = None,
    right_shift: bool | None = None,
    mask_token_id: int | None = None,
) -> Config:
    """`config`, with what it does not declare filled in: by the arguments, else mdlm, and a shift for ar alone.

    Raises ValueError where an argument contradicts what the checkpoint declares or what its objective needs.
    """
    objective = objective or config.objective or "mdlm"
    diffusion = objective != "ar"
    wanted = {
        "objective": ("--objective", objective),
        "block_length": ("--block_size", block_length),
        "right_shift": ("--right_shift_logits", right_shift),
        "mask_token_id": ("the tokenizer's mask token", mask_token_id if diffusion else None),
    }
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    filled = {}
    for name, (flag, value) in wanted.items():
        declared = getattr(config, name)
        if None not in (declared, value) and declared != value:
            raise ValueError(
                f"{flag} {value} contradicts the checkpoint, which declares {name} {declared}; leave it at that, "
                "or declare it anew with convert.py"
            )
        filled[name] = value if declared is None else declared
    if filled["right_shift"] is None:
        filled["right_shift"] = not diffusion
    if not diffusion and not filled["right_shift"]:
        raise ValueError("--right_shift_logits False: an ar model predicts the next token; leave the flag out")
    if objective == "bd3lm" and filled["block_length"] is None:
        raise ValueError("bd3lm needs a block length and the checkpoint declares none; pass --block_size, 32 say")
    if objective != "bd3lm" and block_length is not None:
        raise ValueError(f"--block_size {block_length}: only bd3lm has a block length, the objective is {objective}")
    if filled["block_length"] is not None and filled["block_length"] < 1:
        raise ValueError(f"--block_size {block_length}: expected at least 1")
    if diffusion and filled["mask_token_id"] is None:
        raise ValueError(f"{objective} needs a mask token and the checkpoint declares none; run convert.py on it first")
    if diffusion and filled["mask_token_id"] >= config.vocab_size:
        raise ValueError(
            f"mask token id {filled['mask_token_id']} lies beyond the embedding's {config.vocab_size} rows; "
            "run convert.py first, which adds some"
        )
    for name, value in filled.items():
        setattr(config, name, value)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, device="cpu") -> LanguageModel:
    """The model of a directory or a Hub id, in eval mode; dtype None: as stored, which `config.dtype` then tells.

    Tensors are read through a memory map, and as stored they stay in it. Others are copied one by one, each through a
    map of its own, since what is mapped counts as memory; the largest first, so that the peak is the model itself.
    Beside the model's own tensors a file may hold rotary buffers and, under tying, a head equal to the embedding.
    """
    path = resolve(path)
    config = load_config(path)
    with torch.device("meta"):
        model = LanguageModel(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    with ExitStack() as stack:
        owner, files = {}, {}  # tensor name: the open file that holds it, and its path
        for file in _weight_files(path):
            try:
                handle = stack.enter_context(safe_open(file, "pt"))
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
            names = [name for name in handle.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
            owner |= dict.fromkeys(names, handle)
            files |= dict.fromkeys(names, file)
        found = {name: handle.get_slice(name) for name, handle in owner.items()}
        shapes = {name: part.get_shape() for name, part in found.items()}
        if config.tie_word_embeddings and shapes.get(head, []) == shapes.get(embedding):
            if not torch.equal(owner[head].get_tensor(head), owner[embedding].get_tensor(embedding)):
                raise ValueError(f"{path}: {head} differs from {embedding}, but config.json says tie_word_embeddings")
            del shapes[head]
        problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
        problems += [f"{name} is unexpected" for name in shapes.keys() - expected.keys()]
        problems += [
            f"{name} is {shapes[name]}, expected {expected[name]}"
            for name in expected.keys() & shapes.keys()
            if shapes[name] != expected[name]
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"{path}: weights and config.json disagree: {', '.join(sorted(problems)[:3])}{more}")
        stored = found[embedding].get_dtype()
        names = {code: name for name, code in DTYPES.items()}
        if stored not in names:
            raise ValueError(f"{path}: weights of type {stored}; expected one of {', '.join(names)}")
        config.dtype = names[stored]
        dtype = dtype or getattr(torch, config.dtype)
        if (dtype, torch.device(device).type) == (getattr(torch, config.dtype), "cpu"):
            tensors = {name: owner[name].get_tensor(name) for name in expected}
        else:
            tensors = {}
            for name in sorted(expected, key=lambda name: -math.prod(expected[name])):
                with safe_open(files[name], "pt") as handle:
                    tensors[name] = handle.get_tensor(name).to(device, dtype)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        raise FileNotFoundError(
            f"{path} holds no model.safetensors; expected that or its index and shards, which transformers writes: "
            "save_pretrained(...)"
        )
    try:
        files = [path / name for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} names no shards ({error!r}); fetch the model again") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}, which {index.name} names, is missing; fetch the model again")
    return files


def save_model(
    model: LanguageModel,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer=None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes config.json, the weights and the tokenizer's files, all at once or not at all.

    dtype None: `config.dtype`, that of the source. state_dict: the whole tensors, where the model's own are sharded.
    An existing checkpoint at `path` is replaced; anything else is left alone (ValueError).
    """
    path = Path(path)
    if path.exists() and not _replaceable(path):
        raise ValueError(f"{path} exists and is no checkpoint, or holds directories; choose another directory")
    with replacing(path) as directory:
        write_model(model, directory, dtype=dtype, tokenizer=tokenizer, state_dict=state_dict)


def write_model(model: LanguageModel, directory: Path, *, dtype=None, tokenizer=None, state_dict=None) -> None:
    """What save_model says, into a directory that is new."""
    dtype = dtype or getattr(torch, model.config.dtype)
    config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
    tensors = model.state_dict() if state_dict is None else state_dict
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        size += tensor.numel() * dtype.itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = tensor.numel() * dtype.itemsize
        shards[-1].append(name)
    (directory / "config.json").write_text(json.dumps(config_dict(config), indent=2) + "\n")
    names = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        part = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in shard}
        try:
            save_file(part, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise _unwritten(directory / file, error) from error
        (directory / file).chmod((directory / "config.json").stat().st_mode)  # safetensors makes it private
        names |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(directory, mask=is_diffusion(config))


def _unwritten(path: Path, error: BaseException) -> OSError:
    """What the libraries say of a full disk is not always that."""
    free = shutil.disk_usage(path.parents[1]).free / 1e9  # the parent is gone where another rank was first
    return OSError(f"cannot write {path}: {error}; {free:.2f} GB are free there")


def _replaceable(path: Path) -> bool:
    """Whether `path` is an empty directory, or a checkpoint without directories in it: replacing it loses no more."""
    held = list(path.iterdir()) if path.is_dir() else [path]
    return not held or ((path / "config.json").is_file() and not any(inner.is_dir() for inner in held))


def _beside(path: Path) -> Path:
    """Where `replacing` has `path` written."""
    path = Path(path).resolve()
    return path.with_name(f".{path.name}.writing")


@contextmanager
def naming_file(path: str | Path):
    """Names `path` in an OSError that names no file, as that of a full disk does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}; make room there", str(path)) from error


@contextmanager
def replacing(path: str | Path):
    """A new directory beside `path` to write into; it takes the name `path` when the block is left, not before.

    On an exception it is removed, and `path` stays as it was. A process killed inside leaves `.NAME.writing` behind;
    killed between the two renames that replace a directory, the old one as `.NAME.old`.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(path), path.with_name(f".{path.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        with naming_file(path):
            yield new
        for written in (*new.rglob("*"), new):
            _sync(written)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a checkpoint, which no longer bears its name once a part of it is gone."""
    doomed = path.rename(_beside(path))
    shutil.rmtree(doomed)


def recover(directory: Path) -> None:
    """Puts back the checkpoint that a killed process was about to replace, and removes what it left unfinished."""
    for old in directory.glob(".checkpoint-*.old"):
        path = directory / old.name[1:].removesuffix(".old")
        shutil.rmtree(old) if path.exists() else old.rename(path)
    for new in directory.glob(".checkpoint-*.writing"):
        shutil.rmtree(new)


# ---------------------------------------------------------------------------------------------------------------------
# Training state: what it takes to go on, on any number of ranks


def save_training(path: Path, model: LanguageModel, optimizers: list, progress: dict, *, dtype, tokenizer) -> None:
    """Writes a checkpoint that training can be resumed from; called by all ranks, whose `progress` is the same.

    A Hugging Face directory, in it `state`: the float32 weights and the optimizers as torch.distributed.checkpoint
    stores them, sharded or not, and progress.json. It takes its name when all of it is written.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    dcp, rank = _dcp(), dist.get_rank() if dist.is_initialized() else 0
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with replacing(path) if rank == 0 else nullcontext(_beside(path)) as directory:
        if rank == 0:
            write_model(model, directory, dtype=dtype, tokenizer=tokenizer, state_dict=whole)
        del whole
        barrier()
        weights, moments = get_state_dict(model, optimizers)
        try:
            dcp.save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=directory / STATE,
            )
        except dcp.api.CheckpointException as error:  # no Exception; it holds one of each rank that failed
            raise _unwritten(directory / STATE, next(iter(error.failures.values()))[0]) from error
        if rank == 0:
            (directory / STATE / PROGRESS).write_text(json.dumps(progress) + "\n")
        barrier()
    barrier()


def load_training(path: Path, model: LanguageModel, optimizers: list) -> dict:
    """Puts the state of save_training into the model and the optimizers, sharded as they now are; the progress."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    dcp = _dcp()
    weights, moments = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=path / STATE)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        failures = getattr(error, "failures", {0: (error, None)})
        raise ValueError(f"{path} does not fit this run or is damaged: {next(iter(failures.values()))[0]}") from error
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_progress(path)


def read_progress(path: Path) -> dict:
    """The progress that save_training stored; FileNotFoundError where `path` is no checkpoint to resume from."""
    file = path / STATE / PROGRESS
    if not path.is_dir():
        there = ", ".join(sorted(other.name for other in path.parent.glob("checkpoint-*"))) or "no checkpoint"
        raise FileNotFoundError(f"there is no directory {path} to resume from; {path.parent} holds {there}")
    if not (file.is_file() and (path / STATE / ".metadata").is_file()):
        raise FileNotFoundError(f"{path} holds no training state; it can be loaded as a model, but not resumed")
    return json.loads(file.read_text())


def drop_training(path: Path) -> None:
    """Removes the training state from a checkpoint, which remains a model. First what marks it as whole."""
    (path / STATE / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(path / STATE, ignore_errors=True)


def _dcp():
    """torch.distributed.checkpoint; imported late, as it takes a second, and told that one process is no mistake."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    return dcp


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

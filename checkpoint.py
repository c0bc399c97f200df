"""Hugging Face directories in and out: config.json, safetensors, and names resolved to directories.

Parameter names equal Hugging Face names, so nothing is mapped: every tensor that a file holds and every tensor that the
model needs is matched by name and shape, or the file is refused. A save appears whole or not at all.
"""

import json
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import huggingface_hub
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import replacing
from model import FAMILIES, OBJECTIVES, Config, LanguageModel

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # torch's name: safetensors'
DOWNLOADED = ["*.json", "*.safetensors", "*.jinja"]
WRITTEN = ["config.json", "model*.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
WRITTEN += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a config.json of ours declares, unknown to transformers: where a contradicting value comes from.
DECLARED = {"objective": "--objective", "block_length": "--block_size", "right_shift": "--right_shift_logits"}
DECLARED |= {"mask_token_id": "the tokenizer's mask token"}

# What a config.json must have, and its numbers that may be 0.
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["max_position_embeddings", "rms_norm_eps"]
MAY_BE_ZERO = ("mask_token_id", "initializer_range")

# The one value of a field, or of each item of its list, that model.py computes; null means the same.
IMPLEMENTED = {"hidden_act": "silu", "layer_types": "full_attention", "partial_rotary_factor": 1.0}
OFF = ("use_sliding_window", "mlp_bias", "quantization_config", "num_experts", "num_local_experts")
IMPLEMENTED |= dict.fromkeys(OFF, False)
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}  # of its rope_scaling


def resolve(path: str | Path) -> Path:
    """The directory that `path` names: itself, `$BASE_MODELS_DIR/path`, or a Hub id's snapshot, downloaded on need."""
    # A directory here, or among the base models.
    base = os.environ.get("BASE_MODELS_DIR", "")
    for directory in (Path(path).expanduser(), Path(base).expanduser() / path):
        if directory.is_dir():
            return directory
        if directory.exists():
            raise ValueError(f"{directory} is a file; name the checkpoint's directory")

    # The Hub, whose own errors are OSError and ValueError.
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=DOWNLOADED))
    except (OSError, ValueError) as error:
        under = f" (nor one under {base})" if base else ""
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is neither a directory{under} nor a Hub id within reach: {reason}") from error


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def load_config(path: str | Path) -> Config:
    file = resolve(path) / "config.json"
    if not file.is_file():
        # Perhaps a run's directory, whose checkpoints have one.
        found = sorted(inner.parent.name for inner in file.parent.glob("*/config.json"))
        hint = f"did you mean {file.parent / found[-1]}?" if found else "expected a Hugging Face checkpoint's directory"
        raise FileNotFoundError(f"{file.parent} holds no config.json; {hint}")
    try:
        return read_config(json.loads(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_config(raw: dict) -> Config:
    """A Config of config.json's fields, in either dialect; ValueError for what is not implemented."""
    _check_fields(raw)
    theta, scaling = _read_rope(raw)
    if missing := [name for name in REQUIRED if raw.get(name) is None]:
        raise ValueError(f"field missing: {', '.join(missing)}")

    # The fields that Config knows, with transformers' defaults for those that may be left out.
    H = raw["num_attention_heads"]
    defaults = {"num_key_value_heads": H, "head_dim": raw["hidden_size"] // H, "tie_word_embeddings": False}
    known = {field.name for field in fields(Config)} - {"extra"}
    given = defaults | {name: raw[name] for name in known & raw.keys() if raw[name] is not None}
    dtype = (raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    family = raw["model_type"].removeprefix("a2d-")
    given |= {"model_type": family, "dtype": dtype, "rope_theta": theta, "rope_scaling": scaling}

    # All others are written back as they are, but for those that config_dict writes from what Config knows.
    derived = {"architectures", "transformers_version", "torch_dtype", "rope_parameters"}
    config = Config(**given, extra={name: value for name, value in raw.items() if name not in known | derived})

    if config.objective not in (None, *OBJECTIVES):
        raise ValueError(f"objective {config.objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    G, C = config.num_key_value_heads, config.head_dim
    if H % G or C % 2:
        raise ValueError(f"{H} heads of {C} for {G} of keys and values: expected a multiple of that, an even head_dim")
    return config


def _check_fields(raw) -> None:
    """Raises ValueError, naming the field, for a wrong type or a number too small, or for what is not implemented."""
    if not isinstance(raw, dict):
        raise ValueError(f"{json.dumps(raw)[:40]}: expected an object with model_type, hidden_size and so on")

    # Types are those of Config, in which a float may be written as an int.
    for name, hint in (get_type_hints(Config) | {"rope_parameters": dict, "torch_dtype": str}).items():
        value, (kind, *_) = raw.get(name), get_args(hint) or (hint,)
        if value is None:
            continue
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise ValueError(f"{name} {json.dumps(value)[:40]}: expected {kind.__name__}")
        if kind in (int, float) and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
            raise ValueError(f"{name} {value}: expected more")

    # The family comes first, since it explains most of what else may be strange.
    family = raw.get("model_type")
    if family is None or family.removeprefix("a2d-") not in FAMILIES:
        raise ValueError(f"model_type {family!r}: expected {', '.join(FAMILIES)}, or one with a2d- before")
    for name, only in IMPLEMENTED.items():
        values = raw[name] if isinstance(raw.get(name), list) else [raw.get(name)]
        if any(value not in (None, only) for value in values):
            raise ValueError(f"{name} {json.dumps(raw[name])} is not supported")


def _read_rope(raw: dict) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling), as Config has them, of either dialect."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    if set(rope) != {"default": set(), "llama3": LLAMA3}.get(rope_type):
        name = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"
        raise ValueError(f"{name} {json.dumps(raw[name])} is not supported")
    return float(theta), {"rope_type": rope_type, **rope} if rope else None


def is_diffusion(config: Config) -> bool:
    """Whether this is a diffusion checkpoint: by its objective, or where it declares none, by its mask token."""
    return config.mask_token_id is not None if config.objective is None else config.objective != "ar"


def config_dict(config: Config) -> dict:
    """The fields of config.json, in the flat dialect."""
    # The family is dLLM's a2d-* for diffusion, else the plain causal one.
    name, diffusion = config.family.name, is_diffusion(config)
    out = {field.name: getattr(config, field.name) for field in fields(Config) if field.name != "extra"}
    out |= {"architectures": [f"A2D{name}LMHeadModel" if diffusion else f"{name}ForCausalLM"], **config.extra}
    out["model_type"] = f"a2d-{config.model_type}" if diffusion else config.model_type

    # Left out are biases where the family decides, and what is not declared.
    if config.family.qkv_bias is not None:
        del out["attention_bias"]
    return dict(sorted((key, value) for key, value in out.items() if value is not None or key not in DECLARED))


def declare(config: Config, *, objective=None, block_length=None, right_shift=None, mask_token_id=None) -> Config:
    """`config`, with what it does not declare filled in; ValueError where an argument contradicts what it does."""
    # Without anything said it is mdlm, and only ar has a shift.
    objective = objective or config.objective or "mdlm"
    diffusion = objective != "ar"
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")

    # What the checkpoint declares wins, and no argument may differ from it.
    filled = {"objective": objective, "block_length": block_length, "right_shift": right_shift}
    filled["mask_token_id"] = mask_token_id if diffusion else None
    for name, value in filled.items():
        declared = getattr(config, name)
        if None not in (declared, value) and declared != value:
            conflict = f"{DECLARED[name]} {value} contradicts the checkpoint, which declares {name} {declared}"
            raise ValueError(f"{conflict}; leave it at that, or declare it anew with convert.py")
        filled[name] = value if declared is None else declared
    if filled["right_shift"] is None:
        filled["right_shift"] = not diffusion

    # What the objective needs, and what it has no use for.
    shift, K, mask_id = filled["right_shift"], filled["block_length"], filled["mask_token_id"]
    if not diffusion and not shift:
        raise ValueError("--right_shift_logits False: an ar model predicts the next token; leave the flag out")
    if objective == "bd3lm" and (K is None or K < 1):
        raise ValueError(f"--block_size {K}: expected at least 1, bd3lm needs a block length; pass --block_size 32")
    if objective != "bd3lm" and block_length is not None:
        raise ValueError(f"--block_size {block_length}: only bd3lm has a block length, the objective is {objective}")
    if diffusion and mask_id is None:
        raise ValueError(f"{objective} needs a mask token and the checkpoint declares none; run convert.py on it first")
    if diffusion and mask_id >= (rows := config.vocab_size):
        raise ValueError(f"mask token id {mask_id} lies beyond the embedding's {rows} rows; run convert.py first")

    # Nothing is wrong, so that `config` may change.
    for name, value in filled.items():
        setattr(config, name, value)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Stored(NamedTuple):
    """A tensor in a safetensors file, unread."""

    file: Path
    shape: list[int]
    dtype: str  # safetensors' name


def load_model(path: str | Path, *, dtype: torch.dtype | None = None, device="cpu") -> LanguageModel:
    """The model of a directory or a Hub id, in eval mode; dtype None: as stored, which `config.dtype` then names."""
    path = resolve(path)
    config = load_config(path)
    with torch.device("meta"):
        model = LanguageModel(config)

    # Before any weight is read, compare what the files hold with what the model needs.
    expected, stored = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, _contents(path)
    _check_weights(path, config, expected, stored)
    config.dtype = next(name for name, code in DTYPES.items() if code == stored[EMBEDDING].dtype)
    tensors, as_stored = {}, getattr(torch, config.dtype)
    if (dtype or as_stored, torch.device(device).type) == (as_stored, "cpu"):
        # Unconverted, tensors stay in the files' memory maps: a page is read when it is first used.
        for file in {stored[name].file for name in expected}:
            with safe_open(file, "pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in expected if stored[name].file == file}
    else:
        # One by one, each through a map of its own, since what is mapped counts as memory, and the largest first: so
        # the peak is hardly more than the model itself.
        for name in sorted(expected, key=lambda name: -math.prod(expected[name])):
            with safe_open(stored[name].file, "pt") as handle:
                tensors[name] = handle.get_tensor(name).to(device, dtype or as_stored)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _contents(path: Path) -> dict[str, Stored]:
    """The tensors of a directory by name, but for rotary buffers, which older checkpoints have."""
    # They lie in one file, or in shards that an index names.
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files, stored = [single], {}
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{path} holds no {single.name}; expected that or its index and shards")
    if not single.is_file():
        try:
            files = [path / name for name in sorted({*json.loads(index.read_bytes())["weight_map"].values()})]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} names no shards ({error!r}); fetch the model again") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}, which {index.name} names, is missing; fetch the model again")
        try:
            with safe_open(file, "pt") as handle:
                parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                stored |= {name: Stored(file, part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
    return {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_weights(path: Path, config: Config, expected: dict[str, list[int]], stored: dict[str, Stored]) -> None:
    """Raises ValueError unless the stored tensors are those of the model, by name and shape, in a type we know."""
    found = {name: tensor.shape for name, tensor in stored.items()}

    # Where config.json ties head and embedding, a head equal to the embedding may be stored as well.
    if config.tie_word_embeddings and HEAD in found and found[HEAD] == found.get(EMBEDDING):
        with safe_open(stored[HEAD].file, "pt") as a, safe_open(stored[EMBEDDING].file, "pt") as b:
            if not torch.equal(a.get_tensor(HEAD), b.get_tensor(EMBEDDING)):
                raise ValueError(f"{path}: {HEAD} differs from {EMBEDDING}, but config.json says tie_word_embeddings")
        del found[HEAD]

    # Name at most three of the differences.
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    wrong = [name for name in expected.keys() & found.keys() if found[name] != expected[name]]
    problems += [f"{name} is {found[name]}, expected {expected[name]}" for name in wrong]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path}: weights and config.json disagree: {', '.join(sorted(problems)[:3])}{more}")
    if (dtype := stored[EMBEDDING].dtype) not in DTYPES.values():
        raise ValueError(f"{path}: weights of type {dtype}; expected one of {', '.join(DTYPES.values())}")


def save_model(model: LanguageModel, path: str | Path, *, dtype=None, tokenizer=None, state_dict=None) -> None:
    """Writes config.json, the weights and the tokenizer's files, all at once or not at all.

    dtype: a torch.dtype; None: the source's. state_dict: the whole tensors, where the model's own are sharded.
    """
    # Only a checkpoint is replaced, or an empty directory.
    path = Path(path)
    files = [] if not path.exists() else list(path.iterdir()) if path.is_dir() else [path]
    if files and (not (path / "config.json").is_file() or any(file.is_dir() for file in files)):
        raise ValueError(f"{path} exists and is no checkpoint, or holds directories; choose another directory")
    with replacing(path) as directory:
        write_model(model, directory, dtype=dtype, tokenizer=tokenizer, state_dict=state_dict)
        for file in files:  # what is not ours, such as a README.md, stays
            if not any(file.match(pattern) for pattern in WRITTEN):
                shutil.copy2(file, directory, follow_symlinks=False)


def write_model(model: LanguageModel, directory: Path, *, dtype=None, tokenizer=None, state_dict=None) -> None:
    """What save_model describes, into a new directory."""
    dtype = dtype or getattr(torch, model.config.dtype)
    config = replace(model.config, dtype=str(dtype).removeprefix("torch."))
    tensors = model.state_dict() if state_dict is None else state_dict
    config_file = directory / "config.json"
    config_file.write_text(json.dumps(config_dict(config), indent=2) + "\n")

    # Which tensor goes to which file depends on their sizes as they will be stored, which empty tensors have too. Only
    # one file's tensors are converted at a time.
    sizes = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    split = huggingface_hub.split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    for name, shard in split.filename_to_tensors.items():
        file = directory / name
        part = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in shard}
        try:
            save_file(part, file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, say
            raise cannot_write(file, error) from error
        file.chmod(config_file.stat().st_mode)  # safetensors makes it private
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(directory, mask=is_diffusion(config))


def cannot_write(path: Path, error: BaseException) -> OSError:
    """An error that names the free space, since what a library says of a full disk may not."""
    free = shutil.disk_usage(path.parents[1]).free / 1e9  # the parent is gone where another rank was first
    return OSError(f"cannot write {path}: {error}; {free:.2f} GB are free there")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

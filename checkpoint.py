"""Hugging Face directories in and out: config.json, safetensors, and names resolved to directories.

Parameter names equal Hugging Face names, so nothing is mapped: every tensor that a file holds and every tensor that the
model needs is matched by name and shape, or the file is refused. A save appears whole or not at all.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import huggingface_hub
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lora
from files import read_json, replacing, resolve
from model import CONTEXTS, FAMILIES, OBJECTIVES, Config, LanguageModel
from tokenizer import GENERATION, Tokenizer, read_files

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # torch's name: safetensors'
WRITTEN = ["config.json", "model*.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
WRITTEN += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
WRITTEN += [lora.ADAPTER, lora.WEIGHTS]
SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What a config.json of ours declares, unknown to transformers: where a contradicting value comes from.
DECLARED = {"objective": "--objective", "block_length": "--block_size", "right_shift": "--right_shift_logits"}
DECLARED |= {"mask_token_id": "the tokenizer's mask token", "context": "--context"}
UNSTORED = ("extra", "reason", "assumed", "answer_length", "adapter")  # fields of Config that config.json has not

# What is known of published checkpoints that declare no objective, by a part of their names; and by the architecture.
KNOWN = {
    "-diffusion-bd3lm": {"objective": "bd3lm", "block_length": 32, "right_shift": False},
    "-diffusion-mdlm": {"objective": "mdlm", "right_shift": False},
    "open-dcoder": {"objective": "mdlm", "right_shift": True},
}
PLAIN = "a plain causal model"
CONVERTED = "by default, as it declares a mask token and no objective"
UNKNOWN = "the checkpoint declares no objective; add --objective mdlm, or bd3lm with --block_size, or ar"

# What a config.json must have, and the range of its numbers.
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["max_position_embeddings", "rms_norm_eps"]
SIZE, POSITION, POSITIVE = (1, 2**24), (1, 2**31), (1e-20, 1e20)
RANGES = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), SIZE)
RANGES |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), (1, 1024))
RANGES |= dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "block_length"), POSITION)
RANGES |= dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), POSITIVE)
RANGES |= {"rms_norm_eps": (1e-20, 1), "initializer_range": (0, 1e3), "mask_token_id": (0, 2**24)}

# The one value of a field, or of each item of its list, that model.py computes; null means the same.
IMPLEMENTED = {"hidden_act": "silu", "layer_types": "full_attention", "partial_rotary_factor": 1.0}
OFF = ("use_sliding_window", "mlp_bias", "quantization_config", "num_experts", "num_local_experts")
IMPLEMENTED |= dict.fromkeys(OFF, False)
LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}  # of its rope_scaling
HINTS = {name: hint for name, hint in get_type_hints(Config).items() if name not in UNSTORED}


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def load_config(path: str | Path) -> Config:
    """The Config of a directory or a Hub id, with what is known of a checkpoint that declares no objective."""
    path = resolve(path)
    file = path / "config.json"
    if not file.is_file():
        # Perhaps a run's directory, whose checkpoints have one.
        found = sorted(inner.parent.name for inner in file.parent.glob("*/config.json"))
        hint = f"did you mean {file.parent / found[-1]}?" if found else "expected a Hugging Face checkpoint's directory"
        raise FileNotFoundError(f"{file.parent} holds no config.json; {hint}")
    raw = read_json(file)
    try:
        config = read_config(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    _assume(config, path, raw)
    config.adapter = lora.read(path)

    # mdlm's answer fills a canvas, which should be no longer than in training.
    if config.objective == "mdlm" and "objective" in raw and (path / GENERATION).is_file():
        longest = read_json(path / GENERATION).get("max_new_tokens")
        if longest is not None and not (type(longest) is int and 0 < longest < POSITION[1]):
            raise ValueError(f"{path / GENERATION}: max_new_tokens {json.dumps(longest)[:40]}: expected at least 1")
        config.answer_length = longest
    return config


def _assume(config: Config, path: Path, raw: dict) -> None:
    """Fills in what `config` does not declare and the checkpoint's name or architecture tells, and says why."""
    if config.objective is not None:
        return
    # The name of a Hub id's snapshot, or a link's target, is another than the path's last part.
    paths = path.absolute(), path.resolve()
    names = [(each.parents[1] if each.parent.name == "snapshots" else each).name.lower() for each in paths]
    known = next((found for part, found in KNOWN.items() if any(part in name for name in names)), {})
    diffusion = "A2D" in json.dumps(raw.get("architectures")) or raw["model_type"].startswith("a2d-")
    config.reason = "known by name" if known else CONVERTED if diffusion and config.mask_token_id is not None else ""

    # Where the name says nothing: causal is what has no mask token.
    if known and config.mask_token_id is None and (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer(path)
        known = known | ({} if tokenizer.mask_added else {"mask_token_id": tokenizer.mask_id})
    elif not (known or diffusion or config.mask_token_id is not None or "mask_token" in read_files(path)[2]):
        known, config.reason = {"objective": "ar"}, PLAIN
    for name, value in known.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
            config.assumed += (name,)


def read_config(raw: dict) -> Config:
    """A Config of config.json's fields, in either dialect; ValueError for what is not implemented."""
    _check_fields(raw)
    theta, scaling = _read_rope(raw)
    if missing := [name for name in REQUIRED if raw.get(name) is None]:
        raise ValueError(f"field missing: {', '.join(missing)}")

    # The fields that Config knows, with transformers' defaults for those that may be left out.
    H = raw["num_attention_heads"]
    defaults = {"num_key_value_heads": H, "head_dim": raw["hidden_size"] // H, "tie_word_embeddings": False}
    given = defaults | {name: raw[name] for name in HINTS.keys() & raw.keys() if raw[name] is not None}
    dtype = (raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    family = raw["model_type"].removeprefix("a2d-")
    given |= {"model_type": family, "dtype": dtype, "rope_theta": theta, "rope_scaling": scaling}

    # All others are written back as they are, but for those that config_dict writes from what Config knows.
    derived = {"architectures", "transformers_version", "torch_dtype", "rope_parameters"}
    config = Config(**given, extra={name: value for name, value in raw.items() if name not in HINTS.keys() | derived})

    for name, known in (("objective", OBJECTIVES), ("context", CONTEXTS)):
        if getattr(config, name) not in (None, *known):
            raise ValueError(f"{name} {getattr(config, name)!r}: expected one of {', '.join(known)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    G, C = config.num_key_value_heads, config.head_dim
    if H % G or C % 2 or not C:
        raise ValueError(f"{H} heads of {C} for {G} of keys and values: expected a multiple of that, an even head_dim")
    return config


def _check_fields(raw) -> None:
    """Raises ValueError, naming the field, for a wrong type or a number too small, or for what is not implemented."""
    if not isinstance(raw, dict):
        raise ValueError(f"{json.dumps(raw)[:40]}: expected an object with model_type, hidden_size and so on")

    # Types are those of Config, in which a float may be written as an int.
    for name, hint in (HINTS | {"rope_parameters": dict, "torch_dtype": str}).items():
        value, (kind, *_) = raw.get(name), get_args(hint) or (hint,)
        if value is None:
            continue
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise ValueError(f"{name} {json.dumps(value)[:40]}: expected {kind.__name__}")
        if kind in (int, float):
            _check_range(name, value)

    # The family comes first, since it explains most of what else may be strange.
    family = raw.get("model_type")
    if family is None or family.removeprefix("a2d-") not in FAMILIES:
        raise ValueError(f"model_type {family!r}: expected {', '.join(FAMILIES)}, or one with a2d- before")
    for name, only in IMPLEMENTED.items():
        values = raw[name] if isinstance(raw.get(name), list) else [raw.get(name)]
        if any(value not in (None, only) for value in values):
            raise ValueError(f"{name} {json.dumps(raw[name])} is not supported")


def _check_range(name: str, value) -> None:
    """Raises ValueError, naming the field, unless `value` is a number in its range; NaN is in none."""
    least, most = RANGES[name]
    if type(value) not in (int, float) or not least <= value <= most:
        wanted = "less" if type(value) in (int, float) and value > most else "more"
        raise ValueError(f"{name} {json.dumps(value)[:40]}: expected {wanted}, a number from {least} to {most}")


def _read_rope(raw: dict) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling), as Config has them, of either dialect."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    _check_range("rope_theta", theta)
    if set(rope) != {"default": set(), "llama3": LLAMA3}.get(str(rope_type)):
        name = "rope_parameters" if "rope_parameters" in raw else "rope_scaling"
        raise ValueError(f"{name} {json.dumps(raw[name])} is not supported")
    for name, value in rope.items():
        _check_range(name, value)
    if rope and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"low_freq_factor {rope['low_freq_factor']}: expected less than high_freq_factor")
    return float(theta), {"rope_type": rope_type, **rope} if rope else None


def is_diffusion(config: Config) -> bool:
    """Whether this is a diffusion checkpoint: by its objective, or where it declares none, by its mask token."""
    if config.objective is None:
        return config.mask_token_id is not None or not config.reason
    return config.objective != "ar"


def config_dict(config: Config) -> dict:
    """The fields of config.json, in the flat dialect."""
    # The family is dLLM's a2d-* for diffusion, else the plain causal one.
    name, diffusion = config.family.name, is_diffusion(config)
    out = {name: getattr(config, name) for name in HINTS}
    out |= {"architectures": [f"A2D{name}LMHeadModel" if diffusion else f"{name}ForCausalLM"], **config.extra}
    out["model_type"] = f"a2d-{config.model_type}" if diffusion else config.model_type

    # Left out are biases where the family decides, and what is not declared.
    if config.family.qkv_bias is not None:
        del out["attention_bias"]
    return dict(sorted((key, value) for key, value in out.items() if value is not None or key not in DECLARED))


def identify(config: Config, objective: str | None = None) -> tuple[str, str]:
    """(objective, why): `objective` if given, else what the checkpoint declares, else what is known of it; ValueError
    where nothing says what it is."""
    if objective not in (None, config.objective):
        return objective, "by --objective"
    if not config.reason:
        raise ValueError(UNKNOWN)
    return config.objective or "mdlm", config.reason


def declare(
    config: Config, *, objective=None, block_length=None, right_shift=None, mask_token_id=None, context=None
) -> Config:
    """`config`, with what it does not declare filled in; ValueError where an argument contradicts what it does. With
    causal context a checkpoint is an ar model, too, and of any block length."""
    objective, reason = identify(config, objective)
    diffusion = objective != "ar"
    if objective not in OBJECTIVES:
        raise ValueError(f"--objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")

    # What the checkpoint declares wins, and no argument may differ from it.
    filled = {"objective": objective, "block_length": block_length, "right_shift": right_shift}
    filled |= {"mask_token_id": mask_token_id if diffusion else None, "context": context}
    free = {"block_length", *(["objective"] if objective == "ar" else [])} if config.context == "causal" else set()
    for name, value in filled.items():
        # What is only assumed gives way to the arguments, and goes with the objective that it was assumed with.
        declared, stands = getattr(config, name), objective == config.objective or name == "mask_token_id"
        if (name in config.assumed and not (stands and value is None)) or (name in free and value is not None):
            declared = None
        if name == "context" and declared is None and config.objective == "bd3lm":
            declared = "block"
        if None not in (declared, value) and declared != value:
            conflict = f"{DECLARED[name]} {value} contradicts the checkpoint, which declares {name} {declared}"
            raise ValueError(f"{conflict}; leave it at that, or declare it anew with convert.py")
        filled[name] = value if declared is None else declared
    if filled["right_shift"] is None:
        filled["right_shift"] = not diffusion

    # What the objective needs, and what it has no use for.
    shift, K, mask_id = filled["right_shift"], filled["block_length"], filled["mask_token_id"]
    if not diffusion and not shift and not free:
        raise ValueError("--right_shift_logits False: an ar model predicts the next token; leave the flag out")
    if objective == "bd3lm" and (K is None or K < 1):
        raise ValueError(f"--block_size {K}: expected at least 1, bd3lm needs a block length; pass --block_size 32")
    if objective != "bd3lm" and block_length is not None:
        raise ValueError(f"--block_size {block_length}: only bd3lm has a block length, the objective is {objective}")
    if objective != "bd3lm" and context is not None:
        raise ValueError(f"--context {context}: only bd3lm has a context, the objective is {objective}")
    if diffusion and mask_id is None:
        raise ValueError(f"{objective} needs a mask token and the checkpoint declares none; run convert.py on it first")
    if diffusion and mask_id >= (rows := config.vocab_size):
        raise ValueError(f"mask token id {mask_id} lies beyond the embedding's {rows} rows; run convert.py first")

    # Nothing is wrong, so that `config` may change.
    if objective == "bd3lm":
        filled["context"] = filled["context"] or "block"
    for name, value in filled.items():
        setattr(config, name, value)
    config.reason, config.assumed = reason, ()
    return config


def about(name: str, config: Config) -> str:
    """One line: what the checkpoint of this name was declared or taken to be, and why."""
    blocks = f", block length {config.block_length}" if config.objective == "bd3lm" else ""
    blocks += ", causal context" if config.context == "causal" else ""
    shift = ", right shift" if config.right_shift and config.objective != "ar" else ""
    answers = "" if config.answer_length is None else f", trained on answers of up to {config.answer_length} tokens"
    context = f"context {config.max_position_embeddings}{answers}"
    return f"{name}: {config.objective}{blocks}{shift} ({config.reason}), {context}"


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Stored(NamedTuple):
    """A tensor in a safetensors file, unread."""

    file: Path
    shape: list[int]
    dtype: str  # safetensors' name


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AVX512_BF16 or AMX)."""
    known = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return any(supported() for supported in known)


def load_model(path: str | Path, *, dtype=None, device="cpu", config: Config | None = None) -> LanguageModel:
    """The model of a directory or a Hub id, in eval mode; dtype (a torch.dtype) None: as stored, which
    `config.dtype` then names. config: `load_config`'s, where it has been read. An adapter is merged into its base."""
    path = adapter = resolve(path)
    config = config or load_config(path)
    if config.adapter is not None:
        path = _base(adapter, config.adapter["base_model_name_or_path"])
    stored = _contents(path)
    if (L := config.num_hidden_layers) > len(stored):
        raise ValueError(f"{path}: weights and config.json disagree: {len(stored)} tensors for num_hidden_layers {L}")
    with torch.device("meta"):
        model = LanguageModel(config)

    # Before any weight is read, compare what the files hold with what the model needs.
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
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
    if config.adapter is not None:
        lora.merge(model, adapter)
    return model.eval()


def _base(adapter: Path, name: str) -> Path:
    """The directory of the model that an adapter belongs to."""
    try:
        return resolve(name)
    except (FileNotFoundError, ValueError) as error:
        place = f"base_model_name_or_path in {adapter / lora.ADAPTER}"
        raise FileNotFoundError(f"{error}; put it there, or name another in {place}") from error


def _contents(path: Path) -> dict[str, Stored]:
    """The tensors of a directory by name, but for rotary buffers, which older checkpoints have."""
    # They lie in one file, or in shards that an index names.
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    files, stored = [single], {}
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{path} holds no {single.name}; expected that or its index and shards")
    if not single.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{index} names no shards, its weight_map is {shards!r:.40}; fetch the model again")
        # Plain names alone, so that what is loaded lies in the directory.
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{index} names the shard {name!r:.60}; expected a file's name, without a directory")
        files = [path / name for name in sorted({*shards.values()})]
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
    for name in expected:
        if (dtype := stored[name].dtype) not in DTYPES.values():
            raise ValueError(f"{path}: {name} is of type {dtype}; expected one of {', '.join(DTYPES.values())}")


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
    tensors, name = lora.stored(tensors, config), "model{suffix}.safetensors"
    if config.adapter is not None:  # config.json stays that of the base, which is not float32 perhaps
        config, dtype, name = model.config, torch.promote_types(dtype, torch.float32), lora.WEIGHTS
        (directory / lora.ADAPTER).write_text(json.dumps(config.adapter, indent=2) + "\n")
    config_file = directory / "config.json"
    config_file.write_text(json.dumps(config_dict(config), indent=2) + "\n")

    # Which tensor goes to which file depends on their sizes as they will be stored, which empty tensors have too. Only
    # one file's tensors are converted at a time.
    sizes = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    how = {"filename_pattern": name, "max_shard_size": SHARD_BYTES}
    split = huggingface_hub.split_torch_state_dict_into_shards(sizes, **how)
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
        tokenizer.save(directory, mask=is_diffusion(config), answer_length=config.answer_length)


def cannot_write(path: Path, error: BaseException) -> OSError:
    """An error that names the free space, since what a library says of a full disk may not."""
    free = shutil.disk_usage(path.parents[1]).free / 1e9  # the parent is gone where another rank was first
    return OSError(f"cannot write {path}: {error}; {free:.2f} GB are free there")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

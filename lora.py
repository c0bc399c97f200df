"""LoRA (arXiv 2106.09685): the weights stay as they are, and beside each projection a thin product of two is trained.

    Adapting                the flags
    Dropout                 which inputs the products do not see, by hash
    LoRALinear, Embedding   a projection with its product; an embedding of which the mask token's row alone is trained
    adapt                   puts these into a model that is to be trained
    stored, read, merge     what a save writes, in PEFT's format; an adapter's directory read, and put into its base

A run on an adapter is this file; everywhere else an adapter is merged when it is loaded, and then a model as any other.
"""

import argparse
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from files import read_json, resolve
from model import Config, LanguageModel, Linear
from options import Count, Decay, Options, flags, nearest

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's names: what it puts before ours, and the trained rows of an embedding, which are whole rows in spite of theirs.
PREFIX, ROW = "base_model.model.", "model.embed_tokens.token_adapter.trainable_tokens_delta"
# Of its options those that would change what is computed, so that they are refused where an adapter sets them.
UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


def projections(text: str) -> str:
    for name in text.split(","):
        if name not in ("all-linear", *PROJECTIONS):
            known = nearest(name, PROJECTIONS, f"expected all-linear, or some of {', '.join(PROJECTIONS)}")
            raise argparse.ArgumentTypeError(f"{name!r} is no projection; {known}")
    return text


@dataclass(kw_only=True)
class Adapting(Options):
    "LoRA, and what is not trained"

    lora: bool = False
    """train, in the weights' place, a product of two thin matrices beside each projection, and the mask token's row of
    the embedding; checkpoints are then adapters in PEFT's format, which name --model_name_or_path as their base"""
    r: Count = 32  # LoRA's rank: rows of the first matrix, columns of the second
    lora_alpha: Count = 64  # a product counts lora_alpha / r times
    lora_dropout: Annotated[Decay, "PART"] = 0.05  # part of its inputs that a product does not see in training
    target_modules: Annotated[str, projections, "all-linear|NAME,NAME,..."] = "all-linear"
    """projections that get a product: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all of them"""
    freeze_embeddings: bool = False
    """do not train the embedding and the head, but for the mask token's row (with --lora they never are)"""

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Self:
        """The options of a command line; ValueError for those that mean nothing with the others."""
        args = super().parse(argv)
        for name in sorted(args.given & flags(Adapting).keys() - {"lora", "freeze_embeddings"}):
            if not args.lora:
                raise ValueError(f"--{name} {getattr(args, name)}: only LoRA has it; add --lora, or leave it out")
        if args.lora and args.model_name_or_path.startswith("builtin/"):
            raise ValueError(f"--lora: an adapter names its base, and {args.model_name_or_path} is none; name a model")
        if args.lora and args.push_to_hub and Path(args.model_name_or_path).expanduser().is_dir():
            base, way_out = args.model_name_or_path, "push what convert.py --merge makes of it instead"
            raise ValueError(f"--push_to_hub: the adapter would name {base} as its base, which only is here; {way_out}")
        if args.lora and args.optim == "muon":
            raise ValueError("--optim muon with --lora: its step is one for whole matrices, not for factors; use adamw")
        if args.lora and args.save_dtype:
            raise ValueError(f"--save_dtype {args.save_dtype}: an adapter is float32; give it to convert.py --merge")
        return args


# ---------------------------------------------------------------------------------------------------------------------
# What a model has of it in training


def mixed(x: Tensor) -> Tensor:
    """int32 numbers, hashed: each bit depends on all of theirs (the last steps of MurmurHash3)."""
    x = (x ^ (x >> 16 & 0xFFFF)) * -2048144789
    x = (x ^ (x >> 13 & 0x7FFFF)) * -1028477387
    return x ^ (x >> 16 & 0xFFFF)


class Dropout:
    """Drops a part of the inputs, by a hash of the step, the row, the token's place in it, the projection and the
    feature: so any number of processes, a resumed run and a layer that is computed again drop the same."""

    def __init__(self, part: float, seed: int):
        self.part, self.seed, self.step = part, seed % 2**31, 0
        self.tokens = self.chosen = None  # of the batch under way: (B, T) int32, and (N,) of the last layer's

    def begin(self, model: LanguageModel, inputs: tuple, options: dict) -> None:
        """Called before each forward. A row is known by its clean tokens: what pads these, or stands in the place of
        noisy ones that are not needed, depends on the rows beside it."""
        tokens, layout = inputs
        place = torch.zeros_like(tokens, dtype=torch.int32)
        for field in (layout.document, layout.position, layout.noisy):
            place = mixed(place + field.int())
        known = mixed(place + tokens.int()) * ((layout.document >= 0) & (layout.noisy == 0))  # (B, T)
        row = mixed(mixed(known.sum(dim=1, dtype=torch.int32) ^ self.seed) + self.step)  # (B,)
        self.tokens = mixed(place ^ row[:, None])
        self.chosen = self.tokens if options.get("index") is None else self.tokens.flatten()[options["index"]]

    def __call__(self, x: Tensor, number: int) -> Tensor:
        """x (B, T, F) or, where the last layer computes what is asked for alone, (N, F). number: the projection's."""
        if not self.part:
            return x
        features = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        drawn = mixed((self.tokens if x.ndim == 3 else self.chosen)[..., None] ^ mixed(features + (number << 16)))
        return x.masked_fill(drawn < int(self.part * 2**32) - 2**31, 0) / (1 - self.part)


class LoRALinear(Linear):
    """A projection whose weights are those of `base`, and stay as they are, with the product that is trained."""

    def __init__(self, base: Linear, number: int, args: Adapting, dropout: Dropout, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.number, self.dropout, self.scale = number, dropout, args.lora_alpha / args.r
        self.lora_A = Linear(base.in_features, args.r, bias=False, dtype=base.weight.dtype)
        self.lora_B = Linear(args.r, base.out_features, bias=False, dtype=base.weight.dtype)

        # As PEFT begins: the product is 0, and so the model the one it was.
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        seen = self.dropout(x, self.number) if self.training else x
        return super().forward(x, onto) + self.scale * self.lora_B(self.lora_A(seen))


class Embedding(nn.Module):
    """An embedding of which one token's row alone is trained."""

    def __init__(self, table: nn.Parameter, token: int):
        super().__init__()
        self.table, self.token = table, token
        self.row = nn.Parameter(table.data[token : token + 1].clone())  # (1, D)

    @property
    def weight(self) -> Tensor:
        """(V, D), of a head that is tied to it. It has no gradient: no target is ever the mask token."""
        if hasattr(self.table, "to_local"):  # sharded outside `forward`, where only its dtype and device are looked at
            return self.table
        return replaced(self.table, self.row, self.token).detach()

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.where((tokens == self.token)[..., None], self.row, F.embedding(tokens, self.table))


def replaced(table: Tensor, row: Tensor, token: int) -> Tensor:
    """`table` (V, D) with another row (1, D) for a token."""
    return torch.cat([table[:token], row.to(table), table[token + 1 :]])


def adapt(model: LanguageModel, args: Adapting, name: str, seed: int) -> LanguageModel:
    """`model`, of that name, in which from now on only what `args` say is trained; ValueError where an adapter would
    have no base. seed: of the products' first matrices, and of what they do not see."""
    if not (args.lora or args.freeze_embeddings):
        return model
    config, embedding = model.config, model.model.embed_tokens
    for parameter in model.parameters() if args.lora else (embedding.weight, model.head_weight):
        parameter.requires_grad_(False)
    token = None if config.objective == "ar" else config.mask_token_id
    if token is not None:
        model.model.embed_tokens = Embedding(embedding.weight, token)
    if not args.lora:
        return model

    # What the adapter will declare, in PEFT's words; a directory is found from anywhere.
    if (resolve(name) / ADAPTER).is_file():
        raise ValueError(f"{name} is an adapter, and --lora needs a base: merge it first, by convert.py --merge {name}")
    names = PROJECTIONS if "all-linear" in args.target_modules else args.target_modules.split(",")
    config.adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": args.r, "lora_alpha": args.lora_alpha}
    config.adapter |= {"lora_dropout": args.lora_dropout, "target_modules": sorted({*names}), "bias": "none"}
    local = Path(name).expanduser()
    config.adapter["base_model_name_or_path"] = str(local.absolute()) if local.is_dir() else name
    if token is not None:
        config.adapter["trainable_token_indices"] = {"embed_tokens": [token]}

    model.dropout, generator = Dropout(args.lora_dropout, seed), torch.Generator().manual_seed(seed)
    model.register_forward_pre_hook(model.dropout.begin, with_kwargs=True)
    blocks = [block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)]
    places = [(block, name) for block in blocks for name in PROJECTIONS if name in names and hasattr(block, name)]
    for number, (block, name) in enumerate(places):
        setattr(block, name, LoRALinear(getattr(block, name), number, args, model.dropout, generator))
    return model


def begin_step(model: LanguageModel, step: int) -> None:
    """At each step other inputs are dropped."""
    if model.config.adapter is not None:
        model.dropout.step = step


def digest(model: LanguageModel) -> str | None:
    """A hash of what is not trained, of each matrix some thousand numbers; None where all is."""
    found = hashlib.blake2b(digest_size=8)
    frozen = [parameter.data.flatten() for parameter in model.parameters() if not parameter.requires_grad]
    for numbers in frozen:
        found.update(numbers[:: 1 + len(numbers) // 4096].contiguous().view(torch.uint8).numpy())
    return found.hexdigest() if frozen else None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def stored(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What a save writes of a model's tensors, by its names there: of an adapter what was trained, under PEFT's; else
    all, the trained row in its place."""
    rest = dict(tensors)
    table, row = (rest.pop(f"model.embed_tokens.{name}", None) for name in ("table", "row"))
    if config.adapter is not None:
        rest = {PREFIX + name: tensor for name, tensor in rest.items() if ".lora_" in name}
        return rest if row is None else rest | {PREFIX + ROW: row}
    if row is not None:
        rest["model.embed_tokens.weight"] = replaced(table, row, config.mask_token_id)
    return rest


def read(directory: Path) -> dict | None:
    """The adapter_config.json of a directory, or None where there is none; ValueError for what is not implemented."""
    file = directory / ADAPTER
    if not file.is_file():
        return None
    adapter = read_json(file)
    form = dict.fromkeys(UNSUPPORTED, r"null|false|\{\}|\[\]") | {"peft_type": '"LORA"', "r": "[1-9][0-9]{0,5}"}
    form |= {"lora_alpha": r"[0-9.]{1,12}", "base_model_name_or_path": '".+"'}
    form["trainable_token_indices"] = r'null|\{"embed_tokens": \[[0-9]+\]\}'
    form["init_lora_weights"] = 'null|true|false|"gaussian"|"eva"|"orthogonal"'  # others, as pissa, change the base
    for name, pattern in form.items():
        if not re.fullmatch(pattern, value := json.dumps(adapter.get(name))):
            raise ValueError(f"{file}: {name} {value:.60} is not supported; expected LoRA as train.py --lora writes it")
    return adapter


def merge(model: LanguageModel, directory: Path) -> None:
    """Adds the products of the adapter in `directory` to the weights of its base, `model`, which then has none."""
    adapter, file = model.config.adapter, directory / WEIGHTS
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is missing, truncated or no safetensors file ({error}); fetch it again") from error
    try:
        if adapter.get("trainable_token_indices"):
            (token,), table = adapter["trainable_token_indices"]["embed_tokens"], model.model.embed_tokens.weight
            if token not in range(len(table)):
                raise KeyError(token)
            table.data = replaced(table.data, tensors.pop(ROW), token)

        # Computed in float32 at least, and rounded once.
        for name, module in model.named_modules():
            if name.endswith(PROJECTIONS) and f"{name}.lora_A.weight" in tensors:
                thin, weight = [tensors.pop(f"{name}.lora_{letter}.weight") for letter in "BA"], module.weight
                wide = torch.promote_types(weight.dtype, torch.float32)
                B, A = (matrix.to(weight.device, wide) for matrix in thin)
                if A.shape[:1] != (adapter["r"],):
                    raise KeyError(f"{name}.lora_A")
                scale = adapter["lora_alpha"] / adapter["r"]
                weight.data = torch.addmm(weight.data.to(wide), B, A, alpha=scale).to(weight.dtype)
        if tensors:
            raise KeyError(min(tensors))
    except (KeyError, RuntimeError) as error:
        base = adapter["base_model_name_or_path"]
        raise ValueError(f"{file} and {ADAPTER} do not fit each other or {base}: {error}; fetch them again") from error
    model.config.adapter = None

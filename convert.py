"""An autoregressive checkpoint in, a diffusion checkpoint out, and back. `python convert.py --help` is the manual."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch

from checkpoint import EMBEDDING, HEAD, load_config, load_model, resolve, save_model
from cli import one_line_errors
from display import printable
from files import check_directory
from model import OBJECTIVES, Config, LanguageModel
from options import Directory, Model, Options, Seed
from tokenizer import Tokenizer


@dataclass(kw_only=True)
class Paths(Options):
    "from where, to where"

    model_name_or_path: Model  # source: a directory (also under $BASE_MODELS_DIR) or a Hub id
    output_dir: Directory  # directory to write; it appears when it is complete, not before
    overwrite: bool = False
    """replace the checkpoint in --output_dir (default: False, a non-empty directory is an error)"""


@dataclass(kw_only=True)
class Declarations(Options):
    "what the new checkpoint declares"

    to: Literal["diffusion", "ar"] = "diffusion"
    """ar: a plain causal checkpoint with the same weights, for transformers"""
    objective: Literal[*OBJECTIVES[1:]] | None = None  # declare this objective (default: what the source declares)
    block_size: Annotated[int, "TOKENS"] | None = None
    """declare this block length; for bd3lm, which needs one (default: what the source declares)"""
    right_shift_logits: bool | None = None
    """declare whether position i predicts token i + 1, as in the AR model (default: what the source declares)"""


@dataclass(kw_only=True)
class Weights(Options):
    "weights and the mask token"

    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the saved weights (default: the source's)"""
    random_init: bool = False
    """random weights, N(0, initializer_range), in the source's shape, whose weights are not read"""
    seed: Seed = 42  # of the random weights
    mask_token: Annotated[str, "TOKEN"] | None = None
    """use this token of the vocabulary as the mask, such as Llama's <|reserved_special_token_0|> (default: the
    tokenizer's mask token, else <|mask|>, added; where the vocabulary is full the embedding grows to the next multiple
    of 64 rows)"""
    mask_init: Literal["mean", "keep"] = "mean"
    """embedding of a mask token that no training has used as one. mean (recommended): start from the average embedding
    at normal length, so that the first steps are stable. keep: leave it. Rows added to the embedding are always set"""


@dataclass(kw_only=True)
class Convert(Paths, Declarations, Weights):
    """Turn an autoregressive Qwen3, Qwen2, Qwen2.5 or Llama checkpoint into a diffusion checkpoint, or back.

    The weights stay what they are: a diffusion checkpoint is the same network with a mask token and a config.json that
    declares what it is (model_type a2d-qwen3, a2d-qwen2 or a2d-llama, as dLLM writes it). Without --objective one
    conversion serves for training either mdlm or bd3lm. A checkpoint converted before can be converted again, to
    declare something else or to go back to a plain causal checkpoint (--to ar)."""

    prog: ClassVar[str] = "convert.py"


def redeclare(config: Config, args: Convert, mask_id: int) -> None:
    """Writes into `config` what the new checkpoint declares."""
    # Nothing, where it is to be a plain causal one.
    if args.to == "ar":
        for flag in ("objective", "block_size", "right_shift_logits", "mask_token"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} {getattr(args, flag)} means nothing with --to ar; leave it out")
        config.objective = config.block_length = config.right_shift = config.mask_token_id = None
        return

    # What the source declares stays, unless a flag declares otherwise; but an AR objective goes, and its shift with it.
    if config.objective == "ar":
        config.objective = config.right_shift = None
    config.mask_token_id = mask_id
    config.objective = args.objective or config.objective
    if args.right_shift_logits is not None:
        config.right_shift = args.right_shift_logits

    # A block length goes with bd3lm, and only with it.
    K = config.block_length if args.block_size is None else args.block_size
    if config.objective == "bd3lm" and (K is None or K < 1):
        raise ValueError(f"--block_size {K}: bd3lm needs one of at least 1, 32 say")
    if config.objective != "bd3lm" and args.block_size is not None:
        raise ValueError(f"--block_size {K}: only bd3lm declares one; add --objective bd3lm")
    config.block_length = K if config.objective == "bd3lm" else None


def prepare_mask(tensors: dict, config: Config, tokenizer: Tokenizer, *, untrained: bool, init: str) -> str:
    """Gives the mask token a usable row in the embedding, and in the head if there is one; returns what it did."""
    mask_id, rows = tokenizer.mask_id, config.vocab_size
    if mask_id < rows and not (untrained and init == "mean"):
        return "untrained, kept" if untrained else "kept"

    # The mean of the rows that stand for a token: an embedding may have more, which nothing trains.
    trained = torch.tensor(sorted(i for i in tokenizer.ids if i < rows and i != mask_id))
    config.vocab_size = rows if mask_id < rows else (mask_id // 64 + 1) * 64
    for name in tensors.keys() & {EMBEDDING, HEAD}:
        # At their median norm. The mean itself is far shorter, and a row's gradient grows with 1 / norm: on a random
        # model (hidden 256, 6 layers) with everything masked, a row of 0.01 times the median norm gave a gradient of
        # norm 64, one of the median norm 1.2.
        known = tensors[name][trained]  # (N, D)
        mean = known.mean(0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(known, dim=1, dtype=torch.float32).median()
        row = (mean * (norm / mean.norm())).to(known.dtype)

        # All new rows get it, or the one there is.
        if mask_id >= rows:
            tensors[name] = torch.cat([tensors[name], row.expand(config.vocab_size - rows, -1)])
        tensors[name][mask_id] = row
    return "set to the scaled mean row" if mask_id < rows else "and the other new ones set to the scaled mean row"


def convert(args: Convert) -> dict[str, str]:
    """Writes the new checkpoint; returns what was done."""
    # Whatever is wrong with the options shows before the weights are read.
    output = Path(args.output_dir)
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(f"--output_dir {output} is not empty; choose another or pass --overwrite")
    if not output.exists():
        check_directory("--output_dir", output)
    source = resolve(args.model_name_or_path)
    tokenizer = Tokenizer(source, args.mask_token)

    # The weights: random ones, or the source's.
    model = LanguageModel(load_config(source)) if args.random_init else load_model(source)
    if args.random_init:
        model.init_weights(torch.Generator().manual_seed(args.seed))
    config, tensors = model.config, model.state_dict()
    tokenizer.fit(config.vocab_size, mask=False)
    stored, rows = config.dtype, config.vocab_size

    # What changes: the config's declarations, and the mask token's row.
    redeclare(config, args, tokenizer.mask_id)
    mask = "none declared"
    if args.to == "diffusion":
        untrained = tokenizer.mask_untrained and not args.random_init
        done = prepare_mask(tensors, config, tokenizer, untrained=untrained, init=args.mask_init)
        mask = f"{tokenizer.mask_token}, id {tokenizer.mask_id}; its row {done}"
    dtype = args.save_dtype or stored
    save_model(model, output, dtype=getattr(torch, dtype), tokenizer=tokenizer, state_dict=tensors)
    return {
        "family": config.model_type,
        "objective": config.objective or f"{args.to}, none declared",
        "mask token": mask,
        "embedding rows": str(rows) if config.vocab_size == rows else f"{rows} -> {config.vocab_size}",
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        "dtype": stored if dtype == stored else f"{stored} -> {dtype}",
        "written": str(output),
    }


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("convert.py"):
        for what, value in convert(Convert.parse(argv)).items():
            print(printable(f"{what:<15} {value}"))


if __name__ == "__main__":
    main(sys.argv[1:])

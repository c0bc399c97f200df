"""An autoregressive checkpoint in, a diffusion checkpoint out, and back. `python convert.py --help` is the manual."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch

import card
from checkpoint import EMBEDDING, HEAD, load_config, load_model, resolve, save_model
from cli import one_line_errors
from display import printable
from files import check_directory, sole_user
from lora import ADAPTER
from model import CONTEXTS, OBJECTIVES, Config, LanguageModel
from options import Directory, Model, Options, Seed
from tokenizer import Tokenizer


@dataclass(kw_only=True)
class Paths(Options):
    "from where, to where"

    model_name_or_path: Model | None = None
    """source: a directory (also under $BASE_MODELS_DIR) or a Hub id (default: none, with --merge)"""
    merge: Annotated[Model, "ADAPTER_DIR"] | None = None
    """add what train.py --lora trained to the weights of its base, and write an ordinary checkpoint that declares what
    the adapter does (default: convert --model_name_or_path)"""
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
    context: Literal[*CONTEXTS] | None = None
    """what clean tokens see, for bd3lm. block: their whole block. causal: only what is before them: the model is then
    an ar model, too, and can verify its own drafts (default: what the source declares, else block)"""
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
class Convert(Paths, Declarations, Weights, card.Publishing):
    """Turn an autoregressive Qwen3, Qwen2, Qwen2.5 or Llama checkpoint into a diffusion checkpoint, or back.

    The weights stay what they are: a diffusion checkpoint is the same network with a mask token and a config.json that
    declares what it is (model_type a2d-qwen3, a2d-qwen2 or a2d-llama, as dLLM writes it). Without --objective one
    conversion serves for training either mdlm or bd3lm. A checkpoint converted before can be converted again, to
    declare something else or to go back to a plain causal checkpoint (--to ar)."""

    prog: ClassVar[str] = "convert.py"

    def __post_init__(self):
        super().__post_init__()
        if (self.merge is None) == (self.model_name_or_path is None):
            raise ValueError("name what to convert by --model_name_or_path, or an adapter by --merge, and not both")

    @classmethod
    def parse(cls, argv: list[str] | None = None) -> Self:
        args = super().parse(argv)
        general = {"merge", "output_dir", "overwrite", "save_dtype", "push_to_hub"}
        for name in sorted(args.given - general if args.merge else ()):
            raise ValueError(f"--{name} means nothing with --merge; merge first, and convert what that wrote")
        return args


def redeclare(config: Config, args: Convert, mask_id: int) -> None:
    """Writes into `config` what the new checkpoint declares."""
    # No more than that, where it is to be a plain causal one.
    if args.to == "ar":
        for flag in ("objective", "block_size", "context", "right_shift_logits", "mask_token"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} {getattr(args, flag)} means nothing with --to ar; leave it out")
        config.objective, config.block_length, config.right_shift, config.mask_token_id = "ar", None, None, None
        config.context = None
        return

    # What the source declares stays, unless a flag declares otherwise; but an AR objective goes, and its shift with it.
    if config.objective == "ar":
        config.objective = config.right_shift = None
    config.mask_token_id = mask_id
    config.objective = args.objective or config.objective
    if args.right_shift_logits is not None:
        config.right_shift = args.right_shift_logits

    # A block length and a context go with bd3lm, and only with it.
    K = config.block_length if args.block_size is None else args.block_size
    if config.objective == "bd3lm" and (K is None or K < 1):
        raise ValueError(f"--block_size {K}: bd3lm needs one of at least 1, 32 say")
    if config.objective != "bd3lm" and args.block_size is not None:
        raise ValueError(f"--block_size {K}: only bd3lm declares one; add --objective bd3lm")
    if config.objective != "bd3lm" and args.context is not None:
        raise ValueError(f"--context {args.context}: only bd3lm declares one; add --objective bd3lm")
    config.block_length = K if config.objective == "bd3lm" else None
    config.context = args.context or config.context or "block" if config.objective == "bd3lm" else None


def grow(tensors: dict, config: Config, tokenizer: Tokenizer, *, untrained: bool, init: str) -> str:
    """Gives every token a row in the embedding, and in the head if there is one, and the mask token a usable one;
    returns what it did with that."""
    mask_id, rows = tokenizer.mask_id, config.vocab_size
    last, reset = max(tokenizer.ids), untrained and init == "mean"
    done = "set to the scaled mean row" if reset else "untrained, kept" if untrained else "kept"
    if last < rows and not reset:
        return done

    # The mean of the rows that stand for a token: an embedding may have more, which nothing trains.
    trained = torch.tensor(sorted(i for i in tokenizer.ids if i < rows and i != mask_id))
    if last >= rows:  # the way back needs to know how many there were
        config.extra.setdefault("source_vocab_size", rows)
        config.vocab_size = (last // 64 + 1) * 64
    for name in tensors.keys() & {EMBEDDING, HEAD}:
        # At their median norm. The mean itself is far shorter, and a row's gradient grows with 1 / norm: on a random
        # model (hidden 256, 6 layers) with everything masked, a row of 0.01 times the median norm gave a gradient of
        # norm 64, one of the median norm 1.2.
        known = tensors[name][trained]  # (N, D)
        wide = torch.promote_types(known.dtype, torch.float32)
        mean = known.mean(0, dtype=wide)
        norm = torch.linalg.vector_norm(known, dim=1, dtype=wide).median()
        row = (mean * (norm / mean.norm())).to(known.dtype)

        # All new rows get it, and the mask's.
        tensors[name] = torch.cat([tensors[name], row.expand(config.vocab_size - rows, -1)])
        if reset:
            tensors[name][mask_id] = row
    return done if mask_id < rows else "and the other new ones set to the scaled mean row"


def shrink(tensors: dict, config: Config) -> None:
    """Takes the rows away that `grow` added."""
    rows = config.extra.pop("source_vocab_size", config.vocab_size)
    if type(rows) is not int or not 0 < rows <= config.vocab_size:
        raise ValueError(f"config.json: source_vocab_size {rows!r:.40}: expected a number up to {config.vocab_size}")
    config.vocab_size = rows
    for name in tensors.keys() & {EMBEDDING, HEAD}:
        tensors[name] = tensors[name][: config.vocab_size]


def random_model(config: Config, seed: int) -> LanguageModel:
    """A model of random weights; ValueError where the machine's memory does not hold them."""
    with torch.device("meta"):
        size = sum(4 * parameter.numel() for parameter in LanguageModel(config).parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(f"--random_init: the weights take {size / 1e9:,.0f} GB, the machine has {memory / 1e9:,.0f}")
    model = LanguageModel(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def convert(args: Convert) -> dict[str, str]:
    """Writes the new checkpoint; returns what was done."""
    # Whatever is wrong with the options shows before the weights are read.
    output = Path(args.output_dir)
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(f"--output_dir {output} is not empty; choose another or pass --overwrite")
    if not output.exists():
        check_directory("--output_dir", output)
    source = resolve(args.merge or args.model_name_or_path)
    if args.merge is not None:
        return merge(args, source, output)
    tokenizer = Tokenizer(source, args.mask_token)
    remark = ""
    if args.to == "diffusion":
        tokenizer.check_mask()
        if tokenizer.mask_id not in tokenizer.core.get_added_tokens_decoder():
            remark = "; it is an ordinary word, which the model can no longer read or write"

    # The weights: random ones, or the source's.
    config = load_config(source)
    if args.to == "ar" or tokenizer.first_added > config.vocab_size:
        tokenizer.fit(config.vocab_size, mask=False)
    model = random_model(config, args.seed) if args.random_init else load_model(source, config=config)
    tensors, causal = model.state_dict(), config.objective == "ar"
    stored, rows = config.dtype, config.vocab_size

    # What changes: the config's declarations, and the mask token's row.
    redeclare(config, args, tokenizer.mask_id)
    mask = "none declared"
    if args.to == "diffusion":
        untrained = (tokenizer.mask_untrained or causal) and not args.random_init
        done = grow(tensors, config, tokenizer, untrained=untrained, init=args.mask_init)
        mask = f"{tokenizer.mask_token}, id {tokenizer.mask_id}; its row {done}{remark}"
    else:
        shrink(tensors, config)
    dtype = args.save_dtype or stored
    card.check_hub(args.push_to_hub)
    with sole_user(output.resolve(), whole=True):
        save_model(model, output, dtype=getattr(torch, dtype), tokenizer=tokenizer, state_dict=tensors)
        card.publish(output, args)
    shift = "--right_shift_logits True in training: positions go on predicting the next token, as the AR model did"
    advised = causal and args.to == "diffusion" and not args.random_init and config.right_shift is None
    return {
        "family": config.model_type,
        "objective": config.objective or f"{args.to}, none declared",
        "mask token": mask,
        "embedding rows": str(rows) if config.vocab_size == rows else f"{rows} -> {config.vocab_size}",
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        "dtype": stored if dtype == stored else f"{stored} -> {dtype}",
        "written": str(output),
        **({"recommended": shift} if advised else {}),
    }


def merge(args: Convert, source: Path, output: Path) -> dict[str, str]:
    """Writes the checkpoint that the adapter in `source` makes of its base; returns what was done."""
    config = load_config(source)
    if config.adapter is None:
        raise ValueError(f"--merge {source} holds no {ADAPTER}; name a checkpoint of train.py --lora")
    adapter, model = config.adapter, load_model(source, config=config)
    dtype = args.save_dtype or config.dtype
    card.check_hub(args.push_to_hub)
    with sole_user(output.resolve(), whole=True):
        save_model(model, output, dtype=getattr(torch, dtype), tokenizer=Tokenizer(source))
        card.publish(output, args)
    about = f"of rank {adapter['r']}, on {adapter['base_model_name_or_path']}"
    return {"adapter": about, "objective": f"{config.objective}", "dtype": dtype, "written": str(output)}


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("convert.py"):
        for what, value in convert(Convert.parse(argv)).items():
            print(printable(f"{what:<15} {value}"))


if __name__ == "__main__":
    main(sys.argv[1:])

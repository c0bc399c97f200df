"""An autoregressive checkpoint in, a diffusion checkpoint out, and back. `python convert.py --help` is the manual."""

from cli import Parser, boolean, check_place, one_line_errors, place, seed, switch

import argparse
import sys
from pathlib import Path

import torch

from checkpoint import OBJECTIVES, load_config, load_model, resolve, save_model
from model import Config, LanguageModel
from tokenizer import Tokenizer


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        "convert.py",
        """\
Turn an autoregressive Qwen3, Qwen2, Qwen2.5 or Llama checkpoint into a diffusion checkpoint, or back.

The weights stay what they are: a diffusion checkpoint is the same network with a mask token and a config.json that
says what it is (model_type a2d-qwen3, a2d-qwen2 or a2d-llama, as dLLM writes it). Without --objective the same
conversion serves for training either mdlm or bd3lm. A checkpoint converted before can be converted again, to declare
something else or to go back to a plain causal checkpoint (--to ar).""",
    )
    add = parser.add_argument_group("from where, to where").add_argument
    add(
        "--model_name_or_path",
        type=place,
        required=True,
        help="source: a directory (also under $BASE_MODELS_DIR) or a Hub id",
    )
    add(
        "--output_dir",
        type=place,
        required=True,
        metavar="DIR",
        help="directory to write; it appears when it is complete, not before",
    )
    switch(
        add,
        "--overwrite",
        False,
        "replace the checkpoint in --output_dir (default: False, a non-empty directory is an error)",
    )
    add = parser.add_argument_group("what the new checkpoint declares").add_argument
    add(
        "--to",
        choices=["diffusion", "ar"],
        default="diffusion",
        help="ar: a plain causal checkpoint with the same weights, for transformers (default: diffusion)",
    )
    add("--objective", choices=OBJECTIVES[1:], help="declare this objective (default: what the source declares)")
    add(
        "--block_size",
        type=int,
        metavar="TOKENS",
        help="declare this block length; for bd3lm, which needs one (default: what the source declares)",
    )
    add(
        "--right_shift_logits",
        type=boolean,
        metavar="True|False",
        help="declare whether position i predicts token i + 1, as in the AR model (default: what the source declares)",
    )
    add = parser.add_argument_group("weights and the mask token").add_argument
    add("--save_dtype", choices=["float32", "bfloat16", "float16"], help="of the saved weights (default: the source's)")
    switch(
        add,
        "--random_init",
        False,
        "random weights, N(0, initializer_range), in the source's shape, whose own are not read",
    )
    add("--seed", type=seed, default=42, metavar="N", help="of the random weights")
    add(
        "--mask_token",
        metavar="TOKEN",
        help="use this token of the vocabulary as the mask, such as Llama's <|reserved_special_token_0|> "
        "(default: the tokenizer's mask token, else <|mask|>, added; where the vocabulary is full the embedding grows "
        "to the next multiple of 64 rows)",
    )
    add(
        "--mask_init",
        choices=["mean", "keep"],
        default="mean",
        help="a mask token that was no mask before has a row nobody trained. mean: make it the mean of the "
        "tokenizer's rows, scaled to their median norm (the mean itself is far shorter). The gradient goes with "
        "1 / norm of the row: on a random model (hidden 256, 6 layers) with everything masked a row of 0.01 times "
        "the median norm gave a gradient of norm 64, one of the median norm 1.2. keep: leave it. New rows are always "
        "set. (default: mean)",
    )
    return parser


def redeclare(config: Config, args: argparse.Namespace, mask_id: int) -> None:
    """Writes into `config` what the checkpoint is to declare."""
    if args.to == "ar":
        for flag in ("objective", "block_size", "right_shift_logits", "mask_token"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} {getattr(args, flag)} means nothing with --to ar; leave it out")
        config.objective = config.block_length = config.right_shift = config.mask_token_id = None
        return
    if config.objective == "ar":  # its shift goes with it
        config.objective = config.right_shift = None
    config.mask_token_id = mask_id
    config.objective = args.objective or config.objective
    if args.right_shift_logits is not None:
        config.right_shift = args.right_shift_logits
    if config.objective != "bd3lm":
        config.block_length = None
        if args.block_size is not None:
            raise ValueError(f"--block_size {args.block_size}: only bd3lm declares one; add --objective bd3lm")
    elif args.block_size is not None or config.block_length is None:
        if args.block_size is None or args.block_size < 1:
            raise ValueError(f"--block_size {args.block_size}: bd3lm needs one of at least 1, 32 say")
        config.block_length = args.block_size


def prepare_mask(tensors: dict, config: Config, tokenizer: Tokenizer, *, untrained: bool, init: str) -> str:
    """Sees to it that the embedding, and the head if there is one, has a usable row for the mask; says what it did.

    Rows that are set become the mean of those of the tokenizer's ids, scaled to their median norm.
    """
    mask_id, rows = tokenizer.mask_id, config.vocab_size
    if mask_id < rows and not (untrained and init == "mean"):
        return "untrained, kept" if untrained else "kept"
    trained = torch.tensor(sorted(i for i in tokenizer.ids if i < rows and i != mask_id))
    config.vocab_size = rows if mask_id < rows else (mask_id // 64 + 1) * 64
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        weight = tensors[name]
        known = weight[trained]  # (N, D)
        mean = known.mean(0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(known, dim=1, dtype=torch.float32).median()
        row = (mean * (norm / mean.norm())).to(weight.dtype)
        if mask_id < rows:
            weight[mask_id] = row
        else:
            tensors[name] = torch.cat([weight, row.expand(config.vocab_size - rows, -1)])
    return "set to the scaled mean row" if mask_id < rows else "and the other new ones set to the scaled mean row"


@torch.no_grad()
def convert(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Does it; returns what was done, as (what, value)."""
    output = Path(args.output_dir)
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise ValueError(f"--output_dir {output} is not empty; choose another or pass --overwrite")
    if not output.exists():
        check_place("--output_dir", output)
    source = resolve(args.model_name_or_path)
    tokenizer = Tokenizer(source, args.mask_token)
    if args.random_init:
        model = LanguageModel(load_config(source))
        model.init_weights(torch.Generator().manual_seed(args.seed))
    else:
        model = load_model(source)
    config, tensors = model.config, model.state_dict()
    tokenizer.fit(config.vocab_size, mask=False)
    stored, rows = config.dtype, config.vocab_size
    redeclare(config, args, tokenizer.mask_id)
    mask = "none declared"
    if args.to == "diffusion":
        untrained = tokenizer.mask_untrained and not args.random_init
        done = prepare_mask(tensors, config, tokenizer, untrained=untrained, init=args.mask_init)
        mask = f"{tokenizer.mask_token}, id {tokenizer.mask_id}; its row {done}"
    dtype = args.save_dtype or stored
    save_model(model, output, dtype=getattr(torch, dtype), tokenizer=tokenizer, state_dict=tensors)
    return [
        ("family", config.model_type),
        ("objective", config.objective or f"{args.to}, none declared"),
        ("mask token", mask),
        ("embedding rows", str(rows) if config.vocab_size == rows else f"{rows} -> {config.vocab_size}"),
        ("parameters", f"{sum(tensor.numel() for tensor in tensors.values()):,}"),
        ("dtype", stored if dtype == stored else f"{stored} -> {dtype}"),
        ("written", str(output)),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        for what, value in convert(args):
            print(f"{what:<15} {value}")


if __name__ == "__main__":
    main(sys.argv[1:])

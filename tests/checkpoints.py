"""Tiny random checkpoints with a real byte-level tokenizer, for the tests of the programs."""

import functools
import tempfile
from pathlib import Path

import torch
from conftest import tiny

from checkpoint import load_model, save_model
from tokenizer import Tokenizer

DECLARED = {
    "ar": {"objective": "ar", "right_shift": True, "mask_token_id": None},
    "mdlm": {"objective": "mdlm", "right_shift": False},
    "mdlm.shift": {"objective": "mdlm", "right_shift": True},
    "bd3lm": {"objective": "bd3lm", "block_length": 4, "right_shift": False},
    "causal": {"objective": "bd3lm", "block_length": 4, "right_shift": True, "context": "causal"},
    "undeclared": {},
    "plain": {"mask_token_id": None},  # as an AR model comes from elsewhere
}
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def tokenizer(template: bool = True) -> Tokenizer:
    """Its mask token is added; ends are <|endoftext|> (BOS) and <|im_end|> (EOS)."""
    subjects, verbs = ("word", "number", "letter", "digits", "largest"), ("Reverse", "Sort", "Count", "What is", "Add")
    texts = [f"{verb} the {subject} of {n}, yes?" for verb in verbs for subject in subjects for n in range(20)]
    trained = Tokenizer.train(texts, 400)
    if not template:
        del trained.files["tokenizer_config.json"]["chat_template"]
        trained.template = None
    return trained


@functools.cache
def checkpoint(name: str, *, template: bool = True, dtype=torch.float64, **changes) -> str:
    """The directory of a checkpoint that declares DECLARED[name]; shared, so that nobody may write to it."""
    path = Path(FOLDER.name, f"{name}.{len(list(Path(FOLDER.name).iterdir()))}")
    core = tokenizer(template)
    model = tiny(**{"vocab_size": 448, "mask_token_id": core.mask_id, "dtype": dtype} | DECLARED[name] | changes)
    model.config.dtype = str(dtype).removeprefix("torch.")
    save_model(model, path, tokenizer=core)
    return str(path)


def opened(name: str, **changes):
    """The model of a checkpoint, as the programs open it: what its tokenizer does not know is never generated."""
    path = checkpoint(name, **changes)
    model = load_model(path)
    model.known_ids = Tokenizer(path).known_ids
    return model

"""What the tests share: the reference's golden outputs, and tiny random models of all three families."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion
import model
from checkpoint import load_model
from model import Config, LanguageModel

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen3", "qwen2", "llama")
VOCAB = 40
MASK = 39  # the tiny models' mask id
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

torch.set_num_threads(1)  # models this small only wait for each other's threads


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem != "test_parallel")  # the longest first: no process ends alone with it
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@functools.cache
def golden_arrays(name: str) -> dict[str, torch.Tensor]:
    """The arrays of golden/`name`.npz; integers as int64."""
    arrays = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    return {key: x if x.is_floating_point() or x.dtype == torch.uint8 else x.long() for key, x in arrays.items()}


@functools.cache
def golden_json(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())


@functools.cache
def golden_model(family: str, dtype=torch.float32, **declared) -> LanguageModel:
    """The golden checkpoint of a family, its config declaring `declared` (objective, mask_token_id, ...); shared."""
    model = load_model(GOLDEN / "models" / family, dtype=dtype)
    for name, value in declared.items():
        setattr(model.config, name, value)
    return model


def tiny(family: str = "qwen3", *, seed: int = 0, dtype=torch.float64, **changes) -> LanguageModel:
    """A tiny random model in float64; its weights are large, so that logits differ clearly and masks matter."""
    shape = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "max_position_embeddings": 256,
        "rope_theta": 1e4,
        "rope_scaling": LLAMA3 if family == "llama" else None,
        "initializer_range": 0.4,
        "mask_token_id": MASK,
    }
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(Config(**shape | changes))
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def watched_masks(monkeypatch) -> list[bool]:
    """Of each dense mask to come, whether every query sees a key; what sees none becomes NaN in some kernels."""
    seen, build = [], model.attention_mask

    def record(q, k):
        mask = build(q, k)
        if isinstance(mask, torch.Tensor):
            seen.append(bool(mask.any(dim=-1).all()))
        return mask

    for module in (model, diffusion):
        monkeypatch.setattr(module, "attention_mask", record)
    return seen


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids below the mask id."""
    return torch.randint(0, MASK, shape, generator=torch.Generator().manual_seed(seed))


def positions(B: int, T: int) -> torch.Tensor:
    return torch.arange(T).expand(B, T)

"""Saved = loaded, converted = the reference's conversion, and what does not fit is refused by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import FAMILIES, GOLDEN, golden_json, golden_model, positions, random_tokens, tiny
from safetensors.torch import load_file, save_file

import checkpoint
import convert
import files
import resume
from checkpoint import config_dict, declare, load_config, load_model, read_config, resolve, save_model
from files import replacing
from model import Config, LanguageModel, Layout
from tokenizer import Tokenizer

MODELS = GOLDEN / "models"
EMBEDDING = "model.embed_tokens.weight"


TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def raw(family: str) -> dict:
    return json.loads((MODELS / family / "config.json").read_text())


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def source(tmp_path, family="qwen3", drop=(), config=None, **tensors):
    """A copy of a golden checkpoint with tensors replaced, added or dropped and fields of config.json changed."""
    path = tmp_path / "source"
    shutil.copytree(MODELS / family, path)
    weights = {name: x for name, x in load_file(path / "model.safetensors").items() if name not in drop}
    save_file(weights | tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw(family) | (config or {})))
    return path


def run(*args) -> None:
    convert.main([str(arg) for arg in args])


def converted(tmp_path, name, *flags, family="qwen3"):
    run("--model_name_or_path", MODELS / family, "--output_dir", tmp_path / name, *flags)
    return tmp_path / name


# ---------------------------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_config_is_written_as_it_was_read(family):
    written = config_dict(read_config(raw(family)))
    expected = raw(family) | ({"head_dim": 16} if family == "qwen2" else {})
    expected.pop("transformers_version")
    assert written == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_read_alike(family):
    flat, nested = raw(family), raw(family)
    flat["torch_dtype"] = flat.pop("dtype")
    scaling, theta = nested.pop("rope_scaling"), nested.pop("rope_theta")
    nested["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    assert read_config(flat) == read_config(nested) == read_config(raw(family))
    if scaling:  # an older name
        flat["rope_scaling"] = {"type" if name == "rope_type" else name: x for name, x in scaling.items()}
        assert read_config(flat) == read_config(raw(family))


def test_what_is_left_out_has_the_defaults_of_transformers():
    config = {name: value for name, value in raw("qwen3").items() if name not in ("head_dim", "num_key_value_heads")}
    for name in ("dtype", "rope_theta", "rope_scaling", "tie_word_embeddings"):
        del config[name]
    config = read_config(config)
    assert (config.head_dim, config.num_key_value_heads, config.dtype) == (16, 4, "float32")
    assert (config.rope_theta, config.rope_scaling, config.tie_word_embeddings) == (10000.0, None, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ({"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.*linear"),
        ({"objective": "sedd"}, "objective 'sedd'"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        read_config(raw("qwen3") | changes)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3 |= {"original_max_position_embeddings": 64}
ABSURD = [
    *({"rope_theta": value} for value in (0, -1, "NaN", "Infinity", "1e999", True)),
    *({"rope_parameters": {"rope_type": "default", "rope_theta": value}} for value in ([1], None, "NaN", 0, "8", {})),
    *({"rope_scaling": LLAMA3 | {"factor": value}} for value in (0, "8", None, [8], True, "NaN")),
    {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
    *({"rope_scaling": {"rope_type": value}} for value in (["llama3"], {}, 3)),
    *({"rms_norm_eps": value} for value in ("NaN", 0, "Infinity", 10)),
    *({"initializer_range": value} for value in (-1, "NaN", 1e300)),
    *({"vocab_size": value} for value in (10**30, 2**63, 0, True, 512.0)),
    *({"num_hidden_layers": value} for value in (10**5, 10**9, -3)),
    {"hidden_size": 2**40},
    *({name: 10**9} for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")),
    {"max_position_embeddings": 10**15},
    *({"block_length": value} for value in (2**70, 0, "4")),
    *({"mask_token_id": value} for value in (-1, 2**70, "5")),
    *({"layer_types": value} for value in ([["full_attention"]], 3, {"a": 1})),
    *({"model_type": value} for value in (["qwen3"], 3)),
    *({"torch_dtype": value, "dtype": None} for value in (3, ["float32"])),
]


@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_absurd_values_are_refused_by_name(changes, tmp_path):
    """NaN and infinities are literals there, as Python's own JSON writes them."""
    path = source(tmp_path, config=changes)
    text = (path / "config.json").read_text()
    for literal in ("NaN", "Infinity", "1e999"):
        text = text.replace(f'"{literal}"', literal)
    (path / "config.json").write_text(text)
    named = {*changes, *changes.get("rope_parameters", ()), *changes.get("rope_scaling", ()), "heads"}
    with pytest.raises(ValueError, match="|".join(sorted(named))) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *TOKENIZER_FILES])
@pytest.mark.parametrize(
    "damage", ["deep", "deep enough to be read", "latin", "list", "null", "torn", "long", "a number"]
)
def test_every_file_of_json_is_read_within_bounds(name, damage, tmp_path, monkeypatch):
    path = source(tmp_path)
    (path / "model.safetensors").rename(path / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(path / "model-00001.safetensors"), "model-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "generation_config.json").write_text("{}")
    load_model(path), Tokenizer(path)
    content = {"deep": b'{"x": ' + b"[" * 200_000, "deep enough to be read": b'{"x":' + b"[" * 90 + b"]" * 90 + b"}"}
    content |= {
        "latin": b'{"x": "\xff"}',
        "list": b"[]",
        "null": b"null",
        "torn": b'{"x',
        "long": b"{" + b" " * 5000 + b"}",
    }
    content |= {"a number": b"1" * 5000}
    (path / name).write_bytes(content[damage])
    monkeypatch.setattr(files, "JSON_BYTES", 4000 if damage == "long" else 10**6)
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*; fetch it again"):
        load_model(path), Tokenizer(path)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "{}/outside.safetensors", "sub/x.safetensors", "..", "", 3, None]
)
def test_shards_lie_in_the_directory(shard, tmp_path):
    path = source(tmp_path)
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    shard = shard.format(tmp_path) if isinstance(shard, str) else shard
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "outside.safetensors"), shard)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names the shard .*; expected a file's name"):
        load_model(path)
    # A link in the directory stays possible: the Hub's cache is made of them.
    (path / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], "linked.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(path)


def test_more_layers_than_the_files_have_are_refused_before_they_are_made(tmp_path):
    with pytest.raises(ValueError, match="disagree: 24 tensors for num_hidden_layers 1000"):
        load_model(source(tmp_path, config={"num_hidden_layers": 1000, "layer_types": None}))


def test_a_tensor_of_integers_among_floats_is_refused(tmp_path):
    path = source(tmp_path, **{"model.norm.weight": torch.ones(64, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of type I32; expected one of F32"):
        load_model(path)


def test_a_sliding_window_out_of_use_is_no_obstacle():
    fields = raw("qwen2") | {"use_sliding_window": False, "sliding_window": 32768}
    assert config_dict(read_config(fields))["sliding_window"] == 32768


def test_declarations_are_filled_in_and_survive_saving():
    config = declare(read_config(raw("qwen3")), objective="bd3lm", block_length=8, mask_token_id=504)
    assert (config.objective, config.block_length, config.right_shift, config.mask_token_id) == ("bd3lm", 8, False, 504)
    assert read_config(config_dict(config)) == config
    assert declare(read_config(raw("qwen3")), mask_token_id=504).objective == "mdlm"
    ar = declare(read_config(raw("qwen3")), objective="ar", mask_token_id=9999)
    assert (ar.right_shift, ar.mask_token_id) == (True, None)
    assert config_dict(ar)["objective"] == "ar"
    assert config_dict(ar)["architectures"] == ["Qwen3ForCausalLM"]
    # What is declared needs no argument, and to repeat it is no contradiction.
    again = declare(read_config(config_dict(config)), objective="bd3lm", block_length=8, right_shift=False)
    assert again == config


@pytest.mark.parametrize(
    ("declared", "arguments", "words"),
    [
        (
            {"objective": "mdlm"},
            {"objective": "bd3lm"},
            "--objective bd3lm contradicts .* objective mdlm.*convert.py",
        ),
        ({"objective": "bd3lm", "block_length": 8}, {"block_length": 16}, "--block_size 16 contradicts"),
        ({"right_shift": True}, {"right_shift": False}, "--right_shift_logits False contradicts"),
        ({"mask_token_id": 3}, {"mask_token_id": 4}, "mask token 4 contradicts"),
        ({}, {"objective": "bd3lm"}, "pass --block_size"),
        ({}, {"objective": "mdlm", "block_length": 4}, "--block_size 4: only bd3lm"),
        ({}, {"objective": "bd3lm", "block_length": 0}, "--block_size 0"),
        ({}, {"objective": "ar", "right_shift": False}, "--right_shift_logits False"),
        ({}, {"objective": "sedd"}, "sedd"),
        ({}, {"mask_token_id": 512}, "512 lies beyond the embedding's 512 rows.*convert"),
        ({}, {"mask_token_id": None}, "needs a mask token.*convert"),
    ],
)
def test_contradictory_declarations_are_refused(declared, arguments, words):
    config = Config(**declared)
    with pytest.raises(ValueError, match=words):
        declare(config, **{"mask_token_id": declared.get("mask_token_id", 5)} | arguments)
    assert config == Config(**declared)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_saved_equals_loaded(family, tied, sharded, tmp_path, monkeypatch):
    if sharded:
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    model = tiny(family, tie_word_embeddings=tied, attention_bias=family == "llama", dtype=torch.float32)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert equal(loaded.state_dict(), model.state_dict())
    assert loaded.config == model.config
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    assert (tmp_path / "saved/model.safetensors.index.json").is_file() == sharded
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1
    files = {path: load_file(path) for path in (tmp_path / "saved").glob("*.safetensors")}
    sizes = {path: sum(x.nbytes for x in held.values()) for path, held in files.items()}
    if sharded:
        assert len(files) > 1 and all(sizes[path] <= 20_000 or len(files[path]) == 1 for path in files)
        index = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes.values())
        assert index["weight_map"] == {name: path.name for path, held in files.items() for name in held}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_checkpoint_is_the_golden_model(family):
    assert equal(load_model(MODELS / family).state_dict(), golden_model(family).state_dict())


def test_dtypes_are_those_of_the_file_unless_asked_otherwise(tmp_path):
    model = load_model(MODELS / "qwen3")
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load_model(tmp_path / "half")
    assert {x.dtype for x in half.state_dict().values()} == {torch.bfloat16}
    assert model.config.dtype == "float32" and half.config.dtype == "bfloat16"
    wide = load_model(tmp_path / "half", dtype=torch.float32)
    assert {x.dtype for x in wide.state_dict().values()} == {torch.float32}
    save_model(wide, tmp_path / "again")  # as its source stored it
    assert equal(load_model(tmp_path / "again").state_dict(), half.state_dict())
    # The file decides, not config.json.
    fields = json.loads((tmp_path / "half/config.json").read_text()) | {"dtype": "float32"}
    (tmp_path / "half/config.json").write_text(json.dumps(fields))
    assert equal(load_model(tmp_path / "half").state_dict(), half.state_dict())


def test_a_tensor_stored_in_another_type_than_the_embedding_keeps_it_unless_asked_otherwise(tmp_path):
    norm = "model.norm.weight"
    path = source(tmp_path, **{norm: load_file(MODELS / "qwen3/model.safetensors")[norm].double()})
    assert load_model(path).state_dict()[norm].dtype == torch.float64
    assert load_model(path, dtype=torch.bfloat16).state_dict()[norm].dtype == torch.bfloat16


def test_a_conversion_takes_no_more_memory_at_its_peak_than_the_model_and_little_besides(tmp_path, monkeypatch):
    model, bytes_read, peaks = tiny(dtype=torch.float32, tie_word_embeddings=False), [], []
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)

    class Counted:
        """A file opened for a tensor or two, whose bytes are then mapped beside all that has been converted."""

        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def __enter__(self):
            return type(self)(self.handle.__enter__())

        def __exit__(self, *error):
            self.handle.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.handle.get_tensor(name)
            bytes_read.append(2 * tensor.nbytes)  # of the converted
            peaks.append(sum(bytes_read) + tensor.nbytes)
            return tensor

    opened = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda *args: Counted(opened(*args)))
    load_model(tmp_path / "half", dtype=torch.float32)
    whole = sum(x.nbytes for x in model.state_dict().values())
    assert sum(bytes_read) == whole and max(peaks) < 1.02 * whole


def test_loaded_weights_can_be_trained_without_touching_the_file(tmp_path):
    path = source(tmp_path)
    before = (path / "model.safetensors").read_bytes()
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_a_redundant_head_and_rotary_buffers_are_accepted_only_where_they_change_nothing(tmp_path):
    embedding = load_file(MODELS / "qwen3/model.safetensors")[EMBEDDING]
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    path = source(tmp_path, **{"lm_head.weight": embedding.clone()}, **rotary)
    assert equal(load_model(path).state_dict(), load_model(MODELS / "qwen3").state_dict())
    shutil.rmtree(path)
    path = source(tmp_path, **{"lm_head.weight": embedding + 1e-3})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*tie_word_embeddings"):
        load_model(path)


def test_every_tensor_is_accounted_for_by_name_and_shape(tmp_path):
    gate = "model.layers.0.mlp.gate_proj.weight"
    for name, change, words in (
        ("missing", {"drop": [gate]}, f"{gate} is missing"),
        ("extra", {"model.layers.7.foo": torch.ones(1)}, "model.layers.7.foo is unexpected"),
        ("shape", {"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \[3\], expected \[64\]"),
        ("layers", {"config": {"num_hidden_layers": 1, "layer_types": None}}, "is unexpected.* and 8 more"),
        ("head", {"config": {"tie_word_embeddings": False}}, "lm_head.weight is missing"),
        ("dtype", {"model.embed_tokens.weight": torch.ones(512, 64, dtype=torch.int8)}, "I8"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=words):
            load_model(source(tmp_path / name, **change))


def test_damaged_and_absent_files_are_named(tmp_path, monkeypatch):
    path = source(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        load_model(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"source/config\.json is damaged: "):
        load_model(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/source"):
        (path / "config.json").write_text("{}")
        load_model(tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 100_000)
    save_model(load_model(MODELS / "qwen3"), tmp_path / "shards")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-.*fetch the model again"):
        load_model(tmp_path / "shards")


def test_names_resolve_to_directories_before_the_hub(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path))
    assert resolve("org/name") == tmp_path / "org/name"
    with pytest.raises(FileNotFoundError, match=r"/no/such/place is neither a directory .* nor a Hub id"):
        resolve("/no/such/place")


@pytest.mark.parametrize("step", ["save_file", "_sync"])
def test_an_interrupted_save_leaves_the_old_checkpoint_whole(step, tmp_path, monkeypatch):
    old, new = tiny(dtype=torch.float32), tiny(seed=1, dtype=torch.float32)
    save_model(old, tmp_path / "saved")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if hasattr(checkpoint, step) else files, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_model(new, tmp_path / "saved")
    assert equal(load_model(tmp_path / "saved").state_dict(), old.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    save_model(new, tmp_path / "saved")
    assert equal(load_model(tmp_path / "saved").state_dict(), new.state_dict())


def test_a_save_that_cannot_take_its_name_gives_it_back(tmp_path, monkeypatch):
    old, rename = tiny(dtype=torch.float32), Path.rename
    save_model(old, tmp_path / "saved")

    def refused(path, target):
        if path.name.endswith(".writing"):
            raise OSError("refused")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="refused"):
        save_model(tiny(seed=1, dtype=torch.float32), tmp_path / "saved")
    assert equal(load_model(tmp_path / "saved").state_dict(), old.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_save_is_on_the_disk_before_it_takes_its_name_and_the_name_is_after(tmp_path, monkeypatch):
    synced, sync = [], files._sync

    def recorded(path):
        synced.append((path.name, (tmp_path / "saved").exists()))
        sync(path)

    monkeypatch.setattr(files, "_sync", recorded)
    save_model(tiny(), tmp_path / "saved")
    written = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {name for name, named in synced if not named} == written | {".saved.writing"}
    assert [name for name, named in synced if named] == [tmp_path.name]


def test_a_checkpoint_is_no_longer_whole_before_a_part_of_it_is_gone(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-2"
    for take in (resume.drop_training, files.remove):
        (path / "state").mkdir(parents=True, exist_ok=True)
        for name in (".metadata", "progress.json"):
            (path / "state" / name).write_text("{}")
        assert resume.read_progress(path) == {}
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # killed here
            take(path)
        with pytest.raises(FileNotFoundError):
            resume.read_progress(path)


def test_a_killed_save_leaves_nothing_that_passes_for_a_checkpoint(tmp_path):
    """What a killed process leaves behind stands under another name, and the next save clears it."""
    stale = tmp_path / ".saved.writing"
    stale.mkdir()
    (stale / "model-00009-of-00009.safetensors").write_text("half")
    save_model(tiny(), tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_only_checkpoints_are_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no checkpoint"):
        save_model(tiny(), tmp_path)
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds directories"):
        save_model(tiny(), tmp_path / "run")
    with replacing(tmp_path / "deep/down") as directory:
        (directory / "file").write_text("x")
    assert (tmp_path / "deep/down/file").read_text() == "x"


# ---------------------------------------------------------------------------------------------------------------------
# convert.py


def test_conversion_equals_the_references(tmp_path):
    """But for the dtype, which the reference makes bfloat16 unasked, and the mask token, which it does not declare."""
    saved = converted(tmp_path, "half", "--save_dtype", "bfloat16")
    fields = json.loads((saved / "config.json").read_text())
    expected = golden_json("convert_qwen3_config")
    assert fields.pop("mask_token_id") == 504
    assert fields == {name: value for name, value in expected.items() if name != "transformers_version"}
    tensors = load_file(saved / "model.safetensors")
    assert {name: [str(x.dtype), list(x.shape)] for name, x in tensors.items()} == golden_json("convert_qwen3_tensors")
    assert {x.dtype for x in load_file(converted(tmp_path, "kept") / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_source(family, tmp_path):
    there = converted(tmp_path, "there", "--mask_init", "keep", family=family)
    run("--model_name_or_path", there, "--output_dir", tmp_path / "back", "--to", "ar")
    assert equal(load_file(tmp_path / "back/model.safetensors"), load_file(MODELS / family / "model.safetensors"))
    assert load_config(tmp_path / "back") == load_config(MODELS / family)
    assert load_config(there).mask_token_id == Tokenizer(there).mask_id
    # A plain causal copy of the source gets no mask token: converted later, its row would pass for a trained one.
    copied = converted(tmp_path, "copied", "--to", "ar", family=family)
    assert Tokenizer(copied).mask_added


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_mask_row_becomes_the_mean_row_at_the_median_norm(family, tmp_path):
    path = converted(tmp_path, "out", family=family)
    before, after = (load_file(p / "model.safetensors") for p in (MODELS / family, path))
    mask = Tokenizer(path).mask_id  # the source's tokenizer has the ids 0 .. mask - 1
    row, rows = after[EMBEDDING][mask].clone(), before[EMBEDDING][:mask]
    torch.testing.assert_close(row.norm(), rows.norm(dim=1).median())
    torch.testing.assert_close(row / row.norm(), rows.mean(0) / rows.mean(0).norm())
    after[EMBEDDING][mask] = before[EMBEDDING][mask]
    assert equal(after, before)
    # It was trained on from here: converting again leaves it alone.
    run("--model_name_or_path", path, "--output_dir", tmp_path / "again", "--objective", "mdlm")
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")[EMBEDDING][mask], row)


@pytest.mark.parametrize("even", [True, False])  # as Llama's own vocabulary is, which is a multiple of 64 itself
@pytest.mark.parametrize("tied", [True, False])
def test_a_full_vocabulary_grows_to_a_multiple_of_64(tied, even, tmp_path):
    shutil.copytree(MODELS / "llama", tmp_path / "tokenizer")
    core = tokenizers.Tokenizer.from_file(str(MODELS / "llama/tokenizer.json"))
    core.add_tokens([f"<extra {n}>" for n in range(-core.get_vocab_size() % 64 if even else 3)])
    core.save(str(tmp_path / "tokenizer/tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    assert (tokenizer.mask_id % 64 == 0) == even
    shape = {"vocab_size": tokenizer.mask_id, "tie_word_embeddings": tied, "mask_token_id": None}
    model = tiny("llama", dtype=torch.float32, **shape)
    save_model(model, tmp_path / "full", tokenizer=tokenizer)
    run("--model_name_or_path", tmp_path / "full", "--output_dir", tmp_path / "out", "--mask_init", "keep")
    grown = load_model(tmp_path / "out")
    rows = tokenizer.mask_id
    assert (grown.config.vocab_size, grown.config.mask_token_id) == ((rows // 64 + 1) * 64, rows)
    declare(grown.config)
    for name in (EMBEDDING, "lm_head.weight") if not tied else (EMBEDDING,):
        old, new = model.state_dict()[name], grown.state_dict()[name]
        assert torch.equal(new[:rows], old)
        torch.testing.assert_close(new[rows:].norm(dim=1), old.norm(dim=1).median().expand(len(new) - rows))
    tokens = random_tokens(2, 9)
    causal = Layout.of(positions(2, 9), block_length=1)
    assert torch.equal(model(tokens, causal), grown(tokens, causal)[..., :rows])


def test_a_token_of_the_vocabulary_can_be_the_mask(tmp_path):
    path = converted(tmp_path, "out", "--mask_token", "w400")
    assert load_config(path).mask_token_id == 400
    assert (Tokenizer(path).mask_token, len(Tokenizer(path))) == ("w400", 504)
    assert not torch.equal(load_model(path).head_weight[400], load_model(MODELS / "qwen3").head_weight[400])


def test_a_conversion_declares_what_it_is_told_to(tmp_path):
    config = load_config(converted(tmp_path, "none"))
    assert (config.objective, config.block_length, config.right_shift) == (None, None, None)
    flags = ("--objective", "bd3lm", "--block_size", "8", "--right_shift_logits", "True")
    path = converted(tmp_path, "all", *flags)
    config = load_config(path)
    assert (config.objective, config.block_length, config.right_shift) == ("bd3lm", 8, True)
    assert config_dict(config)["architectures"] == ["A2DQwen3LMHeadModel"]
    run("--model_name_or_path", path, "--output_dir", tmp_path / "same")
    assert config_dict(load_config(tmp_path / "same")) == config_dict(config)
    run("--model_name_or_path", path, "--output_dir", path, "--overwrite", "--objective", "mdlm")  # in its own place
    config = load_config(path)
    assert (config.objective, config.block_length, config.right_shift) == ("mdlm", None, True)
    # An AR checkpoint of ours says ar, and its shift is part of that.
    model = load_model(MODELS / "qwen3")
    declare(model.config, objective="ar")
    save_model(model, tmp_path / "ar", tokenizer=Tokenizer(MODELS / "qwen3"))
    run("--model_name_or_path", tmp_path / "ar", "--output_dir", tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert (config.objective, config.right_shift, config.mask_token_id) == (None, None, 504)


def test_random_weights_follow_the_seed_and_need_no_source_weights(tmp_path):
    path = source(tmp_path)
    (path / "model.safetensors").unlink()
    for name, flags in (("a", ""), ("b", "True"), ("c", "--seed=1")):
        run("--model_name_or_path", path, "--output_dir", tmp_path / name, "--random_init", *flags.split())
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert equal(a, b) and not equal(a, c)
    assert abs(a[EMBEDDING].std().item() - 0.02) < 1e-3
    model = LanguageModel(load_config(path))
    model.init_weights(torch.Generator().manual_seed(42))
    assert equal(a, model.state_dict())  # the mask token's row like all others


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_name_or_path", "/no/such/model"], "/no/such/model is neither"),
        (["--objective", "bd3lm"], "--block_size None: bd3lm needs one"),
        (["--block_size", "8"], "--block_size 8: only bd3lm"),
        (["--objective", "bd3lm", "--block_size", "0"], "--block_size 0"),
        (["--to", "ar", "--objective", "mdlm"], "--objective mdlm means nothing with --to ar"),
        (["--mask_token", "<none>"], "'<none>' is not in the vocabulary"),
        (["--overwrite", "maybe"], "expected True or False"),
        (["--random_init", "False", "--what"], "--what"),
    ],
)
def test_user_errors_are_one_line_and_write_nothing(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run("--model_name_or_path", MODELS / "qwen3", "--output_dir", tmp_path / "out", *flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("convert.py: ") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_overwritten_only_on_request(tmp_path, capsys):
    path = converted(tmp_path, "out")
    with pytest.raises(SystemExit):
        converted(tmp_path, "out")
    assert "is not empty; choose another or pass --overwrite" in capsys.readouterr().err
    converted(tmp_path, "out", "--overwrite", "True", "--objective", "mdlm")
    assert load_config(path).objective == "mdlm"
    (path / "sub").mkdir()
    with pytest.raises(SystemExit):
        converted(tmp_path, "out", "--overwrite")
    assert (path / "sub").is_dir()


def test_the_command_line_prints_a_summary(tmp_path):
    command = [sys.executable, "convert.py", "--model_name_or_path", MODELS / "qwen2", "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, cwd=GOLDEN.parent.parent, capture_output=True, text=True, check=True)
    assert dict(line.split(maxsplit=1) for line in done.stdout.splitlines())["family"] == "qwen2"
    assert "<|mask|>, id 312; its row set to the scaled mean row" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_causal_checkpoint_with_equal_logits(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    there = converted(tmp_path, "there", "--mask_init", "keep", family=family)
    run("--model_name_or_path", there, "--output_dir", tmp_path / "back", "--to", "ar")
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back"), load_model(tmp_path / "back")
    assert type(theirs).__name__ == raw(family)["architectures"][0]
    tokens = random_tokens(2, 17)
    with torch.no_grad():
        logits = ours(tokens, Layout.of(positions(2, 17), block_length=1))
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-4)

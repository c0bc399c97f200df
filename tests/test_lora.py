"""LoRA: only what should be is trained, and an adapter is the same model trained, saved, merged and in PEFT."""

import json

import launch
import pytest
import torch
from conftest import positions, random_tokens, tiny
from safetensors.torch import load_file
from test_parallel import FileSystemReader, ended, few_rows, flags_of, metrics, refused, start  # noqa: F401

import convert
import log
import lora
import sample
import train
from checkpoint import load_config, load_model, save_model
from model import Layout
from parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
LORA = ["--lora", "--r", "4", "--lora_alpha", "8"]
OBJECTIVES = {"ar": [], "mdlm": [], "bd3lm": ["--block_size", "4"]}


def settings(source, *more: str, objective="mdlm") -> train.Settings:
    return train.Settings.parse(flags_of(source, "unused", *more, "--objective", objective, *OBJECTIVES[objective]))


def adapted(source, *more: str, **options):
    """A model as a run of LoRA has it, with products and a mask's row that are not those it began with."""
    model = train.build_model(settings(source, *LORA, *more, **options))[0].double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, tokens=None, block_length=None):
    tokens = random_tokens(2, 9) if tokens is None else tokens
    with torch.no_grad():
        return model(tokens, Layout.of(positions(*tokens.shape), None, block_length))


def adapter(output) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-final/adapter_model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return launch.make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def untied(tmp_path_factory, source) -> str:
    """The same with a head of its own."""
    path, tokenizer = tmp_path_factory.mktemp("untied"), train.Tokenizer(source)
    shape = {"vocab_size": 320, "mask_token_id": tokenizer.mask_id, "tie_word_embeddings": False}
    model = tiny(**shape, initializer_range=0.05)
    model.config.dtype = "float64"
    save_model(model, path / "model", tokenizer=tokenizer)
    return str(path / "model")


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_products_and_the_masks_row_are_trained(tmp_path, source, objective):
    train.main(flags_of(source, tmp_path, *LORA, "--objective", objective, *OBJECTIVES[objective], steps=3))
    trained, base = adapter(tmp_path), load_model(source)
    row = lora.PREFIX + lora.ROW
    names = {name.split(".")[-3] for name in trained if "lora_" in name}
    assert names == set(lora.PROJECTIONS) and len(trained) == 2 * 7 * 2 + (objective != "ar")
    assert all(tensor.abs().max() > 0 for tensor in trained.values())
    if objective != "ar":
        assert (trained[row] - base.model.embed_tokens.weight[base.config.mask_token_id]).abs().max() > 1e-4


def test_a_gradient_is_where_it_should_be_and_the_base_stays_what_it_was_to_the_bit(source, untied):
    for path in (source, untied):
        model = adapted(path)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizers = train.build_optimizers(model, settings(path, *LORA, "--weight_decay", "0.1"))
        tokens = random_tokens(2, 9)
        tokens[:, 3] = model.config.mask_token_id
        for _ in range(3):
            model(tokens, Layout.of(positions(2, 9))).square().mean().backward()
            for name, p in model.named_parameters():
                assert (p.grad is not None) == (".lora_" in name or name.endswith("embed_tokens.row")), name
                assert p.grad is None or p.grad.abs().max() > 0
            train.update(optimizers, 1e-2, torch.ones(()))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_freeze_embeddings_trains_all_else_and_the_masks_row(tmp_path, source, untied, head):
    path = source if head == "tied" else untied
    train.main(flags_of(path, tmp_path, "--freeze_embeddings", "--save_steps", "2", steps=3))
    before, after = load_model(path), load_model(tmp_path / "checkpoint-final")
    changed = before.model.embed_tokens.weight != after.model.embed_tokens.weight
    assert changed.any(1).nonzero().flatten().tolist() == [before.config.mask_token_id]
    assert head == "tied" or torch.equal(before.lm_head.weight, after.lm_head.weight)
    ours, theirs = (dict(model.model.layers.named_parameters()) for model in (before, after))
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_products_begin_at_zero_and_a_part_of_their_inputs_is_dropped(source):
    plain, (model, _) = load_model(source, dtype=torch.float32), train.build_model(settings(source, *LORA))
    assert torch.equal(logits(plain), logits(model))
    with pytest.raises(ValueError, match="less than 1"):
        settings(source, "--lora", "--lora_dropout", "1")

    tokens, x = random_tokens(2, 500), torch.ones(2, 500, 64)
    layout = Layout.of(positions(2, 500))
    dropout = lora.Dropout(0.3, seed=1)

    def dropped(number=0, step=0, rows=slice(None), columns=slice(None)):
        dropout.step = step
        dropout.begin(None, (tokens[rows, columns], layout.map(lambda x: x[rows, columns])), {})
        return dropout(x[rows, columns], number)

    seen = dropped()
    assert set(seen.unique().tolist()) == {0, torch.tensor(1 / 0.7).item()}
    for dim in ((0, 1), (0, 2), (1, 2)):  # each feature, token and row is dropped as often, within five deviations
        share = (seen == 0).double().mean(dim)
        assert ((share - 0.3).abs() < 5 * (0.21 / (seen.numel() / share.numel())) ** 0.5).all()
    features = (seen == 0).double().flatten(0, 1)
    assert (torch.corrcoef(features.T) - torch.eye(64)).abs().max() < 0.2
    assert (torch.corrcoef(features[:200]) - torch.eye(200)).abs().max() < 0.75  # of 64 numbers each
    for other in (dropped(number=1), dropped(step=1)):
        assert ((other == 0) & (seen == 0)).double().mean() == pytest.approx(0.09, abs=0.01)
    assert torch.equal(dropped(rows=slice(1, 2)), seen[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Saved, merged, resumed, on many processes


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_adapter_is_the_same_model_trained_and_merged(tmp_path, source, untied, objective):
    for n, path in enumerate((source, untied)):
        model = adapted(path, "--target_modules", "q_proj,o_proj,down_proj" if n else "all-linear", objective=objective)
        output = tmp_path / str(n)
        save_model(model, output, tokenizer=train.Tokenizer(path))
        merged = load_model(output)
        tokens = random_tokens(2, 9)
        tokens[:, 3] = model.config.mask_token_id
        assert not torch.allclose(logits(load_model(path), tokens), logits(model.eval(), tokens), atol=1e-3)
        torch.testing.assert_close(logits(merged, tokens), logits(model, tokens), rtol=1e-12, atol=1e-12)
        assert merged.config == model.config and merged.config.adapter is None
        assert load_model(output, dtype=torch.float32).head_weight.dtype == torch.float32

        convert.main(["--merge", str(output), "--output_dir", str(tmp_path / f"merged-{n}")])
        whole = load_model(tmp_path / f"merged-{n}")
        assert not (tmp_path / f"merged-{n}/adapter_config.json").exists()
        assert whole.config == merged.config and whole.config.dtype == "float64"
        assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_a_run_leaves_is_small_declares_what_it_is_and_is_used_like_any_checkpoint(tmp_path, source, capsys):
    train.main(flags_of(source, tmp_path, *LORA, "--save_steps", "2", objective="bd3lm", steps=3))
    said = capsys.readouterr().out
    assert "trained" in said
    for name in ("checkpoint-2", "checkpoint-final"):
        assert not (tmp_path / name / "model.safetensors").exists()
        config, peft = load_config(tmp_path / name), json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config.objective, config.block_length, config.right_shift) == ("bd3lm", 4, False)
        assert (peft["base_model_name_or_path"], peft["r"], peft["lora_alpha"]) == (source, 4, 8)
    base = sum(p.numel() for p in load_model(source).parameters())
    trained = sum(tensor.numel() for tensor in adapter(tmp_path).values())
    kept = FileSystemReader(tmp_path / "checkpoint-2/state").read_metadata().state_dict_metadata
    assert trained < base / 3 and all(".lora_" in name or ".row" in name for name in kept)

    final = str(tmp_path / "checkpoint-final")
    with pytest.raises(SystemExit) as end:
        sample.main(["--model_name_or_path", final, "--max_new_tokens", "4", "--device", "cpu", "1+2?"])
    assert not end.value.code and "tokens per forward" in "".join(capsys.readouterr())
    train.main(flags_of(final, tmp_path / "further", objective="bd3lm", steps=1))
    assert (tmp_path / "further/checkpoint-final/model.safetensors").is_file()
    assert "is an adapter" in refused(capsys, flags_of(final, tmp_path / "again", *LORA, objective="bd3lm"))


def test_a_resumed_run_goes_on_as_if_it_had_not_ended(tmp_path, source, capsys):
    for more in (LORA, ["--freeze_embeddings"]):
        whole, torn = tmp_path / f"whole{len(more)}", tmp_path / f"torn{len(more)}"
        train.main(flags_of(source, whole, *more, "--save_steps", "2", steps=4))
        again = [*more, "--checkpoint_activations", "full", "--resume_from_checkpoint", str(whole / "checkpoint-2")]
        train.main(flags_of(source, torn, *again, steps=4))
        file = f"checkpoint-final/{'adapter_' if more == LORA else ''}model.safetensors"
        ours, theirs = load_file(whole / file), load_file(torn / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # A base of the same shape, but with other weights.
    other = tmp_path / "other"
    model = load_model(source)
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight + 1
    save_model(model, other, tokenizer=train.Tokenizer(source))
    resumed = [*LORA, "--resume_from_checkpoint", str(tmp_path / f"whole{len(LORA)}/checkpoint-2")]
    assert "base model is not that of" in refused(capsys, flags_of(str(other), tmp_path / "x", *resumed, steps=4))


def test_any_number_of_processes_trains_the_same_adapter(tmp_path, source):
    cases = {"ddp": "mdlm", "zero2": "bd3lm", "zero3": "mdlm", "hybrid": "bd3lm"}

    def plan(way, processes, accumulation):
        flags = [*LORA, "--lora_dropout", "0.3", "--gradient_accumulation_steps", str(accumulation), "--sample_prompt"]
        flags += ["7 is", "--parallel", way if processes > 1 else "ddp"]
        output, rows = tmp_path / f"{way}-{processes}", 8 // processes // accumulation
        flags = flags_of(source, output, *flags, objective=cases[way], rows=rows, steps=2)
        return {"flags": flags, "local": 1 if way == "hybrid" else processes}

    ended(start([plan(way, 1, 1) for way in cases]))
    ended(start([plan(way, 2, 2) for way in cases], 2), timeout=900)
    for way in cases:
        one, two = (adapter(tmp_path / f"{way}-{n}") for n in (1, 2))
        assert one.keys() == two.keys() and len(one) == 29
        assert all((one[name] - two[name]).abs().max() < 1e-9 for name in one), way
        answers = [[row["sample"] for row in metrics(tmp_path / f"{way}-{n}") if "sample" in row] for n in (1, 2)]
        assert answers[0] == answers[1]


def test_the_memory_told_is_that_of_what_is_trained():
    """Of Qwen3-0.6B: gradients and moments of the products and the mask's row alone, as the README has it."""
    shape = {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = train.LanguageModel(train.Config(**shape, objective="mdlm", mask_token_id=151_669))
        number, args = model.size, settings("unused", "--compute_dtype", "bfloat16")
        whole, kept = log.memory(args, model, ALONE)
        lora.adapt(model, lora.Adapting(lora=True), ".", 0)
    D, Q, G, inner = 1024, 2048, 1024, 3072
    trained = 28 * 32 * (2 * (D + Q) + 2 * (D + G) + 3 * (D + inner)) + D
    assert (log.trained(model), model.size) == (trained, number + trained)
    state, activations = log.memory(args, model, ALONE)
    assert whole == 16 * number and state == 4 * number + 16 * trained
    assert f"{trained / 1e6:.0f} {state / 1e9:.1f} {whole / 1e9:.1f}" == "20 2.7 9.5"
    assert activations - kept == 8 * 48 * 28 * (3 * D + Q + 2 * D + inner) * 3
    frozen = train.Settings.parse(flags_of("unused", "unused", "--lora", "--checkpoint_activations", "full"))
    assert log.memory(frozen, model, ALONE)[1] < kept


# ---------------------------------------------------------------------------------------------------------------------
# PEFT, and what is refused


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_peft_loads_it_onto_transformers_model_with_equal_logits(tmp_path, source, untied, head):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    path = source if head == "tied" else untied
    ours = adapted(path).eval()
    save_model(ours, tmp_path / "adapter", tokenizer=train.Tokenizer(path))

    # The same weights under the name of a plain causal model, which is what transformers knows.
    base = load_model(path)
    base.config.objective = "ar"
    save_model(base, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = random_tokens(2, 9)
    tokens[:, 3] = ours.config.mask_token_id
    with torch.no_grad():
        found = theirs(tokens).logits
        merged = theirs.merge_and_unload()(tokens).logits
    torch.testing.assert_close(found, logits(ours, tokens, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, logits(load_model(tmp_path / "adapter"), tokens, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--r", "8"], "--r 8: only LoRA has it; add --lora"),
        (["--target_modules", "q_proj"], "--target_modules q_proj: only LoRA has it"),
        (["--lora", "--target_modules", "q_prj"], "did you mean q_proj"),
        (["--lora", "--target_modules", "lm_head"], "'lm_head' is no projection; expected all-linear"),
        (["--lora", "--optim", "muon"], "use adamw"),
        (["--lora", "--save_dtype", "bfloat16"], "an adapter is float32"),
        (["--lora", "--lora_dropout", "1"], "less than 1"),
        (["--lora", "--r", "0"], "at least 1"),
        (["--lora", "--model_name_or_path", "builtin/tiny"], "names its base"),
    ],
)
def test_flags_that_mean_nothing_are_refused(tmp_path, source, capsys, flags, said):
    assert said in refused(capsys, flags_of(source, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa"'),
        ({"peft_type": "IA3"}, 'peft_type "IA3"'),
        ({"r": 0}, "r 0"),
        ({"r": "4"}, 'r "4"'),
        ({"base_model_name_or_path": None}, "base_model_name_or_path null"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "neither a directory nor a Hub id"),
        ({"r": 5}, "do not fit each other"),
        ({"lora_alpha": float("nan")}, "lora_alpha NaN"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [10_000]}}, "do not fit each other"),
        ({"trainable_token_indices": None}, "do not fit each other"),
    ],
)
def test_an_adapter_that_is_none_of_ours_is_refused_in_one_line(tmp_path, source, changes, said):
    save_model(adapted(source), tmp_path / "a", tokenizer=train.Tokenizer(source))
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((ValueError, FileNotFoundError)) as stop:
        load_model(tmp_path / "a")
    assert said in str(stop.value) and "adapter_config.json" in str(stop.value)


def test_merge_wants_an_adapter_and_nothing_else_to_do(tmp_path, source, capsys):
    def refusal(*flags) -> str:
        with pytest.raises(SystemExit):
            convert.main([*flags, "--output_dir", str(tmp_path / "out")])
        return capsys.readouterr().err

    assert "holds no adapter_config.json" in refusal("--merge", source)
    assert "--to" in refusal("--merge", source, "--to", "ar")
    assert "--merge" in refusal()
    assert not (tmp_path / "out").exists()

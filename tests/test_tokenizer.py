"""Special ids and chat rows against the reference's outputs, and the laws of templates, masks and saved files."""

import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import FAMILIES, GOLDEN, golden_json

import templates
from tokenizer import Tokenizer

QWEN3 = GOLDEN / "models" / "qwen3"
CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w12"},
    {"role": "user", "content": "w13"},
    {"role": "assistant", "content": "w14 w15"},
]
TEXTS = [
    "def f(x):\n    return x + 10\n",
    "The 3rd – naïve — test 🎉, isn't it?\r\n\t\n",
    "a  b   c",
    "",
    "日本 <b>",
] * 5


def copy(source: Path, target: Path, **changes) -> Path:
    """The directory `source` in `target`, with fields of tokenizer_config.json changed (None: removed)."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "tokenizer_config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(kept))
    return target


def learnt(tokenizer, rendered) -> str:
    ids, supervised = rendered
    return tokenizer.decode([i for i, yes in zip(ids, supervised, strict=True) if yes], skip_special_tokens=False)


def test_special_ids_equal_the_references():
    expected = golden_json("data")["special_ids"]
    tokenizer = Tokenizer(QWEN3)
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id) == tuple(expected[k] for k in ("mask", "pad", "eos"))
    assert len(tokenizer) == expected["len_tokenizer"]
    assert tokenizer.mask_added and tokenizer.mask_untrained
    assert tokenizer.end_ids == [500, 502]
    assert tokenizer.bos_id is None


def test_rendering_equals_the_references_sft_rows():
    tokenizer = Tokenizer(QWEN3)
    cases = [case for case in golden_json("data")["sft"] if case["mask_prompt_loss"]]
    for case in cases:
        ids, supervised = tokenizer.render(case["messages"])
        assert ids == case["out"]["input_ids"]
        labels = [i if learnt else -100 for i, learnt in zip(ids, supervised)]
        assert labels == case["out"]["labels"]
        prompt, nothing = tokenizer.render(case["messages"][:-1], reply=True)
        assert prompt == ids[: case["out"]["prompt_len"]]
        assert not any(nothing)
    assert cases


def test_all_assistant_turns_are_learnt_where_the_template_keeps_them():
    tokenizer = Tokenizer(QWEN3)
    assert learnt(tokenizer, tokenizer.render(CHAT)) == "w14 w15 <|im_end|>"
    assert learnt(tokenizer, tokenizer.render(CHAT, train_on="all")) == "w12 <|im_end|> w14 w15 <|im_end|>"


def test_a_template_that_rewrites_earlier_turns_cannot_train_on_all(tmp_path):
    """As Qwen3's does: thinking stands in the last assistant turn and is dropped from the others."""
    rewrites = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if not enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
    )
    Tokenizer.train(TEXTS, 300, template=rewrites).save(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert learnt(tokenizer, tokenizer.render(CHAT)) == "w14 w15<|im_end|>\n"
    assert learnt(tokenizer, tokenizer.render(CHAT, thinking=True)) == "<think>\nw14 w15<|im_end|>\n"
    with pytest.raises(ValueError, match=r"turn 3 otherwise.*last turn only"):
        tokenizer.render(CHAT, train_on="all")


def test_a_prompt_in_training_is_the_prompt_in_sampling_even_where_a_token_would_span_its_end():
    tokenizer = Tokenizer.train(["\n\n", "x\n\ny"] * 9 + TEXTS, 300)
    assert len(tokenizer.encode("\n\n")) == 1
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\ny"}]
    ids, supervised = tokenizer.render(chat)
    prompt, _ = tokenizer.render(chat[:-1], reply=True)
    assert ids[: len(prompt)] == prompt
    assert supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    text = tokenizer.fill(chat, reply=False, thinking=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode(text)[: len(prompt)] != prompt  # the token does span it


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        (CHAT[:-1], {}, "do not end with an assistant turn"),
        ([], {}, "do not end with an assistant turn"),
        (CHAT, {"train_on": "most"}, "most"),
        ([{"role": "user", "content": None}], {"reply": True}, "refuses these messages"),
        ([{"role": "user"}], {"reply": True}, "refuses these messages"),
    ],
)
def test_unusable_messages_are_refused(messages, options, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer(QWEN3).render(messages, **options)


def test_templates_see_what_transformers_gives_them(tmp_path):
    template = (
        "  {% if true %}\n"
        "{{ bos_token is defined }} {{ eos_token }} {{ {'a': '<é>'} | tojson }} {{ strftime_now('%Y') | length }}\n"
        "  {% endif %}\n"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    )
    (copy(QWEN3, tmp_path) / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.fill(CHAT[:2], reply=False, thinking=False) == 'False <|im_end|> {"a": "<é>"} 4\nw9'
    with pytest.raises(ValueError, match="too long"):
        tokenizer.render(CHAT)


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set x = 10 ** (10 ** 9) %}",
    "{{ 'a' * 3000000000 }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ '{:3000000000}'.format(1) }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ 'a\nb' | indent(3000000000) }}",
    "{{ [1] | tojson(indent=3000000000) }}",
    "{{ lipsum(n=10000000) }}",
    "{% for a in range(60) %}{{ 'a' * 1000000 }}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{% for a in range(10 ** 9) %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999) | map('string') | sort | join | list | length %}{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([a]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
]


def filled(template: str | None = None, chat=CHAT) -> str:
    tokenizer = Tokenizer(QWEN3)
    tokenizer.template = template or tokenizer.template
    return tokenizer.fill(chat, reply=False, thinking=False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limits")
@pytest.mark.parametrize("place", ["main thread", "another thread"])
@pytest.mark.parametrize("template", BOMBS, ids=lambda text: text[:30])
def test_a_template_that_would_take_all_time_or_memory_is_ended(template, place, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ValueError, match=r"refuses these messages: .{9}"),
    ):
        filled(template) if place == "main thread" else pool.submit(filled, template).result()


def test_a_long_chat_is_no_bomb():
    assert len(filled(chat=[{"role": "user", "content": "w1 " * 500_000}, CHAT[-1]])) > templates.CHARACTERS


def test_threads_and_forks_render_each_its_own_chats():
    chats = [[{"role": "user", "content": f"w{i}"}] for i in range(40)]
    expected = [filled(chat=chat) for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda chat: filled(chat=chat), chats)) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(rendered_in_a_fork, chats) == expected


def rendered_in_a_fork(chat):
    return filled(chat=chat)


def test_what_interrupts_a_template_does_not_disturb_the_next_one():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = filled()
    process = templates.renderer(os.getpid()).process
    process.send_signal(signal.SIGTERM)  # a run that gets it goes on for a step
    assert filled() == before and process.poll() is None
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            filled(BOMBS[0])
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert filled() == before and process.poll() is not None
    templates.renderer(os.getpid()).process.kill()
    templates.renderer(os.getpid()).process.wait()
    assert filled() == before


def test_a_process_that_is_killed_at_its_work_is_an_error_and_no_refusal():
    renderer = templates.Renderer()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(renderer.ask, (BOMBS[0], {"messages": []}, 10))
        while renderer.process is None:
            pass
        renderer.process.kill()
        with pytest.raises(OSError, match=r"has ended \(status -9\)"):
            asked.result()


@pytest.mark.parametrize(
    "form", [["x"], [{"template": "x"}], [{"name": ["a"], "template": "x"}], [{"name": "a"}], 3, {"a": 1}, [[]]]
)
def test_a_malformed_template_is_refused(form, tmp_path):
    copy(QWEN3, tmp_path, chat_template=form)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged: chat_template.*: expected a text"):
        Tokenizer(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 1000}
SEQUENCE = {"type": "Sequence", "normalizers": [REPLACE] * 5}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": SEQUENCE},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}},
        {"decoder": {"type": "Sequence", "decoders": [REPLACE] * 4}},
        {"normalizer": REPLACE, "decoder": REPLACE},
    ],
)
def test_a_tokenizer_that_makes_texts_a_million_times_as_long_is_refused(parts, tmp_path):
    core = json.loads((copy(QWEN3, tmp_path) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(core | parts))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged: it may make a text .* times as long; fetch"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(core | {"normalizer": REPLACE}))
    assert len(Tokenizer(tmp_path).encode("x")) > 0


@pytest.mark.parametrize("tokens", [[], "x", None, 3])
def test_malformed_added_tokens_are_refused(tokens, tmp_path):
    copy(QWEN3, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": tokens}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json is damaged: added_tokens_decoder .*: expected an obj"
    ):
        Tokenizer(tmp_path)


def test_a_regular_expression_that_gives_up_is_an_error_of_the_files(tmp_path):
    copy(QWEN3, tmp_path)
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(core | {"pre_tokenizer": split}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot encode 'xxx.*fetch it again"):
        Tokenizer(tmp_path).encode("x" * 60)


@pytest.mark.parametrize("ids", [[[1]], {}, "2", [2, "x"], 2.5, True, [None]])
def test_malformed_end_ids_are_refused(ids, tmp_path):
    copy(QWEN3, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id .*: expected an id, or a list"):
        Tokenizer(tmp_path)


def test_the_template_comes_from_a_file_a_string_or_a_list(tmp_path):
    text = (QWEN3 / "chat_template.jinja").read_text()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    for form in (text, named):
        (copy(QWEN3, tmp_path, chat_template=form) / "chat_template.jinja").unlink()
        assert Tokenizer(tmp_path).render(CHAT) == Tokenizer(QWEN3).render(CHAT)
    copy(QWEN3, tmp_path, chat_template=None)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(tmp_path).render(CHAT)


def test_saved_equals_loaded_and_the_source_is_kept(tmp_path):
    (tmp_path / "source").mkdir()
    source = copy(QWEN3, tmp_path / "source", padding_side="left")
    (source / "generation_config.json").write_text('{"eos_token_id": [502, 503, 7]}')
    tokenizer = Tokenizer(source)
    assert tokenizer.end_ids == [500, 502, 503]  # 7 is a word
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer(tmp_path / "saved")
    assert not again.mask_added and not again.mask_untrained
    for name in ("mask_id", "mask_token", "end_ids", "eos_id", "pad_id", "bos_id", "template", "special"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.render(CHAT) == tokenizer.render(CHAT)
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert saved.pop("mask_token") == "<|mask|>"
    assert saved["added_tokens_decoder"].pop("504")["special"]
    assert saved == json.loads((source / "tokenizer_config.json").read_text())

    tokenizer.save(tmp_path / "saved", mask=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        saved, read = (json.loads((directory / name).read_text()) for directory in (tmp_path / "saved", source))
        assert saved == read, name


def test_the_mask_is_the_declared_token_or_the_one_asked_for(tmp_path):
    declared = Tokenizer(copy(QWEN3, tmp_path, mask_token="w7"))
    assert (declared.mask_id, declared.mask_added, declared.mask_untrained) == (7, False, False)
    assert len(declared) == 504
    asked = Tokenizer(tmp_path, mask_token="w8")
    assert (asked.mask_id, asked.mask_added, asked.mask_untrained) == (8, False, True)
    assert not Tokenizer(tmp_path, mask_token="w7").mask_untrained
    with pytest.raises(ValueError, match="'<none>' is not in the vocabulary"):
        Tokenizer(tmp_path, mask_token="<none>")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer(GOLDEN)


def test_special_tokens_are_decoded_only_when_asked_for():
    tokenizer = Tokenizer(QWEN3)
    ids = tokenizer.encode("w1 <|mask|> w2 <|im_end|>")
    assert ids == [1, tokenizer.mask_id, 2, 502]
    assert tokenizer.decode(ids) == "w1 w2"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "w1 <|mask|> w2 <|im_end|>"


def test_a_trained_tokenizer_is_lossless_deterministic_and_splits_digits():
    tokenizer = Tokenizer.train(TEXTS, 320)
    assert tokenizer.core.to_str() == Tokenizer.train(iter(TEXTS), 320).core.to_str()
    for text in [*TEXTS, "\x00 \ufeff any bytes ÿ 𝔘"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1010")) == 4
    assert tokenizer.mask_id == len(tokenizer) - 1 <= 320  # not counted in vocab_size
    assert tokenizer.end_ids == [0, 2] and (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 0, 2)
    with pytest.raises(ValueError, match="vocab_size 100"):
        Tokenizer.train(TEXTS, 100)


def test_an_embedding_needs_a_row_for_every_id():
    tokenizer = Tokenizer(QWEN3)
    last = max(tokenizer.ids)
    assert last == tokenizer.mask_id
    tokenizer.fit(last + 1)
    tokenizer.fit(last, mask=False)
    for rows, mask in ((last, True), (last - 1, False)):
        with pytest.raises(ValueError, match=f"token id {rows} and the embedding {rows} rows"):
            tokenizer.fit(rows, mask=mask)


def test_a_token_that_the_config_leaves_open_is_none(tmp_path):
    config = json.loads((copy(QWEN3, tmp_path) / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert "pad_token" not in tokenizer.special and tokenizer.pad_id == tokenizer.eos_id


def test_a_rare_pair_is_not_merged():
    texts = ["common"] * 500 + ["rare"] * 4  # 504 texts: a merge needs 5 occurrences
    tokenizer = Tokenizer.train(texts, 400)
    assert (len(tokenizer.encode("common")), len(tokenizer.encode("rare"))) == (1, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_chats_equal_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(GOLDEN / "models" / family)
    theirs.add_special_tokens({"mask_token": "<|mask|>"})
    ours = Tokenizer(GOLDEN / "models" / family)
    ours.save(tmp_path)
    for other in (theirs, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert (other.mask_token_id, other.eos_token_id, len(other)) == (ours.mask_id, ours.eos_id, len(ours))
        assert other.apply_chat_template(CHAT, return_dict=False) == ours.render(CHAT)[0]
        prompt = other.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == ours.render(CHAT[:-1], reply=True)[0]

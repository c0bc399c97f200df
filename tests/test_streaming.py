"""Streams: every row once a pass, the same batches however they are cut, exact resumption, packing and hold-outs."""

import json
from collections import Counter
from functools import partial
from itertools import islice

import pytest
import torch
from conftest import GOLDEN, golden_json
from test_data import cache, chat, load_rows, tokenize_chat, write  # noqa: F401

import data
import loaders
import stream
from tokenizer import Tokenizer

TOK = Tokenizer(GOLDEN / "models" / "qwen3")
EOS = TOK.eos_id


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """96 rows of one word, w0 to w95, in three files, and two to test on: with EOS a row is a piece of two tokens."""
    root = tmp_path_factory.mktemp("words")
    for shard in range(3):
        write(root / f"train-{shard}.jsonl", [{"text": f"w{i + 32 * shard}"} for i in range(32)])
    write(root / "test.jsonl", [{"text": "w400"}, {"text": "w401"}])
    return str(root)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """60 rows of 1 to 17 words in two files, whose pieces cross rows, windows and passes."""
    root = tmp_path_factory.mktemp("texts")
    rows = [{"text": " ".join(f"w{(i * 5 + j) % 400}" for j in range(1 + i * 7 % 17))} for i in range(60)]
    for shard in range(2):
        write(root / f"train-{shard}.jsonl", rows[shard * 30 : shard * 30 + 30])
    write(root / "test.jsonl", rows[:1])
    return str(root)


def loader(
    spec: str,
    micro=2,
    accumulation=2,
    *,
    max_length=2,
    stage="pt",
    reading=None,
    packing=None,
    collating=None,
    **options,
):
    reading = data.Reading(stage=stage, max_length=max_length, **reading or {})
    return loaders.StreamLoader(
        stream.Stream(spec, TOK, reading, **packing or {}),
        micro_batch_size=micro,
        accumulation=accumulation,
        collate=partial(loaders.collate, pad_id=TOK.pad_id, **collating or {}),
        **{"seed": 1, "shuffle_buffer": 16, "prefetch": 0} | options,
    )


def take(loader, steps: int) -> list[dict]:
    """Each of the next steps as one batch, in order of the samples."""
    taken = []
    for step in islice(loader.batches(), steps):
        joined = {key: torch.cat([batch[key] for batch in step]) for key in step[0] if key != "epoch"}
        order = joined["sample"].argsort()
        taken.append({key: value[order] for key, value in joined.items()})
    return taken


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


def firsts(steps: list[dict]) -> list[int]:
    return torch.cat([step["tokens"][:, 0] for step in steps]).tolist()


def test_a_pass_holds_every_row_once_and_passes_differ(words):
    steps = take(loader(words), 72)  # 24 steps of 4 rows are a pass
    passes = [firsts(steps[begin : begin + 24]) for begin in (0, 24, 48)]
    assert all(sorted(rows) == list(range(96)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert not all(row % 4 == n % 4 for n, row in enumerate(passes[0]))  # rows are shuffled before they are dealt, too
    assert torch.cat([step["sample"] for step in steps]).tolist() == list(range(288))
    assert firsts(take(loader(words, shuffle=False), 24)) == list(range(96))
    assert firsts(take(loader(words, seed=2), 24)) != passes[0] == firsts(take(loader(words), 24))


def test_shards_change_their_order_from_pass_to_pass_unless_limited_and_pieces_of_a_text_within_a_window(
    words, tmp_path
):
    def orders(spec, shuffle):
        """Of each of eight passes, its rows' files in turn."""
        reader = stream.Reader(loader(spec).stream.sources, 0, shuffle)
        taken = [[int(row["text"][1:]) // 32 for _, row in reader.take(100)] for _ in range(8)]
        return {tuple(dict.fromkeys(files)) for files in taken}

    assert len(orders(words, True)) > 2 and orders(words, False) == {(0, 1, 2)}
    assert orders(f"{words}[train:40]", True) == {(0, 1)}  # always the same rows
    write(tmp_path / "train.jsonl", [{"text": " ".join(f"w{i}" for i in range(40))}])
    write(tmp_path / "test.jsonl", [{"text": "w400"}])
    one = partial(loader, str(tmp_path), 1, 1, reading={"insert_eos": False})
    assert firsts(take(one(shuffle=False), 20)) == list(range(0, 40, 2))
    assert firsts(take(one(), 20)) != sorted(firsts(take(one(), 20))) == list(range(0, 40, 2))


@pytest.mark.parametrize("spec, max_length", [("words", 2), ("texts", 8)])
def test_ranks_and_accumulation_cut_the_same_batches(spec, max_length, request):
    spec = request.getfixturevalue(spec)
    whole = take(loader(spec, 4, 1, max_length=max_length), 30)
    for micro, accumulation, world_size in ((1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
        ranks = [
            take(loader(spec, micro, accumulation, max_length=max_length, rank=r, world_size=world_size), 30)
            for r in range(world_size)
        ]
        joined = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in zip(*ranks)]
        order = [step["sample"].argsort() for step in joined]
        assert same(whole, [{key: step[key][o] for key in step} for step, o in zip(joined, order)])


@pytest.mark.parametrize("spec, max_length", [("words", 2), ("texts", 8)])
def test_a_stream_resumed_after_any_step_goes_on_the_same(spec, max_length, request):
    make = partial(loader, request.getfixturevalue(spec), max_length=max_length)
    whole = take(make(), 40)
    for done in range(0, 40, 3):
        first = make()
        assert same(take(first, done), whole[:done])
        rest = make(prefetch=2)
        assert len(first.state["windows"]) <= 5  # what no slot needs any more is forgotten
        rest.load_state(json.loads(json.dumps(first.state)))
        assert same(take(rest, 40 - done), whole[done:])


def test_a_stream_resumes_on_another_number_of_ranks(texts):
    """Four ranks, then two, then one, by threads ahead or not: the batches of a single process, none twice or lost."""
    whole, step, states = take(loader(texts, 4, 1, max_length=8), 45), 0, None
    for world_size, steps in ((4, 7), (2, 15), (1, 9), (4, 14)):
        ranks = [
            loader(texts, 4 // world_size, 1, max_length=8, rank=r, world_size=world_size, prefetch=r)
            for r in range(world_size)
        ]
        for rank in ranks:
            if states:
                rank.load_state(states)
        parts = [take(rank, steps) for rank in ranks]
        for own in zip(*parts):
            joined = {key: torch.cat([part[key] for part in own]) for key in own[0]}
            order = joined["sample"].argsort()
            assert same([whole[step]], [{key: value[order] for key, value in joined.items()}])
            step += 1
        states = [json.loads(json.dumps(rank.state)) for rank in ranks]
    assert step == len(whole)
    with pytest.raises(ValueError, match="the states of all its ranks"):
        loader(texts, 4, 1, max_length=8).load_state(states[:2])
    with pytest.raises(ValueError, match=r"step is .* saved with 46"):
        loader(texts, 4, 1, max_length=8).load_state([*states[:3], states[3] | {"step": 46}])
    with pytest.raises(ValueError, match=r"global batch size is 8, but .* saved with 4"):
        loader(texts, 8, 1, max_length=8).load_state(states)


def test_worker_processes_change_nothing_and_resume(texts):
    whole = take(loader(texts, max_length=8), 20)
    first = loader(texts, max_length=8, workers=2, prefetch=3)
    assert same(take(first, 8), whole[:8])
    assert first.counts["kept"] == first.counts["read"] > 0
    second = loader(texts, max_length=8, workers=1)
    second.load_state(json.loads(json.dumps(first.state)))
    assert same(take(second, 12), whole[8:])


def test_a_mistake_in_a_worker_process_is_told_in_the_same_words(tmp_path):
    write(tmp_path / "train-0.jsonl", [{"text": f"w{i}"} for i in range(40)])
    write(tmp_path / "test.jsonl", [{"text": "w0"}])
    (tmp_path / "train-1.jsonl").write_bytes(b'{"text": "w\xff"}\n')
    for options in ({}, {"prefetch": 2}, {"workers": 1}):
        with pytest.raises(ValueError, match=r"is not UTF-8 text: .*byte 0xff") as error:
            take(loader(str(tmp_path), **options), 40)
        assert "\n" not in str(error.value)


def test_texts_are_packed_across_rows_windows_and_passes_without_losing_a_token(texts):
    """Slot s of 4 has rows s, s + 4, ... one after another, cut into pieces."""
    lines = [row["text"] for row in data.raw(texts, "train")]
    encode = data.TextEncoder(TOK, data.Reading())
    steps = take(loader(texts, shuffle=False, max_length=8), 60)
    for slot in range(4):
        tokens = torch.cat([step["tokens"][slot] for step in steps]).tolist()
        expected = [i for n in range(slot, 4 * len(lines), 4) for i in encode(lines[n % 60]).tokens]
        assert tokens == expected[: len(tokens)] and len(tokens) == 60 * 8


def test_one_slot_packs_texts_as_the_reference_does(tmp_path):
    cases = golden_json("data")["group"]
    write(tmp_path / "train.jsonl", [{"text": text} for text in cases[0]["texts"]])
    write(tmp_path / "test.jsonl", [{"text": "w1"}])
    for case in cases:
        if case["drop_tail"] and case["input_ids"]:
            reading = {"insert_eos": case["insert_eos"]}
            one = loader(str(tmp_path), 1, 1, max_length=case["seq_length"], shuffle=False, reading=reading)
            steps = take(one, len(case["input_ids"]))
            assert torch.cat([step["tokens"] for step in steps]).tolist() == case["input_ids"]


def test_limits_and_turns_of_several_sets(words, texts):
    assert sorted(set(firsts(take(loader(f"{words}[train:8]"), 20)))) == list(range(8))
    two = loader(
        f"{words}[train:12]+builtin/stdlib[train:4]", shuffle=False, max_length=1, reading={"insert_eos": False}
    )
    reader = stream.Reader(two.stream.sources, 0, False)
    for _ in range(2):  # passes
        taken = reader.take(100)
        assert [n for n, _ in taken] == [0, 1] * 4 + [0] * 8
    assert [row["text"] for n, row in taken if n == 0] == [f"w{i}" for i in range(12)]


def test_a_stream_without_test_rows_holds_some_out_of_training(tmp_path):
    write(tmp_path / "train-0.jsonl", [{"text": f"w{i}"} for i in range(200)])
    write(tmp_path / "train-1.jsonl", [{"text": f"w{i}"} for i in range(200, 400)])
    load = partial(load_rows, tokenizer=TOK, max_length=2, rows_of=stream.load_split)
    test = {int(row["tokens"][0]) for row in load(str(tmp_path), split="test")}
    train = set(firsts(take(loader(str(tmp_path)), 250)))
    assert not train & test and train | test == set(range(400)) and 8 <= len(test) <= 35
    assert {int(row["tokens"][0]) for row in load(str(tmp_path), split="validation")} == test
    assert len(load(f"{tmp_path}[train:3]", split="test")) == len(test)
    assert len(load(f"{tmp_path}[train:3,test:2]", split="test")) == 2
    few = set(firsts(take(loader(f"{tmp_path}[train:3]"), 9)))
    assert len(few) == 3 and not few & test
    one = write(tmp_path / "one" / "rows.jsonl", [{"text": "w1"}])
    with pytest.raises(ValueError, match=r"has no rows to test"):
        load(one, split="test")


def test_chat_rows_stream_with_their_language_filter_and_counts(tmp_path):
    good, other = [{"messages": chat(f"w{i}", answer)} for i, answer in ((1, "w7 w8"), (2, "w8"))]
    write(tmp_path / "train.jsonl", [good, other, {"messages": [{"role": "user", "content": "w3"}]}, good] * 5)
    write(tmp_path / "test.jsonl", [good])
    filtered = loader(f"{tmp_path}[lang:w7]", stage="sft", max_length=16)
    steps = take(filtered, 5)
    golden = tokenize_chat(good["messages"], TOK, max_length=16)
    width = len(golden.tokens)
    assert {tuple(row) for step in steps for row in step["tokens"][:, :width].tolist()} == {tuple(golden.tokens)}
    assert all(row == golden.supervised for step in steps for row in step["supervised"][:, :width].tolist())
    assert all(step["tokens"].shape == (4, 16) for step in steps)  # the canvas is always max_length
    assert filtered.counts["read"] == filtered.counts["kept"]
    every = loader(str(tmp_path), stage="sft", max_length=16)
    take(every, 5)
    assert every.counts["dropped:no assistant turn at the end"] > 0


def test_packed_chat_rows_stream_once_each(tmp_path):
    rows = [{"messages": chat(f"w{i}", " ".join(["w9"] * (1 + i % 5)))} for i in range(40)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:1])
    packed = loader(
        str(tmp_path),
        micro=1,
        stage="sft",
        max_length=16,
        shuffle_buffer=40,
        packing={"pack_length": 48, "block_length": 4, "eos_id": EOS},
        collating={"block_length": 4, "eos_id": EOS},
    )
    seen = Counter()
    for step in take(packed, 10):
        assert step["tokens"].shape == (2, 48)
        for tokens, document, position in zip(step["tokens"], step["document"], step["position"]):
            for d in range(document.max() + 1):
                own = tokens[document == d]
                assert len(own) % 4 == 0 and position[document == d].tolist() == list(range(len(own)))
                seen[tuple(own.tolist())] += 1
    assert len(seen) == 40 and max(seen.values()) - min(seen.values()) <= 2


def test_a_set_smaller_than_a_batch_goes_round(tmp_path):
    write(tmp_path / "train.jsonl", [*({"text": f"w{i}"} for i in range(4)), {"text": None}])
    write(tmp_path / "test.jsonl", [{"text": "w9"}])
    for shuffle in (False, True):
        taken = firsts(take(loader(str(tmp_path), 4, 4, shuffle=shuffle), 8))
        assert set(taken) == set(range(4)) and max(Counter(taken).values()) <= 2 * min(Counter(taken).values())


def test_streams_of_nothing_are_refused_by_name(tmp_path, words):
    write(tmp_path / "bad" / "train.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}] * 30)
    write(tmp_path / "bad" / "test.jsonl", [{"messages": chat("w1", "w2")}])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"leaves no row to train .*no assistant turn at the end 1?\d\d, read"):
        take(loader(f"{tmp_path}/bad", stage="sft", max_length=8), 1)
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        loader(f"{tmp_path}/empty.jsonl")
    with pytest.raises(ValueError, match="no column 'body'"):
        loader(words, reading={"text_field": "body"})
    with pytest.raises(ValueError, match="no column 'messages'"):
        loader(words, stage="sft")
    write(tmp_path / "few" / "train.jsonl", [{"text": "w1"}, *[{"text": None}] * 12_100])
    write(tmp_path / "few" / "test.jsonl", [{"text": "w1"}])
    with pytest.raises(ValueError, match=r"leaves no row to train .*no text 1"):
        take(loader(f"{tmp_path}/few", 1, 1, shuffle=False, shuffle_buffer=2000), 2)
    with pytest.raises(ValueError, match="shuffle buffer 0"):
        loader(words, shuffle_buffer=0)
    with pytest.raises(FileNotFoundError, match="no data at"):
        loader("missing.jsonl")

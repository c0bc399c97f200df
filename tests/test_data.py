"""Specs, packing, chat rows and padding against the reference's outputs; the laws of splits, builtin sets, loader."""

import json
import re
import sys
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_json

import data
from tokenizer import Tokenizer

TOK = Tokenizer(GOLDEN / "models" / "qwen3")
DATA = golden_json("data")
SUMS = {split: list(data.raw("builtin/sums", split)) for split in data.SPLITS}
PAD, EOS = DATA["special_ids"]["pad"], DATA["special_ids"]["eos"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write(path, rows) -> str:
    """The path, as a string, of a .jsonl file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(n: int, offset: int = 0) -> list[dict]:
    return [{"text": f"w{i + offset}"} for i in range(n)]


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def supervised_of(labels: list[int]) -> list[bool]:
    return [label != -100 for label in labels]


class Lines:
    """Rows of given lengths; every token of row i is i."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"tokens": np.full(self.lengths[i], i), "supervised": np.ones(self.lengths[i], bool)}


def loader(rows, micro_batch_size=2, accumulation=3, **options):
    return data.Loader(
        rows,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        collate=partial(data.collate, pad_id=-1),
        **{"seed": 1} | options,
    )


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize("case", DATA["parse_spec"][:3], ids=lambda case: case["spec"])
def test_a_spec_is_read_as_by_the_reference(case):
    name, expected = case["out"]
    (spec,) = data.parse_specs(case["spec"])
    assert (spec.name, spec.limits | ({"name": spec.config} if spec.config else {})) == (name, expected)


def test_a_name_with_an_equals_sign_is_a_name():
    """The reference takes the fourth golden case, or a path such as run=3/rows.jsonl, for options (defect 14)."""
    assert data.parse_specs("run=3/rows.jsonl") == [data.Spec("run=3/rows.jsonl", None, None, {})]


def test_specs_are_joined_by_plus_or_bar():
    text = "a/b+c[lang:python, name:x] | d[train,test:1_000]+builtin/sums"
    assert data.parse_specs(text) == [
        data.Spec("a/b", None, None, {}),
        data.Spec("c", "x", "python", {}),
        data.Spec("d", None, None, {"train": None, "test": 1000}),
        data.Spec("builtin/sums", None, None, {}),
    ]


BAD = ["", "a+", "a[train:5", "a]", "[train:5]", "a[dev:5]", "a[train:0]", "a[train:-1]", "a[train:]", "a[train:1e3]"]


@pytest.mark.parametrize("text", [*BAD, "a[name]", "a[name:]", "a[train:5,]", "a[train:5,train:6]", "a[b][c]"])
def test_bad_grammar_is_one_clear_line(text):
    with pytest.raises(ValueError, match="dataset spec") as error:
        data.parse_specs(text)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- row sources and splits


@pytest.mark.parametrize("text", ["{}", "{}[train:50,test:10]", "{}[test:3]", "{}[train:1]"])
def test_held_out_rows_are_never_trained_on(tmp_path, text):
    """The reference takes [train:50,test:10] of a set with one split from the same rows (defect 14)."""
    text = text.format(write(tmp_path / "rows.jsonl", numbered(100)))
    rows = {split: [row["text"] for row in data.raw(text, split)] for split in data.SPLITS}
    assert not set(rows["train"]) & set(rows["test"])
    assert rows["test"] == rows["validation"]
    limits = data.parse_specs(text)[0].limits
    assert len(rows["train"]) == limits.get("train", 95) and len(rows["test"]) == min(limits.get("test", 5), 5)


def test_validation_and_test_stand_in_for_each_other(tmp_path):
    for split in ("test", "validation"):
        write(tmp_path / split / "train.jsonl", numbered(30))
        write(tmp_path / split / f"{split}.jsonl", numbered(4, 100))
        assert len(list(data.raw(str(tmp_path / split), "train"))) == 30
        for asked in ("test", "validation"):
            assert list(data.raw(f"{tmp_path / split}[{split}:3]", asked)) == numbered(3, 100)


def test_a_set_without_training_rows_does_not_train_on_its_test_rows(tmp_path):
    write(tmp_path / "test.jsonl", numbered(4))
    assert len(list(data.raw(str(tmp_path), "test"))) == 4
    with pytest.raises(ValueError, match=r"has no split train \(it has test\)"):
        list(data.raw(str(tmp_path), "train"))


def test_local_paths_are_also_looked_up_under_the_base_directory(tmp_path, monkeypatch):
    write(tmp_path / "sets" / "rows.jsonl", numbered(20))
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path))
    assert len(list(data.raw("sets/rows.jsonl", "train"))) == 19
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "sets" / "other.jsonl"))):
        list(data.raw("sets/other.jsonl", "train"))


def test_lines_of_a_text_file_keep_their_ends(tmp_path):
    (tmp_path / "a.txt").write_text("w1\n\nw2\nw3")
    rows = [row["text"] for split in ("train", "test") for row in data.raw(str(tmp_path / "a.txt"), split)]
    assert sorted(rows) == ["\n", "w1\n", "w2\n", "w3"]


def test_parquet_and_json_files_hold_rows_too(tmp_path):
    import datasets

    datasets.Dataset.from_list(numbered(20)).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(numbered(20)))
    assert [list(data.raw(f"{tmp_path}/a.{suffix}", "test")) for suffix in ("parquet", "json")] == [
        list(data.raw(write(tmp_path / "a.jsonl", numbered(20)), "test"))
    ] * 2


def test_mistakes_in_naming_a_set_name_the_way_out(tmp_path):
    write(tmp_path / "one.jsonl", numbered(1))
    (tmp_path / "a.csv").write_text("text\nw1")
    (tmp_path / "configs").mkdir()
    for name in "ab":
        write(tmp_path / "configs" / f"{name}.jsonl", numbered(20, ord(name)))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "configs" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for text, message in {
        "builtin/sum": "unknown dataset builtin/sum; the builtin sets are builtin/sums, builtin/stdlib",
        "builtin/sums[name:x]": "no configurations",
        "builtin/sums[lang:python]": "no answer in train contains 'python'",
        "builtin/stdlib[lang:python]": "this set is none",
        f"{tmp_path}/one.jsonl": "no test split",
        f"{tmp_path}/one.jsonl[name:x]": "is a file",
        f"{tmp_path}/a.csv": "expected one of .jsonl",
        f"{tmp_path}/configs": r"\[name:CONFIG\]",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            list(data.raw(text, "train"))
        assert "\n" not in str(error.value)
    assert len(list(data.raw(f"{tmp_path}/configs[name:b]", "train"))) == 19


# ---------------------------------------------------------------- builtin sets


def solve(task: str, question: str) -> tuple[str, object]:
    """The answer, and what must not be shared between splits."""
    if task == "add":
        a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", question).groups())
        return str(a + b), frozenset((a, b))
    if task == "reverse":
        word = re.fullmatch(r"Reverse the word ([A-Z]{3,6})\.", question)[1]
        return "".join(reversed(word)), word
    if task == "sort":
        digits = re.fullmatch(r"Sort the digits (\d{3,5})\.", question)[1]
        return "".join(d * digits.count(d) for d in "0123456789"), tuple(sorted(digits))
    if task == "count":
        letter, word = re.fullmatch(r"How many times does ([A-Z]) occur in ([A-Z]{3,6})\?", question).groups()
        return str(Counter(word)[letter]), word
    numbers = [int(n) for n in re.fullmatch(r"Which is the largest of (\d+), (\d+) and (\d+)\?", question).groups()]
    assert task == "largest" and max(numbers) < 100
    return str(sorted(numbers)[-1]), tuple(sorted(numbers))


def test_sums_are_right_and_no_question_is_in_two_splits():
    keys = {}
    for split, rows in SUMS.items():
        for row in rows:
            (user, question), (assistant, answer) = (message.values() for message in row["messages"])
            expected, key = solve(row["task"], question)
            assert (user, assistant, answer) == ("user", "assistant", expected), question
            word = key if isinstance(key, str) else None  # a held-out word is held out of reverse and count alike
            assert keys.setdefault(word or (row["task"], key), split) == split, question


def test_sums_in_validation_and_test_are_distinct_and_in_equal_shares():
    for split, n in (("validation", 500), ("test", 2000)):
        questions = {row["messages"][0]["content"] for row in SUMS[split]}
        assert len(SUMS[split]) == len(questions) == n
    shares = Counter(row["task"] for row in data.raw("builtin/sums[test:500]", "test"))
    assert shares == dict.fromkeys(("add", "reverse", "sort", "count", "largest"), 100)
    assert list(data.raw("builtin/sums[test:500]", "test")) == SUMS["test"][:500]


def test_builtin_sets_need_no_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = data.load("builtin/sums[test:10]", stage="sft", split="test", tokenizer=TOK, max_length=64)
    assert len(rows) == 10 and next(data.raw("builtin/stdlib", "validation"))["text"]


def test_stdlib_splits_are_disjoint_source_files():
    splits = {split: [row["text"] for row in data.raw("builtin/stdlib", split)] for split in data.SPLITS}
    assert splits["train"] and splits["validation"] and 15 < len(splits["train"]) / len(splits["test"]) < 21
    long = {split: {text for text in rows if len(text) > 500} for split, rows in splits.items()}
    assert not long["train"] & long["test"] and not long["train"] & long["validation"]
    assert any("class JSONDecodeError" in text for rows in splits.values() for text in rows)


# ---------------------------------------------------------------- from a row to messages or text


def test_known_columns_become_messages(tmp_path):
    alpaca = [
        {"instruction": " w1 ", "input": "", "output": "w2\n", "text": "all"},
        {"instruction": "w1", "input": " w3", "output": "w2", "text": "all"},
    ]
    for name, rows, expected in (
        ("alpaca", alpaca, [chat("w1", "w2"), chat("w1\n\nw3", "w2")]),
        ("opc", [{"instruction": "w1 ", "output": "w2", "tag": "x"}] * 2, [chat("w1 ", "w2")] * 2),
        ("gsm8k", [{"question": "w1", "answer": "w2"}] * 2, [chat("w1", "w2")] * 2),
        ("chat", [{"messages": chat("w1", "w2", "w3", "w4")}] * 2, [chat("w1", "w2", "w3", "w4")] * 2),
    ):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", rows)
        assert [row["messages"] for row in data.raw(str(tmp_path / name), "test")] == expected


def test_texts_are_what_a_tokenizer_sees():
    contents = [message["content"] for message in SUMS["train"][0]["messages"]]
    assert list(islice(data.texts("builtin/sums", "sft"), 2)) == contents
    assert [{"text": text} for text in data.texts("builtin/stdlib[train:3]", "pt")] == list(
        data.raw("builtin/stdlib[train:3]", "train")
    )


@pytest.mark.parametrize(
    "text, stage, message",
    [
        ("builtin/sums", "pt", r"no column 'text' \(it has task, messages\); it is chat"),
        ("builtin/stdlib", "sft", r"no column 'messages' \(it has text\); sft needs messages or"),
        ("builtin/sums", "rl", "stage 'rl': expected pt"),
    ],
)
def test_a_stage_that_does_not_fit_the_set_is_refused(text, stage, message):
    with pytest.raises(ValueError, match=message):
        data.load(text, stage=stage, split="validation", tokenizer=TOK, max_length=8)
    with pytest.raises(ValueError, match=message):
        next(data.texts(text, stage))


# ---------------------------------------------------------------- plain text


def test_texts_are_packed_as_by_the_reference(tmp_path):
    (texts,) = {tuple(case["texts"]) for case in DATA["group"]}
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"Text": text} for text in texts])
    for case in DATA["group"]:
        length, drop_tail, insert_eos = case["seq_length"], case["drop_tail"], case["insert_eos"]
        options = {"text_field": "Text", "insert_eos": insert_eos, "drop_tail": drop_tail, "max_length": length}
        pack = partial(data.load, str(tmp_path), stage="pt", split="train", tokenizer=TOK, **options)
        if not case["input_ids"]:
            with pytest.raises(ValueError, match="leaves no row to train"):
                pack()
            continue
        rows = pack()
        assert [row["tokens"].tolist() for row in rows] == case["input_ids"] == case["labels"]
        assert all(row["supervised"].all() for row in rows)
        assert rows.lengths.tolist() == [len(ids) for ids in case["input_ids"]] and len(rows) == len(rows.lengths)
        assert rows.counts["read"] == rows.counts["kept"] == len(texts)
        assert all(len(ids) == length for ids in case["input_ids"]) or not drop_tail


def test_packing_runs_over_all_sets_and_drops_one_tail(tmp_path):
    """The reference drops a tail in every map batch (defect 14): 1,100 rows are two of its batches."""
    for name in "ab":
        write(tmp_path / name / "train.jsonl", [{"text": f"w{i % 400}"} for i in range(1100)] + [{"text": None}])
        write(tmp_path / name / "test.jsonl", numbered(1))
    text, options = f"{tmp_path / 'a'}+{tmp_path / 'b'}", {"insert_eos": False, "max_length": 7, "tokenizer": TOK}
    rows = data.load(text, stage="pt", split="train", num_proc=2, **options)
    stream = [i % 400 for i in range(1100)] * 2
    assert np.concatenate([rows[i]["tokens"] for i in range(len(rows))]).tolist() == stream[: 2200 // 7 * 7]
    assert rows.counts == {"read": 2202, "kept": 2200, "dropped:no text": 2, "tail tokens dropped": 2200 % 7}
    assert rows[-1]["tokens"].tolist() == rows[len(rows) - 1]["tokens"].tolist()
    assert rows[0]["tokens"].dtype == np.int64 and rows[0]["supervised"].dtype == np.bool_
    whole = data.load(text, stage="pt", split="train", drop_tail=False, **options)
    assert np.concatenate([row["tokens"] for row in whole]).tolist() == stream


# ---------------------------------------------------------------- chat


def test_chat_rows_are_the_references():
    for case in DATA["sft"]:
        encoded = data.tokenize_chat(case["messages"], TOK, max_length=99, mask_prompt_loss=case["mask_prompt_loss"])
        labels = case["out"]["labels"]
        assert encoded == (case["out"]["input_ids"], supervised_of(labels), "kept")


def test_long_chat_rows_are_cut_as_by_the_reference_unless_nothing_is_left_to_learn():
    """The reference keeps rows whose prompt fills max_length (defect 9): its first two cases have no label at all."""
    messages = DATA["sft"][2]["messages"]
    for case in DATA["clip"]:
        tokens, supervised, outcome = data.tokenize_chat(messages, TOK, max_length=case["max_length"])
        if any(supervised_of(case["out"]["labels"])):
            assert (tokens, supervised) == (case["out"]["input_ids"], supervised_of(case["out"]["labels"]))
        else:
            assert (tokens, supervised, outcome) == ([], [], "dropped:prompt fills max_length")
    whole, prompt = len(tokens), case["out"]["prompt_len"]
    assert data.tokenize_chat(messages, TOK, max_length=prompt).outcome == "dropped:prompt fills max_length"
    cut = data.tokenize_chat(messages, TOK, max_length=prompt + 1)
    assert cut == (tokens[: prompt + 1], [False] * prompt + [True], "cut")
    filtered = data.tokenize_chat(messages, TOK, max_length=whole - 1, truncation="filter")
    assert filtered == ([], [], "dropped:longer than max_length")
    assert data.tokenize_chat(messages, TOK, max_length=whole, truncation="filter").outcome == "kept"


def test_every_row_that_is_dropped_or_cut_is_counted(tmp_path):
    rows = [{"messages": chat(*turns)} for turns in (["w1", "w2"], ["w1", "w2 " * 9], ["w1 " * 9, "w2"], ["w1"])]
    write(tmp_path / "train.jsonl", rows * 3)
    write(tmp_path / "test.jsonl", rows[:1])
    load = partial(data.load, str(tmp_path), stage="sft", split="train", tokenizer=TOK, max_length=10)
    right, filtered = load(), load(truncation="filter")
    dropped = {"dropped:prompt fills max_length": 3, "dropped:no assistant turn at the end": 3}
    assert right.counts == {"read": 12, "kept": 6, "cut": 3} | dropped
    assert right.lengths.tolist() == [8, 10] * 3
    kept = data.tokenize_chat(rows[0]["messages"], TOK, max_length=10)
    for row in (right[2], filtered[1]):
        assert (row["tokens"].tolist(), row["supervised"].tolist()) == kept[:2]
    dropped = {"dropped:longer than max_length": 6, "dropped:no assistant turn at the end": 3}
    assert filtered.counts == {"read": 12, "kept": 3} | dropped and len(filtered) == 3
    with pytest.raises(ValueError, match=r"leaves no row to train .*dropped:prompt fills max_length 9"):
        load(max_length=6)
    with pytest.raises(ValueError, match="expected right"):
        load(truncation="left")
    with pytest.raises(ValueError, match="expected at least 1"):
        load(max_length=0)


# ---------------------------------------------------------------- batches


def golden_rows():
    """The three conversations that the reference's collators were given."""
    rows = [case["out"] for case in DATA["sft"] if case["mask_prompt_loss"]]
    return [
        {"tokens": np.array(row["input_ids"]), "supervised": np.array(supervised_of(row["labels"]))} for row in rows
    ]


@pytest.mark.parametrize(
    "name, options",
    [
        ("mdlm_sft", {"train_on_padding": True}),
        ("bd3lm_sft_bs4", {"block_length": 4, "eos_id": EOS}),
        ("bd3lm_sft_bs32", {"block_length": 32, "eos_id": EOS}),
        ("pt", {}),
    ],
)
def test_rows_are_padded_as_by_the_reference(name, options):
    golden = {key: torch.tensor(value) for key, value in DATA[f"collate_{name}"].items()}
    batch = data.collate(golden_rows(), pad_id=PAD, **options)
    B, T = golden["input_ids"].shape
    assert torch.equal(batch["tokens"], golden["input_ids"])
    assert torch.equal(batch["supervised"], golden["labels"] != -100)
    visible = golden.get("attention_mask", torch.ones(B, T, dtype=torch.int64))  # mdlm sft: none, padding is seen
    assert torch.equal(batch["document"], visible - 1)
    assert torch.equal(batch["position"], torch.arange(T).expand(B, T))
    assert all(batch[key].dtype == torch.int64 for key in ("tokens", "document", "position"))


def test_a_fixed_canvas_only_adds_padding_and_refuses_longer_rows():
    short, long = (data.collate(golden_rows(), pad_id=PAD, length=length) for length in (None, 50))
    assert long["tokens"].shape == (3, 50) and (long["document"][:, 40:] == -1).all()
    assert all(torch.equal(short[key], long[key][:, :40]) for key in short)
    with pytest.raises(ValueError, match="a row of 40 tokens exceeds the canvas of 39"):
        data.collate(golden_rows(), pad_id=PAD, length=39)


# ---------------------------------------------------------------- the loader

LENGTHS = [1 + 7 * i % 13 for i in range(20)]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_is_a_permutation_set_by_seed_and_epoch(group_by_length):
    make = partial(loader, Lines(LENGTHS), group_by_length=group_by_length)
    orders = [make(seed=seed).order(epoch).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert make(seed=1).order(1).tolist() == orders[1] and len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("group_by_length", [False, True])
def test_the_global_batch_does_not_depend_on_how_it_is_cut(group_by_length):
    def steps(micro, accumulation):
        batches = loader(Lines(LENGTHS), micro, accumulation, group_by_length=group_by_length).epoch(3)
        return [{k: torch.cat([m[k] for m in step]) for k in step[0] if k != "epoch"} for step in batches]

    whole = steps(6, 1)
    for micro, accumulation in ((1, 6), (2, 3), (3, 2)):
        for a, b in zip(whole, steps(micro, accumulation), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_epoch_begun_later_goes_on_the_same():
    full = list(loader(Lines(LENGTHS)).epoch(2))
    for start in range(len(full) + 1):
        rest = list(loader(Lines(LENGTHS)).epoch(2, start))
        assert len(rest) == len(full) - start
        for a, b in zip(full[start:], rest):
            assert all(x["epoch"] == y["epoch"] == 2 and len(x) == len(y) for x, y in zip(a, b, strict=True))
            assert all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in ("tokens", "sample", "document"))


def test_an_epoch_has_every_row_once_the_last_batch_too():
    batches = loader(Lines(LENGTHS))
    steps = list(batches.epoch(0))
    assert len(steps) == batches.steps_per_epoch == 4
    assert [[len(m["tokens"]) for m in step] for step in steps] == [[2, 2, 2]] * 3 + [[2]]
    assert torch.equal(torch.cat([m["sample"] for step in steps for m in step]), torch.arange(20))
    seen = torch.cat([m["tokens"][:, 0] for step in steps for m in step])
    assert seen.tolist() == batches.order(0).tolist()
    in_order = loader(Lines(LENGTHS), shuffle=False)
    assert torch.cat([m["tokens"][:, 0] for step in in_order for m in step]).tolist() == list(range(20))


def test_grouping_by_length_saves_padding():
    rows = Lines(np.random.default_rng(0).integers(1, 200, 1000))

    def padding(group_by_length):
        steps = loader(rows, group_by_length=group_by_length).epoch(0)
        return sum((m["document"] == -1).sum().item() for step in steps for m in step)

    assert padding(True) < padding(False) / 10


def test_batch_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        loader(Lines(LENGTHS), 0)

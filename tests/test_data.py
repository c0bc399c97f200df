"""Specs, packing, chat rows and padding against the reference's outputs; the laws of splits, builtin sets, loader."""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden_json, tiny

import data
import loaders
from diffusion import Batch, Noise, bd3lm_example, draw_noise, loss
from tasks.builtin import SHARES, TASKS
from tokenizer import Tokenizer

TOK = Tokenizer(GOLDEN / "models" / "qwen3")
DATA = golden_json("data")
SUMS, CHATS = ({split: list(data.raw(f"builtin/{name}", split)) for split in data.SPLITS} for name in ("sums", "chats"))
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
        self.lengths, self.useful, self.counts = np.array(lengths), sum(lengths), Counter()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return {"tokens": np.full(self.lengths[i], i), "supervised": np.ones(self.lengths[i], bool)}


def load_rows(dataset_args, *, split, tokenizer, num_proc=1, rows_of=data.load_split, hold_out=True, **reading):
    how = {"num_proc": num_proc, "rows_of": rows_of, "hold_out": hold_out}
    return data.load(dataset_args, split, tokenizer, data.Reading(**reading), **how)


def load_preprocessed(directory, *, split, tokenizer, **reading):
    return data.load_preprocessed(directory, split, tokenizer, data.Reading(**reading))


def tokenize_chat(messages, tokenizer, **reading):
    return data.ChatEncoder(tokenizer, data.Reading(stage="sft", **reading))(messages)


def loader(rows, micro_batch_size=2, accumulation=3, **options):
    return loaders.Loader(
        rows,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        **{"seed": 1, "collate": partial(loaders.collate, pad_id=-1)} | options,
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


def test_a_name_or_value_in_quotes_may_hold_any_sign(tmp_path):
    text = """'runs/a+b|c=[1],d.jsonl'[train:5] + "it's|x"[name:'p,q+[r]',lang:"c++"] | Bob's.txt"""
    assert data.parse_specs(text) == [
        data.Spec("runs/a+b|c=[1],d.jsonl", None, None, {"train": 5}),
        data.Spec("it's|x", "p,q+[r]", "c++", {}),
        data.Spec("Bob's.txt", None, None, {}),
    ]
    path = write(tmp_path / "a+b=[1],c|d" / "rows.jsonl", numbered(20))
    assert len(list(data.raw(f"'{path}'[train:7]+\"{path}\"[train:2]", "train"))) == 9
    for bad in ("'a", "a[name:'x]", "''", "'a'b", "a['train':5]"):
        with pytest.raises(ValueError, match="dataset spec"):
            data.parse_specs(bad)


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
    (tmp_path / "a.xlsx").write_text("text\nw1")
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "configs").mkdir()
    for name in "ab":
        write(tmp_path / "configs" / f"{name}.jsonl", numbered(20, ord(name)))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "configs" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for text, message in {
        "builtin/sum": "unknown dataset builtin/sum; the builtin sets are builtin/sums, builtin/chats, builtin/",
        "builtin/sums[name:x]": "no configurations",
        "builtin/sums[lang:python]": "no answer in train contains 'python'",
        "builtin/stdlib[lang:python]": "this set is none",
        f"{tmp_path}/one.jsonl": "no test split",
        f"{tmp_path}/one.jsonl[name:x]": "is a file",
        f"{tmp_path}/a.xlsx": "expected one of .jsonl",
        f"{tmp_path}/configs": r"\[name:CONFIG\]",
        f"'{tmp_path}/a[1]'": "rename it, or name a file in it",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            list(data.raw(text, "train"))
        assert "\n" not in str(error.value)
    assert len(list(data.raw(f"{tmp_path}/configs[name:b]", "train"))) == 19


def hub(root, name: str, configs: dict[str, dict[str, list[dict]]]) -> str:
    """A directory as on the Hub: a card that names the configurations, whose splits are files."""
    card = ""
    for config, splits in configs.items():
        card += f"- config_name: {config}\n  data_files:\n"
        for split, rows in splits.items():
            write(root / name / config / f"{split}.jsonl", rows)
            card += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
    (root / name / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    return str(root / name)


def test_named_sets_are_read_as_their_users_know_them(tmp_path, monkeypatch):
    """smoltalk: config all; opc-sft-stage*: all configurations at once; ultrachat_200k: splits train_sft, test_sft."""
    monkeypatch.setenv("BASE_DATASETS_DIR", str(tmp_path))
    talk = {name: {"train": [{"messages": chat(name, "w1")}] * 3} for name in ("all", "other")}
    talk["all"]["test"] = [{"messages": chat("held", "w1")}]
    hub(tmp_path, "HuggingFaceTB/smoltalk", talk)
    firsts = [row["messages"][0]["content"] for row in data.raw("HuggingFaceTB/smoltalk", "train")]
    assert firsts == ["all"] * 3
    assert [row["messages"][0]["content"] for row in data.raw("HuggingFaceTB/smoltalk", "test")] == ["held"]
    assert len(list(data.raw("HuggingFaceTB/smoltalk[name:other]", "train"))) == 2  # of three, one is held out

    code = {
        name: {"train": [{"instruction": f"{name} {i}", "output": f"```{lang}```"} | more for i in range(20)]}
        for name, lang, more in (
            ("a", "python", {"tag": "x"}),
            ("unpythonic", "javascript", {"code": "y", "seq_id": 1}),
        )
    }
    hub(tmp_path, "opc-sft-stage2", code)
    rows = {split: list(data.raw("opc-sft-stage2", split)) for split in ("train", "test")}
    assert [len(rows[split]) for split in rows] == [38, 2]
    assert {row["instruction"] for split in rows.values() for row in split} == {
        f"{name} {i}" for name in code for i in range(20)
    }
    python = [row["instruction"] for row in data.raw("opc-sft-stage2[lang:python]", "train")]
    assert python == [row["instruction"] for row in rows["train"] if "python" in row["output"]]
    assert len(list(data.raw("opc-sft-stage2[lang:python,train:3]", "train"))) == 3
    assert len(list(data.raw("opc-sft-stage2[name:unpythonic]", "train"))) == 19
    with pytest.raises(ValueError, match=r"lang:rust\] has no rows: no answer in train contains 'rust'"):
        list(data.raw("opc-sft-stage2[lang:rust]", "train"))

    splits = {f"{split}_sft": [{"messages": chat(split, "w1")}] * 2 for split in ("train", "test")}
    hub(tmp_path, "HuggingFaceH4/ultrachat_200k", {"default": splits | {"train_gen": [{"messages": chat("gen", "w")}]}})
    for split in ("train", "test"):
        found = [row["messages"][0]["content"] for row in data.raw("HuggingFaceH4/ultrachat_200k", split)]
        assert found == [split] * 2


def test_a_directory_without_data_is_told_apart_from_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="doesn't contain any data files"):
        list(data.raw(str(tmp_path), "train"))
    with pytest.raises(FileNotFoundError, match="no data at"):
        list(data.raw(str(tmp_path / "missing"), "train"))


def test_a_directory_of_text_files_is_read_as_a_text_file(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split}\n\nw2\n")
    assert [row["text"] for row in data.raw(str(tmp_path), "train")] == ["train\n", "\n", "w2\n"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text": "w\xff"}\n' * 20, "is not UTF-8 text: .*byte 0xff in position"),
        ("a.txt", b"w1\nw\xff\n", "is not UTF-8 text: .*byte 0xff in position"),
        ("a.jsonl", b'{"text": "w1"}\n{"text: 5}\n', "cannot load .*JSON parse error"),
        ("a.jsonl", b"", "has no rows"),
        ("a.parquet", b"no parquet", "cannot load .*Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(data.raw(str(tmp_path / name), "train"))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


# ---------------------------------------------------------------- builtin sets


def solve(question: str) -> tuple[str, str, object]:
    """The task, the answer, and what must not be shared between splits."""
    if found := re.fullmatch(r"What is (\d+) \+ (\d+)\?", question):
        a, b = map(int, found.groups())
        return "add", str(a + b), frozenset((a, b))
    if found := re.fullmatch(r"Reverse the word ([A-Z]{3,6})\.", question):
        return "reverse", "".join(reversed(found[1])), found[1]
    if found := re.fullmatch(r"Sort the digits (\d{3,5})\.", question):
        return "sort", "".join(d * found[1].count(d) for d in "0123456789"), tuple(sorted(found[1]))
    if found := re.fullmatch(r"How many letters are in ([A-Z]{3,6})\?", question):
        return "count", str(len(found[1])), found[1]
    numbers = [int(n) for n in re.fullmatch(r"Which is the largest of (\d+), (\d+) and (\d+)\?", question).groups()]
    assert max(numbers) < 100
    return "largest", str(sorted(numbers)[-1]), tuple(sorted(numbers))


def test_sums_are_right_and_no_question_is_in_two_splits():
    keys = {}
    for split in data.SPLITS:
        for row in SUMS[split] + CHATS[split]:
            said = [message.values() for message in row["messages"]]
            for (user, question), (assistant, answer) in zip(said[::2], said[1::2], strict=True):
                task, expected, key = solve(question)
                assert (user, assistant, answer) == ("user", "assistant", expected), question
                word = key if isinstance(key, str) else None  # a held-out word is held out of reverse and count alike
                assert keys.setdefault(word or (task, key), split) == split, question
            assert row["task"] == task, "of its last question"


def test_sums_in_validation_and_test_are_distinct_and_in_equal_shares():
    for split, n in (("validation", 500), ("test", 2000)):
        questions = {row["messages"][0]["content"] for row in SUMS[split]}
        assert len(SUMS[split]) == len(questions) == n
    shares = Counter(row["task"] for row in data.raw("builtin/sums[test:500]", "test"))
    assert shares == dict.fromkeys(TASKS, 100)
    assert list(data.raw("builtin/sums[test:500]", "test")) == SUMS["test"][:500]


def test_repeats_are_a_word_six_times_and_no_word_is_in_two_splits():
    rows = {split: list(data.raw("builtin/repeats", split)) for split in data.SPLITS}
    questions = [row["messages"][0]["content"] for split in rows.values() for row in split]
    assert len(questions) == len({*questions}) == 4000 + 33 + 133
    for row in itertools.chain(*rows.values()):
        question, answer = (message["content"] for message in row["messages"])
        word = re.fullmatch("Write ([A-Z]{3}) six times.", question)[1]
        assert answer == f"{word} {word} {word} {word} {word} {word}"


def test_chats_are_of_four_sums_of_one_split_in_random_order():
    assert [len(rows) for rows in CHATS.values()] == [15_000, 125, 500]
    assert {len(row["messages"]) for rows in CHATS.values() for row in rows} == {8}
    for turn in range(0, 8, 2):
        tasks = Counter(solve(row["messages"][turn]["content"])[0] for row in CHATS["train"])
        assert all(abs(tasks[task] / 1500 - share) < 0.3 for task, share in SHARES.items())


def test_the_rows_that_scores_are_measured_on_stay_as_they_are():
    digest = hashlib.sha256(json.dumps(SUMS["test"]).encode()).hexdigest()
    assert digest.startswith("396c4fd874691719")


def test_builtin_sets_need_no_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    rows = load_rows("builtin/sums[test:10]", stage="sft", split="test", tokenizer=TOK, max_length=64)
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
    strings = [text for message in SUMS["train"][0]["messages"] for text in (message["role"], message["content"])]
    assert list(islice(data.texts("builtin/sums", "sft"), len(strings))) == strings
    assert [{"text": text} for text in data.texts("builtin/stdlib[train:3]", "pt")] == list(
        data.raw("builtin/stdlib[train:3]", "train")
    )


@pytest.mark.parametrize(
    "text, stage, message",
    [
        ("builtin/sums", "pt", r"no column 'text' \(it has task, messages\); it is chat"),
        ("builtin/stdlib", "sft", r"no column 'messages' \(it has text\); sft needs messages or"),
        ("builtin/sums", "rl", r"stage 'rl'.* expected pt"),
    ],
)
def test_a_stage_that_does_not_fit_the_set_is_refused(text, stage, message):
    with pytest.raises(ValueError, match=message):
        load_rows(text, stage=stage, split="validation", tokenizer=TOK, max_length=8)
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
        pack = partial(load_rows, str(tmp_path), stage="pt", split="train", tokenizer=TOK, **options)
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
    rows = load_rows(text, stage="pt", split="train", num_proc=2, **options)
    stream = [i % 400 for i in range(1100)] * 2
    assert np.concatenate([rows[i]["tokens"] for i in range(len(rows))]).tolist() == stream[: 2200 // 7 * 7]
    assert rows.counts == {"read": 2202, "kept": 2200, "dropped:no text": 2, "tail tokens dropped": 2200 % 7}
    assert rows[-1]["tokens"].tolist() == rows[len(rows) - 1]["tokens"].tolist()
    assert rows[0]["tokens"].dtype == np.int64 and rows[0]["supervised"].dtype == np.bool_
    whole = load_rows(text, stage="pt", split="train", drop_tail=False, **options)
    assert np.concatenate([row["tokens"] for row in whole]).tolist() == stream


# ---------------------------------------------------------------- chat


def test_chat_rows_are_the_references():
    for case in DATA["sft"]:
        encoded = tokenize_chat(case["messages"], TOK, max_length=99, mask_prompt_loss=case["mask_prompt_loss"])
        labels = case["out"]["labels"]
        assert encoded == (case["out"]["input_ids"], supervised_of(labels), "kept")


def test_long_chat_rows_are_cut_as_by_the_reference_unless_nothing_is_left_to_learn():
    """The reference keeps rows whose prompt fills max_length (defect 9): its first two cases have no label at all."""
    messages = DATA["sft"][2]["messages"]
    for case in DATA["clip"]:
        tokens, supervised, outcome = tokenize_chat(messages, TOK, max_length=case["max_length"])
        if any(supervised_of(case["out"]["labels"])):
            assert (tokens, supervised) == (case["out"]["input_ids"], supervised_of(case["out"]["labels"]))
        else:
            assert (tokens, supervised, outcome) == ([], [], "dropped:prompt fills max_length")
    whole, prompt = len(tokens), case["out"]["prompt_len"]
    assert tokenize_chat(messages, TOK, max_length=prompt).outcome == "dropped:prompt fills max_length"
    cut = tokenize_chat(messages, TOK, max_length=prompt + 1)
    assert cut == (tokens[: prompt + 1], [False] * prompt + [True], "cut")
    filtered = tokenize_chat(messages, TOK, max_length=whole - 1, truncation="filter")
    assert filtered == ([], [], "dropped:longer than max_length")
    assert tokenize_chat(messages, TOK, max_length=whole, truncation="filter").outcome == "kept"


def test_every_row_that_is_dropped_or_cut_is_counted(tmp_path):
    rows = [{"messages": chat(*turns)} for turns in (["w1", "w2"], ["w1", "w2 " * 9], ["w1 " * 9, "w2"], ["w1"])]
    write(tmp_path / "train.jsonl", rows * 3)
    write(tmp_path / "test.jsonl", rows[:1])
    load = partial(load_rows, str(tmp_path), stage="sft", split="train", tokenizer=TOK, max_length=10)
    right, filtered = load(), load(truncation="filter")
    dropped = {"dropped:prompt fills max_length": 3, "dropped:no assistant turn at the end": 3}
    assert right.counts == {"read": 12, "kept": 6, "cut": 3} | dropped
    assert right.lengths.tolist() == [8, 10] * 3
    kept = tokenize_chat(rows[0]["messages"], TOK, max_length=10)
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


GOOD = {"messages": chat("w1", "w2")}


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "robot", "content": "w1"}, *chat("w1", "w2")], "unknown role 'robot'"),
        (chat("w1"), "no assistant turn at the end"),
        ([], "no messages"),
        (None, "no messages"),
        ([{"role": "user", "content": None}, *chat("w1", "w2")[1:]], "content that is no string"),
        ([*chat("w1"), {"role": "assistant", "content": None}], "content that is no string"),
    ],
)
def test_malformed_chat_rows_are_counted_and_a_set_of_nothing_else_is_refused(tmp_path, messages, reason):
    bad = {"messages": messages}
    load = partial(load_rows, stage="sft", split="train", tokenizer=TOK, max_length=20)
    for name, rows in (("some", [GOOD, bad] * 2), ("all", [bad] * 3)):
        write(tmp_path / name / "train.jsonl", rows)
        write(tmp_path / name / "test.jsonl", rows)
    assert load(str(tmp_path / "some")).counts == {"read": 4, "kept": 2, f"dropped:{reason}": 2}
    with pytest.raises(ValueError, match=f"leaves no row to train .*dropped:{reason} 3"):
        load(f"{tmp_path / 'some'}+{tmp_path / 'all'}")


def test_rows_that_the_template_refuses_are_counted_with_its_reason(tmp_path):
    picky = Tokenizer(GOLDEN / "models" / "qwen3")
    refusal = "{{ raise_exception('no system turn, please') }}"
    picky.template = "{% if messages[0]['role'] == 'system' %}" + refusal + "{% endif %}" + picky.template
    system = {"messages": [{"role": "system", "content": "w3"}, *GOOD["messages"]]}
    write(tmp_path / "train.jsonl", [GOOD, system, GOOD])
    write(tmp_path / "test.jsonl", [system])
    load = partial(load_rows, str(tmp_path), stage="sft", tokenizer=picky, max_length=20)
    counts = load(split="train").counts
    assert counts["kept"] == 2 and [name for name in counts if "no system turn, please" in name]
    with pytest.raises(ValueError, match=r"leaves no row to test .*no system turn, please 1"):
        load(split="test")
    picky.template = None
    with pytest.raises(ValueError, match="no chat template"):
        load(split="train")


def test_texts_that_are_none_or_no_text_are_counted_and_empty_ones_are_no_data(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "w1"}, {"text": ""}, {"text": 5}, {"text": None}, {"other": 1}])
    write(tmp_path / "test.jsonl", [{"text": ""}] * 2)
    load = partial(load_rows, str(tmp_path), stage="pt", tokenizer=TOK, max_length=3, drop_tail=False)
    counts = load(split="train").counts
    assert counts == {"read": 5, "kept": 2, "empty": 1, "dropped:not text": 1, "dropped:no text": 2}
    with pytest.raises(ValueError, match=r"leaves no row to test .*empty 2"):
        load(split="test")


def test_all_assistant_turns_are_learnt_only_where_the_template_lets_them_be_told_apart(tmp_path):
    rows = [{"messages": chat("w1", "w2", "w3", "w4")}] * 2
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    load = partial(load_rows, str(tmp_path), stage="sft", split="train", max_length=40)
    last, every = (load(tokenizer=TOK, train_on=which)[0] for which in ("last", "all"))
    assert last["tokens"].tolist() == every["tokens"].tolist()
    assert every["supervised"].sum() == 2 * last["supervised"].sum() > 0
    forgetful = Tokenizer(GOLDEN / "models" / "qwen3")
    forgetful.template = "{% for m in messages[-2:] %}" + "<|im_start|> {{ m['content'] }} <|im_end|> {% endfor %}"
    with pytest.raises(ValueError, match="--train_on all: the chat template renders turn"):
        load(tokenizer=forgetful, train_on="all")
    with pytest.raises(ValueError, match=r"train_on 'some'.* expected last or all"):
        load(tokenizer=TOK, train_on="some")


# ---------------------------------------------------------------- rows that were tokenised before


def program(capsys, *flags: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of data.py."""
    try:
        data.main(["--model_name_or_path", str(GOLDEN / "models" / "qwen3"), *flags])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_preprocessed_rows_are_the_rows(tmp_path, capsys, stage):
    for split, n in (("train", 30), ("test", 4)):
        rows = numbered(n) if stage == "pt" else [{"messages": chat(f"w{i}", "w1 w2")} for i in range(n)]
        write(tmp_path / "set" / f"{split}.jsonl", rows)
    options = {"stage": stage, "max_length": 7 if stage == "pt" else 20, "tokenizer": TOK}
    flags = ["--dataset_args", f"{tmp_path}/set", "--stage", stage, "--max_length", str(options["max_length"])]
    status, shown, _ = program(capsys, *flags, "--output_dir", f"{tmp_path}/made", "--num_proc", "1")
    assert status == 0 and "train row 2" in shown and "⟦" in shown
    for split in data.SPLITS:
        made = load_preprocessed(tmp_path / "made", split=split, **options)
        rows = load_rows(f"{tmp_path}/set", split=split, **options)
        assert isinstance(made.tokens[0], np.memmap) and made.counts == rows.counts and len(made) == len(rows)
        for a, b in zip(made, rows):
            assert a["tokens"].tolist() == b["tokens"].tolist() and a["supervised"].tolist() == b["supervised"].tolist()

    other = Tokenizer(GOLDEN / "models" / "qwen2")
    of_stage = {
        "pt": {"insert_eos": False, "drop_tail": False},
        "sft": {"truncation": "filter", "train_on": "all", "mask_prompt_loss": False},
    }
    for name, value in {"max_length": 9, "tokenizer": other, **of_stage[stage]}.items():
        with pytest.raises(ValueError, match=f"was made with {name} .*, this run has"):
            load_preprocessed(tmp_path / "made", split="train", **options | {name: value})
    with pytest.raises(ValueError, match="was made with stage"):
        load_preprocessed(tmp_path / "made", split="train", **options | {"stage": {"pt": "sft"}.get(stage, "pt")})
    with pytest.raises(FileNotFoundError, match=r"holds no preprocessed\.json"):
        load_preprocessed(tmp_path / "set", split="train", **options)

    before = (tmp_path / "made" / "preprocessed.json").stat().st_ino
    status, _, told = program(capsys, *flags, "--output_dir", f"{tmp_path}/made")
    assert status == 2 and "--overwrite" in told and (tmp_path / "made" / "preprocessed.json").stat().st_ino == before
    assert program(capsys, *flags, "--output_dir", f"{tmp_path}/made", "--overwrite", "--num_proc", "1")[0] == 0
    status, _, told = program(capsys, *flags, "--output_dir", f"{tmp_path}/set", "--overwrite")
    assert status == 2 and "holds other files" in told and told.count("\n") == 1
    status, _, told = program(capsys, *flags[2:], "--dataset_args", "builtin/none", "--output_dir", f"{tmp_path}/new")
    assert status == 2 and "unknown dataset builtin/none" in told and not (tmp_path / "new").exists()


def test_a_tokenizer_is_known_again_when_its_files_have_come_to_hold_the_mask(tmp_path):
    TOK.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert TOK.mask_added and not again.mask_added and data.fingerprint(again) == data.fingerprint(TOK)
    core = json.loads((tmp_path / "tokenizer.json").read_text())
    next(token for token in core["added_tokens"] if token["id"] == TOK.mask_id)["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(core))  # as another program might add it
    assert data.fingerprint(Tokenizer(tmp_path)) == data.fingerprint(TOK)
    again.template += " "
    assert data.fingerprint(again) != data.fingerprint(TOK)


# ---------------------------------------------------------------- packing


def test_rows_are_packed_once_each_and_as_tightly_as_they_go():
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    groups = data.pack(lengths, 256)
    assert sorted(i for group in groups for i in group) == list(range(3000))
    assert max(lengths[group].sum() for group in groups) <= 256
    assert lengths.sum() / (256 * len(groups)) > 0.98
    assert data.pack([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]
    assert data.pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]  # 4 where it leaves nothing
    with pytest.raises(ValueError, match="a row of 300 tokens exceeds the canvas of 256"):
        data.pack([300], 256)


def test_packing_and_grouping_raise_the_share_of_useful_tokens():
    rows = Lines(np.random.default_rng(0).integers(1, 200, 1000))
    share = {grouped: loader(rows, group_by_length=grouped).useful_share(32) for grouped in (False, True)}
    packed = loader(data.Packed(rows, 512, block_length=32, eos_id=EOS)).useful_share(32)
    assert share[False] < 0.6 < 0.8 < share[True] < packed < 1
    plain = loader(rows)
    cells = sum(batch["tokens"].numel() for step in plain for batch in step)
    assert plain.useful_share() == rows.lengths.sum() / cells


@pytest.mark.parametrize("right_shift", [False, True])
def test_packed_rows_have_the_loss_of_padded_rows(right_shift):
    """bd3lm, the same rows and the same noise: the sum over all and the denominator are equal in float64."""
    K, sizes, rng = 4, [3, 9, 4, 14, 6, 1, 11], np.random.default_rng(0)
    rows = [{"tokens": rng.integers(0, 39, n), "supervised": np.arange(n) >= n // 3} for n in sizes]
    model = tiny(right_shift=right_shift)
    settings = {"block_length": K, "mask_id": 39, "right_shift": right_shift}
    collate = partial(loaders.collate, pad_id=38, block_length=K, eos_id=37)

    padded = Batch(**collate(rows), sample=torch.arange(len(rows)))
    noise = draw_noise(padded, block_length=K)
    separate = loss(model, bd3lm_example(padded, noise, **settings))

    lengths = [data.filled(n, K) for n in sizes]
    groups = data.pack(lengths, 28)
    packed = Batch(
        **collate([data.join([rows[i] for i in g], K, 37) for g in groups]), sample=torch.arange(len(groups))
    )
    level, masked = torch.ones(packed.tokens.shape), torch.zeros(packed.tokens.shape, dtype=torch.bool)
    for b, group in enumerate(groups):
        for d, i in enumerate(group):
            own = packed.document[b] == d
            assert own.sum() == lengths[i] and torch.equal(packed.tokens[b][own], padded.tokens[i, : lengths[i]])
            level[b, own], masked[b, own] = noise.level[i, : lengths[i]], noise.masked[i, : lengths[i]]
    together = loss(model, bd3lm_example(packed, Noise(level, masked), **settings))
    assert len(groups) < len(rows) and separate[1] == together[1]
    torch.testing.assert_close(together[0], separate[0], rtol=1e-12, atol=0)


def test_packed_rows_load_as_rows():
    rows = Lines([5, 3, 8, 2])
    packed = data.Packed(rows, 12, block_length=4, eos_id=EOS)
    assert packed.lengths.tolist() == [12, 12] and packed.useful == 18 and packed.counts["packed canvases"] == 2
    (step,) = list(loader(packed, micro_batch_size=2, accumulation=1, shuffle=False))
    assert step[0]["tokens"].tolist() == [[0] * 5 + [EOS] * 3 + [3] * 2 + [EOS] * 2, [2] * 8 + [1] * 3 + [EOS]]
    assert step[0]["document"].tolist() == [[0] * 8 + [1] * 4] * 2
    assert step[0]["position"].tolist() == [[*range(8), *range(4)]] * 2
    assert step[0]["supervised"].all()


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
    batch = loaders.collate(golden_rows(), pad_id=PAD, **options)
    B, T = golden["input_ids"].shape
    assert torch.equal(batch["tokens"], golden["input_ids"])
    assert torch.equal(batch["supervised"], golden["labels"] != -100)
    visible = golden.get("attention_mask", torch.ones(B, T, dtype=torch.int64))  # mdlm sft: none, padding is seen
    assert torch.equal(batch["document"], visible - 1)
    assert torch.equal(batch["position"], torch.arange(T).expand(B, T))
    assert all(batch[key].dtype == torch.int64 for key in ("tokens", "document", "position"))


def test_a_fixed_canvas_only_adds_padding_and_refuses_longer_rows():
    short, long = (loaders.collate(golden_rows(), pad_id=PAD, length=length) for length in (None, 50))
    assert long["tokens"].shape == (3, 50) and (long["document"][:, 40:] == -1).all()
    assert all(torch.equal(short[key], long[key][:, :40]) for key in short)
    with pytest.raises(ValueError, match="a row of 40 tokens exceeds the canvas of 39"):
        loaders.collate(golden_rows(), pad_id=PAD, length=39)


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


def test_grouping_puts_long_rows_first_in_stretches_of_fifty_batches():
    rows = Lines(1 + np.random.default_rng(0).permutation(600))
    lengths = rows.lengths[loader(rows, accumulation=1, group_by_length=True).order(0)].reshape(6, 100)
    assert (np.diff(lengths, axis=1) < 0).all()
    assert lengths[1:, 0].min() > 500 > lengths[:-1, -1].max()  # each is a sample of all


@pytest.mark.parametrize("group_by_length", [False, True])
def test_ranks_share_the_batches_of_one_process(group_by_length):
    """1 process x 4 micro-batches, 2 x 2, 4 x 1: the same rows, samples and canvases; the last step is short."""

    def steps(accumulation, world_size):
        options = {"world_size": world_size, "group_by_length": group_by_length, "micro_batch_size": 2}
        ranks = [
            list(loader(Lines(LENGTHS), accumulation=accumulation, rank=rank, **options).epoch(1))
            for rank in range(world_size)
        ]
        for parts in zip(*ranks, strict=True):
            assert len({len(part) for part in parts}) == 1  # every rank has as many micro-batches
            assert len({batch["tokens"].shape[1] for part in parts for batch in part}) == 1
            batches = [batch for part in parts for batch in part]
            real = [batch for batch in batches if batch["supervised"].any()]
            assert all(len(batch["tokens"]) == 1 for batch in batches if not batch["supervised"].any())
            joined = {key: torch.cat([batch[key] for batch in real]) for key in batches[0] if key != "epoch"}
            order = joined["sample"].argsort()
            yield {key: value[order] for key, value in joined.items()}

    whole = list(steps(4, 1))
    assert torch.equal(torch.cat([step["sample"] for step in whole]), torch.arange(20))
    for accumulation, world_size in ((2, 2), (1, 4)):
        for a, b in zip(whole, steps(accumulation, world_size), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_rank_reads_no_row_of_another_but_one_that_fills_up():
    class Counting(Lines):
        def __getitem__(self, i):
            read[-1].append(i)
            return super().__getitem__(i)

    read = []
    for rank in range(4):
        read.append([])
        list(loader(Counting(LENGTHS), 1, 2, rank=rank, world_size=4, shuffle=False))
    assert [len(own) for own in read] == [5] * 4
    assert sorted(i for own in read for i in own) == list(range(20))
    steps = [list(loader(Lines([1, 2, 3, 4, 5]), 1, 1, rank=rank, world_size=4)) for rank in range(4)]
    last = [own[-1][0] for own in steps]
    assert [bool(batch["supervised"].any()) for batch in last] == [True, False, False, False]
    assert all(torch.equal(batch["tokens"], last[0]["tokens"]) for batch in last)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_go_on_where_the_state_says_through_epochs(prefetch):
    def tokens(steps):
        return [torch.cat([batch["tokens"][:, 0] for batch in step]).tolist() for step in steps]

    whole = [step for epoch in range(3) for step in loader(Lines(LENGTHS)).epoch(epoch)]
    for done in range(9):
        first = loader(Lines(LENGTHS), prefetch=prefetch)
        assert tokens(islice(first.batches(), done)) == tokens(whole[:done])
        rest = loader(Lines(LENGTHS), 1, 2, rank=1, world_size=3, prefetch=prefetch)
        rest.load_state(json.loads(json.dumps(first.state)))
        assert first.state == rest.state
        steps = list(islice(rest.batches(), len(whole) - done))
        assert [step[0]["epoch"] for step in steps] == [step[0]["epoch"] for step in whole[done:]]
        assert all(set(a) <= set(b) for a, b in zip(tokens(steps), tokens(whole[done:])))
    with pytest.raises(ValueError, match=r"global batch size is 4, but .* was saved with 6"):
        loader(Lines(LENGTHS), 2, 2).load_state(first.state)
    with pytest.raises(ValueError, match=r"rows is 19, but .* was saved with 20"):
        loader(Lines(LENGTHS[1:])).load_state(first.state)


def test_a_mistake_while_reading_ahead_is_raised_where_the_batches_are_taken():
    with pytest.raises(ValueError, match="exceeds the canvas of 3"):
        short = partial(loaders.collate, pad_id=-1, length=3)
        list(islice(loader(Lines(LENGTHS), prefetch=2, collate=short).batches(), 9))


def test_batch_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        loader(Lines(LENGTHS), 0)

"""Data as people have it: every format gives the same rows, nothing is left out in silence, bad files are one line."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import checkpoint
from conftest import GOLDEN
from test_data import cache, chat, load_preprocessed, load_rows, program, tokenize_chat, write  # noqa: F401

import data
import loaders
import sample
import stream
from checkpoint import load_model
from tokenizer import CHATML, Tokenizer

ROOT = GOLDEN.parent.parent
GOLDEN_TOKENIZER = Tokenizer(GOLDEN / "models" / "qwen3")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "q"}
CALLS = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS}

# What decides in the templates of Qwen3, DeepSeek-R1-Distill and Llama 3.2
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].split('<think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is false else '') }}
{%- endif %}"""
R1 = """{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User:' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- 'Assistant:' + content + '<|im_end|>' }}{% for tool in message.tool_calls or [] %}
{{- tool['function']['name'] + '\n' + tool['function']['arguments'] }}{% endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:<think>\n' }}{% endif %}"""
LLAMA = """{% if tools is not none %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{- m.role + ': ' }}
{%- if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}<|im_end|>\n' }}{% else %}{{- m.content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    """A function from a template to a tokenizer of bytes with it."""
    made = Tokenizer.train(["The quick brown fox, 2 + 3."] * 9, 300)

    def with_template(template: str) -> Tokenizer:
        made.template = template
        return made

    return with_template


def encode(row, tokenizer, **options):
    """What is learnt of a row, as text, or why it is dropped."""
    content = data.chat_format(list(row))
    encoded = data.ChatEncoder(tokenizer, data.Reading(stage="sft", max_length=4000, **options))(*content(row))
    learnt = [token for token, yes in zip(encoded.tokens, encoded.supervised) if yes]
    return tokenizer.decode(learnt, skip_special_tokens=False) or encoded.outcome


# ---------------------------------------------------------------- one row in every format

WANTED = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SYSTEM = {"role": "system", "content": "w3"}
FORMATS = {
    "messages": ({"messages": WANTED}, WANTED),
    "json text": ({"messages": json.dumps(WANTED)}, WANTED),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "w1"]}, WANTED[1]]},
        WANTED,
    ),
    "prompt": ({"prompt": "w1", "completion": "w2"}, WANTED),
    "prompt messages": ({"prompt": [SYSTEM, WANTED[0]], "completion": WANTED[1:]}, [SYSTEM, *WANTED]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, WANTED),
    "sharegpt system": (
        {"system": "w3", "conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        [SYSTEM, *WANTED],
    ),
    "system_prompt": ({"system_prompt": "w3", "question": "w1", "answer": "w2"}, [SYSTEM, *WANTED]),
    "alpaca": ({"instruction": "w1 ", "input": "", "output": "w2"}, WANTED),
    "question": ({"question": "w1", "answer": "w2"}, WANTED),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_messages(tmp_path, name):
    row, wanted = FORMATS[name]
    path = write(tmp_path / "a.jsonl", [row] * 2)
    assert [found["messages"] for found in data.raw(path, "train")] == [wanted]


FILES = {
    "a.jsonl.gz": lambda rows: gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()),
    "a.json": lambda rows: json.dumps({"data": rows}).encode(),
    "b.json": lambda rows: json.dumps({"version": 1, "data": rows}, indent=1).encode(),
    "c.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "a.csv": lambda rows: (
        "\ufeffquestion,answer\n".encode() + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in rows).encode()
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_rows(tmp_path, name):
    rows = [{"question": f"w{i},\nw", "answer": answer} for i, answer in enumerate(("007", "NA", "null", "w7"))]
    (tmp_path / name).write_bytes(FILES[name](rows))
    read = [row for split in ("train", "test") for row in data.raw(str(tmp_path / name), split)]
    assert sorted(row["messages"][0]["content"] for row in read) == [row["question"] for row in rows]
    assert {row["messages"][1]["content"] for row in read} == {"007", "NA", "null", "w7"}


def test_a_text_file_is_lines_or_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("w1\n\nw2\n")
    rows = load_rows(
        f"{tmp_path}/a.txt[whole]", split="train", tokenizer=GOLDEN_TOKENIZER, max_length=3, hold_out=False
    )
    assert rows.counts["read"] == 1 and len(rows) == 1
    (tmp_path / "b.txt").write_text("w3\nw4")
    found = [row["text"] for split in ("train", "test") for row in data.raw(f"{tmp_path}[whole]", split)]
    assert sorted(found) == ["w1\n\nw2\n", "w3\nw4"]
    with pytest.raises(ValueError, match=r"whole.*only \.txt files"):
        list(data.raw(write(tmp_path / "a.jsonl", [{"text": "w1"}]) + "[whole]", "train"))


def test_a_csv_row_of_more_fields_than_columns_is_refused(tmp_path):
    for rows in ("w1,w2,w3\n" * 3, "w1,w2\n" * 3 + "w1,w2,w3\n"):
        (tmp_path / "a.csv").write_text("question,answer\n" + rows)
        with pytest.raises(ValueError, match=r"a\.csv: .*(3 fields in a row, of 2 columns|Expected 2 fields .* saw 3)"):
            list(data.raw(str(tmp_path / "a.csv"), "train"))


def test_parts_that_are_no_text_are_counted():
    image = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}, WANTED[1]]}
    assert encode(image, GOLDEN_TOKENIZER) == "dropped:content that is no string"


def test_objects_filled_up_by_arrow_are_as_they_were(tmp_path):
    import datasets

    other = CALL | {"function": {"name": "f", "arguments": {"a": "x", "b": {"c": 1}}}}
    rows = [CALLS, {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [other]}], "tools": None}] * 2
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    found = [row for split in ("train", "test") for row in data.raw(str(tmp_path / "a.parquet"), split)]
    assert {
        json.dumps(row["messages"][1]["tool_calls"][0]["function"]["arguments"], sort_keys=True) for row in found
    } == {
        '{"city": "Paris", "days": 2}',
        '{"a": "x", "b": {"c": 1}}',
    }
    assert [row["tools"] for row in found if row["tools"]] == [TOOLS] * 2


# ---------------------------------------------------------------- tools and reasoning


def test_tool_calls_are_learnt_and_tools_are_shown(tokenizer):
    qwen = tokenizer(QWEN3)
    call = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
    assert encode(CALLS, qwen) == f"<tool_call>\n{call}\n</tool_call><|im_end|>\n"
    ids, _ = qwen.render(data.Content("messages", chat=True)(CALLS)[0], tools=TOOLS)
    assert "# Tools" in qwen.decode(ids)
    text = {"name": "weather", "arguments": json.dumps(CALL["function"]["arguments"])}  # flat, and JSON text
    same = CALLS | {"messages": [USER, {"role": "assistant", "tool_calls": [text]}], "tools": json.dumps(TOOLS)}
    assert encode(same, qwen) == encode(CALLS, qwen)
    assert encode(same, tokenizer(LLAMA)).count('"parameters": {"city": "Paris"') == 1


@pytest.mark.parametrize(
    ("template", "message", "tools", "reason"),
    [
        (CHATML, CALLS["messages"][1], None, "tool calls not rendered"),
        (CHATML, WANTED[1], TOOLS, "tools not rendered"),
        (CHATML, WANTED[1] | {"reasoning_content": "x"}, None, "reasoning not rendered"),
        (R1, WANTED[1] | {"reasoning_content": "x"}, None, "reasoning not rendered"),
        (LLAMA, WANTED[1] | {"tool_calls": [CALL]}, TOOLS, "assistant content not rendered"),
        (LLAMA, CALLS["messages"][1] | {"tool_calls": [CALL, CALL]}, TOOLS, "one call"),
        (CHATML.replace("message['content']", "message['content'][:3]"), chat("", "long one")[1], None, "content not"),
        (CHATML, {"role": "assistant", "tool_calls": ["f"]}, None, "tool calls that are no list"),
        (CHATML, WANTED[1], ["f"], "tools that are no list"),
    ],
)
def test_what_the_template_leaves_out_is_counted(tokenizer, template, message, tools, reason):
    assert reason in encode({"messages": [USER, message], "tools": tools}, tokenizer(template))


def test_older_names_of_fields_are_read(tokenizer):
    older = [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    assert encode({"messages": older, "functions": TOOLS}, tokenizer(QWEN3)) == encode(CALLS, tokenizer(QWEN3))
    assert "tool calls not rendered" in encode({"messages": older}, tokenizer(CHATML))
    assert "tools not rendered" in encode({"messages": WANTED, "functions": TOOLS}, tokenizer(CHATML))
    for name in ("reasoning", "thinking"):
        thought = {"messages": [USER, WANTED[1] | {name: "x"}]}
        assert encode(thought, tokenizer(QWEN3)) == "<think>\nx\n</think>\n\nw2<|im_end|>\n"
        assert "reasoning not rendered" in encode(thought, tokenizer(CHATML))
    assert "reasoning that is no string" in encode(
        {"messages": [USER, WANTED[1] | {"reasoning": [1]}]}, GOLDEN_TOKENIZER
    )


def test_a_role_that_the_template_leaves_out_is_counted(tokenizer):
    silent = tokenizer("{% for m in messages if m.role != 'tool' %}{{ m.role + m.content }}{% endfor %}")
    assert "tool content not" in encode(
        {"messages": [USER, WANTED[1], {"role": "tool", "content": "a"}, WANTED[1]]}, silent
    )


THOUGHT = "<think>\nx\n</think>\n\ny"


@pytest.mark.parametrize(
    ("template", "answer", "learnt"),
    [
        (QWEN3, {"content": THOUGHT}, "<think>\nx\n</think>\n\ny<|im_end|>\n"),
        (QWEN3, {"content": "y", "reasoning_content": "x"}, "<think>\nx\n</think>\n\ny<|im_end|>\n"),
        (QWEN3, {"content": "y", "reasoning_content": None}, "y<|im_end|>\n"),
        (QWEN3, {"content": "<think>\n\n</think>\n\ny"}, "y<|im_end|>\n"),
        (R1, {"content": THOUGHT}, "x\n</think>\n\ny<|im_end|>"),
        (R1, {"content": "y"}, "y<|im_end|>"),
        (CHATML, {"content": THOUGHT}, f"{THOUGHT}<|im_end|>\n"),
    ],
)
def test_thinking_is_learnt_in_the_mode_it_was_written_for(tokenizer, template, answer, learnt):
    earlier = [USER, {"role": "assistant", "content": "<think>\nz\n</think>\n\nw"}]
    for messages in ([USER], [*earlier, USER]) if template != R1 else ([USER],):
        assert encode({"messages": [*messages, {"role": "assistant", **answer}]}, tokenizer(template)) == learnt


def test_a_long_chat_is_rendered_in_linear_time(tokenizer):
    turns = chat(*itertools.chain(*((f"question {i}?", f"{i}") for i in range(1500))))
    start = time.monotonic()
    ids, supervised = tokenizer(CHATML).render(turns, train_on="all")
    assert time.monotonic() - start < 3
    few = tokenizer(CHATML).render(turns[:20], train_on="all")
    assert (ids[: len(few[0])], supervised[: len(few[1])]) == few and sum(supervised) > 1500


def test_rows_with_the_mask_are_counted(tokenizer):
    reason = "dropped:<|mask|> in the text"
    assert encode({"messages": chat("q", "say <|mask|>")}, tokenizer(CHATML)) == reason
    assert data.TextEncoder(tokenizer(CHATML), data.Reading())("a <|mask|>").outcome == reason


# ---------------------------------------------------------------- files that end a reader, or must not be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("null\n", "row 1 is null"),
        ('\ufeff\n null\n{"text": "w1"}\n', "row 1 is null"),
        ('{"text": "w1"}\nnull\n', "row 2 is null"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deep"),
        ('{"text": "w1"}\n' + '{"a":' * 5000 + "1" + "}" * 5000, "nested too deep"),
        ("[\n" * 5000, "nested too deep"),
        ("[null]", "leaves no row"),
        ("5", "cannot load"),
        ("[5]", "leaves no row"),
        ('{"data": []}', "no"),
    ],
)
def test_json_that_would_end_the_reader_is_refused(tmp_path, content, message):
    for name, pack in (("a.json", lambda raw: raw), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(content.encode()))
        with pytest.raises(ValueError, match=message) as error:
            load_rows(str(tmp_path / name), split="train", tokenizer=GOLDEN_TOKENIZER, max_length=2, hold_out=False)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a set is not tried apart")
def test_a_file_that_ends_the_reader_ends_no_program_of_ours(tmp_path):
    """In a process without the faulthandler of pytest, which would report the reader's end."""
    deep = "[" * 10**5 + "]" * 10**5
    (tmp_path / "a.jsonl").write_text('{"text": "' + "w1 " * 2**21 + f'"}}\n{{"a": {deep}}}')
    (tmp_path / "b.jsonl").write_text("null,\n")
    script = "import data, sys\nfor name in sys.argv[1:]:\n    try: list(data.raw(name, 'train'))\n"
    script += "    except ValueError as error: print(error)"
    argv = [sys.executable, "-c", script, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip("ab", done.stdout.splitlines(), strict=True):
        assert line.startswith(f"cannot load {tmp_path}/{name}.jsonl: ")


def test_zst_without_its_package_and_a_fifo_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    os.mkfifo(tmp_path / "b.jsonl")
    for name, message in (("a.jsonl.zst", "pip install zstandard"), ("b.jsonl", "neither a file nor a directory")):
        with pytest.raises(ValueError, match=message):
            list(data.raw(str(tmp_path / name), "train"))


@pytest.mark.parametrize("pattern", ["../secret.jsonl", "{}/secret.jsonl", "../*.jsonl", "https://example.com/a.jsonl"])
def test_a_set_reads_no_file_outside_itself(tmp_path, pattern):
    write(tmp_path / "secret.jsonl", [{"text": "w1"}] * 3)
    write(tmp_path / "set" / "a.jsonl", [{"text": "w1"}] * 3)
    card = f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern.format(tmp_path)}'\n---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    with pytest.raises((ValueError, FileNotFoundError, ConnectionError), match=r"outside the set|https"):
        list(data.raw(str(tmp_path / "set"), "train"))


def test_a_spec_of_very_many_commas_is_refused_at_once():
    for text in ("a[" + "," * 100_000 + "]", "a[" + "train," * 50_000 + "]", "a[" + "','," * 30_000 + "]"):
        with pytest.raises(ValueError, match=r"in dataset spec|occurs twice") as error:
            data.parse_specs(text)
        assert len(str(error.value)) < 500
    with pytest.raises((ValueError, OSError)):
        list(data.raw("./" + "," * 100_000, "train"))


# ---------------------------------------------------------------- splits, processes, sets made before


def test_a_run_that_evaluates_on_nothing_trains_on_all_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"w{i}"} for i in range(40)])
    rows = data.load_split(data.parse_specs(path)[0], "train", hold_out=False)
    assert sorted(row["text"] for row in rows) == sorted(f"w{i}" for i in range(40))
    assert len(list(stream._source(data.parse_specs(path)[0], "train", False).rows())) == 40
    one = write(tmp_path / "one.jsonl", [{"text": "w1 w2"}])
    assert len(load_rows(one, split="train", tokenizer=GOLDEN_TOKENIZER, max_length=3, hold_out=False)) == 1


def test_few_rows_start_no_processes_and_a_file_gets_no_bars(tmp_path):
    assert data.processes([0] * 47, 8) is None and data.processes([0] * 2001, 8) == 2 == data.processes([0] * 9999, 2)
    path = write(tmp_path / "a.jsonl", [{"text": f"w{i}"} for i in range(100)])
    command = [sys.executable, "data.py", "--dataset_args", path, "--max_length", "4"]
    command += ["--model_name_or_path", str(GOLDEN / "models" / "qwen3")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "train: " in done.stdout


@pytest.mark.parametrize("objective", ["ar", "mdlm", "bd3lm"])
def test_any_id_pads_but_what_ends_an_answer_is_needed(objective):
    nothing = SimpleNamespace(pad_id=None, eos_id=None)
    config = SimpleNamespace(objective=objective, block_length=4)
    rows = [{"tokens": np.arange(n), "supervised": np.ones(n, bool)} for n in (2, 3)]
    collate = loaders.collate_for(SimpleNamespace(stage="pt", pad_to=None), config, nothing)
    assert collate(rows)["document"].tolist() == [[0, 0, -1], [0, 0, 0]]
    chats = SimpleNamespace(stage="sft", pad_to=None)
    if objective == "ar":
        loaders.collate_for(chats, config, nothing)
    else:
        with pytest.raises(ValueError, match="name an eos_token"):
            loaders.collate_for(chats, config, nothing)


DAMAGE = {
    "ids beyond": lambda tokens, supervised, bounds: (tokens + 10**6, supervised, bounds),
    "ids below 0": lambda tokens, supervised, bounds: (tokens - 500, supervised, bounds),
    "NaN": lambda tokens, supervised, bounds: (tokens * np.nan, supervised, bounds),
    "no rising": lambda tokens, supervised, bounds: (tokens, supervised, bounds[::-1].copy()),
    "an empty row": lambda tokens, supervised, bounds: (tokens, supervised, np.repeat(bounds, 2)),
    "beyond": lambda tokens, supervised, bounds: (tokens, supervised, np.append(bounds[:-1], bounds[-1] + 1)),
    "2-d": lambda tokens, supervised, bounds: (tokens, supervised, bounds[None]),
    "0-d": lambda tokens, supervised, bounds: (tokens, supervised, np.array(0)),
    "no bounds": lambda tokens, supervised, bounds: (tokens, supervised, bounds[:0]),
    "one row of all": lambda tokens, supervised, bounds: (tokens, supervised, bounds[[0, -1]]),
    "less supervised": lambda tokens, supervised, bounds: (tokens, supervised[:-1], bounds),
    "float supervised": lambda tokens, supervised, bounds: (tokens, supervised * 0.5, bounds),
}
MADE = {
    "nested": lambda made: "[" * 200_000,
    "list": lambda made: "[]",
    "counts": lambda made: json.dumps(made | {"counts": {"train": {"read": "many"}}}),
    "no counts": lambda made: json.dumps(made | {"counts": None}),
}


@pytest.mark.parametrize("name", [*DAMAGE, *MADE])
def test_a_damaged_preprocessed_set_is_one_line(tmp_path, capsys, name):
    write(tmp_path / "set" / "train.jsonl", [{"text": f"w{i}"} for i in range(30)])
    write(tmp_path / "set" / "test.jsonl", [{"text": "w1 w2"}] * 3)
    flags = ["--dataset_args", f"{tmp_path}/set", "--max_length", "4"]
    assert program(capsys, *flags, "--output_dir", f"{tmp_path}/made")[0] == 0
    names, about = ("tokens", "supervised", "bounds"), tmp_path / "made" / "preprocessed.json"
    if name in MADE:
        about.write_text(MADE[name](json.loads(about.read_text())))
    else:
        changed = DAMAGE[name](*(np.load(tmp_path / "made" / "train" / f"{array}.npy") for array in names))
        for array, value in zip(names, changed):
            np.save(tmp_path / "made" / "train" / f"{array}.npy", value)
    with pytest.raises(ValueError, match="is damaged; make the set anew") as error:
        load_preprocessed(tmp_path / "made", split="train", tokenizer=GOLDEN_TOKENIZER, max_length=4)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------- what sample.py reads


def test_line_separators_within_a_row_of_jsonl_are_kept(tmp_path):
    prompts = ["a\u2028b", "c\u0085d", "e\x0cf"]
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\r\n" for prompt in prompts)
    (tmp_path / "p.jsonl").write_bytes(text.encode())
    (tmp_path / "p.txt").write_bytes("\r\n".join(prompts).encode())
    for name in ("p.jsonl", "p.txt"):
        args = sample.Sample.parse(["--model_name_or_path", "x", "--input", str(tmp_path / name)])
        assert [request.prompt for request in sample.requests(args)] == prompts


def test_a_question_is_asked_with_the_tools_that_the_row_was_learnt_with(tmp_path):
    source = checkpoint("mdlm")
    model, tokenizer = load_model(source), Tokenizer(source)
    tokenizer.template = "{{ tools|length }} tools: {% for message in messages %}{{ message.content }} {% endfor %}"
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": WANTED, "tools": found} for found in (json.dumps(tools), "[]") for _ in range(9)]
    asked = [sample.to_score(row, "rows") for row in data.raw(write(tmp_path / "rows.jsonl", rows), "train")]
    assert {json.dumps(request.tools) for request in asked} == {json.dumps(tools), "null"}
    request = next(request for request in asked if request.tools)
    sample.encode(request, 1, sample.Sample.parse(["--model_name_or_path", source]), model, tokenizer, True)
    assert tokenizer.decode(request.ids).startswith("1 tools: ")


def test_tasks_may_be_numbers():
    rows = [{"messages": WANTED, "task": task} for task in (3, "a", None, 2.5)]
    todo = [sample.to_score(row, "rows") for row in rows]
    assert [[request.task for request in batch] for batch in sample.batches(todo, 9)] == [[None], ["2.5"], ["3"], ["a"]]

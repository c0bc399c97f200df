"""A run's directory: no file in it runs code, one run at a time uses it, and nothing in it is lost or mistaken."""

import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import launch
import numpy as np
import pytest
import tokenizers
import torch
from test_parallel import contents, flags_of, metrics, refused, weights
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import checkpoint
import convert
import data
import files
import log
import resume
import train
from tasks import builtin
from tokenizer import Tokenizer

AUTO = ["--resume_from_checkpoint", "auto"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return launch.make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(builtin, "SUMS", launch.ROWS)
    monkeypatch.setattr(log, "curves", lambda *_: None)  # a second a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, source) -> Path:
    """A complete run of ten steps, with training state in checkpoint-4 and checkpoint-8."""
    output = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "SUMS", launch.ROWS)
        patch.setattr(log, "curves", lambda *_: None)
        train.main(flags(source, output))
    return output


@pytest.fixture
def run(tmp_path, finished) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def torn(run) -> Path:
    shutil.rmtree(run / "checkpoint-final")
    return run


def flags(source, output, *more: str) -> list[str]:
    return flags_of(source, output, "--save_steps", "4", "--eval_strategy", "no", *more)


# ---------------------------------------------------------------------------------------------------------------------
# No pickle runs code


class Payload:
    """Creates a directory where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def saved(thing) -> bytes:
    torch.save(thing, buffer := io.BytesIO())
    return buffer.getvalue()


def in_metadata(state: Path, change) -> None:
    """Changes what .metadata holds."""
    stored = pickle.loads((state / ".metadata").read_bytes())
    change(stored)
    (state / ".metadata").write_bytes(pickle.dumps(stored))


def first_of(fields: dict, payload) -> None:
    fields[next(iter(fields))] = payload


def replaced(state: Path, content: bytes, *, as_bytes: bool) -> None:
    """Has `content` stand for every tensor, which .metadata declares to be one, or an object."""
    (file,) = state.glob("*.distcp")
    offset = file.stat().st_size
    file.write_bytes(file.read_bytes() + content)

    def change(stored):
        for part in stored.storage_data.values():
            part.offset, part.length = offset, len(content)
        if as_bytes:
            for index in list(stored.storage_data):
                stored.state_dict_metadata[index.fqn] = BytesStorageMetadata()
                stored.storage_data[type(index)(index.fqn)] = stored.storage_data[index]

    in_metadata(state, change)


PLACES = {
    "metadata": lambda state, p: (state / ".metadata").write_bytes(pickle.dumps(p)),
    "metadata, old protocol": lambda state, p: (state / ".metadata").write_bytes(pickle.dumps(p, protocol=0)),
    "metadata, a tensor's": lambda state, p: in_metadata(state, lambda m: first_of(m.state_dict_metadata, p)),
    "metadata, a file's": lambda state, p: in_metadata(state, lambda m: first_of(m.storage_data, p)),
    "metadata, the planner's": lambda state, p: in_metadata(state, lambda m: first_of(m.planner_data, [{"a": p}])),
    "metadata, the storage's": lambda state, p: in_metadata(state, lambda m: setattr(m.storage_meta, "modules", [p])),
    "metadata, a new field": lambda state, p: in_metadata(state, lambda m: setattr(m, "more", (p,))),
    "shard": lambda state, p: [file.write_bytes(saved(p)) for file in state.glob("*.distcp")],
    "shard, a pickle": lambda state, p: [file.write_bytes(pickle.dumps(p) * 9999) for file in state.glob("*.distcp")],
    "tensor": lambda state, p: replaced(state, saved(p), as_bytes=False),
    "tensor, a pickle": lambda state, p: replaced(state, pickle.dumps(p), as_bytes=False),
    "object": lambda state, p: replaced(state, saved(p), as_bytes=True),
    "object, a pickle": lambda state, p: replaced(state, pickle.dumps(p), as_bytes=True),
    "progress": lambda state, p: (state / "progress.json").write_bytes(pickle.dumps(p)),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_pickle_in_a_checkpoint_runs_code(torn, source, tmp_path, capsys, place):
    marker, state = tmp_path / "ran", torn / "checkpoint-8/state"
    assert not state.joinpath("progress.json").read_bytes().startswith(b"\x80")
    PLACES[place](state, Payload(marker))
    before = contents(torn)
    said = refused(capsys, flags(source, torn, "--resume_from_checkpoint", str(torn / "checkpoint-8")))
    assert "checkpoint-8" in said and "damaged" in said and "weights_only" not in said
    assert not marker.exists() and contents(torn) == before
    if place == "metadata":  # the payload is alive
        pickle.loads((state / ".metadata").read_bytes())
        assert marker.exists()


def test_a_state_holds_tensors_alone_and_names_no_file_outside(torn, source, tmp_path, capsys):
    state = torn / "checkpoint-8/state"
    stored = pickle.loads((state / ".metadata").read_bytes())
    assert all(hasattr(entry, "size") for entry in stored.state_dict_metadata.values())
    (file,) = state.glob("*.distcp")
    shutil.copy(file, tmp_path / "outside.distcp")
    by_name = flags(source, torn, "--resume_from_checkpoint", str(torn / "checkpoint-8"))
    for name in (str(tmp_path / "outside.distcp"), "../../../outside.distcp", "..", "none"):

        def change(stored, name=name):
            for part in stored.storage_data.values():
                part.relative_path = name

        in_metadata(state, change)
        said = refused(capsys, by_name)
        assert "which is no file of ours" in said or "is missing" in said


def test_no_pickle_in_a_preprocessed_set_runs_code(source, tmp_path, capsys):
    argv = ["--dataset_args", "builtin/sums", "--stage", "sft", "--model_name_or_path", source, "--max_length", "48"]
    data.main([*argv, "--show", "0", "--output_dir", str(tmp_path / "set")])
    argv = flags(source, tmp_path / "run", "--dataset_args", str(tmp_path / "set"), "--load_preprocessed_data")
    for name in ("tokens", "supervised", "bounds"):
        file = tmp_path / "set/train" / f"{name}.npy"
        whole = file.read_bytes()
        np.save(file, np.array([Payload(tmp_path / "ran")], dtype=object), allow_pickle=True)
        assert "set is damaged" in refused(capsys, argv)
        file.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        assert "set is damaged" in refused(capsys, argv)
        file.write_bytes(whole)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# One run at a time


def test_a_second_run_in_a_directory_is_refused_while_the_first_lasts(source, tmp_path, capsys, monkeypatch):
    output, save, refusals = tmp_path / "run", resume.save_training, []

    def saving(*args, **options):
        for more in ([], AUTO, ["--overwrite"], ["--resume_from_checkpoint", str(output / "checkpoint-4")]):
            refusals.append(refused(capsys, flags(source, output, *more)))
        return save(*args, **options)

    monkeypatch.setattr(resume, "save_training", saving)
    train.main(flags(source, output))
    assert len(refusals) == 8 and (output / "checkpoint-final").is_dir()
    assert all(f"{output} is in use by process {os.getpid()} on " in said for said in refusals)
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_two_conversions_into_one_directory_are_one_after_the_other(source, tmp_path, capsys, monkeypatch):
    argv = ["--model_name_or_path", source, "--output_dir", str(tmp_path / "new"), "--overwrite"]
    save, said = convert.save_model, []

    def saving(*args, **options):
        monkeypatch.setattr(convert, "save_model", save)
        with pytest.raises(SystemExit):
            convert.main(argv)
        said.append(capsys.readouterr().err)
        save(*args, **options)

    monkeypatch.setattr(convert, "save_model", saving)
    convert.main(argv)
    assert f"convert.py: {tmp_path / 'new'} is in use by process {os.getpid()} on " in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_lock_ends_with_its_process_and_not_with_a_fork_of_it(tmp_path):
    script = f"""
import os, sys, time
sys.path.insert(0, {str(launch.ROOT)!r})
import files, pathlib
with files.sole_user(pathlib.Path({str(tmp_path / "a/run")!r})):
    if os.fork() == 0:
        print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    try:
        words = f"is in use by process {process.pid} on .*; wait for it, or choose"
        with pytest.raises(ValueError, match=words), files.sole_user(tmp_path / "a/run"):
            pass
        process.kill()
        process.wait()
        with files.sole_user(tmp_path / "a/run"):  # though its child lives
            pass
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()
    with files.sole_user(tmp_path / "b/c/run"):
        assert (tmp_path / "b/c/run/.lock").is_file()
    assert not (tmp_path / "b").exists() and (tmp_path / "a/run").exists()  # what was there before stays


def test_where_the_platform_has_no_locks_and_no_resource_usage_runs_go_on(tmp_path, monkeypatch):
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (files, log):
        spec = importlib.util.spec_from_file_location("without", module.__file__)
        spec.loader.exec_module(without := importlib.util.module_from_spec(spec))
        if module is files:
            with without.sole_user(tmp_path):
                pass
    sums = Counter(dict.fromkeys(log.SUMS, 1.0))
    assert "peak_memory_gb" not in without.summarize(sums, train.Ranks(0, 1, torch.device("cpu")), None)


# ---------------------------------------------------------------------------------------------------------------------
# Resumed with other inputs


def rows_file(path: Path, answer=str) -> Path:
    rows = [[{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": answer(i + 1)}] for i in range(60)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


WAYS = {
    "rows": [],
    "stream": ["--streaming", "--eval_strategy", "no"],
    "packed": ["--packing", "True", "--objective", "ar"],
}


@pytest.mark.parametrize("way", WAYS)
def test_other_data_under_the_same_name_is_refused(source, tmp_path, capsys, way):
    file = rows_file(tmp_path / "rows.jsonl")
    more = ["--dataset_args", str(file), "--num_proc", "1", "--max_steps", "5", *WAYS[way]]
    argv = flags_of(source, tmp_path / "run", "--save_steps", "4", *more)
    train.main(argv)
    shutil.rmtree(tmp_path / "run/checkpoint-final")
    before = contents(tmp_path / "run")
    rows_file(file, lambda n: str(n + 1 if n < 50 else n))
    said = refused(capsys, [*argv, *AUTO])
    assert "the data to train on is not that of" in said and "checkpoint-4" in said
    assert contents(tmp_path / "run") == before
    rows_file(file)
    train.main([*argv, *AUTO])


def test_another_row_far_into_a_stream_is_refused(source, tmp_path, capsys):
    rows = [json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(200)]
    (tmp_path / "set").mkdir()
    more = ["--dataset_args", str(tmp_path / "set"), "--max_steps", "5", *WAYS["stream"]]
    argv = flags_of(source, tmp_path / "run", "--save_steps", "4", *more)
    for again in ([], AUTO):
        (tmp_path / "set/rows.jsonl").write_text("".join(rows))
        train.main([*argv, *again])
        shutil.rmtree(tmp_path / "run/checkpoint-final")
    rows[150] = rows[150].replace("151", "515")
    (tmp_path / "set/rows.jsonl").write_text("".join(rows))
    assert "the data to train on is not that of" in refused(capsys, [*argv, *AUTO])


def test_another_tokenizer_under_the_same_name_is_refused(torn, source, tmp_path, capsys):
    other = shutil.copytree(source, tmp_path / "other")
    core = json.loads((other / "tokenizer.json").read_text())
    vocabulary = core["model"]["vocab"]
    a, b = "0", "1"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(core))
    said = refused(capsys, flags(str(other), torn, *AUTO))
    assert "the tokenizer is not that of" in said and "checkpoint-8" in said
    assert tokenizers.Tokenizer.from_file(str(other / "tokenizer.json")).encode("0").ids


def test_builtin_tiny_names_the_data_that_its_tokenizer_is_made_of(source, tmp_path, capsys):
    file = rows_file(tmp_path / "rows.jsonl")
    more = ["--dataset_args", str(file), "--num_proc", "1", "--max_steps", "3", "--save_steps", "2"]
    argv = flags_of("builtin/tiny", tmp_path / "run", *more)
    train.main(argv)
    shutil.rmtree(tmp_path / "run/checkpoint-final")
    train.main([*argv, *AUTO])
    shutil.rmtree(tmp_path / "run/checkpoint-final")
    rows_file(file, lambda n: str(n + 1))
    assert "data" in refused(capsys, [*argv, *AUTO])


def test_the_hash_of_rows_is_of_their_content_and_takes_a_second():
    tokens, bounds = np.arange(1000, dtype=np.int32), np.arange(0, 1001, 10)
    mask = np.ones(1000, np.uint8)

    def hashed(cut, tokens=tokens, mask=mask, bounds=bounds):
        return resume.hash_rows(data.Rows(np.split(tokens, cut), np.split(mask, cut), bounds, Counter()))

    assert hashed([]) == hashed([500]) == hashed([1, 2, 999])
    other, unlearnt = tokens.copy(), mask.copy()
    other[700], unlearnt[3] = 5, 0
    assert len({hashed([]), hashed([], other), hashed([], mask=unlearnt), hashed([], bounds=bounds[:-1])}) == 4
    million = np.zeros(128 * 10**6, np.int32)
    rows = data.Rows(
        [million], [million.view(np.uint8)[: len(million)]], np.arange(0, len(million) + 1, 128), Counter()
    )
    began = time.perf_counter()
    resume.hash_rows(rows)
    assert time.perf_counter() - began < 5  # about one, on an idle machine


# ---------------------------------------------------------------------------------------------------------------------
# A complete run, resumed


def test_a_complete_run_is_compared_first(run, source, capsys):
    before = contents(run)
    train.main(flags(source, run, *AUTO))
    assert "the run is complete" in capsys.readouterr().out
    for more, words in {
        ("--dataset_args", "builtin/sums[train:40]"): "--dataset_args builtin/sums[train:40] contradicts",
        ("--learning_rate", "1e-3"): "--learning_rate 0.001 contradicts",
        ("--seed", "1"): "--seed 1 contradicts",
        ("--max_steps", "9"): "holds a complete run of 10 steps; to prolong it pass more --max_steps",
    }.items():
        said = refused(capsys, flags(source, run, *AUTO, *more))
        assert words in said and str(run) in said
    assert contents(run) == before


def test_a_complete_run_is_prolonged_and_so_after_a_kill(run, source, capsys, monkeypatch):
    longer, update = flags(source, run, "--max_steps", "14", *AUTO), train.update
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(longer)
    said = capsys.readouterr().out
    assert f"resume {run}/checkpoint-8, on the longer learning rate schedule" in said
    assert not (run / "checkpoint-final").exists() and checkpoint.load_model(run / "checkpoint-10")
    assert "--max_steps 10 contradicts" in refused(capsys, flags(source, run, *AUTO))
    train.main(longer)
    assert f"resume {run}/checkpoint-8" in capsys.readouterr().out
    assert [row["step"] for row in metrics(run) if "loss" in row] == list(range(1, 15))
    train.main(longer)
    assert "the run is complete" in capsys.readouterr().out
    assert train.update is update


def test_a_complete_run_without_state_says_why_it_cannot_be_prolonged(run, source, capsys):
    for path in resume.checkpoints(run):
        shutil.rmtree(path)
    before = contents(run)
    said = refused(capsys, flags(source, run, "--max_steps", "20", *AUTO))
    assert "no checkpoint beside it holds training state" in said and "--model_name_or_path" in said
    assert contents(run) == before


# ---------------------------------------------------------------------------------------------------------------------
# Overwritten


def ends_early(argv, monkeypatch, where="update") -> None:
    """A run that ends in its first step, or wherever."""
    with monkeypatch.context() as patch:
        patch.setattr(train, where, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(argv)


def test_a_run_is_overwritten_at_the_first_save_of_another(run, source, capsys, monkeypatch):
    before, old = contents(run), weights(run)
    argv = flags(source, run, "--learning_rate", "1e-3")
    ends_early([*argv, "--overwrite"], monkeypatch)
    assert contents(run) | before == contents(run)  # nothing is lost
    refusal = refused(capsys, argv)
    assert "holds a run (checkpoint-4); choose another, or pass --overwrite, or go on with it by" in refusal

    # What was begun goes on from its start, and not with what is to be overwritten.
    train.main([*argv, *AUTO])
    said = capsys.readouterr().out
    assert "is complete" not in said and "resume" not in said
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in Path(run).glob("[!.]*"))
    assert next(row["learning_rate"] for row in metrics(run) if "loss" in row) < 1e-3
    assert any(not torch.equal(old[name], value) for name, value in weights(run).items())


def test_a_kill_while_one_run_takes_the_place_of_another_loses_nothing(run, source, monkeypatch, tmp_path):
    new = run / ".overwriting"
    shutil.copytree(run, tmp_path / "new")
    (tmp_path / "new/checkpoint-8/config.json").write_text("new")
    (tmp_path / "new/checkpoint-4").rename(tmp_path / "new/checkpoint-6")
    wanted = {path.removeprefix(str(tmp_path / "new")) for path in contents(tmp_path / "new")}
    (run / ".overwriting").mkdir()
    shutil.copytree(tmp_path / "new", new, dirs_exist_ok=True)
    rename, delete, calls = Path.rename, files.delete, 0

    def ending(function):
        def call(*args):
            nonlocal calls
            calls += 1
            return function(*args) if calls % 3 else 1 / 0

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", ending(rename))
        patch.setattr(resume, "delete", ending(delete))
        for _attempt in range(40):
            try:
                resume.put_in_order(run)
            except ZeroDivisionError:
                continue
            break
    assert calls > 9
    assert {path.removeprefix(str(run)) for path in contents(run)} == wanted
    assert (run / "checkpoint-8/config.json").read_text() == "new"


def test_only_what_a_run_wrote_is_overwritten_and_no_link_is_followed(run, source, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(run / "checkpoint-4", outside / "model")
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-4").symlink_to(outside / "model")
    (run / "checkpoint-5").symlink_to(outside / "nowhere")
    (run / "metrics.jsonl").rename(outside / "metrics.jsonl")
    (run / "metrics.jsonl").symlink_to(outside / "metrics.jsonl")
    kept = [
        "checkpoint-notes.txt",
        "checkpoint-averaged/model",
        "notes/a",
        ".hidden",
        "checkpoint-",
        ".checkpoint-x.old/a",
    ]
    for name in kept:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    before = contents(outside)
    train.main(flags(source, run, "--overwrite", "--save_steps", "0"))
    assert contents(outside) == before and all((run / name).read_text() == name for name in kept)
    assert sorted(path.name for path in run.glob("checkpoint-[0-9f]*")) == ["checkpoint-final"]
    assert not (run / "metrics.jsonl").is_symlink()

    # Nor are links when checkpoints grow old.
    (run / "checkpoint-2").symlink_to(outside / "model")
    resume.prune(run, 20, 1)
    assert contents(outside) == before


def test_what_a_killed_save_left_is_not_the_result_of_the_run_that_overwrites(run, source, monkeypatch, capsys):
    old = weights(run)
    (run / "checkpoint-final").rename(run / ".checkpoint-final.old")
    shutil.copytree(run / "checkpoint-8", run / ".checkpoint-8.old")
    argv = flags(source, run, "--learning_rate", "1e-3")
    ends_early([*argv, "--overwrite"], monkeypatch)
    assert all(torch.equal(old[name], value) for name, value in weights(run).items())  # it is back
    train.main([*argv, *AUTO])
    assert "is complete" not in capsys.readouterr().out
    assert any(not torch.equal(old[name], value) for name, value in weights(run).items())


def test_convert_overwrites_a_checkpoint_and_keeps_what_else_is_there(source, tmp_path):
    output = shutil.copytree(source, tmp_path / "model")
    kept = ["README.md", "optimizer.pt", "eval.json", "model-card.md", ".gitattributes"]
    for name in kept:
        (output / name).write_text(name)
    (output / "link").symlink_to("README.md")
    (output / "model-00001-of-00002.safetensors").write_text("of a model before")
    convert.main(["--model_name_or_path", source, "--output_dir", str(output), "--overwrite", "--objective", "mdlm"])
    assert all((output / name).read_text() == name for name in kept) and (output / "link").is_symlink()
    assert checkpoint.load_config(output).objective == "mdlm" and Tokenizer(output)
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


def test_a_flag_that_there_was_not_yet_when_a_run_was_written_had_its_default(source, tmp_path):
    args = train.Settings.parse(flags_of(source, tmp_path / "run"))
    before = {name: value for name, value in args.learned.items() if name not in ("noise_type", "adam_beta1")}
    resume.check_settings(before, args, tmp_path)
    with pytest.raises(ValueError, match="--stage"):
        resume.check_settings(before | {"stage": "other"}, args, tmp_path)


def test_what_is_later_than_a_checkpoint_is_neither_mixed_with_its_run_nor_taken_for_it(run, source, tmp_path, capsys):
    by_name = {n: ["--resume_from_checkpoint", str(run / f"checkpoint-{n}")] for n in (4, 8)}
    before = contents(run)
    assert "later than" in (said := refused(capsys, flags(source, run, *by_name[4]))) and "checkpoint-8 say" in said
    assert "the run is complete; go on by" in refused(capsys, flags(source, run, *by_name[8]))
    assert contents(run) == before
    train.main(flags(source, tmp_path / "other", *by_name[4]))
    assert weights(tmp_path / "other").keys() == weights(run).keys()
    shutil.rmtree(run / "checkpoint-final")
    train.main(flags(source, run, *by_name[8]))
    assert (run / "checkpoint-final").is_dir()


def test_a_run_that_is_there_names_its_newest_checkpoint(run, source, capsys):
    for newest in ("checkpoint-final", "checkpoint-8", "checkpoint-4"):
        said = refused(capsys, flags(source, run))
        assert f"--resume_from_checkpoint auto (the newest is {newest})" in said and "--overwrite" in said
        shutil.rmtree(run / newest)
    assert "(args.json)" not in refused(capsys, flags(source, run))
    (run / "metrics.jsonl").unlink()
    assert "holds a run (args.json)" in refused(capsys, flags(source, run))


# ---------------------------------------------------------------------------------------------------------------------
# Damaged


def edited(**changes):
    def change(file: Path):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def without(name):
    def change(file: Path):
        fields = json.loads(file.read_text())
        del fields[name]
        file.write_text(json.dumps(fields))

    return change


def of(content: bytes):
    return lambda file: file.write_bytes(content)


PROGRESS = {
    "empty": of(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "{}": of(b"{}"),
    "[]": of(b"[]"),
    "null": of(b"null"),
    "deep": of(b"[" * 100_000),
    "not UTF-8": of(b'{"step": "\xff"}'),
    "a string": edited(step="8"),
    "negative": edited(step=-5),
    "huge": edited(step=10**9),
    "a huge epoch": edited(loader=[{"epoch": 10**9, "step": 8, "rows": 60, "global_batch_size": 8, "seed": 42}]),
    "no loader": edited(loader={}),
    "no sums": without("sums"),
    "no settings": without("settings"),
    "no hash": without("hash"),
}


@pytest.mark.parametrize("damage", PROGRESS)
def test_a_damaged_progress_is_told_in_one_line_and_an_earlier_one_serves(torn, source, capsys, damage):
    file, before = torn / "checkpoint-8/state/progress.json", contents(torn)
    PROGRESS[damage](file)
    expected = before | {str(file): file.read_bytes()}
    said = refused(capsys, flags(source, torn, "--resume_from_checkpoint", str(torn / "checkpoint-8")))
    assert f"{file} is damaged" in said and contents(torn) == expected
    again = flags(source, torn, *AUTO, "--save_steps", "0")
    if damage == "empty":
        PROGRESS[damage](torn / "checkpoint-4/state/progress.json")
        assert f"{file} is damaged" in refused(capsys, again)
        (torn / "checkpoint-4/state/progress.json").write_bytes(before[f"{torn}/checkpoint-4/state/progress.json"])
    if damage in ("empty", "deep"):
        train.main(again)
        said = capsys.readouterr().out
        assert f"passed over: {file} is damaged" in said and f"resume {torn}/checkpoint-4" in said
        assert (torn / "checkpoint-final").is_dir()


LINES = {"NUL": b"\0\0\0\0", "broken": b'{"step": 1', "not UTF-8": b"\xff", "no step": b'{"loss": 1}'}
LINES |= {"a string": b'{"step": "1"}', "a list": b"[1]", "deep": b"[" * 100_000}


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_line_of_the_log_is_named_before_anything_is_written(torn, source, capsys, line):
    file = torn / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + LINES[line] + b"\n")
    n, before = file.read_bytes().count(b"\n"), contents(torn)
    said = refused(capsys, flags(source, torn, *AUTO))
    assert f"{file}, line {n}: " in said and "is no row of a run's log; remove it" in said
    assert contents(torn) == before


def test_a_damaged_state_is_named_without_a_traceback(torn, source, capsys, caplog):
    state = torn / "checkpoint-8/state"
    whole = {file.name: file.read_bytes() for file in state.iterdir()}
    (shard,) = (name for name in whole if name.endswith(".distcp"))
    noise = np.random.default_rng(0).bytes(len(whole[shard]))
    contents = [(shard, part) for part in (whole[shard][:-1], b"", noise, bytes(len(noise)))]
    others = (b"", noise, whole[".metadata"][:500], pickle.dumps([1]), pickle.dumps({}))
    for name, content in [*contents, *((".metadata", other) for other in others)]:
        (state / name).write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train.main(flags(source, torn, "--resume_from_checkpoint", str(torn / "checkpoint-8")))
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "checkpoint-8 does not fit this run or is damaged: " in said, said
        (state / name).write_bytes(whole[name])
    (state / ".metadata").unlink()
    os.mkfifo(state / ".metadata")  # which would keep a reader waiting
    said = refused(capsys, flags(source, torn, "--resume_from_checkpoint", str(torn / "checkpoint-8")))
    assert "damaged: .metadata is missing" in said
    assert not [record for record in caplog.records if "NullHandler" not in record.name]


def test_a_damaged_args_json_of_a_complete_run_is_named(run, source, capsys):
    for content in (b"", b"[]", b"[" * 100_000):
        (run / "args.json").write_bytes(content)
        assert f"{run}/args.json is damaged" in refused(capsys, flags(source, run, *AUTO))

"""Manifests, which record everything that made a score, and the table that compares the scores of many manifests."""

import hashlib
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import config_dict, resolve
from diffusion import Sampling
from files import replacing_file

# ---------------------------------------------------------------------------------------------------------------------
# Writing manifests. `lm` is evaluate.py's model, `results` what lm-eval writes of a run.

PACKAGES = ("torch", "lm_eval", "datasets", "tokenizers", "safetensors", "numpy")
OPTIONS = ("dtype", "max_length", "enable_thinking", "add_bos_token", "seed", "mc_num", "is_check_greedy")


def manifest(lm, counts: Counter, results: dict, argv: list[str], seconds: float) -> dict:
    """Everything that made the numbers of a run."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    config = results["config"]
    subtasks = {task for tasks in results["group_subtasks"].values() for task in tasks}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": " ".join([*(["torchrun"] if lm.world_size > 1 else []), "evaluate.py", *argv]),
        "commit": git.stdout.strip() or None,
        "date": results["date"],
        "model": str(lm),
        "checkpoint": str(lm.options.pretrained),
        "checkpoint_sha256": _digest(resolve(lm.options.pretrained)),
        "config": config_dict(lm.model.config),
        "dtype": str(lm.model.head_weight.dtype).removeprefix("torch."),
        "sampler": lm.options.only(Sampling),
        "options": {name: getattr(lm.options, name) for name in OPTIONS},
        "gen_kwargs": config.get("gen_kwargs"),
        "chat_template_sha": results.get("chat_template_sha"),
        "system_instruction": results.get("system_instruction"),
        "fewshot_as_multiturn": results.get("fewshot_as_multiturn"),
        "limit": config.get("limit"),
        "batch_size": lm.batch_size or "auto",
        "processes": lm.world_size,
        "hardware": f"{lm.world_size} x {_hardware(lm.device)}",
        "packages": {"python": platform.python_version()} | versions,
        "seconds": seconds,
        **{kind: {name: n for (of, name), n in counts.items() if of == kind} for kind in ("generated", "scored")},
        "tokens_per_forward": counts["generated", "tokens"] / max(1, counts["generated", "forwards"]) or None,
        "tasks": {name: _task(lm, results, name) for name in results["results"]},
        "requested": sorted(set(results["results"]) - subtasks),
    }


def _digest(directory: Path) -> str:
    """A hash of a checkpoint's files."""
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors"), *directory.glob("*.jinja")]):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def cache_key(lm) -> str:
    """What answers depend on besides their requests, as a hash: the checkpoint's files and every option."""
    options = {**asdict(lm.options), "pretrained": _digest(resolve(lm.options.pretrained)), "model": str(lm)}
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def _task(lm, results: dict, name: str) -> dict:
    """What a manifest records of one task."""
    scores, prompts = results["results"][name], lm.prompts.get(name)
    if results["config"].get("use_cache") is not None:
        prompts = None  # the model has not seen what the cache answered
    return {
        "results": {metric: value for metric, value in scores.items() if isinstance(value, int | float | str)},
        "version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
        "generation_kwargs": results["configs"].get(name, {}).get("generation_kwargs"),
        "questions": results.get("n-samples", {}).get(name, {}).get("effective"),
        "prompts_sha256": hashlib.sha256("".join(sorted(prompts)).encode()).hexdigest() if prompts else None,
    }


def write_manifest(lm, counts: Counter, output_path: str, argv: list[str], began: float) -> Path:
    """Writes the manifest, and the likelihoods' standard errors, beside lm-eval's newest results; returns its path."""
    # lm-eval only warns when it cannot write, and may leave an empty or a torn file.
    path = Path(output_path)
    found = path.parent.glob(f"{path.stem}_*.json") if path.suffix == ".json" else path.glob("*/results_*.json")
    written = [file for file in found if file.stat().st_mtime >= began - 1 and file.stat().st_size]
    if not written:
        raise OSError(f"lm-eval could not write its results to {output_path}; make room there, then run it again")
    newest = max(written, key=lambda file: file.stat().st_mtime)
    try:
        results = json.loads(newest.read_bytes())
    except ValueError as error:
        raise OSError(f"lm-eval could not write all of {newest}; make room there, then run it again") from error

    made = manifest(lm, counts, results, argv, time.time() - began)
    name = newest.name.removeprefix("results_")
    target = newest.with_name(f"manifest_{name}")
    with replacing_file(target) as file:
        file.write_text(json.dumps(made, indent=2, default=str) + "\n")
    if lm.standard_errors:
        rows = sorted(lm.standard_errors, key=lambda row: (row["task"], row["doc"], row["choice"]))
        with replacing_file(newest.with_name(f"standard_errors_{Path(name).stem}.jsonl")) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


# ---------------------------------------------------------------------------------------------------------------------
# The table of many manifests

UNNAMED = ("max_new_tokens", "temperature", "top_k", "top_p")  # sampler options that a row's name leaves out
USUAL = {"scheduler": "linear", "remasking": "low_confidence"}  # values that it leaves out


class Cell(NamedTuple):
    value: float
    error: float | None
    setting: dict  # what has to be equal for two cells of a column to be comparable


def table(directories: list[str]) -> str:
    """The manifests below these directories as a Markdown table, newest first where there are several of a cell."""
    cells: dict[tuple[str, str], Cell] = {}
    for made in sorted(_read_manifests(directories), key=lambda made: made["date"]):
        cells |= _cells(made)
    rows, columns = sorted({row for row, _ in cells}), list(dict.fromkeys(column for _, column in cells))

    # A cell whose setting is not the most frequent one of its column gets a mark, which a note below explains.
    usual, notes = {}, {}
    for column in columns:
        settings = [json.dumps(cells[row, column].setting) for row in rows if (row, column) in cells]
        usual[column] = json.loads(statistics.mode(settings))
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row in rows:
        texts = [_text(cells.get((row, column)), usual[column], notes) for column in columns]
        lines.append("| " + " | ".join([row, *texts]) + " |")
    footnotes = [f"[{number}] not comparable: {note}" for note, number in notes.items()]
    return "\n".join([*lines, *([""] if footnotes else []), *footnotes])


def _read_manifests(directories: list[str]) -> list[dict]:
    files = [file for directory in directories for file in Path(directory).rglob("manifest_*.json")]
    if not files:
        raise FileNotFoundError(f"no manifest_*.json below {', '.join(directories)}; --output_path makes them")
    manifests = []
    for file in files:
        try:
            manifests.append(json.loads(file.read_bytes()))
            for name in ("date", "sampler", "checkpoint", "model", "requested", "tasks"):
                manifests[-1][name]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no manifest of evaluate.py ({error!r}); remove it") from error
    return manifests


def _cells(made: dict) -> dict[tuple[str, str], Cell]:
    """The cells of a manifest by (row, column): (checkpoint and sampler, task and metric)."""
    sampler = {name: value for name, value in made["sampler"].items() if value not in (None, False, [], 0.0)}
    method = [f"{name} {x}" for name, x in sampler.items() if name not in UNNAMED and x != USUAL.get(name)]
    row = f"{made['checkpoint'].rstrip('/')} ({', '.join([made['model'], *method])})"
    cells = {}
    for task in made["requested"]:
        results = made["tasks"][task]["results"]
        for metric, value in results.items():
            name, _, kind = metric.partition(",")
            if not isinstance(value, int | float) or name.endswith("_stderr") or name == "sample_len":
                continue
            error = results.get(f"{name}_stderr,{kind}")
            column = f"{task}<br>{name}" + (f" ({kind})" if kind != "none" else "")
            cells[row, column] = Cell(value, error if isinstance(error, int | float) else None, _setting(made, task))
    return cells


def _setting(made: dict, name: str) -> dict:
    task, chat = made["tasks"][name], made["chat_template_sha"] is not None
    return {
        "shots": task["num_fewshot"],
        "task version": task["version"],
        "questions": task["questions"] or made["limit"],
        "chat template": chat,
        "system instruction": made["system_instruction"],
        "few-shot as turns": bool(made["fewshot_as_multiturn"] and chat and task["num_fewshot"]),
        "answer tokens": made["sampler"]["max_new_tokens"],
        "temperature": made["sampler"]["temperature"] or 0,
        "generation": json.dumps([task["generation_kwargs"], made["gen_kwargs"]], sort_keys=True),
        # a template's text is the model's own, so prompts can only be compared without one
        "prompts": None if chat else task["prompts_sha256"],
    }


def _text(cell: Cell | None, usual: dict, notes: dict[str, int]) -> str:
    """A cell as the table shows it, with the mark of a note where its setting is not the usual one."""
    if cell is None:
        return ""
    scale, value, error = (1, ".4g", ".2g") if abs(cell.value) > 1 else (100, ".1f", ".1f")  # a rate is in percent
    text = f"{scale * cell.value:{value}}"
    if cell.error is not None:
        text += f" ± {scale * cell.error:{error}}"
    other = [f"{k} {v!r} where the column has {usual[k]!r}" for k, v in cell.setting.items() if v != usual[k]]
    if other:
        text += f" [{notes.setdefault('; '.join(other), len(notes) + 1)}]"
    return text

"""Manifests, which record everything that made a score, and the table that compares the scores of many manifests."""

import hashlib
import json
import platform
import re
import subprocess
import time
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from checkpoint import config_dict, resolve
from diffusion import Sampling
from files import replacing_file

# ---------------------------------------------------------------------------------------------------------------------
# Writing manifests. `lm` is evaluate.py's model, `results` what lm-eval writes of a run.

PACKAGES = ("torch", "lm_eval", "datasets", "tokenizers", "safetensors", "numpy")
OPTIONS = ("dtype", "max_length", "enable_thinking", "add_bos_token", "seed", "mc_num", "is_check_greedy")
CHAT = ("chat_template_sha", "system_instruction", "fewshot_as_multiturn")


def manifest(lm, counts: Counter, results: dict, argv: list[str], seconds: float) -> dict:
    """Everything that made the numbers of a run."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    # A group's results are the mean of its tasks', so the tasks that nobody named are left out of "requested".
    subtasks = {task for tasks in results["group_subtasks"].values() for task in tasks}
    return {
        "command": " ".join([*(["torchrun"] if lm.world_size > 1 else []), "evaluate.py", *argv]),
        "commit": git.stdout.strip() or None,
        "date": results["date"],
        "model": f"a2d_{lm.objective}",
        "checkpoint": str(lm.options.pretrained),
        "checkpoint_sha256": _digest(resolve(lm.options.pretrained)),
        "config": config_dict(lm.model.config),
        "dtype": str(lm.model.head_weight.dtype).removeprefix("torch."),
        "sampler": lm.options.only(Sampling),
        "options": {name: getattr(lm.options, name) for name in OPTIONS},
        "gen_kwargs": results["config"].get("gen_kwargs"),
        **{name: results.get(name) for name in CHAT},
        "limit": results["config"].get("limit"),
        "batch_size": lm.batch_size or "auto",
        "processes": lm.world_size,
        "hardware": f"{lm.world_size} x {_hardware(lm.device)}",
        "packages": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "seconds": seconds,
        **{kind: {name: n for (of, name), n in counts.items() if of == kind} for kind in ("generated", "scored")},
        "tokens_per_forward": counts["generated", "tokens"] / max(1, counts["generated", "forwards"]) or None,
        "tasks": {name: _task(lm, results, name) for name in results["results"]},
        "requested": sorted(set(results["results"]) - subtasks),
    }


def _digest(directory: Path) -> str:
    """A hash of a checkpoint's files."""
    # Each file is hashed on its own, so that the weights are never in memory as a whole.
    digest = hashlib.sha256()
    for file in sorted(file for kind in ("json", "safetensors", "jinja") for file in directory.glob(f"*.{kind}")):
        with file.open("rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def cache_key(lm) -> str:
    """What answers depend on besides their requests, as a hash: the checkpoint's files and every option."""
    options = {**asdict(lm.options), "pretrained": _digest(resolve(lm.options.pretrained)), "objective": lm.objective}
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return f"{name[1] if name else platform.machine()}, {torch.get_num_threads()} threads"


def _task(lm, results: dict, name: str) -> dict:
    """What a manifest records of one task."""
    # Where a cache answers, the model does not see all of the prompts.
    prompts = lm.prompts.get(name) if results["config"].get("use_cache") is None else None
    return {
        "results": {metric: x for metric, x in results["results"][name].items() if isinstance(x, int | float | str)},
        "version": results["versions"].get(name),
        "num_fewshot": results["n-shot"].get(name),
        "generation_kwargs": results["configs"].get(name, {}).get("generation_kwargs"),
        "questions": results.get("n-samples", {}).get(name, {}).get("effective"),
        "prompts_sha256": hashlib.sha256("".join(sorted(prompts)).encode()).hexdigest() if prompts else None,
    }


def write_manifest(lm, counts: Counter, output_path: str, argv: list[str], began: float) -> Path:
    """Writes the manifest, and the likelihoods' standard errors, beside lm-eval's newest results; returns its path."""
    # lm-eval only warns when it cannot write, and may leave an empty or a torn file.
    path, way = Path(output_path), "make room there, then run it again"
    found = path.parent.glob(f"{path.stem}_*.json") if path.suffix == ".json" else path.glob("*/results_*.json")
    written = [file for file in found if file.stat().st_mtime >= began - 1 and file.stat().st_size]
    if not written:
        raise OSError(f"lm-eval could not write its results to {output_path}; {way}")
    newest = max(written, key=lambda file: file.stat().st_mtime)
    try:
        results = json.loads(newest.read_bytes())
    except ValueError as error:
        raise OSError(f"lm-eval could not write all of {newest}; {way}") from error

    # Both files end in the date that the results' name ends in.
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


def table(directories: list[str]) -> str:
    """The manifests below these directories as a Markdown table; of several of a cell the newest."""
    cells = _read_cells(directories)
    rows, columns = sorted({row for row, _ in cells}), list(dict.fromkeys(column for _, column in cells))
    usual = {}  # of each column, the most frequent setting
    for column in columns:
        settings = [cells[row, column][1] for row in rows if (row, column) in cells]
        usual[column] = max(settings, key=settings.count)

    # A cell whose setting is another one gets a mark, which a note below the table explains.
    lines, notes = ["| model | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)], {}
    for row in rows:
        texts = []
        for column, was in usual.items():
            text, setting = cells.get((row, column), ("", was))
            note = "; ".join(f"{k} {v!r} where the column has {was[k]!r}" for k, v in setting.items() if v != was[k])
            texts.append(f"{text} [{notes.setdefault(note, len(notes) + 1)}]" if note else text)
        lines.append("| " + " | ".join([row, *texts]) + " |")
    footnotes = [f"[{number}] not comparable: {note}" for note, number in notes.items()]
    return "\n".join([*lines, *([""] if footnotes else []), *footnotes])


def _read_cells(directories: list[str]) -> dict[tuple[str, str], tuple[str, dict]]:
    """The cells of all manifests below these directories, of several the newest."""
    files = [file for directory in directories for file in Path(directory).rglob("manifest_*.json")]
    if not files:
        raise FileNotFoundError(f"no manifest_*.json below {', '.join(directories)}; --output_path makes them")
    dated = []
    for file in files:
        try:
            made = json.loads(file.read_bytes())
            dated.append((made["date"], _cells(made)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no manifest of evaluate.py ({error!r}); remove it") from error
    cells = {}
    for _, of_one in sorted(dated, key=lambda pair: pair[0]):
        cells |= of_one
    return cells


def _cells(made: dict) -> dict[tuple[str, str], tuple[str, dict]]:
    """A manifest's (text, setting) by (row, column): (checkpoint and sampler, task and metric)."""
    sampler = {name: value for name, value in made["sampler"].items() if value not in (None, False, [], 0.0)}
    method = [f"{name} {x}" for name, x in sampler.items() if name not in UNNAMED and x != USUAL.get(name)]
    row = f"{made['checkpoint'].rstrip('/')} ({', '.join([made['model'], *method])})"
    cells, chat = {}, made["chat_template_sha"] is not None
    for name in made["requested"]:
        task = made["tasks"][name]
        # Two cells of a column can be compared if all of this is equal. A chat template's text is the model's own.
        setting = {
            "shots": task["num_fewshot"],
            "task version": task["version"],
            "questions": task["questions"] or made["limit"],
            "chat template": chat,
            "system instruction": made["system_instruction"],
            "few-shot as turns": bool(made["fewshot_as_multiturn"] and chat and task["num_fewshot"]),
            "answer tokens": made["sampler"]["max_new_tokens"],
            "temperature": made["sampler"]["temperature"] or 0,
            "generation": json.dumps([task["generation_kwargs"], made["gen_kwargs"]], sort_keys=True),
            "prompts": None if chat else task["prompts_sha256"],
        }
        for label, value in task["results"].items():
            metric, _, kind = label.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric == "sample_len":
                continue
            # A value up to 1 is a rate, which is shown in percent, unless its metric is none.
            rate = abs(value) <= 1 and not re.search("bits_per_byte|perplexity|likelihood", metric)
            scale, digits, of_error = (100, ".1f", ".1f") if rate else (1, ".4g", ".2g")
            text, error = f"{scale * value:{digits}}", task["results"].get(f"{metric}_stderr,{kind}")
            text += f" ± {scale * error:{of_error}}" if isinstance(error, int | float) else ""
            cells[row, f"{name}<br>{metric}" + (f" ({kind})" if kind != "none" else "")] = text, setting
    return cells

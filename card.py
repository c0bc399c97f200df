"""A checkpoint's model card, the README.md that the Hub reads, and the way there. args: train.Settings or Convert."""

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import huggingface_hub
import yaml

import report
from checkpoint import WRITTEN, about, load_config
from data import parse_specs
from files import replacing_file, resolve
from log import past_rows
from options import Bound, Options

README, LIBRARY = "README.md", "nanoa2d"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
KINDS = {
    "ar": ("An autoregressive language model", []),
    "mdlm": ("A masked-diffusion language model (MDLM, arXiv 2406.07524)", ["diffusion", "masked-diffusion", "mdlm"]),
    "bd3lm": ("A block-diffusion language model (BD3LM, arXiv 2503.09573)", ["diffusion", "block-diffusion", "bd3lm"]),
    None: ("A language model with a mask token, to be trained as a diffusion model", ["diffusion"]),
}
PLACES = {"output_dir", "overwrite", "resume_from_checkpoint", "config", "push_to_hub"}  # flags that are no recipe
MOST = 12  # rows of the curve
Repository = Annotated[str, Bound(HUB_ID.fullmatch, "owner/name, a repository of the Hub"), "OWNER/NAME"]


@dataclass(kw_only=True)
class Publishing(Options):
    "the Hub"

    push_to_hub: Repository | None = None
    """also push what is written, with its model card, to this repository; a new one is public. Whether that is allowed
    is found out before the work (default: none)"""


# ---------------------------------------------------------------------------------------------------------------------
# The card


def on_hub(name: str) -> bool:
    """Whether this is a Hub id, and neither a path that is there nor one of ours."""
    local = name.startswith("builtin/") or Path(name).expanduser().exists()
    return HUB_ID.fullmatch(name) is not None and not local


def metadata(file: Path) -> dict:
    """The front matter of a card; {} where there is none, or none that can be read."""
    try:
        found = huggingface_hub.metadata_load(file) if file.is_file() else None
    except (ValueError, yaml.YAMLError):
        found = None
    return found or {}


def lineage(name: str) -> dict:
    """What a card says of the checkpoint that this one was made from: base_model, datasets and license, if known."""
    if name.startswith("builtin/"):
        return {}
    file = resolve(name) / README
    if on_hub(name) and not file.is_file():
        try:
            file = Path(huggingface_hub.hf_hub_download(name, README))
        except (OSError, ValueError):  # it has no card, or was found on this machine and there is no Hub
            return {"base_model": name}
    known = metadata(file)
    kept = {key: known[key] for key in ("license", "license_name", "license_link") if key in known}
    if on_hub(name):
        return {"base_model": name, **kept}
    ours = known if known.get("library_name") == LIBRARY else {}
    return {key: ours[key] for key in ("base_model", "datasets") if key in ours} | kept


def shown(value) -> str:
    """A value of a flag, absolute paths without their directories, which are nobody's business."""
    return re.sub(r"(?<![\w.:/-])~?/(?:[^/\s+|\[\],]+/)*", "", str(value))


def recipe(args) -> str:
    """The command, without flags at their defaults and those that say where its results go."""
    values, defaults = asdict(args), args.defaults(asdict(args))
    given = {name: value for name, value in values.items() if name not in PLACES and value != defaults[name]}
    words = [f"--{name} {shlex.quote(shown(value))}" for name, value in given.items()]
    return " \\\n        ".join([f"    python {args.prog}", *words])


def curve(rows: list[dict]) -> str:
    """The evaluated bounds of a run as a Markdown table: at most MOST, the first and the last among them."""
    rows = [row for row in rows if "eval_loss" in row]
    last = len(rows) - 1
    rows = [rows[i] for i in sorted({round(n * last / (MOST - 1)) for n in range(MOST)})] if last >= MOST else rows
    lines = [f"| {row['step']:,} | {row['eval_loss']:.4f} | {row['eval_perplexity']:.4g} |" for row in rows]
    return "\n".join(["| step | bound, nats per token | perplexity |", "| --- | --- | --- |", *lines]) if rows else ""


def scores(run: Path) -> str:
    """The table of evaluate.py's manifests below a run's directory."""
    return shown(report.table([str(run)])) if any(run.rglob("manifest_*.json")) else ""


def card(directory: Path, args, run: Path | None = None) -> str:
    """The text of a checkpoint's card. run: the directory of the run that made it."""
    datasets = [spec.name for spec in parse_specs(args.dataset_args) if on_hub(spec.name)] if run else []
    config, name = load_config(directory), args.push_to_hub or directory.name
    kind, tags = KINDS[config.objective]
    known = lineage(args.model_name_or_path or args.merge)
    front = {"library_name": LIBRARY, "pipeline_tag": "text-generation", "tags": [LIBRARY, *tags], **known}
    front |= {"datasets": used} if (used := list(dict.fromkeys([*known.get("datasets", []), *datasets]))) else {}
    title = name if args.push_to_hub or run is None else f"{run.resolve().name}, {config.objective}"
    answers = f"""
    python chat.py --model_name_or_path {name}

    from nanoa2d import generate, load

    model, tokenizer = load("{name}")
    print(generate(model, tokenizer, "What is a diffusion model?", max_new_tokens=64))"""
    trains = f"\n    python train.py --objective mdlm --model_name_or_path {name} --stage sft --dataset_args …"
    parts = {
        "": f"{kind}, made with nanoA2D from {known.get('base_model') or 'random weights or a local checkpoint'}.\n\n"
        f"{about(name, config) if config.objective else ''}",
        "How to run it": f"In a clone of nanoA2D, after `pip install -e .`:\n{answers if config.objective else trains}",
        "Recipe": recipe(args),
        "Curve": curve(past_rows(run)) if run else "",
        "Scores": scores(run) if run else "",
    }
    body = "\n\n".join(f"## {head}\n\n{text}" if head else text.strip() for head, text in parts.items() if text)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n{body}\n"


def publish(directory: Path, args, run: Path | None = None) -> None:
    """Writes the card into a checkpoint's directory, and pushes that where --push_to_hub says so. A card that is not
    ours stays."""
    file = directory / README
    if not file.exists() or metadata(file).get("library_name") == LIBRARY:
        with replacing_file(file) as draft:
            draft.write_text(card(directory, args, run), encoding="utf-8")
    if args.push_to_hub is None:
        return
    try:
        # What is not of this checkpoint goes: an adapter, say, or another number of files with weights.
        what = {"folder_path": directory, "allow_patterns": [*WRITTEN, README], "delete_patterns": WRITTEN}
        huggingface_hub.HfApi().upload_folder(repo_id=args.push_to_hub, commit_message="Add the checkpoint", **what)
    except Exception as error:  # whatever it is: the checkpoint is there
        by_hand = f"push it by hand: hf upload {args.push_to_hub} {shlex.quote(str(directory))}"
        raise OSError(f"{directory} is written, but not pushed ({reason(error)}); {by_hand}") from error
    print(f"pushed {directory} to {huggingface_hub.constants.ENDPOINT}/{args.push_to_hub}")


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


def check_hub(repository: str | None) -> None:
    """Makes the repository on need; ValueError where we may not write to it. Call it before the work."""
    if repository is None:
        return
    try:
        # An existing repository is no error, whoever owns it, so ask for the owner and what the token may do first.
        hub, owner = huggingface_hub.HfApi(), repository.partition("/")[0]
        user = hub.whoami()
        if owner not in (user["name"], *(organization["name"] for organization in user.get("orgs", []))):
            raise ValueError(f"you are {user['name']}, who may not write there")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError("the token may only read")
        hub.create_repo(repository, exist_ok=True)
    except Exception as error:  # as many kinds as there are ways to be offline
        way_out = "log in with `hf auth login`, or name a repository of yours"
        raise ValueError(f"--push_to_hub {repository}: {reason(error)}; {way_out}") from error


def reason(error: Exception) -> str:
    """The first line of what the Hub's library says, without the token."""
    said = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    token = huggingface_hub.get_token()
    return said.replace(token, "…") if token else said

"""Model cards, as the Hub reads them, and the way to the Hub, which a recording stands for here."""

import json
import re

import huggingface_hub
import pytest
import torch
import yaml
from checkpoints import checkpoint

import card
import convert
import train
from checkpoint import load_config
from tasks import builtin

TOKEN = "hf_secretsecretsecretsecretsecretsecr"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(builtin, "SUMS", {"train": 60, "validation": 20, "test": 20})


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """What was asked of the Hub, in order; no request leaves the machine."""

    class Hub:
        user = {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}  # noqa: RUF012
        asked, failing, files = [], {}, {}

        def _ask(self, what):
            Hub.asked.append(what)
            if what in Hub.failing:
                raise Hub.failing[what]

        def whoami(self):
            self._ask("whoami")
            return Hub.user

        def create_repo(self, repo_id, exist_ok):
            assert exist_ok
            self._ask(f"create {repo_id}")

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, delete_patterns, commit_message):
            self._ask(f"upload {repo_id}")
            chosen = huggingface_hub.utils.filter_repo_objects
            old = set(chosen(Hub.files, allow_patterns=delete_patterns))
            new = chosen([path.name for path in folder_path.iterdir()], allow_patterns=allow_patterns)
            Hub.files = {name: content for name, content in Hub.files.items() if name not in old}
            Hub.files |= {name: (folder_path / name).read_bytes() for name in new}

    def download(name, file):
        if f"{name}/{file}" not in cards:
            raise FileNotFoundError(f"{name} has no {file}")
        return cards[f"{name}/{file}"]

    cards = Hub.cards = {}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return Hub


@pytest.fixture
def base(tmp_path, monkeypatch, hub) -> str:
    """A Hub id, which lies under $BASE_MODELS_DIR, and whose card the Hub has."""
    folder = tmp_path / "base/acme"
    folder.mkdir(parents=True)
    (folder / "Small-1").symlink_to(checkpoint("plain", dtype=torch.float32, max_position_embeddings=1024))
    monkeypatch.setenv("BASE_MODELS_DIR", str(tmp_path / "base"))
    (tmp_path / "card.md").write_text("---\nlicense: apache-2.0\ntags: [x]\nlanguage: [en]\n---\n# Small\n")
    hub.cards["acme/Small-1/README.md"] = str(tmp_path / "card.md")
    monkeypatch.chdir(tmp_path)
    return "acme/Small-1"


def read(file) -> tuple[dict, str]:
    _, front, body = file.read_text().split("---\n", 2)
    assert huggingface_hub.ModelCard(file.read_text()).data.to_dict() == yaml.safe_load(front)
    return yaml.safe_load(front), body


def trained(model: str, output: str, *flags: str) -> None:
    argv = ["--dataset_args", "builtin/sums", "--stage", "sft", "--max_steps", "2", "--output_dir", output]
    train.main([*argv, "--model_name_or_path", model, "--per_device_train_batch_size", "8", *flags])


def test_cards_tell_the_base_its_license_the_objective_the_recipe_and_the_curve(base, tmp_path, monkeypatch):
    convert.main(["--model_name_or_path", base, "--output_dir", "a2d"])
    front, body = read(tmp_path / "a2d/README.md")
    assert front == {
        "library_name": "nanoa2d",
        "pipeline_tag": "text-generation",
        "tags": ["nanoa2d", "diffusion"],
        "base_model": base,
        "license": "apache-2.0",
    }
    assert "to be trained" in body and "python train.py --objective mdlm --model_name_or_path a2d" in body

    trained("a2d", "run", "--objective", "bd3lm", "--block_size", "4", "--eval_steps", "1", "--learning_rate", "3e-5")
    front, body = read(tmp_path / "run/checkpoint-final/README.md")
    assert front["base_model"] == base and front["license"] == "apache-2.0" and "datasets" not in front
    assert front["tags"] == ["nanoa2d", "diffusion", "block-diffusion", "bd3lm"]
    assert body.startswith("\n# run, bd3lm\n\nA block-diffusion language model") and "block length 4" in body
    for words in ("--block_size 4", "--learning_rate 3e-05", "--model_name_or_path a2d", "--dataset_args builtin/sums"):
        assert words in body
    assert "--output_dir" not in body and "--eval_rows" not in body
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    bounds = [f"| {row['step']} | {row['eval_loss']:.4f} |" for row in rows if "eval_loss" in row]
    assert len(bounds) == 3 and all(bound in body for bound in bounds)
    assert "## Scores" not in body

    # What it says works: the lines of Python, from where the checkpoint lies.
    monkeypatch.chdir(tmp_path / "run")
    code = re.search(r"^    from nanoa2d.*?\)\)$", body, flags=re.MULTILINE | re.DOTALL).group()
    exec("\n".join(line[4:] for line in code.splitlines()), {})


def test_a_card_has_no_paths_of_the_machine_and_no_base_that_is_a_directory(base, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} sheep jump over the fence. " * 9}) + "\n" for i in range(40)))
    argv = ["--model_name_or_path", str(tmp_path / "base" / base), "--output_dir", str(tmp_path / "run")]
    argv += ["--dataset_args", f"{text}[train:30]", "--stage", "pt", "--max_steps", "1", "--objective", "ar"]
    train.main([*argv, "--max_length", "32", "--eval_strategy", "no"])
    front, body = read(tmp_path / "run/checkpoint-final/README.md")
    assert "base_model" not in front and front["tags"] == ["nanoa2d"]
    assert str(tmp_path) not in body and "'text.jsonl[train:30]'" in body and "--model_name_or_path Small-1" in body


def test_values_are_shown_without_absolute_directories():
    for given, kept in {
        "/home/ada/x.jsonl[train:5]+/data/b": "x.jsonl[train:5]+b",
        "~/models/base": "base",
        "runs/a/b": "runs/a/b",
        "a/b+c/d[name:e]": "a/b+c/d[name:e]",
        "1:0.1,2:0.9": "1:0.1,2:0.9",
        "3e-05": "3e-05",
    }.items():
        assert card.shown(given) == kept


def test_data_sets_of_the_hub_are_named_and_others_not(tmp_path, base):
    args = train.Settings(
        model_name_or_path=base,
        output_dir="x",
        stage="sft",
        dataset_args=f"tatsu-lab/alpaca[train:9]+builtin/sums+{base}",
    )
    (tmp_path / base).mkdir(parents=True)  # a directory of that name is meant instead
    front = yaml.safe_load(card.card(tmp_path / "base" / base, args, tmp_path).split("---\n")[1])
    assert front["datasets"] == ["tatsu-lab/alpaca"]


def test_scores_are_those_of_the_manifests_below_the_run(base, tmp_path, monkeypatch):
    assert card.scores(tmp_path) == ""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/manifest_1.json").write_text("{}")
    monkeypatch.setattr(card.report, "table", lambda directories: f"| {directories[0]}/final | 97.5 |")
    assert card.scores(tmp_path) == "| final | 97.5 |"


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    rows = [{"step": n, "eval_loss": 9 - n / 100, "eval_perplexity": 2.0} for n in range(200)]
    lines = card.curve([{"step": 1, "loss": 3.0}, *rows]).splitlines()[2:]
    assert len(lines) == card.MOST and lines[0].startswith("| 0 |") and lines[-1].startswith("| 199 |")
    assert len(card.curve(rows[:5]).splitlines()) == 7 and card.curve([]) == ""


def test_a_card_that_is_not_ours_stays_and_ours_is_written_anew(base, tmp_path):
    flags = ["--model_name_or_path", base, "--output_dir", "a2d", "--overwrite"]
    convert.main(flags)
    (tmp_path / "a2d/README.md").write_text("---\nlibrary_name: nanoa2d\n---\nold")
    convert.main(flags)
    assert "old" not in (tmp_path / "a2d/README.md").read_text()
    for text in ("mine", "---\nlicense: mit\n---\nmine", "---\n: [\n---\nmine"):
        (tmp_path / "a2d/README.md").write_text(text)
        convert.main(flags)
        assert (tmp_path / "a2d/README.md").read_text() == text
    assert not (tmp_path / "base" / base / "README.md").exists()


def test_a_push_is_allowed_before_the_work_and_made_after_it(base, tmp_path, hub, capsys, monkeypatch):
    convert.main(["--model_name_or_path", base, "--output_dir", "a2d", "--push_to_hub", "lab/Small-a2d"])
    assert hub.asked == ["whoami", "create lab/Small-a2d", "upload lab/Small-a2d"]
    (tmp_path / "a2d/notes.txt").write_text("private")
    begun, gradients = [], train.gradients
    monkeypatch.setattr(train, "gradients", lambda *args: begun.append(list(hub.asked)) or gradients(*args))
    hub.asked.clear()
    trained("a2d", "run", "--objective", "mdlm", "--push_to_hub", "ada/Small-mdlm")
    assert begun[0] == ["whoami", "create ada/Small-mdlm"] and hub.asked[2:] == ["upload ada/Small-mdlm"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert b'load("ada/Small-mdlm")' in hub.files["README.md"] and b"# ada/Small-mdlm\n" in hub.files["README.md"]
    assert "pushed run/checkpoint-final to http" in capsys.readouterr().out
    assert "push_to_hub" not in hub.files["README.md"].decode()


def test_what_an_adapter_is_merged_into_has_a_card_and_is_pushed(base, tmp_path, hub, capsys):
    convert.main(["--model_name_or_path", base, "--output_dir", "a2d"])
    with pytest.raises(SystemExit):  # its base is a directory of this machine
        trained("a2d", "run", "--objective", "mdlm", "--lora", "--push_to_hub", "ada/x")
    assert "--merge" in capsys.readouterr().err and hub.asked == []
    trained(base, "ar", "--objective", "ar", "--lora", "--r", "2", "--push_to_hub", "ada/x")
    assert "adapter_config.json" in hub.files
    trained("a2d", "run", "--objective", "mdlm", "--lora", "--r", "2")
    convert.main(["--merge", "run/checkpoint-final", "--output_dir", "whole", "--push_to_hub", "ada/x"])
    assert hub.asked == ["whoami", "create ada/x", "upload ada/x"] * 2
    assert "model.safetensors" in hub.files and "adapter_config.json" not in hub.files
    front, body = read(tmp_path / "whole/README.md")
    assert front["base_model"] == base and front["license"] == "apache-2.0" and "mdlm" in front["tags"]
    assert hub.files["README.md"].decode().endswith(body) and "--merge run/checkpoint-final" in body


REFUSED = {
    "nobody": "--push_to_hub nobody: expected owner/name, a repository of the Hub",
    "a/b/c": "--push_to_hub a/b/c: expected owner/name",
    "bob/x": "--push_to_hub bob/x: you are ada, who may not write there; log in with `hf auth login`, or name a",
    "ada/x": "--push_to_hub ada/x: 403 Forbidden for …; log in",
}


@pytest.mark.parametrize("repository", REFUSED)
@pytest.mark.parametrize("program", ["train", "convert"])
def test_a_repository_that_may_not_be_written_is_refused_before_anything_is(
    base, tmp_path, hub, capsys, repository, program
):
    hub.failing["create ada/x"] = OSError(f"403 Forbidden for {TOKEN}\nand more")
    with pytest.raises(SystemExit) as end:
        if program == "train":
            trained(base, "out", "--objective", "ar", "--push_to_hub", repository)
        else:
            convert.main(["--model_name_or_path", base, "--output_dir", "out", "--push_to_hub", repository])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"{program}.py: {REFUSED[repository]}") and said.count("\n") == 1
    assert TOKEN not in said and not (tmp_path / "out").exists()


def test_a_token_that_may_only_read_is_refused(base, hub, monkeypatch):
    monkeypatch.setattr(hub, "user", hub.user | {"auth": {"accessToken": {"role": "read"}}})
    with pytest.raises(ValueError, match=r"^--push_to_hub ada/x: the token may only read; log in"):
        card.check_hub("ada/x")
    assert hub.asked[-1] == "whoami"


@pytest.mark.parametrize("error", [OSError(f"502 Bad Gateway {TOKEN}"), RuntimeError(f"502 Bad Gateway {TOKEN}\n!")])
def test_a_push_that_fails_keeps_the_run_and_tells_how_to_push_by_hand(base, tmp_path, hub, capsys, error):
    hub.failing["upload ada/x"] = error
    with pytest.raises(SystemExit) as end:
        trained(base, "my run", "--objective", "ar", "--push_to_hub", "ada/x")
    said = capsys.readouterr()
    assert end.value.code == 2 and "wrote  my run/checkpoint-final" in said.out
    expected = "train.py: my run/checkpoint-final is written, but not pushed (502 Bad Gateway …); "
    expected += "push it by hand: hf upload ada/x 'my run/checkpoint-final'"
    assert said.err.splitlines()[-1] == expected and TOKEN not in said.err + said.out
    assert load_config(tmp_path / "my run/checkpoint-final").objective == "ar"
    assert (tmp_path / "my run/curves.png").is_file()

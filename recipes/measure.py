"""What recipes measure of a checkpoint: its bounds, its answers, and how many forwards these take."""

from dataclasses import asdict, replace

import torch

import data
from checkpoint import load_model
from cli import Answer, Answers
from diffusion import Sampling
from likelihood import evaluate
from loaders import collate_for
from model import Config
from parallel import Ranks
from tokenizer import Tokenizer
from train import Settings


class Measured:
    """The checkpoint at `path`, of the given type of numbers, on `device`; settings: of a training, whose data this
    reads.

    `as_ar` is its config as an AR model's, also where its context is not causal: what is left of the AR model.
    """

    def __init__(self, path: str, settings: Settings, dtype: torch.dtype, device="cpu"):
        self.settings, self.tokenizer = settings, Tokenizer(path)
        self.device = torch.device(device)
        self.model = load_model(path, dtype=dtype, device=self.device)
        self.model.known_ids, self.config = self.tokenizer.known_ids, self.model.config
        self.as_ar = replace(self.config, objective="ar")

    def rows(self, split: str) -> data.Rows:
        reading = data.Reading(**self.settings.only(data.Reading))
        return data.load(self.settings.dataset_args, split, self.tokenizer, reading)

    def nats(self, rows, config: Config, batch_size: int = 64, first_rows: int | None = None) -> float:
        """The bound on the rows' nats per token, as that config has it; exact for ar. first_rows: of them alone."""
        self.model.config, collate = config, collate_for(self.settings, config, self.tokenizer)
        how = {"batch_size": batch_size, "first_rows": first_rows, "ranks": Ranks(0, 1, self.device)}
        return evaluate(self.model, self.model, rows, collate, **how)[0]

    def chats(self, spec: str) -> list[list[dict]]:
        """The chats of the test split."""
        return [row["messages"] for row in data.raw(spec, "test")]

    def questions(self, chats: list[list[dict]]) -> list[list[int]]:
        """The tokens up to where the last turn of each chat begins."""
        return [self.tokenizer.render(turns[:-1], reply=True)[0] for turns in chats]

    def answers(self, prompts: list[list[int]], config: Config, **options) -> list[Answer]:
        """What it writes after the prompts, all at once; options: of Sampling."""
        self.model.config, options = config, asdict(Sampling(**options))
        generator = torch.Generator(self.device).manual_seed(0)
        decoding = Answers(self.model, self.tokenizer, prompts, options=options, generator=generator)
        for _ in decoding:
            pass
        return decoding.final()


def tokens_a_forward(answers: list[Answer]) -> float:
    return sum(answer.tokens for answer in answers) / sum(answer.forwards for answer in answers)

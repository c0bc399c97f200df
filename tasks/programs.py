"""The scorer of humaneval_instruct_sandboxed and mbpp_instruct_sandboxed, equal to upstream's in prompt and score.

Upstream's humaneval_instruct and mbpp_instruct fetch the metric `code_eval` from the Hub when they are loaded, and run
programs as the user who evaluates, with all that this one may do. Here each runs in tasks/sandbox.py.
"""

import math
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import sandbox

try:
    sandbox.check()
except ValueError as error:
    raise ValueError(
        f"generated programs cannot be run safely here: {error}. The alternatives are upstream's humaneval_instruct "
        "and mbpp_instruct, which run them as this user (HF_ALLOW_CODE_EVAL=1, --confirm_run_unsafe_code)"
    ) from error

BLOCK = re.compile(r"```(?:\w+)?\n?(.*?)\n?```", re.DOTALL)


def pass_at_k(references: list[str], predictions: list[list[str]], k: list[int]) -> dict[str, float]:
    """pass@k of one problem: the unbiased estimate of arXiv 2107.03374, equation 1, from its n programs."""
    programs = predictions[0]
    n, c = len(programs), sum(sandbox.passes(f"{program}\n{references[0]}") for program in programs)
    return {f"pass@{m}": 1 - math.comb(n - c, m) / math.comb(n, m) for m in k}


def pass_at_1(references: list[str], predictions: list[list[str]]) -> float:
    return pass_at_k(references, predictions, [1])["pass@1"]


def humaneval_programs(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The prompt, which the answer's prefix repeats, then what follows it up to the end of the code block."""
    return [[doc["prompt"] + answer.partition("```")[0] for answer in answers] for answers, doc in zip(resps, docs)]


def mbpp_programs(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """The first code block; the prefix has opened one. Else the first of any language; else nothing."""

    def program(answer: str) -> str:
        found = BLOCK.findall("```" + answer) or BLOCK.findall(answer.replace("```python", "```"))
        return found[0] if found else ""

    return [[program(answer) for answer in answers] for answers in resps]


def mbpp_examples() -> list[dict]:
    """The three worked problems that upstream shows: numbers 2, 3 and 4."""
    import datasets

    rows = datasets.load_dataset("google-research-datasets/mbpp", "full", split="prompt")
    return [{**row, "is_fewshot": True} for row in rows if row["task_id"] in (2, 3, 4)]

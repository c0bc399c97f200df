"""Scores for checkpoints: lm-eval's tasks for ar, mdlm and bd3lm. `python evaluate.py --help` is the manual.

Importing this file registers a2d_ar, a2d_mdlm and a2d_bd3lm with lm-eval. (It has the name of the Hub's package
`evaluate`, which some upstream tasks import: as a program it makes way for that one.)
"""

from cli import (
    MDLM_BLOCK,
    Parser,
    add_reading,
    add_sampling,
    boolean,
    check_place,
    one_line_errors,
    replacing_file,
    seed,
    switch,
)
from cli import sampling as sampling_of

import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from options import Count, Natural, NonNegative

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    missing = f"evaluate.py needs lm-eval ({error}): pip install 'lm-eval[math]==0.4.13'"
    if __name__ != "__main__":
        raise ModuleNotFoundError(missing) from error
    print(missing, file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
MANUAL = """\
usage: python evaluate.py --model a2d_ar|a2d_mdlm|a2d_bd3lm --model_args pretrained=CHECKPOINT,... --tasks TASK,... ...
       torchrun --nproc_per_node N evaluate.py ...
       python evaluate.py --table DIR...

Scores a checkpoint on lm-eval's tasks. The command line is lm-eval's (`lm-eval run --help` tells all of it); this
program adds three models and the tasks in tasks/: mmlu_generative_dream, hellaswag_gen, sums,
humaneval_instruct_sandboxed and mbpp_instruct_sandboxed.

lm-eval's flags, the most used:
  --tasks A,B             tasks or groups; `lm-eval ls tasks` lists upstream's
  --num_fewshot N         worked examples in the prompt (default: the task's)
  --apply_chat_template   prompts as chats; with it also --system_instruction TEXT, --fewshot_as_multiturn False
  --batch_size N|auto     sequences of a forward; auto: as many as fit (default: 1)
  --limit N               only the first N questions of each task: for trying out
  --output_path DIR       where results go, and a manifest beside them: everything that made the numbers
  --log_samples           write prompts and answers there, too
  --use_cache PATH        keep answers, and take them from there when the command is run again
  --gen_kwargs K=V,...    the task's until, max_gen_toks, do_sample, temperature, top_k, top_p
  --confirm_run_unsafe_code   for tasks that run generated programs

--table DIR... renders the manifests below DIR as a Markdown table. A row is a checkpoint with its sampler's options, a
column a task's metric. Cells that were asked otherwise than most of their column (shots, template, questions, answer
length, temperature) carry a mark, which a note below the table explains.

Log-likelihood (multiple choice, perplexity) is exact for ar and an unbiased estimate of a lower bound for the others,
with a standard error for every request, kept beside the results (standard_errors_*.jsonl).

model_args (a mistyped one is an error):
"""


class _Options(Parser):
    def error(self, message: str):
        lacking = message.partition("are required: --")[2]
        raise ValueError(
            f"model_args lack {lacking}; expected {lacking}=CHECKPOINT among them"
            if lacking
            else message.replace("argument --", "model_arg ")
        )


def sampling_options():
    from diffusion import Sampling

    @dataclass(kw_only=True)
    class Generation(Sampling):
        max_new_tokens: Natural | None = None
        """masks that follow each prompt, at most: a task that asks for fewer gets fewer (default: what the task asks
        for, else 256)"""
        steps: Count | None = None  # forwards for the whole answer (default: one a token)
        temperature: NonNegative | None = None
        """of the Gumbel noise on the logits (default: the task's where it has do_sample, else 0)"""

    return Generation


def model_options() -> Parser:
    parser = _Options("evaluate.py", "")
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained",
        required=True,
        metavar="CHECKPOINT",
        help="a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id",
    )
    add_reading(add)
    add("--max_length", type=int, metavar="TOKENS", help="longest sequence (default: the model's context)")
    switch(add, "--enable_thinking", False, "what the chat template is told")
    add(
        "--add_bos_token",
        type=boolean,
        metavar="True|False",
        help="let the tokenizer add its special tokens to prompts (default: ar True, as lm-eval's hf; else False, as "
        "in training)",
    )
    add("--seed", type=seed, default=42, metavar="N", help="of the noise of likelihoods and of sampling")
    add_sampling(parser, sampling_options())
    add = parser.add_argument_group("likelihood").add_argument
    add("--mc_num", type=int, default=128, metavar="N", help="draws of each block (mdlm: of the whole answer)")
    switch(
        add,
        "--is_check_greedy",
        False,
        "also tell whether greedy decoding gives the answer, which costs a forward a token (ar tells it anyway)",
    )
    return parser


def parse_model_args(given: dict):
    """Typed options of model_args; ValueError for one that does not exist or does not parse."""
    parser = model_options()
    known = [action.dest for action in parser._actions if action.dest != "help"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            way = f"did you mean {near[0]}?" if near else "python evaluate.py --help lists them"
            raise ValueError(f"unknown model_arg {name}; {way}")
    return parser.parse_args([f"--{name}={value}" for name, value in given.items() if value is not None])


# ---------------------------------------------------------------------------------------------------------------------
# The models


class A2D(TemplateLM):
    """A checkpoint as lm-eval's model. Texts here, ids in diffusion.py."""

    objective = "mdlm"

    def __init__(self, batch_size: int | str = 1, max_batch_size: int | None = None, device=None, **model_args):
        from cli import open_model

        import torch

        from checkpoint import load_config, resolve

        super().__init__()
        model_args.pop("trust_remote_code", None)  # lm-eval adds it with its flag; no code is loaded with a checkpoint
        self.options = parse_model_args(model_args)
        auto = str(batch_size).startswith("auto")
        if not auto and not (str(batch_size).isdigit() and int(batch_size) > 0):
            raise ValueError(f"--batch_size {batch_size}: expected a number or auto")
        self.batch_size = None if auto else int(batch_size)  # None: by `room`
        self.max_batch_size = max_batch_size
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available() if device in (None, "auto") else str(device).startswith("cuda")
        if device in (None, "auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
        if self._world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # only small objects travel
        declared = load_config(resolve(self.options.pretrained)).objective
        if declared not in (None, self.objective):
            raise ValueError(
                f"--model a2d_{self.objective} contradicts the checkpoint, which declares objective {declared}; pass "
                f"--model a2d_{declared}"
            )
        self.options.model_name_or_path, self.options.objective = self.options.pretrained, self.objective
        self.options.device = device
        self.model, self.tokenizer = open_model(self.options)
        self._device = torch.device(device)
        self._check_sampling()
        self.room = 131072 if on_gpu else 4096  # tokens of a forward; halved where memory does not suffice
        self.max_length = min(self.options.max_length or 2**62, self.model.config.max_position_embeddings)
        # What this process did: requests, tokens, forwards (a sequence each) and seconds, of "generated" and "scored".
        self.counts = Counter()
        self.prompts = defaultdict(set)  # task: a hash of each of its requests
        self.standard_errors = []  # of each likelihood request, a dict

    def _check_sampling(self) -> None:
        """Refuses options that the sampler would refuse, before any task is loaded."""
        from diffusion import denoise

        given = sampling_of(self.options)
        drawn = (given["top_k"], given["top_p"]) != (None, None)  # the temperature may be the task's
        instead = {"max_new_tokens": 1, "steps": 1, "temperature": float(drawn)}
        next(denoise(self.model, [[0]], **given | {k: v for k, v in instead.items() if given[k] is None}))

    # -- what lm-eval asks of a model

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        add = self.objective == "ar" if self.options.add_bos_token is None else self.options.add_bos_token
        bos = self.tokenizer.special.get("bos_token")
        if add_special_tokens is False or not add or (bos and string.startswith(bos)):
            return self.tokenizer.encode(string)
        return self.tokenizer.core.encode(string, add_special_tokens=True).ids

    @property
    def tokenizer_name(self) -> str:
        return str(self.options.pretrained).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str) and chat_template != "default":
            raise ValueError(f"--apply_chat_template {chat_template}: only the tokenizer's own is read; name none")
        return self.tokenizer.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """The chat as the model's template writes it; without a generation prompt it ends with the last message's text,
        which the model then continues (gen_prefix)."""
        if self.tokenizer.template is None:
            raise ValueError(f"{self.options.pretrained} has no chat template; leave out --apply_chat_template")
        thinking = self.options.enable_thinking
        text = self.tokenizer.fill(chat_history, reply=add_generation_prompt, thinking=thinking)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        begin = text.rfind(last.strip())
        if begin < 0:
            raise ValueError(f"the chat template does not keep the beginning of the answer, {last!r}")
        whole = last.lstrip()  # templates may cut the space after it
        return text[: begin + len(whole if text.startswith(whole, begin) else last.strip())]

    def all_gather(self, tensor):
        import torch

        return torch.cat([part.reshape(-1) for part in self._gather_all(tensor.cpu())]).to(tensor.device)

    def gather_object(self, obj, dst: int = 0):
        parts = self._gather_all(obj)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        import torch

        if self.world_size > 1:
            torch.distributed.barrier()

    # -- likelihood

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        found = self._loglikelihood_tokens(
            [(pair, *self._pair(*pair)) for pair in pairs], disable_tqdm=disable_tqdm, instances=requests
        )
        return [(value, greedy) for value, _, greedy in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        # An ar model is not fed the last token of a window.
        room = self.max_length - int(self.objective != "ar")
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, room, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals, errors = [0.0] * len(requests), [0.0] * len(requests)
        for i, (value, error, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[i] += value
            errors[i] += error**2
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._record(requests, totals, [error**0.5 for error in errors])
        return totals

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, instances=None, **kwargs):
        """(log-likelihood, standard error, greedy) of each (texts, context ids, continuation ids)."""
        import torch

        from likelihood import log_likelihood

        room = self.max_length + int(self.objective == "ar")
        continuations = [continuation for _, _, continuation in requests]
        contexts = [self._cut(context, room - len(answer)) for (_, context, _), answer in zip(requests, continuations)]
        questions = defaultdict(list)
        for i, context in enumerate(contexts):
            questions[tuple(context)].append(i)
        # Answers to a question stay together, and questions of about the same length.
        batches = []
        for _, members in sorted(questions.items(), key=lambda item: (-len(item[0]), item[0])):
            if not batches or len(batches[-1]) + len(members) > max(64, self.batch_size or 0):
                batches.append([])
            batches[-1] += members
        results = [None] * len(requests)
        bar = self._bar(len(requests), "log-likelihood", disable_tqdm)
        hook = self.model.register_forward_pre_hook(lambda _, inputs: self._count("scored", forwards=len(inputs[0])))
        while batches:
            batch, began = batches[0], time.time()
            longest = max(len(contexts[i]) + len(continuations[i]) for i in batch)
            try:
                found = log_likelihood(
                    self.model,
                    [contexts[i] for i in batch],
                    [continuations[i] for i in batch],
                    draws=self.options.mc_num,
                    generator=torch.Generator().manual_seed(self.options.seed),
                    forward_tokens=self._rows(longest) * longest,
                    check_greedy=self.objective == "ar" or self.options.is_check_greedy,
                )
            except torch.OutOfMemoryError:
                self._less_room()
                continue
            del batches[0]
            values, errors, *verdict = (part.tolist() for part in found)
            for n, i in enumerate(batch):
                results[i] = values[n], errors[n], bool(verdict[0][n]) if verdict else False
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i][::2])
            tokens = sum(len(continuations[i]) for i in batch)
            self._count("scored", bar, requests=len(batch), tokens=tokens, seconds=time.time() - began)
        hook.remove()
        bar.close()
        if instances is not None:
            self._record(instances, *([result[j] for result in results] for j in (0, 1)))
        return results

    # -- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        import torch

        answers = [None] * len(requests)
        kinds = defaultdict(list)
        for i, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        bar = self._bar(len(requests), "generation", disable_tqdm)
        for members in kinds.values():
            until, length, sampling = self._request_options(requests[members[0]].args[1])
            prompts = {i: self._cut(self.tok_encode(requests[i].args[0]), self.max_length - length) for i in members}
            order = sorted(members, key=lambda i: (-len(prompts[i]), prompts[i]))
            while order:
                began = time.time()
                batch = order[: self._rows(max(1, len(prompts[order[0]])) + length)]
                try:
                    texts, tokens = self._generate([prompts[i] for i in batch], until, **sampling)
                except torch.OutOfMemoryError:
                    self._less_room()
                    continue
                order = order[len(batch) :]
                for i, text in zip(batch, texts):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                self._count("generated", bar, requests=len(batch), tokens=tokens, seconds=time.time() - began)
        bar.close()
        self._record(requests)
        return answers

    def _request_options(self, given: dict) -> tuple[list[str], int, dict]:
        """What a request and the model_args say together: stop strings, answer length, the sampler's options."""
        from lm_eval.models.utils import normalize_gen_kwargs

        unset = self.options.max_new_tokens is None
        wanted = normalize_gen_kwargs(given, 256 if unset else self.options.max_new_tokens)
        until = [stop for stop in wanted.pop("until") if stop]
        length = wanted.pop("max_gen_toks")
        length = length if unset else min(length, self.options.max_new_tokens)
        sample = wanted.pop("do_sample")
        drawn = {name: wanted.pop(name, None) for name in ("temperature", "top_k", "top_p")}
        if wanted:
            raise ValueError(
                f"generation option {', '.join(wanted)} is unknown; a task or --gen_kwargs gives until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p, the rest are model_args"
            )
        sampling = sampling_of(self.options)
        if sampling["temperature"] is None:
            sampling["temperature"] = drawn["temperature"] or 0.0
        for name in ("top_k", "top_p"):
            if sampling[name] is None and sample and sampling["temperature"]:
                sampling[name] = drawn[name]
        if sampling["block_size"] is None and self.objective == "mdlm":
            sampling["block_size"] = MDLM_BLOCK
        if sampling["steps"] is None:
            sampling["steps"] = max(1, length)
        return until, length, sampling | {"max_new_tokens": length}

    def _generate(self, prompts: list[list[int]], until: list[str], **sampling) -> tuple[list[str], int]:
        """The answers' texts up to their first stop string, and how many tokens were generated."""
        import torch

        from diffusion import denoise

        prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
        added = self.tokenizer.core.get_added_tokens_decoder()
        ends = {*self.tokenizer.end_ids, *(i for i, token in added.items() if token.special and token.content in until)}
        # Nothing random depends on what else is evaluated.
        digest = hashlib.sha256(json.dumps(prompts).encode()).digest()
        generator = torch.Generator(self._device).manual_seed(self.options.seed + int.from_bytes(digest[:4]))

        def answers(step) -> list[list[int]]:
            rows = []
            for prompt, tokens, masked in zip(prompts, step.tokens.tolist(), step.masked.tolist()):
                span = range(len(prompt), len(prompt) + sampling["max_new_tokens"])
                stop = next((i for i in span if masked[i] or tokens[i] in ends), span.stop)
                rows.append(tokens[len(prompt) : stop])
            return rows

        def stopped(text: str) -> bool:
            return any(stop in text for stop in until)

        running = len(prompts)
        for step in denoise(self.model, prompts, **sampling, end_ids=tuple(sorted(ends)), generator=generator):
            self._count("generated", forwards=running if step.forwards else 0)
            running = int((~step.done).sum())
            if until and running and step.forwards % 16 == 0:
                texts = map(self.tokenizer.decode, answers(step))
                if all(done or stopped(text) for done, text in zip(step.done.tolist(), texts)):
                    break
        rows = answers(step)
        texts = [self.tokenizer.decode(row) for row in rows]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts, sum(min(len(row) + 1, sampling["max_new_tokens"]) for row in rows)  # with the end token

    # -- batches, memory and what is recorded

    def _rows(self, longest: int) -> int:
        """Sequences of `longest` tokens for a forward."""
        return self.batch_size or max(1, min(self.room // longest, self.max_batch_size or 2**30))

    def _less_room(self) -> None:
        """After memory has not sufficed; raises again where there is nothing left to do about it."""
        import torch

        if self.batch_size is not None or self.room < 1024:
            raise
        self.room //= 2
        torch.cuda.empty_cache()

    def _cut(self, context: list[int], room: int) -> list[int]:
        """The end of a context, as long as there is room before an answer."""
        if room < 1:
            raise ValueError(
                f"an answer of {self.max_length - room} tokens or more leaves no room for a context in the model's "
                f"{self.max_length}; lower max_new_tokens or the task's max_gen_toks, or choose another task"
            )
        if len(context) > room:
            cut = len(context) - room
            logging.getLogger(__name__).warning("cutting %s tokens from the left of a context of %s", cut, len(context))
        return context[-room:]

    def _bar(self, total: int, what: str, disable: bool):
        from tqdm import tqdm

        return tqdm(total=total, desc=what, disable=disable or self.rank != 0, unit="request")

    def _count(self, kind: str, bar=None, **spent: float) -> None:
        self.counts.update({(kind, name): value for name, value in spent.items()})
        if bar is not None:
            tokens, forwards, seconds = (self.counts[kind, name] for name in ("tokens", "forwards", "seconds"))
            rate = f"{tokens / max(seconds, 1e-9):.0f}"
            bar.set_postfix({"tokens/s": rate, "tokens/forward": f"{tokens / max(forwards, 1):.2f}"})
            bar.update(spent["requests"])

    def _record(self, requests, values=(), errors=()) -> None:
        """Keeps what the manifest tells of these requests, on all processes."""
        hashes = [
            (request.task_name, hashlib.sha256(json.dumps(request.args, default=str).encode()).hexdigest())
            for request in requests
        ]
        own = [
            {"task": request.task_name, "doc": request.doc_id, "choice": request.idx, "log_likelihood": a, "error": b}
            for request, a, b in zip(requests, values, errors)
        ]
        kept = {(row["task"], row["doc"], row["choice"]): row for row in own}  # lm-eval repeats some to fill a process
        for part in self._gather_all((hashes, list(kept.values()))):
            for task, digest in part[0]:
                self.prompts[task].add(digest)
            self.standard_errors += part[1]

    def _gather_all(self, obj) -> list:
        import torch

        if self.world_size == 1:
            return [obj]
        parts = [None] * self.world_size
        torch.distributed.all_gather_object(parts, obj)
        return parts

    def __str__(self) -> str:
        return f"a2d_{self.objective}"

    def get_model_info(self) -> dict:
        return {"model": str(self), "model_dtype": self.model.config.dtype}


@register_model("a2d_ar")
class AR(A2D):
    objective = "ar"


@register_model("a2d_mdlm")
class MDLM(A2D):
    objective = "mdlm"


@register_model("a2d_bd3lm")
class BD3LM(A2D):
    objective = "bd3lm"


MODELS = {"a2d_ar": AR, "a2d_mdlm": MDLM, "a2d_bd3lm": BD3LM}


# ---------------------------------------------------------------------------------------------------------------------
# Manifests: everything that made a number, beside it


def manifest(lm: A2D, counts: Counter, results: dict, argv: list[str], seconds: float) -> dict:
    import torch

    from checkpoint import config_dict, resolve

    directory = resolve(lm.options.pretrained)
    digest = hashlib.sha256()
    for file in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors"), *directory.glob("*.jinja")]):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=HERE, capture_output=True, text=True
    )
    config = results["config"]
    if lm._device.type == "cuda":
        hardware = torch.cuda.get_device_name(lm._device)
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model_name = re.search(r"model name\s*:\s*(.+)", cpuinfo)
        hardware = f"{model_name[1] if model_name else platform.machine()}, {torch.get_num_threads()} threads"
    packages = ("torch", "lm_eval", "datasets", "tokenizers", "safetensors", "numpy")
    shown = ("dtype", "max_length", "enable_thinking", "add_bos_token", "seed", "mc_num", "is_check_greedy")
    complete = config.get("use_cache") is None  # answers from the cache never reach the model
    return {
        "command": " ".join([*(["torchrun"] if lm.world_size > 1 else []), "evaluate.py", *argv]),
        "commit": git.stdout.strip() or None,
        "date": results["date"],
        "model": str(lm),
        "checkpoint": str(lm.options.pretrained),
        "checkpoint_sha256": digest.hexdigest(),
        "config": config_dict(lm.model.config),
        "dtype": str(lm.model.head_weight.dtype).removeprefix("torch."),
        "sampler": sampling_of(lm.options),
        "options": {name: getattr(lm.options, name) for name in shown},
        "gen_kwargs": config.get("gen_kwargs"),
        "chat_template_sha": results.get("chat_template_sha"),
        "system_instruction": results.get("system_instruction"),
        "fewshot_as_multiturn": results.get("fewshot_as_multiturn"),
        "limit": config.get("limit"),
        "batch_size": lm.batch_size or "auto",
        "processes": lm.world_size,
        "hardware": f"{lm.world_size} x {hardware}",
        "packages": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "seconds": seconds,
        **{kind: {name: n for (of, name), n in counts.items() if of == kind} for kind in ("generated", "scored")},
        "tokens_per_forward": counts["generated", "tokens"] / max(1, counts["generated", "forwards"]) or None,
        "tasks": {
            name: {
                "results": {metric: value for metric, value in scores.items() if isinstance(value, int | float | str)},
                "version": results["versions"].get(name),
                "num_fewshot": results["n-shot"].get(name),
                "generation_kwargs": results["configs"].get(name, {}).get("generation_kwargs"),
                "questions": results.get("n-samples", {}).get(name, {}).get("effective"),
                "prompts_sha256": hashlib.sha256("".join(sorted(lm.prompts[name])).encode()).hexdigest()
                if complete and name in lm.prompts
                else None,
            }
            for name, scores in results["results"].items()
        },
        "requested": sorted(set(results["results"]) - {t for ts in results["group_subtasks"].values() for t in ts}),
    }


def write_manifest(lm: A2D, counts: Counter, output_path: str, argv: list[str], began: float) -> Path:
    """Writes the manifest, and the likelihoods' standard errors, beside lm-eval's newest results; returns its path."""
    path = Path(output_path)
    found = path.parent.glob(f"{path.stem}_*.json") if path.suffix == ".json" else path.glob("*/results_*.json")
    written = [file for file in found if file.stat().st_mtime >= began - 1 and file.stat().st_size]
    if not written:  # which it only warns of, and an empty file may be left
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
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with replacing_file(newest.with_name(f"standard_errors_{Path(name).stem}.jsonl")) as file:
            file.write_text(lines)
    return target


def table(directories: list[str]) -> str:
    """The manifests below these directories as a Markdown table, newest first where there are several of a cell."""
    files = [file for directory in directories for file in Path(directory).rglob("manifest_*.json")]
    if not files:
        raise FileNotFoundError(f"no manifest_*.json below {', '.join(directories)}; --output_path makes them")
    cells, columns, manifests = {}, {}, []
    for file in files:
        try:
            manifests.append(json.loads(file.read_bytes()))
            for name in ("date", "sampler", "checkpoint", "model", "requested", "tasks"):
                manifests[-1][name]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no manifest of evaluate.py ({error!r}); remove it") from error
    for made in sorted(manifests, key=lambda made: made["date"]):
        sampler = {k: v for k, v in made["sampler"].items() if v not in (None, False, [], 0.0)}
        method = {k: v for k, v in sampler.items() if k not in ("max_new_tokens", "temperature", "top_k", "top_p")}
        method = {k: v for k, v in method.items() if (k, v) not in {("scheduler", "linear")} and v != "low_confidence"}
        options = ", ".join(f"{k} {v}" for k, v in method.items())
        row = f"{made['checkpoint'].rstrip('/')} ({made['model']}{', ' + options if options else ''})"
        for task in made["requested"]:
            one = made["tasks"][task]
            turns = made["fewshot_as_multiturn"] and made["chat_template_sha"] and one["num_fewshot"]
            asked = {
                "shots": one["num_fewshot"],
                "task version": one["version"],
                "questions": one["questions"] or made["limit"],
                "chat template": made["chat_template_sha"] is not None,
                "system instruction": made["system_instruction"],
                "few-shot as turns": bool(turns),
                "answer tokens": made["sampler"]["max_new_tokens"],
                "temperature": made["sampler"]["temperature"] or 0,
                "generation": json.dumps([one["generation_kwargs"], made["gen_kwargs"]], sort_keys=True),
                # a template's text is the model's own: prompts can be compared without one
                "prompts": one["prompts_sha256"] if made["chat_template_sha"] is None else None,
            }
            for metric, value in one["results"].items():
                name, _, kind = metric.partition(",")
                if not isinstance(value, int | float) or name.endswith("_stderr") or name == "sample_len":
                    continue
                error = one["results"].get(f"{name}_stderr,{kind}")
                column = f"{task}<br>{name}" + (f" ({kind})" if kind != "none" else "")
                columns[column] = None
                cells[row, column] = value, error if isinstance(error, int | float) else None, asked
    notes, lines = {}, []
    rows = sorted({row for row, _ in cells})
    usual = {}
    for column in columns:
        everyone = Counter(json.dumps(cells[row, column][2], sort_keys=True) for row in rows if (row, column) in cells)
        usual[column] = json.loads(everyone.most_common(1)[0][0])
    for row in rows:
        line = [row]
        for column in columns:
            value, error, asked = cells.get((row, column), (None, None, None))
            if value is None:
                line.append("")
                continue
            unlike = {k: v for k, v in asked.items() if v != usual[column][k]}
            text = f"{value:.4g}" if abs(value) > 1 else f"{100 * value:.1f}"
            text += "" if error is None else f" ± {error:.2g}" if abs(value) > 1 else f" ± {100 * error:.1f}"
            if unlike:
                told = "; ".join(f"{k} {v!r} where the column has {usual[column][k]!r}" for k, v in unlike.items())
                text += f" [{notes.setdefault(told, len(notes) + 1)}]"
            line.append(text)
        lines.append("| " + " | ".join(line) + " |")
    head = ["| model | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    foot = [f"[{number}] not comparable: {told}" for told, number in notes.items()]
    return "\n".join([*head, *lines, *([""] if foot else []), *foot])


# ---------------------------------------------------------------------------------------------------------------------
# The program


class _HubEvaluate:
    """Finds the Hub's package `evaluate` for those who import it, in place of this file."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "evaluate":
            return None
        elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
        return PathFinder.find_spec(name, elsewhere)


def refuse_flags(message: str, parser) -> None:
    """What lm-eval's parser says of a mistake, in one line, with the nearest name for a flag that does not exist."""
    wrong = re.search("unrecognized arguments:.*?(--[^ =]+)", message)
    if wrong is None:
        raise ValueError(f"{message}; python evaluate.py --help tells more")
    near = difflib.get_close_matches(wrong[1], parser._option_string_actions, n=1)
    way = f"did you mean {near[0]}?" if near else "python evaluate.py --help and lm-eval run --help list them"
    raise ValueError(f"unknown flag {wrong[1]}; {way}")


def run(argv: list[str]) -> None:
    """Hands the command line to lm-eval, with our models and tasks; then writes the manifest."""
    import yaml
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import setup_logging

    began = time.time()
    setup_logging("ERROR" if int(os.environ.get("RANK", 0)) else logging.INFO)
    sys.argv = ["evaluate.py", *([] if argv[:1] in (["run"], ["ls"], ["validate"]) else ["run"]), *argv]
    harness = HarnessCLI()
    for parser in (harness._parser, *harness._subparsers.choices.values()):
        parser.error = functools.partial(refuse_flags, parser=harness._subparsers.choices[sys.argv[1]])
    args = harness.parse_args()
    if sys.argv[1] != "run":
        return harness.execute(args)
    given = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    given |= {name: value for name, value in vars(args).items() if value is not None}
    own = [given["include_path"]] if given.get("include_path") else []
    args.include_path = [str(HERE / "tasks"), *own]
    for file in (file for directory in own for file in Path(directory).rglob("*.yaml")):
        try:
            load_yaml(str(file), resolve_func=False)
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{file} is no task: {error}") from error
    if given.get("output_path"):
        place = Path(given["output_path"])
        check_place("--output_path", place.parent if place.suffix == ".json" else place)
    lm = None
    if given.get("model") in MODELS:
        model_args = given.get("model_args") or {}
        options = {name: given[name] for name in ("batch_size", "max_batch_size", "device") if name in given}
        lm = args.model = MODELS[given["model"]].create_from_arg_obj(model_args, options)
    try:
        harness.execute(args)
    except (ImportError, yaml.YAMLError) as error:
        raise ValueError(f"a task cannot be loaded: {error}") from error
    if lm is None:
        return None
    counts = sum(lm._gather_all(lm.counts), Counter())
    if lm.rank == 0 and given.get("output_path"):
        print(write_manifest(lm, counts, given["output_path"], argv, began))
    if lm.world_size > 1:
        import torch

        torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("evaluate.py"):
        if not argv or argv[0] in ("-h", "--help"):
            options = model_options().format_help()
            print(MANUAL + options[options.index("model:") :].replace("--", ""))
        elif argv[0] == "--table":
            print(table(argv[1:] or ["."]))
        else:
            run(argv)


if __name__ == "__main__":
    sys.meta_path.insert(0, _HubEvaluate)
    main()

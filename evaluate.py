"""Scores for checkpoints: lm-eval's tasks for ar, mdlm and bd3lm. `python evaluate.py --help` is the manual.

Importing this file registers a2d_ar, a2d_mdlm and a2d_bd3lm with lm-eval. (The Hub's package `evaluate`, which some of
lm-eval's tasks import, has the same name; run as a program, this file lets them find that package.)
"""

import functools
import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, ClassVar

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    missing = f"evaluate.py needs lm-eval ({error}): pip install 'lm-eval[math]==0.4.13'"
    if __name__ != "__main__":
        raise ModuleNotFoundError(missing) from error
    print(missing, file=sys.stderr)
    sys.exit(2)

import torch
from tqdm import tqdm

from checkpoint import load_config, resolve
from cli import MDLM_BLOCK, Loading, Opening, one_line_errors, open_model
from diffusion import Sampling, Temperature, denoise
from files import check_directory
from likelihood import log_likelihood
from options import Count, Model, Natural, Options, Seed, Tokens, flags, nearest
from report import table, write_manifest

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# model_args


@dataclass(kw_only=True)
class Checkpoint(Loading):
    "model"

    pretrained: Annotated[Model, "CHECKPOINT"]
    """a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id"""
    max_length: Tokens | None = None  # longest sequence (default: the model's context)
    enable_thinking: bool = False  # turn on thinking in the chat template
    add_bos_token: bool | None = None
    """let the tokenizer add its special tokens to prompts (default: ar True, as lm-eval's hf; else False, as in
    training)"""
    seed: Seed = 42  # of the noise of likelihoods and of sampling


@dataclass(kw_only=True)
class Generation(Sampling):
    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None
    """masks that follow each prompt, at most: a task that asks for fewer gets fewer (default: what the task asks for,
    else 256)"""
    steps: Count | None = None  # forwards for the whole answer (default: one a token)
    temperature: Temperature | None = None
    """of the Gumbel noise on the logits; 0 takes the likeliest token (default: the task's where it has do_sample, else
    0)"""


@dataclass(kw_only=True)
class Likelihood(Options):
    "likelihood"

    mc_num: Annotated[int, "N"] = 128  # draws of each block (mdlm: of the whole answer)
    is_check_greedy: bool = False
    """also find whether greedy decoding gives the answer, which costs a forward a token (ar always finds it)"""


@dataclass(kw_only=True)
class Evaluation(Checkpoint, Generation, Likelihood):
    """usage: python evaluate.py --model a2d_ar|a2d_mdlm|a2d_bd3lm --model_args pretrained=CHECKPOINT,... --tasks A,B...
           torchrun --nproc_per_node N evaluate.py ...
           python evaluate.py --table DIR...

    Scores a checkpoint on lm-eval's tasks. The command line is lm-eval's (`lm-eval run --help` has all of it); this
    program adds three models and the tasks in tasks/: mmlu_generative_dream, hellaswag_gen, sums,
    humaneval_instruct_sandboxed and mbpp_instruct_sandboxed.

    lm-eval's flags, the most used:
      --tasks A,B             tasks or groups; `lm-eval ls tasks` lists upstream's
      --num_fewshot N         worked examples in the prompt (default: the task's)
      --apply_chat_template   prompts as chats; with it also --system_instruction TEXT, --fewshot_as_multiturn False
      --batch_size N|auto     sequences of a forward; auto: as many as memory allows (default: 1)
      --limit N               only the first N questions of each task: for trying out
      --output_path DIR       where results go, and a manifest beside them: everything that made the numbers
      --log_samples           write prompts and answers there, too
      --use_cache PATH        keep answers, and take them from there when the command is run again
      --gen_kwargs K=V,...    the task's until, max_gen_toks, do_sample, temperature, top_k, top_p
      --confirm_run_unsafe_code   for tasks that run generated programs

    --table DIR... renders the manifests below DIR as a Markdown table. A row is a checkpoint with its sampler's
    options, a column a task's metric. A cell whose setting (shots, template, questions, answer length, temperature)
    differs from that of most of its column carries a mark, which a note below the table explains.

    Log-likelihood (multiple choice, perplexity) is exact for ar and an unbiased estimate of a lower bound for the
    others, with a standard error for every request, written beside the results (standard_errors_*.jsonl).

    model_args (a mistyped one is an error):
    """

    prog: ClassVar[str] = "evaluate.py"


def parse_model_args(given: dict) -> Evaluation:
    """The options of lm-eval's model_args; ValueError for one that does not exist or has a bad value."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in flags(Evaluation):
            way = nearest(name, flags(Evaluation), "python evaluate.py --help lists them")
            raise ValueError(f"unknown model_arg {name}; {way}")
    if "pretrained" not in given:
        raise ValueError("model_args lack pretrained; expected pretrained=CHECKPOINT among them")
    try:
        return Evaluation.parse([f"--{name}={value}" for name, value in given.items()])
    except ValueError as error:  # which speaks of flags
        raise ValueError(str(error).replace("argument --", "model_arg ").removeprefix("--")) from error


# ---------------------------------------------------------------------------------------------------------------------
# The models


class A2D(TemplateLM):
    """A checkpoint as lm-eval's model: texts in and out here, token ids in diffusion.py and likelihood.py."""

    objective: str

    def __init__(self, batch_size: int | str = 1, max_batch_size: int | None = None, device=None, **model_args):
        super().__init__()
        model_args.pop("trust_remote_code", None)  # lm-eval adds it with its flag; no code is loaded with a checkpoint
        self.options = parse_model_args(model_args)
        auto = str(batch_size).startswith("auto")
        if not auto and not (str(batch_size).isdigit() and int(batch_size) > 0):
            raise ValueError(f"--batch_size {batch_size}: expected a number or auto")
        self.batch_size = None if auto else int(batch_size)  # None: as many sequences as `room` allows
        self.max_batch_size = max_batch_size

        # torchrun starts a process for each GPU; lm-eval gives each its share of the requests.
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available() if device in (None, "auto") else str(device).startswith("cuda")
        if device in (None, "auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
        if self._world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # only small objects travel

        self._open(device)
        self._device = torch.device(device)
        # The sampler refuses bad options before any task is loaded. With top_k or top_p the task may set a temperature.
        drawn = (self.options.top_k, self.options.top_p) != (None, None)
        next(denoise(self.model, [[0]], **self._sampling(max_new_tokens=1, steps=1, temperature=float(drawn))))
        self.room = 131072 if on_gpu else 4096  # tokens of a forward; halved when memory does not suffice
        self.max_length = min(self.options.max_length or 2**62, self.model.config.max_position_embeddings)

        # For the manifest, what this process did: requests, tokens, forwards (each sequence counts) and seconds of the
        # kinds "generated" and "scored"; of each task a hash of every request; each likelihood's standard error.
        self.counts = Counter()
        self.prompts = defaultdict(set)
        self.standard_errors = []

    def _open(self, device: str) -> None:
        """Opens the checkpoint, which must not declare another objective."""
        options = self.options
        config = load_config(resolve(options.pretrained))
        declared = config.objective
        if declared not in (None, self.objective) and not config.assumed:
            raise ValueError(
                f"--model a2d_{self.objective} contradicts the checkpoint, which declares objective {declared}; pass "
                f"--model a2d_{declared}"
            )
        chosen = {"model_name_or_path": options.pretrained, "objective": self.objective, "device": device}
        self.model, self.tokenizer = open_model(Opening(**chosen, **options.only(Loading)), options.block_size)

    def _sampling(self, **otherwise) -> dict:
        """The fields of Sampling by the model_args; `otherwise` has values for those that are None."""
        given = self.options.only(Sampling)
        return given | {name: value for name, value in otherwise.items() if given[name] is None}

    # -- texts and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.begin_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        add = self.objective == "ar" if self.options.add_bos_token is None else self.options.add_bos_token
        bos = self.tokenizer.special.get("bos_token")
        if add_special_tokens is False or not add or (bos and string.startswith(bos)):
            return self.tokenizer.encode(string)
        return self.tokenizer.core.encode(string, add_special_tokens=True).ids

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. An empty context is the prefix token, unless the continuation begins with it."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _cut(self, context: list[int], room: int) -> list[int]:
        """The end of a context, as much as there is room for before an answer."""
        if room < 1:
            raise ValueError(
                f"an answer of {self.max_length - room} tokens or more leaves no room for a context in the model's "
                f"{self.max_length}; lower max_new_tokens or the task's max_gen_toks, or choose another task"
            )
        if len(context) > room:
            cut = len(context) - room
            logging.getLogger(__name__).warning("cutting %s tokens from the left of a context of %s", cut, len(context))
        return context[-room:]

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

    # -- likelihood

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(request.args, *self._pair(*request.args)) for request in requests]
        found = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
        self._record(requests, [value for value, _, _ in found], [error for _, error, _ in found])
        return [(value, greedy) for value, _, greedy in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: the sums over windows of the model's length."""
        windows, owners = [], []
        room = self.max_length - int(self.objective != "ar")  # ar is not fed the last token of a window
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, room, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals, variances = [0.0] * len(requests), [0.0] * len(requests)
        for i, (value, error, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[i] += value
            variances[i] += error**2
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._record(requests, totals, [variance**0.5 for variance in variances])
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """(log-likelihood, standard error, greedy) of each (texts or None, context ids, continuation ids)."""
        room = self.max_length + int(self.objective == "ar")
        continuations = [continuation for _, _, continuation in requests]
        contexts = [self._cut(context, room - len(answer)) for (_, context, _), answer in zip(requests, continuations)]
        results = [None] * len(requests)
        bar = self._bar(len(requests), "log-likelihood", disable_tqdm)
        hook = self.model.register_forward_pre_hook(lambda _, inputs: self._count("scored", forwards=len(inputs[0])))
        batches = self._likelihood_batches(contexts)
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
                if not self._halve_room():
                    raise
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
        return results

    def _likelihood_batches(self, contexts: list[list[int]]) -> list[list[int]]:
        """Numbers of requests: answers to a question stay together, beside questions of about the same length."""
        order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), contexts[i]))
        batches = []
        for _, answers in itertools.groupby(order, key=lambda i: contexts[i]):
            answers = list(answers)
            if not batches or len(batches[-1]) + len(answers) > max(64, self.batch_size or 0):
                batches.append([])
            batches[-1] += answers
        return batches

    # -- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = [None] * len(requests)
        bar = self._bar(len(requests), "generation", disable_tqdm)
        # Requests of the same options are generated together, the longest prompts first.
        kinds = defaultdict(list)
        for i, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        for members in kinds.values():
            until, sampling = self._request_options(requests[members[0]].args[1])
            length = sampling["max_new_tokens"]
            prompts = {i: self._cut(self.tok_encode(requests[i].args[0]), self.max_length - length) for i in members}
            order = sorted(members, key=lambda i: (-len(prompts[i]), prompts[i]))
            while order:
                began = time.time()
                batch = order[: self._rows(max(1, len(prompts[order[0]])) + length)]
                try:
                    texts, tokens = self._generate([prompts[i] for i in batch], until, sampling)
                except torch.OutOfMemoryError:
                    if not self._halve_room():
                        raise
                    continue
                order = order[len(batch) :]
                for i, text in zip(batch, texts):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                self._count("generated", bar, requests=len(batch), tokens=tokens, seconds=time.time() - began)
        bar.close()
        self._record(requests)
        return answers

    def _request_options(self, given: dict) -> tuple[list[str], dict]:
        """(stop strings, fields of Sampling) of a request: the model_args, and where they are None the task's."""
        longest = self.options.max_new_tokens
        wanted = normalize_gen_kwargs(given, 256 if longest is None else longest)
        until = [stop for stop in wanted.pop("until") if stop]
        length, sample = wanted.pop("max_gen_toks"), wanted.pop("do_sample")
        length = length if longest is None else min(length, longest)
        otherwise = {
            "steps": max(1, length),
            "block_size": MDLM_BLOCK if self.objective == "mdlm" else None,
            "temperature": wanted.pop("temperature", None) or 0.0,
        }
        choice = {name: wanted.pop(name, None) for name in ("top_k", "top_p")}
        if wanted:
            raise ValueError(
                f"generation option {', '.join(wanted)} is unknown; a task or --gen_kwargs gives until, max_gen_toks, "
                "do_sample, temperature, top_k and top_p, the rest are model_args"
            )
        sampling = self._sampling(**otherwise)
        if sample and sampling["temperature"]:  # else the task's top_k and top_p would change nothing
            sampling = self._sampling(**otherwise, **choice)
        return until, sampling | {"max_new_tokens": length}

    def _generate(self, prompts: list[list[int]], until: list[str], sampling: dict) -> tuple[list[str], int]:
        """The answers' texts up to their first stop string, and how many tokens were generated."""
        prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
        added = self.tokenizer.core.get_added_tokens_decoder()
        ends = {*self.tokenizer.end_ids, *(i for i, token in added.items() if token.special and token.content in until)}
        # Seeded by the prompts: nothing random depends on what else is evaluated.
        digest = hashlib.sha256(json.dumps(prompts).encode()).digest()
        generator = torch.Generator(self._device).manual_seed(self.options.seed + int.from_bytes(digest[:4]))

        def answers(step) -> list[list[int]]:
            """Each row's generated tokens before its first mask or end token."""
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
            # Stop strings are texts, which the sampler does not know: every 16 forwards, see whether all have theirs.
            if until and running and step.forwards % 16 == 0:
                texts = map(self.tokenizer.decode, answers(step))
                if all(done or stopped(text) for done, text in zip(step.done.tolist(), texts)):
                    break
        rows = answers(step)
        texts = [self.tokenizer.decode(row) for row in rows]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts, sum(min(len(row) + 1, sampling["max_new_tokens"]) for row in rows)  # with the end token

    # -- batches and memory

    def _rows(self, longest: int) -> int:
        """Sequences of `longest` tokens for a forward."""
        return self.batch_size or max(1, min(self.room // longest, self.max_batch_size or 2**30))

    def _halve_room(self) -> bool:
        """Allows a forward half as many tokens, after memory has not sufficed; False where that would not help."""
        if self.batch_size is not None or self.room < 1024:
            return False
        self.room //= 2
        torch.cuda.empty_cache()
        return True

    # -- counting, and what goes in the manifest

    def _bar(self, total: int, what: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=what, disable=disable or self.rank != 0, unit="request")

    def _count(self, kind: str, bar: tqdm | None = None, **spent: float) -> None:
        self.counts.update({(kind, name): value for name, value in spent.items()})
        if bar is not None:
            tokens, forwards, seconds = (self.counts[kind, name] for name in ("tokens", "forwards", "seconds"))
            rate = f"{tokens / max(seconds, 1e-9):.0f}"
            bar.set_postfix({"tokens/s": rate, "tokens/forward": f"{tokens / max(forwards, 1):.2f}"})
            bar.update(spent["requests"])

    def _record(self, requests, values=(), errors=()) -> None:
        """Adds the requests of all processes to the prompts, and their standard errors where there are some."""
        hashes = [
            (request.task_name, hashlib.sha256(json.dumps(request.args, default=str).encode()).hexdigest())
            for request in requests
        ]
        rows = {}  # by request: lm-eval repeats some, so that all processes have the same number
        for request, value, error in zip(requests, values, errors):
            task, doc, choice = request.task_name, request.doc_id, request.idx
            row = {"task": task, "doc": doc, "choice": choice, "log_likelihood": value, "error": error}
            rows[task, doc, choice] = row
        for process_hashes, process_rows in self._gather((hashes, list(rows.values()))):
            for task, digest in process_hashes:
                self.prompts[task].add(digest)
            self.standard_errors += process_rows

    def get_model_info(self) -> dict:
        return {"model": str(self), "model_dtype": self.model.config.dtype}

    def __str__(self) -> str:
        return f"a2d_{self.objective}"

    # -- processes

    def _gather(self, obj) -> list:
        """The objects of all processes."""
        if self.world_size == 1:
            return [obj]
        parts = [None] * self.world_size
        torch.distributed.all_gather_object(parts, obj)
        return parts

    def all_gather(self, tensor):
        return torch.cat([part.reshape(-1) for part in self._gather(tensor.cpu())]).to(tensor.device)

    def gather_object(self, obj, dst: int = 0):
        parts = self._gather(obj)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()


class AR(A2D):
    objective = "ar"


class MDLM(A2D):
    objective = "mdlm"


class BD3LM(A2D):
    objective = "bd3lm"


MODELS = {f"a2d_{model.objective}": model for model in (AR, MDLM, BD3LM)}
for name, model in MODELS.items():
    register_model(name)(model)


# ---------------------------------------------------------------------------------------------------------------------
# The program


class _HubEvaluate:
    """A finder of modules: `import evaluate` finds the Hub's package of this name instead of this file."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "evaluate":
            return None
        elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
        return PathFinder.find_spec(name, elsewhere)


def refuse_flags(message: str, parser) -> None:
    """Raises what lm-eval's parser has to say in one line, with the nearest name for a flag that does not exist."""
    wrong = re.search("unrecognized arguments:.*?(--[^ =]+)", message)
    if wrong is None:
        raise ValueError(f"{message}; python evaluate.py --help tells more")
    otherwise = "python evaluate.py --help and lm-eval run --help list them"
    raise ValueError(f"unknown flag {wrong[1]}; {nearest(wrong[1], parser._option_string_actions, otherwise)}")


def run(argv: list[str]) -> None:
    """Hands the command line to lm-eval, with our models and tasks; then writes the manifest."""
    # Together with lm-eval's tasks these import data set libraries: seconds, which --help does without.
    import yaml
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
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

    # What a command line or a --config file can get wrong is refused before hours of work.
    given = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    given |= {name: value for name, value in vars(args).items() if value is not None}
    included = [given["include_path"]] if given.get("include_path") else []
    args.include_path = [str(HERE / "tasks"), *included]
    check_tasks(included)
    if given.get("output_path"):
        path = Path(given["output_path"])
        check_directory("--output_path", path.parent if path.suffix == ".json" else path)

    # lm-eval takes a model in place of a model's name.
    lm = None
    if given.get("model") in MODELS:
        options = {name: given[name] for name in ("batch_size", "max_batch_size", "device") if name in given}
        lm = args.model = MODELS[given["model"]].create_from_arg_obj(given.get("model_args") or {}, options)
    try:
        harness.execute(args)
    except (ImportError, yaml.YAMLError) as error:
        raise ValueError(f"a task cannot be loaded: {error}") from error
    if lm is None:
        return None
    counts = sum(lm._gather(lm.counts), Counter())
    if lm.rank == 0 and given.get("output_path"):
        print(write_manifest(lm, counts, given["output_path"], argv, began))
    if lm.world_size > 1:
        torch.distributed.destroy_process_group()


def check_tasks(directories: list[str]) -> None:
    """ValueError for a YAML file in the user's directories of tasks that lm-eval could not read."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    for file in (file for directory in directories for file in Path(directory).rglob("*.yaml")):
        try:
            load_yaml(str(file), resolve_func=False)
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{file} is no task: {error}") from error


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("evaluate.py"):
        if not argv or argv[0] in ("-h", "--help"):
            _, model_args = Evaluation.parser().format_help().split("show this help message and exit\n")
            print(inspect.getdoc(Evaluation) + "\n" + model_args.replace("--", ""))
        elif argv[0] == "--table":
            print(table(argv[1:] or ["."]))
        else:
            run(argv)


if __name__ == "__main__":
    sys.meta_path.insert(0, _HubEvaluate)
    main()

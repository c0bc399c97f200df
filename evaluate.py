"""Scores for checkpoints: lm-eval's tasks for ar, mdlm and bd3lm. `python evaluate.py --help` is the manual.

Importing this file registers a2d_ar, a2d_mdlm and a2d_bd3lm with lm-eval.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from tqdm import tqdm

from checkpoint import load_config, resolve
from cli import MDLM_BLOCK, Loading, Opening, one_line_errors, open_model
from diffusion import Sampling, Temperature, denoise
from display import printable
from files import check_directory
from likelihood import log_likelihood
from model import OBJECTIVES
from options import Model, Natural, Options, Seed, Steps, Tokens, nearest
from report import cache_key, table, write_manifest

HERE = Path(__file__).resolve().parent
NO_OPS = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "min_p": 0.0}

# ---------------------------------------------------------------------------------------------------------------------
# model_args


@dataclass(kw_only=True)
class Checkpoint(Loading):
    "model"

    pretrained: Annotated[Model, "CHECKPOINT"]  # a checkpoint: a directory (also under $BASE_MODELS_DIR) or a Hub id
    max_length: Tokens | None = None  # longest sequence (default: the model's context)
    enable_thinking: bool = False  # turn on thinking in the chat template
    add_bos_token: bool | None = None
    """let the tokenizer add its special tokens to prompts (default: True for ar, as lm-eval's hf; else False)"""
    seed: Seed = 42  # of the noise of likelihoods and of sampling


@dataclass(kw_only=True)
class Generation(Sampling):
    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None
    """masks after each prompt, at most: a task that asks for fewer gets fewer (default: the task's, else 256)"""
    steps: Steps | None = None  # forwards for the whole answer (default: one a token)
    temperature: Temperature | None = None
    """of the Gumbel noise; 0 takes the likeliest token (default: the task's where it has do_sample, else 0)"""


@dataclass(kw_only=True)
class Likelihood(Options):
    "likelihood"

    mc_num: Annotated[int, "N"] = 128  # draws of each block (mdlm: of the whole answer)
    is_check_greedy: bool = False  # find whether greedy decoding gives the answer: a forward a token (ar always does)


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
      --use_cache PATH        keep answers, each checkpoint's and each model_args' by themselves, for the next time
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
    if "pretrained" not in given:
        raise ValueError("model_args lack pretrained; expected pretrained=CHECKPOINT among them")
    try:
        return Evaluation.parse([f"--{name}={value}" for name, value in given.items()])
    except ValueError as error:
        # The message is about flags, which model_args are not.
        message = re.sub("(flag|argument) --", "model_arg ", str(error).removeprefix("--"), count=1)
        raise ValueError(message.replace("did you mean --", "did you mean ")) from error


# ---------------------------------------------------------------------------------------------------------------------
# The models


class A2D:
    """A checkpoint as lm-eval's model: texts in and out here, token ids in diffusion.py and likelihood.py.

    `models` puts lm-eval's TemplateLM below it, which has rank, world_size, device, cache_hook and _encode_pair.
    """

    objective: str
    eot_token_id = prefix_token_id = tokenizer_name = None  # abstract properties of lm-eval's; __init__ has the values

    def __init__(self, batch_size: int | str = 1, max_batch_size: int | None = None, device=None, **model_args):
        super().__init__()
        model_args.pop("trust_remote_code", None)  # lm-eval adds it with its flag; no code is loaded with a checkpoint
        self.options = options = parse_model_args(model_args)
        if not re.fullmatch("auto.*|0*[1-9][0-9]*", str(batch_size)):
            raise ValueError(f"--batch_size {batch_size}: expected a number or auto")
        # With auto it is None: as many sequences as `room` allows, but no more than max_batch_size.
        self.batch_size = None if str(batch_size).startswith("auto") else int(batch_size)
        self.max_batch_size = max_batch_size or 2**30

        # torchrun starts a process for each GPU; lm-eval gives each its share of the requests.
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = torch.cuda.is_available() if device in (None, "auto") else str(device).startswith("cuda")
        if device in (None, "auto", "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu"
        if self._world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")  # only small objects travel

        # Scores of a checkpoint by an objective that it was not trained for would mean nothing.
        config, name = load_config(resolve(options.pretrained)), f"--model a2d_{self.objective}"
        declared = config.objective
        both = config.causal and {declared, self.objective} == {"ar", "bd3lm"}  # it is one as well as the other
        if declared not in (None, self.objective) and not config.assumed and not both:
            way = f"which declares objective {declared}; pass --model a2d_{declared}"
            raise ValueError(f"{name} contradicts the checkpoint, {way}")
        chosen = {"model_name_or_path": options.pretrained, "objective": self.objective, "device": device}
        self.model, self.tokenizer = open_model(Opening(**chosen, **options.only(Loading)), options.block_size)
        self._device = torch.device(device)
        self.eot_token_id, self.prefix_token_id = self.tokenizer.eos_id, self.tokenizer.begin_id
        self.tokenizer_name = str(options.pretrained).replace("/", "__")  # part of the name of lm-eval's cache

        # The sampler refuses bad options before any task is loaded. With top_k or top_p the task may set a temperature.
        drawn = (options.top_k, options.top_p) != (None, None)
        next(denoise(self.model, [[0]], **self._sampling(max_new_tokens=1, steps=1, temperature=float(drawn))))
        self.room = 131072 if on_gpu else 4096  # tokens of a forward; halved when memory does not suffice
        self.max_length = min(options.max_length or 2**62, self.model.config.max_position_embeddings)

        # For the manifest, what this process did: requests, tokens, forwards (each sequence counts) and seconds of the
        # kinds "generated" and "scored"; of each task a hash of every request; each likelihood's standard error.
        self.counts, self.prompts, self.standard_errors = Counter(), defaultdict(set), []

    def _sampling(self, **otherwise) -> dict:
        """The fields of Sampling by the model_args; `otherwise` has values for those that are None."""
        given = self.options.only(Sampling)
        return given | {name: value for name, value in otherwise.items() if given[name] is None}

    # -- texts and tokens

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
            answer, way = f"an answer of {self.max_length - room} tokens", "lower max_new_tokens or max_gen_toks"
            raise ValueError(f"{answer} leaves no room for a context in the model's {self.max_length}; {way}")
        cut = len(context) - room
        if cut > 0:
            logging.getLogger(__name__).warning("cutting %s tokens from the left of a context of %s", cut, len(context))
        return context[-room:]

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
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        # ar is not fed the last token of a window.
        windows, owners, room = [], [], self.max_length - int(self.objective != "ar")
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, room, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)

        # The windows' errors are independent: variances add up.
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
        pairs = [(self._cut(context, room - len(answer)), answer) for _, context, answer in requests]
        results = [None] * len(requests)
        hook = self.model.register_forward_pre_hook(lambda _, inputs: self._count("scored", forwards=len(inputs[0])))
        # Questions of about the same length come one after the other, and all answers to one of them together.
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0]))
        for result, i in zip(self._batches("scored", self._score, [pairs[i] for i in order], disable_tqdm), order):
            results[i] = result
            if requests[i][0] is not None:  # None: a window, which is not a request of its own
                self.cache_hook.add_partial("loglikelihood", requests[i][0], result[::2])
        hook.remove()
        return results

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> tuple[list[tuple[float, float, bool]], int]:
        """_loglikelihood_tokens of the first (context ids, continuation ids), and their number of tokens."""
        # Whole questions, with at most 64 answers if that is more than one question.
        batch = []
        for _, answers in itertools.groupby(pairs, key=lambda pair: pair[0]):
            answers = list(answers)
            if batch and len(batch) + len(answers) > max(64, self.batch_size or 0):
                break
            batch += answers
        contexts, continuations = map(list, zip(*batch))

        longest = max(len(context) + len(answer) for context, answer in batch)
        options = {"draws": self.options.mc_num, "generator": torch.Generator().manual_seed(self.options.seed)}
        options |= {"check_greedy": self.objective == "ar" or self.options.is_check_greedy}
        options |= {"forward_tokens": self._rows(longest) * longest}
        found = [part.tolist() for part in log_likelihood(self.model, contexts, continuations, **options)]
        estimate, error, greedy = [*found, [False] * len(batch)][:3]
        return list(zip(estimate, error, greedy)), sum(map(len, continuations))

    # -- generation

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers, inputs = [None] * len(requests), []
        for text, given in (request.args for request in requests):
            until, sampling = self._request_options(given)
            prompt = self._cut(self.tok_encode(text), self.max_length - sampling["max_new_tokens"])
            inputs.append((json.dumps(given, sort_keys=True, default=str), prompt, until, sampling))
        # Requests of the same options are generated together, the longest prompts first.
        order = sorted(range(len(inputs)), key=lambda i: (inputs[i][0], -len(inputs[i][1]), inputs[i][1]))
        batches = self._batches("generated", self._generate, [inputs[i] for i in order], disable_tqdm)
        for text, i in zip(batches, order):
            answers[i] = text
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        self._record(requests)
        return answers

    def _request_options(self, given: dict) -> tuple[list[str], dict]:
        """(stop strings, fields of Sampling) of a request: the model_args, and where they are None the task's."""
        from lm_eval.models.utils import normalize_gen_kwargs

        longest = self.options.max_new_tokens
        task = normalize_gen_kwargs(given, 256 if longest is None else longest)
        until = [stop for stop in task.pop("until") if stop]
        length, sample = task.pop("max_gen_toks"), task.pop("do_sample")
        task = {name: value for name, value in task.items() if name not in NO_OPS or value != NO_OPS[name]}
        length = length if longest is None else min(length, longest)
        block = MDLM_BLOCK if self.objective == "mdlm" else None
        otherwise = {"steps": max(1, length), "block_size": block, "temperature": task.pop("temperature", None) or 0.0}
        choice = {name: task.pop(name, None) for name in ("top_k", "top_p")}
        if task:
            known = "until, max_gen_toks, do_sample, temperature, top_k and top_p, the rest are model_args"
            raise ValueError(f"generation option {', '.join(task)} is unknown; a task or --gen_kwargs gives {known}")

        # Without noise the task's top_k and top_p would change nothing, and the sampler refuses them.
        sampling = self._sampling(**otherwise)
        if sample and sampling["temperature"]:
            sampling = self._sampling(**otherwise, **choice)
        return until, sampling | {"max_new_tokens": length}

    def check_options(self, task: str, given: dict) -> None:
        """ValueError for a task's generation options that the sampler would refuse."""
        try:
            _, sampling = self._request_options(given)
            self._cut([], self.max_length - sampling["max_new_tokens"])
            Sampling(**sampling)
        except ValueError as error:
            raise ValueError(f"task {task}: {error}") from error

    def _generate(self, inputs: list[tuple[str, list[int], list[str], dict]]) -> tuple[list[str], int]:
        """The answers to the first (options, prompt, stop strings, fields of Sampling), as many as a forward has room
        for: texts up to the first stop string; and how many tokens were generated."""
        key, longest, until, sampling = inputs[0]
        new = sampling["max_new_tokens"]
        inputs = inputs[: self._rows(max(1, len(longest)) + new)]
        prompts = [prompt or [self.prefix_token_id] for options, prompt, *_ in inputs if options == key]
        # A stop string that is a special token ends an answer as the end tokens do.
        added = self.tokenizer.core.get_added_tokens_decoder()
        ends = {*self.tokenizer.end_ids, *(i for i, token in added.items() if token.special and token.content in until)}
        # The prompts are the seed: nothing random depends on what else is evaluated.
        digest = hashlib.sha256(json.dumps(prompts).encode()).digest()
        generator = torch.Generator(self._device).manual_seed(self.options.seed + int.from_bytes(digest[:4]))

        def answers(step) -> list[list[int]]:
            """Each row's generated tokens before its first mask or end token."""
            rows = []
            for prompt, tokens, masked in zip(prompts, step.tokens.tolist(), step.masked.tolist()):
                span = range(len(prompt), len(prompt) + new)
                stop = next((i for i in span if masked[i] or tokens[i] in ends), span.stop)
                rows.append(tokens[len(prompt) : stop])
            return rows

        # Of the rows of a forward, those count that were not done before it.
        running = len(prompts)
        for step in denoise(self.model, prompts, **sampling, end_ids=tuple(sorted(ends)), generator=generator):
            self._count("generated", forwards=running if step.forwards else 0)
            running = int((~step.done).sum())
            # Stop strings are texts, which the sampler does not know: every 16 forwards, see whether all have theirs.
            if until and running and step.forwards % 16 == 0:
                texts = map(self.tokenizer.decode, answers(step))
                stopped = [any(stop in text for stop in until) for text in texts]
                if all(map(any, zip(step.done.tolist(), stopped))):
                    break
        rows = answers(step)
        texts = [self.tokenizer.decode(row) for row in rows]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts, sum(min(len(row) + 1, new) for row in rows)  # with the end token

    # -- batches, and what goes in the manifest

    def _rows(self, longest: int) -> int:
        """Sequences of `longest` tokens for a forward."""
        return self.batch_size or max(1, min(self.room // longest, self.max_batch_size))

    def _batches(self, kind: str, work, inputs: list, disable_tqdm: bool):
        """Yields a result for each of inputs; work(inputs) gives those of the first few, and how many tokens."""
        bar = tqdm(total=len(inputs), desc=kind, disable=disable_tqdm or self.rank != 0, unit="request")
        while inputs:
            began = time.time()
            try:
                results, tokens = work(inputs)
            except torch.OutOfMemoryError:
                if self.batch_size is not None or self.room < 1024:  # half the room would not help
                    raise
                self.room //= 2
                torch.cuda.empty_cache()
                continue
            inputs = inputs[len(results) :]
            self._count(kind, requests=len(results), tokens=tokens, seconds=time.time() - began)

            # The bar has the rates of the whole run.
            tokens, forwards, seconds = (self.counts[kind, name] for name in ("tokens", "forwards", "seconds"))
            rates = {"tokens/s": f"{tokens / max(seconds, 1e-9):.0f}"}
            bar.set_postfix(rates | {"tokens/forward": f"{tokens / max(forwards, 1):.2f}"})
            bar.update(len(results))
            yield from results
        bar.close()

    def _count(self, kind: str, **spent: float) -> None:
        self.counts.update({(kind, name): value for name, value in spent.items()})

    def _record(self, requests, values=(), errors=()) -> None:
        """Adds the requests of all processes to the prompts, and their standard errors where there are some."""
        texts = [json.dumps(request.args, default=str).encode() for request in requests]
        hashes = [(request.task_name, hashlib.sha256(text).hexdigest()) for request, text in zip(requests, texts)]
        # By request, because lm-eval repeats some so that all processes have the same number.
        rows = {}
        for request, value, error in zip(requests, values, errors):
            row = {"task": request.task_name, "doc": request.doc_id, "choice": request.idx}
            rows[tuple(row.values())] = row | {"log_likelihood": value, "error": error}
        for process_hashes, process_rows in self._gather((hashes, list(rows.values()))):
            for task, digest in process_hashes:
                self.prompts[task].add(digest)
            self.standard_errors += process_rows

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
        self._gather(None)


@functools.cache
def models() -> dict[str, type[A2D]]:
    """lm-eval's names of the models, which the first call registers."""
    # lm-eval begins by importing a client for the web, a sixth of the time that --help may take: so here, not above.
    import lm_eval.models  # noqa: F401  which adds lm-eval's own; with ours there it would no longer do so by itself
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    found = {}
    for objective in OBJECTIVES:
        name = f"a2d_{objective}"
        found[name] = register_model(name)(type(name, (A2D, TemplateLM), {"objective": objective}))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The program


def read_command_line(argv: list[str]):
    """(lm-eval's program, its arguments); ValueError for a bad command line, with the nearest name of a wrong flag."""
    from lm_eval._cli import HarnessCLI

    sys.argv = ["evaluate.py", *([] if argv[:1] in (["run"], ["ls"], ["validate"]) else ["run"]), *argv]
    harness = HarnessCLI()
    parsers = harness._subparsers.choices

    def refuse(message: str) -> None:
        wrong = re.search("unrecognized arguments:.*?(--[^ =]+)", message)
        if wrong is None:
            raise ValueError(f"{message}; python evaluate.py --help tells more")
        otherwise, known = "python evaluate.py --help and lm-eval run --help list them", parsers[sys.argv[1]]
        raise ValueError(f"unknown flag {wrong[1]}; {nearest(wrong[1], known._option_string_actions, otherwise)}")

    for parser in (harness._parser, *parsers.values()):
        parser.error = refuse
    return harness, harness.parse_args()


def run(argv: list[str]) -> None:
    """Hands the command line to lm-eval, with our models and tasks; then writes the manifest."""
    try:
        import yaml
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.tasks._yaml_loader import load_yaml
        from lm_eval.utils import setup_logging
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval is needed ({error}): pip install 'lm-eval[math]==0.4.13'") from error

    began = time.time()
    setup_logging("ERROR" if int(os.environ.get("RANK", 0)) else logging.INFO)
    harness, args = read_command_line(argv)
    if sys.argv[1] != "run":
        return harness.execute(args)

    # What a command line or a --config file can get wrong is refused before hours of work.
    given = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    given |= {name: value for name, value in vars(args).items() if value is not None}
    directories = [given["include_path"]] if given.get("include_path") else []
    for file in (file for directory in directories for file in Path(directory).rglob("*.yaml")):
        try:
            load_yaml(str(file), resolve_func=False)
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(f"{file} is no task: {error}") from error
    args.include_path = [str(HERE / "tasks"), *directories]
    output = given.get("output_path")
    if output:
        check_directory("--output_path", Path(output).parent if output.endswith(".json") else Path(output))

    # lm-eval takes a model in place of a model's name.
    lm = None
    if given.get("model") in models():
        options = {name: given[name] for name in ("batch_size", "max_batch_size", "device") if name in given}
        lm = args.model = models()[given["model"]].create_from_arg_obj(given.get("model_args") or {}, options)
        # Another checkpoint or sampler never gets these answers from a cache.
        if given.get("use_cache"):
            args.use_cache = f"{given['use_cache']}_{cache_key(lm)}"
    try:
        with checked_tasks(lm) if lm else nullcontext():
            harness.execute(args)
    except (ImportError, yaml.YAMLError) as error:
        raise ValueError(f"a task cannot be loaded: {error}") from error
    if lm is None:
        return None

    # The first process writes what all of them have done.
    counts = sum(lm._gather(lm.counts), Counter())
    if lm.rank == 0 and output:
        print(write_manifest(lm, counts, output, argv, began))
    if lm.world_size > 1:
        torch.distributed.destroy_process_group()


@contextmanager
def checked_tasks(lm: A2D):
    """Inside, lm-eval begins to evaluate only if `lm` can take every task's generation options."""
    from lm_eval import evaluator

    evaluate = evaluator.evaluate

    def checked(**options):
        for name, task in options["task_dict"]["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                lm.check_options(name, task.get_config("generation_kwargs") or {})
        return evaluate(**options)

    evaluator.evaluate = checked
    try:
        yield
    finally:
        evaluator.evaluate = evaluate


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("evaluate.py"):
        if not argv or argv[0] in ("-h", "--help"):
            _, model_args = Evaluation.parser().format_help().split("show this help message and exit\n")
            print(inspect.getdoc(Evaluation) + "\n" + model_args.replace("--", ""))
        elif argv[0] == "--table":
            print(printable(table(argv[1:] or ["."])))
        else:
            run(argv)


if __name__ == "__main__":
    # Some of lm-eval's tasks import the Hub's package `evaluate`: it must come before this directory.
    sys.path.sort(key=lambda entry: Path(entry).resolve() == HERE)
    main()
else:
    models()

"""Answers prompts, fills in masks, or scores a chat data set. `python sample.py --help` is the manual."""

import json
import sys
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from tqdm import tqdm

import cli
import data
from cli import (
    Answers,
    Opening,
    Request,
    Turns,
    batches,
    check_chat,
    encode,
    idle_steps,
    is_chat,
    one_line_errors,
    open_model,
    sampler_options,
)
from diffusion import Sampling
from display import LEGEND, MASKED, STRONG, Region, Spans, cost, one_line, pieces, plain, show, wrap
from files import check_file, read_text, replacing_file
from model import LanguageModel
from options import Bound, Natural, Options, Rows, Words
from picture import ENDINGS, Frame, Trace, picture
from tokenizer import Tokenizer

Percent = Annotated[float, Bound(lambda score: 0 <= score <= 100, "a percentage, 0 to 100"), "PERCENT"]
FRAME = 0.04  # seconds that a frame of --show lasts at least
PLAIN_EVERY = 8  # forwards from one line of --show to the next where there is no terminal


@dataclass(kw_only=True)
class Prompts(Turns):
    "prompts"

    prompts: Annotated[Words, "PROMPT"] = ()  # prompts; put those that begin with a dash after --
    input: Annotated[str, "FILE"] | None = None
    """.txt: a prompt per line, blank ones left out. .jsonl: rows with "prompt", or "messages" that end in the user's
    turn. -: standard input, as .txt (default: standard input, where no prompt is given)"""
    batch_size: Rows = 16  # prompts decoded at once; they may differ in length


@dataclass(kw_only=True)
class Output(Options):
    "what to show and write"

    show: bool = False
    """animate the denoising: masked (░), just settled (green), settled; ∎ is an end token behind masks. At most 25
    forwards a second are shown; that time does not count. Without a terminal: a line every 8 forwards"""
    output: Annotated[str, "FILE.jsonl"] | None = None
    """write a row per prompt: prompt, answer, tokens, forwards, settings (default: none)"""
    overwrite: bool = False  # replace --output and --picture where they exist (default: False, an error)
    picture: Annotated[str, "FILE"] | None = None
    """the first prompt's denoising. .gif: an animation, 800 pixels wide. .html: a page that plays it, and can be gone
    through forward by forward. .png: position x forward, coloured by when a token settled and how confident the model
    was (default: none)"""


@dataclass(kw_only=True)
class Scoring(Options):
    "scoring"

    dataset_args: Annotated[str, "SPEC"] | None = None
    """take the prompts from a chat data set, such as builtin/sums[test:500]: all turns but the last, which the answer
    must equal but for white space at its ends. Prints a table by task and pooled (default: none)"""
    split: Annotated[str, "SPLIT"] = "test"  # of --dataset_args: train, validation or test
    min_exact_match: Percent | None = None
    """exit with status 1 if the pooled score is lower (default: 0)"""


@dataclass(kw_only=True)
class Sample(Sampling, Scoring, Output, Prompts, Opening):
    """Answer prompts with an ar, mdlm or bd3lm checkpoint, fill in masks, or score a chat data set.

      python sample.py "What is 17 + 25?" "Reverse the word ABC." --model_name_or_path runs/mdlm/checkpoint-final --show
      python sample.py "The <|mask|><|mask|> sat on the mat." --model_name_or_path runs/mdlm/checkpoint-final
      python sample.py --dataset_args "builtin/sums[test:500]" --model_name_or_path runs/mdlm/checkpoint-final

    Prompts are arguments, the lines of a file, or those of standard input (where it is piped, or with a lone "-"). Each
    is a user's turn under the checkpoint's chat template, where it has one. An answer ends before its first end token.
    An empty prompt generates from scratch, without the template: it is free text. AR and right-shift models start from
    BOS (or EOS if there is none).

    Infilling: each <|mask|> in a prompt is one token to fill in. Such a prompt is filled in exactly as written: no chat
    template is added, and end tokens do not stop it; a chat (of --input) is filled in with its last turn as written. By
    default nothing is appended (--max_new_tokens 0). mdlm sees both sides of a mask; bd3lm nothing to the right of its
    block; ar nothing to its right.

    "tokens" counts answer tokens including the end token. "forwards" counts model calls per prompt, added up; prompts
    of one batch share calls. ar decodes 1 token per forward."""

    prog: ClassVar[str] = "sample.py"
    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None
    """masks that follow each prompt (default: 128, or fewer where an mdlm checkpoint was trained on shorter answers; 0
    after a prompt that has masks)"""


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def requests(args: Sample) -> list[Request]:
    """The prompts that the options name, from one source."""
    named = {"PROMPT": args.prompts, "--input": args.input, "--dataset_args": args.dataset_args}
    given = [name for name, value in named.items() if value]
    if len(given) > 1:
        raise ValueError(f"prompts come from {' and '.join(given)}; expected one source")
    if args.min_exact_match is not None and not args.dataset_args:
        raise ValueError("--min_exact_match needs answers to compare with; add --dataset_args")

    # A data set, or arguments; "-" alone stands for standard input.
    if args.dataset_args:
        return [to_score(row, args.dataset_args) for row in data.raw(args.dataset_args, args.split)]
    if args.prompts and list(args.prompts) != ["-"]:
        return [Request(prompt) for prompt in args.prompts]
    if not args.prompts and args.input is None and sys.stdin.isatty():
        raise ValueError("no prompt; give some as arguments (an empty one, '', generates from scratch) or by --input")

    # A line each, of a file or standard input. Only a line feed ends one: JSON's strings may hold other separators.
    piped = args.input in (None, "-")
    name = "standard input" if piped else args.input
    lines = read_text(name, sys.stdin.buffer if piped else None).split("\n")
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{name} holds no prompt; expected one a line")
    if not name.endswith((".jsonl", ".json")):
        return [Request(line) for _, line in numbered]
    return [from_json(line, f"{name}, line {n}") for n, line in numbered]


def from_json(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); expected an object a line") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where}: expected an object with either "prompt" or "messages"')
    if not isinstance(row.get("prompt", ""), str):
        raise ValueError(f"{where}: the prompt is a {type(row['prompt']).__name__}; expected a string")
    return Request(row["prompt"] if "prompt" in row else check_chat(row["messages"], where))


def to_score(row: dict, source: str) -> Request:
    """A row of a chat data set: its last turn is what the answer to the others must be."""
    if "messages" not in row:
        raise ValueError(f"{source} is no chat (it has {', '.join(row)}); scoring compares with an assistant's turn")
    messages = check_chat(row["messages"], source, answered=True)
    if len(messages) < 2:
        raise ValueError(f"{source}: a chat of an answer alone, {messages}; scoring needs a turn before it")
    task = None if row.get("task") is None else one_line(str(row["task"]))
    return Request(messages[:-1], task=task, expected=messages[-1]["content"], tools=row.get("tools"))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class Watch(Region):
    """Shows a batch at each step: in place on a terminal, else a line every few forwards."""

    def show(self, rows: list[Spans], forwards: int) -> None:
        # A row is one line, whatever its tokens are.
        rows = [[(text.replace("\n", "↵"), style) for text, style in row] for row in rows]
        if self.live:
            shown = [(f"forward {forwards}", STRONG), (f"  {LEGEND}", MASKED)]
            for n, row in enumerate(rows, 1):
                shown += [(f"\n{n} ", STRONG), *row]
            self.draw(wrap(shown, self.width))
            time.sleep(FRAME)  # not counted in the time that decoding took
        elif forwards % PLAIN_EVERY == 0:
            for n, row in enumerate(rows, 1):
                show([(f"forward {forwards}, row {n}: {plain(row)}", "")])


def decode(model, tokenizer, batch: list[Request], *, options: dict, generator, watch: bool, frames=None) -> Answers:
    """Answers the requests of a batch, which are of one kind. watch: show each step. frames: a list to which those of
    the first row are added."""
    # Only the steps are timed, not what is shown of them.
    answers = Answers.to(batch, model, tokenizer, options=options, generator=generator)
    with Watch(live=watch) as screen:
        for step in answers:
            if watch:
                screen.show(answers.shown(), step.forwards)
            if frames is not None and answers.forwards[0] == len(frames):  # else the row is done, and others are not
                frames.append(answers.frame())
    for request, answer in zip(batch, answers.final()):
        request.answer = answer
    return answers


def traced(answers: Answers, request: Request, frames: list[Frame], options: dict, objective: str) -> Trace:
    """How the first row of a batch, that of `request`, was denoised, for a picture. options: of `in_force`."""
    last, begin = answers.last, answers.columns[0].start
    # Blocks count from the row's first column, or from where the answer begins.
    origin = 0 if options["block_align"] == "sequence" else begin
    ids, masked, settled, confidence = next(answers.rows(last.tokens, last.masked, answers.settled, last.confidence))
    texts = pieces(answers.tokenizer, ids, masked, skip_special_tokens=False)
    size = options["block_size"] or begin + len(texts)
    borders = [t for t in range(1, len(texts)) if (begin + t - origin) % size == 0]
    forwards, prompt = len(frames) - 1, prompt_text(request, answers.tokenizer)
    title = f"{objective}, {request.answer.tokens} tokens in {forwards} forwards"
    return Trace(texts, settled, confidence, forwards, title, prompt, borders, frames)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written


def prompt_text(request: Request, tokenizer: Tokenizer) -> str:
    """A prompt to be shown: a chat turn by turn, an empty one by the token that the text began with."""
    prompt = request.prompt
    if not isinstance(prompt, str):
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    if prompt == "":
        after = f", after {tokenizer.decode(request.ids, skip_special_tokens=False)}" if request.ids else ""
        return f"(from scratch{after})"
    return prompt


def show_answer(request: Request, number: str, tokenizer: Tokenizer) -> None:
    """Prints prompt and answer; what was filled in stands out."""
    prompt = prompt_text(request, tokenizer)
    show([(f"[{number}] {prompt}\n", STRONG), *request.answer.shown], end="\n\n")


def totals(done: list[Request]) -> tuple[int, int]:
    """Tokens and forwards of the answers."""
    return sum(request.answer.tokens for request in done), sum(request.answer.forwards for request in done)


def show_table(todo: list[Request], seconds: dict[str | None, float]) -> float:
    """Prints exact match by task and pooled, the answer against the expected one; returns the pooled percentage."""
    # A row for each task if there are several, and one for all.
    several = {task: spent for task, spent in seconds.items() if task is not None and len(seconds) > 1}
    rows = [(task, [request for request in todo if request.task == task], spent) for task, spent in several.items()]
    rows.append(("all", todo, sum(seconds.values())))
    width = max(len("task"), *(len(name) for name, *_ in rows))
    print(f"{'task':<{width}}  exact match %      n  tokens/s  tokens per forward")
    for name, done, spent in rows:
        score = 100 * sum(request.correct for request in done) / len(done)
        tokens, forwards = totals(done)
        speed, share = tokens / max(spent, 1e-9), tokens / max(forwards, 1)
        print(f"{name:<{width}}  {score:13.1f}  {len(done):5}  {speed:8.1f}  {share:18.2f}")
    return score


def write_rows(args: Sample, todo: list[Request], model: LanguageModel, options: dict) -> None:
    """Writes --output: a row per prompt, in their order, each with the settings that made it."""
    settings = {
        "model": args.model_name_or_path,
        "objective": model.config.objective,
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "seed": args.seed,
        "batch_size": args.batch_size,
        **cli.in_force(options, model.config),
    }
    # The file takes its name when it is complete.
    with replacing_file(args.output) as file, file.open("w", encoding="utf-8") as lines:
        for request in todo:
            text, _, tokens, forwards, _ = request.answer
            row = {"prompt": request.prompt, "answer": text, "tokens": tokens, "forwards": forwards}
            if request.expected is not None:
                row |= {"task": request.task, "expected": request.expected, "correct": request.correct}
            row |= settings | {"max_new_tokens": request.new}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The program


def sample(args: Sample) -> int:
    """Does what the options say; returns the exit status."""
    # What is wrong is found before the work: names of files first, as they cost nothing; then prompts, then the model.
    for flag, path, endings in (("--output", args.output, (".jsonl",)), ("--picture", args.picture, ENDINGS)):
        if path is not None:
            check_file(flag, path, endings, overwrite=args.overwrite)
    todo = requests(args)
    model, tokenizer = open_model(args, args.block_size)
    chat, objective = is_chat(args, tokenizer), model.config.objective
    options = sampler_options(args, objective)
    # Encode all before the first is decoded: the last may be too long, and that should not show after an hour.
    for n, request in enumerate(todo, 1):
        encode(request, n, args, model, tokenizer, chat)
    if args.picture and not (sum(todo[0].holes or []) + todo[0].new):
        raise ValueError("--picture: the first prompt has no mask to fill in; raise --max_new_tokens or leave it out")

    # Decode batch by batch, and print each answer as soon as those before it are printed.
    generator = torch.Generator(model.head_weight.device).manual_seed(args.seed)
    seconds, trace, printed = {}, None, 0
    progress = tqdm(total=len(todo), unit="row", disable=None if args.dataset_args else True)
    for batch in batches(todo, args.batch_size):
        frames = [] if args.picture and batch[0] is todo[0] else None
        how = {"options": options, "generator": generator, "watch": args.show, "frames": frames}
        answers = decode(model, tokenizer, batch, **how)
        seconds[batch[0].task] = seconds.get(batch[0].task, 0.0) + answers.seconds
        if frames:
            trace = traced(answers, todo[0], frames, cli.in_force(options, model.config), objective)
        progress.update(len(batch))
        while not args.dataset_args and printed < len(todo) and todo[printed].answer is not None:
            printed += 1
            show_answer(todo[printed - 1], f"{printed}/{len(todo)}", tokenizer)
    progress.close()

    # Then the score or the rate, remarks, and the files.
    score = show_table(todo, seconds) if args.dataset_args else None
    tokens, forwards = totals(todo)
    print(cost(tokens, sum(seconds.values()), forwards))
    for remark in idle_steps(options, objective, max(sum(request.holes or []) + request.new for request in todo)):
        print(remark)
    blank = sum(not request.answer.text.strip() for request in todo if request.new)
    if blank:
        print(f"{blank} of {len(todo)} answers {cli.BLANK}")
    if args.picture is not None:
        with replacing_file(args.picture) as file:
            file.write_bytes(picture(trace, args.picture))
    if args.output is not None:
        write_rows(args, todo, model, options)

    # Below the least score the status is 1, for a script to see.
    least = args.min_exact_match
    if least is not None and score < least:
        print(f"sample.py: exact match {score:.1f} % is below --min_exact_match {least}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("sample.py"):
        try:
            status = sample(Sample.parse(argv))
        except KeyboardInterrupt:
            print("sample.py: interrupted; nothing was written", file=sys.stderr)
            status = 130
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])

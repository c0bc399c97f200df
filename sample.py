"""Answers prompts, fills in masks, or scores a chat data set. `python sample.py --help` is the manual."""

from cli import (
    Parser,
    add_model,
    add_sampling,
    boolean,
    canvas,
    check_file,
    check_messages,
    one_line_errors,
    open_model,
    replacing_file,
    sampling,
    surplus,
    switch,
    with_block,
)

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from diffusion import Sampling, denoise
from display import (
    STRONG,
    Rate,
    Region,
    Trace,
    picture,
    pieces,
    plain,
    spans,
    styled,
    terminal,
    wrap,
)
from model import LanguageModel
from options import Natural
from tokenizer import Tokenizer

FRAME = 0.04  # seconds that a frame of --show lasts at least
PLAIN_EVERY = 8  # forwards from one line of --show to the next where there is no terminal


@dataclass(kw_only=True)
class Answering(Sampling):
    max_new_tokens: Natural | None = None
    """masks that follow each prompt (default: 128, or 0 after a prompt that has masks)"""


def arguments() -> Parser:
    parser = Parser(
        "sample.py",
        """\
Answer prompts with an ar, mdlm or bd3lm checkpoint, fill in masks, or score a chat data set.

  python sample.py "What is 17 + 25?" "Reverse the word ABC." --model_name_or_path runs/mdlm/checkpoint-final --show
  python sample.py "The <|mask|><|mask|> sat on the mat." --model_name_or_path runs/mdlm/checkpoint-final
  python sample.py --dataset_args "builtin/sums[test:500]" --model_name_or_path runs/mdlm/checkpoint-final

Prompts are arguments, the lines of a file, or those of standard input (where it is piped, or with a lone "-"). Each
is a user's turn under the checkpoint's chat template, where it has one. An empty prompt generates from scratch, without
the template: from nothing, or, where a token is predicted from the one before it (ar, right shift), from the BOS token,
else the EOS token. An answer ends before its first end token.

Infilling: each <|mask|> in a prompt is one token to fill in. Such a prompt is no turn: it is taken as it stands, a chat
(of --input) with its last turn as it stands; what ends an answer ends nothing there, and --max_new_tokens is 0 unless
given. mdlm sees both sides of a mask; bd3lm nothing to the right of its block; ar nothing to its right.

Tokens are those of the answers, the end token included; forwards those a row needed, summed over rows (a batch runs as
many at once as it has rows). ar decodes 1 token per forward.""",
    )
    add_model(parser)
    add = parser.add_argument_group("prompts").add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="prompts; put those that begin with a dash after --")
    add(
        "--input",
        metavar="FILE",
        help='.txt: a prompt per line, blank ones left out. .jsonl: rows with "prompt", or "messages" that end in the '
        "user's turn. -: standard input, as .txt (default: standard input, where no prompt is given)",
    )
    add(
        "--chat_template",
        type=boolean,
        metavar="True|False",
        help="make each prompt a user's turn; False continues it as text (default: True where there is a template)",
    )
    add("--system", metavar="TEXT", help="system message before each prompt (default: none)")
    add("--batch_size", type=int, default=16, metavar="ROWS", help="prompts decoded at once; they may differ in length")

    add = parser.add_argument_group("what to show and write").add_argument
    switch(
        add,
        "--show",
        False,
        "animate the denoising: masked, just settled (green), settled. At most 25 forwards a "
        f"second are shown; that time does not count. Without a terminal: a line every {PLAIN_EVERY} forwards",
    )
    add(
        "--output",
        metavar="FILE.jsonl",
        help="write a row per prompt: prompt, answer, tokens, forwards, settings (default: none)",
    )
    switch(add, "--overwrite", False, "replace --output and --picture where they exist (default: False, an error)")
    add(
        "--picture",
        metavar="FILE",
        help=".png or .html of the first prompt's denoising: position x forward, coloured by when a token settled and "
        "how confident the model was (default: none)",
    )

    add = parser.add_argument_group("scoring").add_argument
    add(
        "--dataset_args",
        metavar="SPEC",
        help="take the prompts from a chat data set, such as builtin/sums[test:500]: all turns but the last, which the "
        "answer must equal but for white space at its ends. Prints a table by task and pooled (default: none)",
    )
    add("--split", default="test", help="of --dataset_args: train, validation or test")
    add(
        "--min_exact_match",
        type=float,
        metavar="PERCENT",
        help="exit with status 1 if the pooled score is lower (default: 0)",
    )
    add_sampling(parser, Answering)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass
class Request:
    """One prompt, text or messages, and what became of it."""

    prompt: str | list[dict]
    task: str | None = None
    expected: str | None = None
    ids: list[int] = None
    holes: list[bool] | None = None  # of the prompt's tokens: to be filled in; None: none, the answer follows
    answer: str = None
    tokens: int = 0
    forwards: int = 0
    shown: list[tuple[str, str]] = None  # the answer as `display.spans`; of a canvas filled in, all of it


def requests(args: argparse.Namespace) -> list[Request]:
    """The prompts that the flags name, from one source."""
    named = {"PROMPT": args.prompts, "--input": args.input, "--dataset_args": args.dataset_args}
    given = [name for name, value in named.items() if value]
    if args.prompts == ["-"]:
        args.prompts, args.input = [], "-"
    if len(given) > 1:
        raise ValueError(f"prompts come from {' and '.join(given)}; expected one source")
    if args.min_exact_match is not None and not 0 <= args.min_exact_match <= 100:
        raise ValueError(f"--min_exact_match {args.min_exact_match}: expected a percentage, 0 to 100")
    if args.min_exact_match is not None and not args.dataset_args:
        raise ValueError("--min_exact_match needs answers to compare with; add --dataset_args")
    if args.dataset_args:
        return [scored(row, args.dataset_args) for row in data.raw(args.dataset_args, args.split)]
    if args.prompts:
        return [Request(prompt) for prompt in args.prompts]
    if args.input is None and sys.stdin.isatty():
        raise ValueError("no prompt; give some as arguments (an empty one, '', generates from scratch) or by --input")
    if args.input in (None, "-"):
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        name, content = args.input, Path(args.input).read_bytes()
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it, iconv -t utf-8 say") from error
    jsonl = name.endswith((".jsonl", ".json"))
    found = [
        from_json(line, f"{name}, line {n}") if jsonl else Request(line)
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ValueError(f"{name} holds no prompt; expected one a line")
    return found


def from_json(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); expected an object a line") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f'{where}: expected an object with either "prompt" or "messages"')
    if "messages" in row:
        return Request(check_messages(row["messages"], where))
    if not isinstance(row["prompt"], str):
        raise ValueError(f"{where}: the prompt is a {type(row['prompt']).__name__}; expected a string")
    return Request(row["prompt"])


def scored(row: dict, source: str) -> Request:
    if "messages" not in row:
        raise ValueError(f"{source} is no chat (it has {', '.join(row)}); scoring compares with an assistant's turn")
    messages = check_messages(row["messages"], source, answered=True)
    if len(messages) < 2:
        raise ValueError(f"{source}: a chat of an answer alone, {messages}; scoring needs a turn before it")
    return Request(messages[:-1], task=row.get("task"), expected=messages[-1]["content"])


def encode(request: Request, n: int, args: argparse.Namespace, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Sets `ids` and `holes` of the n-th request."""
    prompt = request.prompt
    chat = tokenizer.template is not None if args.chat_template is None else args.chat_template
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    filling = any(tokenizer.mask_token in text for text in texts)
    if not isinstance(prompt, str) and not chat:
        raise ValueError(f"prompt {n} is a chat, which needs a chat template; leave --chat_template False out")
    if isinstance(prompt, str) and filling:
        if args.chat_template or args.system is not None:
            flag = "--system" if args.system is not None else "--chat_template True"
            raise ValueError(f"prompt {n} has masks and is filled in as plain text; leave {flag} out, or give messages")
        request.ids = tokenizer.encode(prompt)
    elif prompt == "" or not chat:
        request.ids = tokenizer.encode(prompt)
    else:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        last = messages[-1]["role"] == "assistant"
        if last and not filling:
            raise ValueError(
                f"prompt {n} ends in the assistant's turn; leave that out, or put {tokenizer.mask_token} in it"
            )
        request.ids, _ = tokenizer.render(system + messages, reply=not last)
    request.ids, holes = canvas(tokenizer, request.ids, predicted_from_before=model.config.right_shift)
    request.holes = holes if filling else None
    length, context = len(request.ids) + new_tokens(request, args), model.config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"prompt {n}: its {len(request.ids)} tokens and {length - len(request.ids)} new ones exceed the model's "
            f"context of {context}; shorten it or lower --max_new_tokens"
        )


def new_tokens(request: Request, args: argparse.Namespace) -> int:
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    return 128 if request.holes is None else 0


def described(request: Request, tokenizer: Tokenizer) -> str:
    """The prompt as it is printed."""
    if not isinstance(request.prompt, str):
        return "\n".join(f"{message['role']}: {message['content']}" for message in request.prompt)
    if request.prompt == "":
        after = f", after {tokenizer.decode(request.ids, skip_special_tokens=False)}" if request.ids else ""
        return f"(from scratch{after})"
    return request.prompt


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def decode(
    model: LanguageModel, tokenizer: Tokenizer, batch: list[Request], *, options: dict, generator, watch
) -> tuple[float, Trace]:
    """Answers the requests of a batch; the seconds it took, and how the first row was denoised.

    All of the batch have masks to fill in, or none. watch: called with the rows' `display.spans` and the forwards so
    far after each forward; what it takes is not counted.
    """
    filling = batch[0].holes is not None
    end_ids = () if filling else tuple(tokenizer.end_ids)
    steps = denoise(
        model,
        [request.ids for request in batch],
        canvas_masks=[request.holes for request in batch] if filling else None,
        end_ids=end_ids,
        generator=generator,
        **options,
    )
    # Of row i the answer is columns begins[i] to stops[i]; of a canvas that is filled in, all of it.
    begins = [0 if filling else len(request.ids) for request in batch]
    stops = [len(request.ids) + options["max_new_tokens"] for request in batch]
    rows = list(enumerate(zip(begins, stops)))
    seconds, settled, spent, before = 0.0, None, None, None
    while True:
        begun = time.perf_counter()
        step = next(steps, None)
        seconds += time.perf_counter() - begun
        if step is None:
            break
        if before is None:
            first = step.masked
            settled, spent = torch.zeros_like(step.tokens), torch.zeros_like(step.done, dtype=torch.int64)
        else:
            settled = torch.where(before.masked & ~step.masked, step.forwards, settled)
            spent = torch.where(before.done, spent, step.forwards)
        before = step
        if watch is not None:
            lists = [field.tolist() for field in (step.tokens, step.masked, settled == max(step.forwards, 1))]
            watch(
                [spans(tokenizer, *(field[i][begin:stop] for field in lists), end_ids) for i, (begin, stop) in rows],
                step.forwards,
            )
    begun = time.perf_counter()
    tokens, masked, settled, spent, first = (
        field.tolist() for field in (before.tokens, before.masked, settled, spent, first)
    )
    seconds += time.perf_counter() - begun  # on a GPU the last forward is waited for here
    for i, (begin, stop) in rows:
        request, ids = batch[i], tokens[i][begin:stop]
        end = next((at for at, token in enumerate(ids) if token in end_ids), len(ids))
        request.answer = tokenizer.decode(ids[:end])
        request.tokens = sum(first[i]) if filling else min(end + 1, len(ids))
        request.forwards = spent[i]
        request.shown = spans(tokenizer, ids[:end], [False] * end, [filling and hole for hole in first[i][:end]])
    begin, stop = begins[0], stops[0]
    when = [-1 if hole else forward for hole, forward in zip(masked[0][begin:stop], settled[0][begin:stop])]
    trace = Trace(
        pieces(tokenizer, tokens[0][begin:stop], masked[0][begin:stop], skip_special_tokens=False),
        when,
        before.confidence[0, begin:stop].tolist(),
        spent[0],
        f"{model.config.objective}, {sum(forward > 0 for forward in when)} tokens in {spent[0]} forwards",
    )
    return seconds, trace


class Watch:
    """Shows a batch at each step: in place on a terminal, else a line every few forwards."""

    def __init__(self):
        self.region = Region() if terminal(sys.stdout) else None
        if self.region:
            self.region.__enter__()

    def __call__(self, rows: list[list[tuple[str, str]]], forwards: int) -> None:
        if self.region is None:
            if forwards % PLAIN_EVERY == 0:
                for n, row in enumerate(rows, 1):
                    text = plain(row).replace("\n", "\\n")
                    print(styled([(f"forward {forwards}, row {n}: {text}", "")], sys.stdout), flush=True)
            return
        lines = wrap([(f"forward {forwards}", STRONG)], self.region.width)
        for n, row in enumerate(rows, 1):
            lines += wrap([(f"{n} ", STRONG), *row], self.region.width)
        self.region.draw(lines)
        time.sleep(FRAME)

    def close(self) -> None:
        if self.region:
            self.region.__exit__()


# ---------------------------------------------------------------------------------------------------------------------
# The program


def sample(args: argparse.Namespace) -> int:
    """Does it; returns the exit status."""
    for flag, path, endings in (("--output", args.output, (".jsonl",)), ("--picture", args.picture, (".png", ".html"))):
        if path is not None:
            check_file(flag, path, endings, overwrite=args.overwrite)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: expected at least 1")
    todo = requests(args)
    model, tokenizer = open_model(args)
    if args.chat_template and tokenizer.template is None:
        raise ValueError("--chat_template True: the tokenizer has no chat template; pass False to continue plain text")
    if args.system is not None and (tokenizer.template is None or args.chat_template is False):
        raise ValueError(f"--system {args.system} needs a chat template; leave it out where text is continued")
    options = with_block(sampling(args), model.config.objective)
    for n, request in enumerate(todo, 1):
        encode(request, n, args, model, tokenizer)

    generator = torch.Generator(model.head_weight.device).manual_seed(args.seed)
    order = sorted(range(len(todo)), key=lambda i: (todo[i].task or "", todo[i].holes is not None))
    rates, trace, printed = {}, None, 0
    progress = tqdm(total=len(todo), unit="row", disable=None if args.dataset_args else True)
    while order:
        alike = [i for i in order if same_kind(todo[i], todo[order[0]])][: args.batch_size]
        order = order[len(alike) :]
        batch = [todo[i] for i in alike]
        watch = Watch() if args.show else None
        try:
            seconds, first = decode(
                model,
                tokenizer,
                batch,
                options={**options, "max_new_tokens": new_tokens(batch[0], args)},
                generator=generator,
                watch=watch,
            )
        finally:
            if watch:
                watch.close()
        trace = first if alike[0] == 0 else trace
        rates.setdefault(batch[0].task, []).append((seconds, batch))
        progress.update(len(batch))
        while not args.dataset_args and printed < len(todo) and todo[printed].answer is not None:
            show_answer(todo[printed], printed + 1, len(todo), tokenizer)
            printed += 1
    progress.close()
    score = None
    if args.dataset_args:
        score = show_table(rates)
    else:
        print(rate_of([part for parts in rates.values() for part in parts]))
    most = max(sum(request.holes or []) + new_tokens(request, args) for request in todo)
    for remark in surplus(options, model.config.objective, most):
        print(remark)
    write(args, todo, trace, model, options)
    if args.min_exact_match is not None and score < args.min_exact_match:
        print(
            f"sample.py: exact match {score:.1f} % is below --min_exact_match {args.min_exact_match}", file=sys.stderr
        )
        return 1
    return 0


def same_kind(a: Request, b: Request) -> bool:
    """Whether they can share a batch: a task is timed by itself, and canvases are filled in or continued."""
    return a.task == b.task and (a.holes is None) == (b.holes is None)


def rate_of(parts: list[tuple[float, list[Request]]]) -> Rate:
    done = [request for _, batch in parts for request in batch]
    return Rate(sum(r.tokens for r in done), sum(seconds for seconds, _ in parts), sum(r.forwards for r in done))


def show_answer(request: Request, n: int, total: int, tokenizer: Tokenizer) -> None:
    """Prompt and answer; of a canvas that was filled in, what was filled in stands out."""
    head = [(f"[{n}/{total}] {described(request, tokenizer)}\n", STRONG)]
    print(styled([*head, *request.shown], sys.stdout), end="\n\n", flush=True)


def show_table(rates: dict[str | None, list[tuple[float, list[Request]]]]) -> float:
    """Prints exact match by task and pooled, the answer against the expected one; returns the pooled percentage."""
    names = [name for name in rates if name is not None] if len(rates) > 1 else []
    rows = [(name, rates[name]) for name in names] + [("all", [part for parts in rates.values() for part in parts])]
    width = max(len("task"), *(len(name) for name, _ in rows))
    print(f"{'task':<{width}}  exact match %      n  tokens/s  tokens per forward")
    for name, parts in rows:
        done, rate = [request for _, batch in parts for request in batch], rate_of(parts)
        score = 100 * sum(map(right, done)) / len(done)
        print(
            f"{name:<{width}}  {score:13.1f}  {len(done):5}  {rate.tokens / max(rate.seconds, 1e-9):8.1f}  "
            f"{rate.tokens / max(rate.forwards, 1):18.2f}"
        )
    print(rate)
    return score


def right(request: Request) -> bool:
    return request.answer.strip() == request.expected.strip()


def write(args, todo: list[Request], trace: Trace | None, model: LanguageModel, options: dict) -> None:
    """Writes --output and --picture, each whole or not at all."""
    if args.picture is not None:
        content = picture(trace, args.picture)
        with replacing_file(args.picture) as file:
            file.write_bytes(content)
    if args.output is None:
        return
    settings = {
        "model": args.model_name_or_path,
        "objective": model.config.objective,
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "seed": args.seed,
        "batch_size": args.batch_size,
        **options,
        "block_size": model.config.block_length if options["block_size"] is None else options["block_size"],
    }
    with replacing_file(args.output) as file, file.open("w", encoding="utf-8") as lines:
        for request in todo:
            row = {name: getattr(request, name) for name in ("prompt", "answer", "tokens", "forwards")}
            if request.expected is not None:
                row |= {"task": request.task, "expected": request.expected, "correct": right(request)}
            row |= {**settings, "max_new_tokens": new_tokens(request, args)}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_intermixed_args(argv)
    with one_line_errors(parser.prog):
        try:
            status = sample(args)
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
            status = 130
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A server: OpenAI's API to a checkpoint, and a page to chat with it. `python serve.py --help` is the manual.

    sampling     from a request's fields to the sampler's options
    Choice       an answer on its way: its text so far, and why it ended
    Service      requests over HTTP: what is wrong with them, what they ask for, and the answers

Requests come and go in the event loop; forwards run in engine.py's thread, which posts copies of a job's `Progress`.
"""

import asyncio
import functools
import hmac
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, NamedTuple
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import cli
from choose import check_canvas
from cli import Opening, Progress, canvas, check_chat, one_line_errors, open_model, sampler_options
from diffusion import Sampling
from engine import Closed, Engine, Full, Job
from options import Bound, Count, Natural, Options, Rows, flags, nearest
from picture import STATES, drawable, filled, read

LOOPBACK = ("127.0.0.1", "::1", "localhost")
UNREAD = 100  # forwards that are kept for a client that does not read; of later ones the last alone


@dataclass(kw_only=True)
class Serving(Options):
    "server"

    host: Annotated[str, "ADDRESS"] = "127.0.0.1"
    """where to listen; elsewhere than on the loopback it needs --api_key. There is no TLS: put a proxy before it"""
    port: Annotated[int, Bound(lambda port: 0 <= port < 2**16, "0 to 65535"), "PORT"] = 8000  # 0 takes a free one
    api_key: Annotated[str, "KEY"] | None = None
    """what requests must bring along, as "Authorization: Bearer KEY" (default: none)"""
    max_batch_size: Rows = 32  # answers decoded at once; more of them wait
    max_queue: Natural = 256  # answers that may wait; more are refused, with status 429
    max_seconds: Annotated[float, Bound(lambda s: s > 0, "more than 0"), "SECONDS"] = 600.0
    """for a request, waiting included; then it is given up, with status 504"""
    max_bytes: Annotated[Count, "BYTES"] = 2**20  # of a request; more is refused, with status 413


@dataclass(kw_only=True)
class Serve(Sampling, Serving, Opening):
    """Serve a checkpoint: OpenAI's API, and a page to chat with it and see text being denoised.

      python serve.py --model_name_or_path runs/mdlm/checkpoint-final --threshold 0.9

    The page is at http://127.0.0.1:8000. The API there is /v1/chat/completions, /v1/completions and /v1/models, as
    `openai` calls it (base_url="http://127.0.0.1:8000/v1"), with and without "stream". Its max_tokens, temperature,
    top_p, stop, n and seed are as in OpenAI's, but the defaults are those below. The other options of the group
    "sampling" are fields of a request under their own names (in `openai`: extra_body); null is a flag's default here,
    whatever the server was started with. An unknown field is refused. "usage" also counts forwards.

    A <|mask|> in a prompt of /v1/completions is one token to fill in; the answer is then the whole text, and nothing is
    appended unless max_tokens says so. "canvas": true with "stream" adds to every event the canvas as it is after that
    forward: the text of each token and its state (given, masked, draft, fresh, settled, corrected). A client that reads
    more slowly than the server writes gets fewer events.

    Requests under the same options are decoded in one batch: one that comes joins it at the next forward, one that ends
    or whose client goes away leaves it; answers at temperature 0 do not depend on who else is there. A request with a
    seed, at a temperature, is decoded alone."""

    prog: ClassVar[str] = "serve.py"
    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None
    """the most tokens of an answer, where max_tokens does not say it; fewer where the context has less room (default:
    128, or fewer where an mdlm checkpoint was trained on shorter answers; 0 after a prompt that has masks)"""


# ---------------------------------------------------------------------------------------------------------------------
# Requests

CHAT, TEXT = "chat.completion", "text_completion"
NEUTRAL = {  # what OpenAI's API has and this does not, with the values that ask for nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,), "best_of": (1,),
    "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "response_format": ({"type": "text"},), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
}  # fmt: skip
REMARKS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")  # about, not for it
FIELDS = ("model", "stream", "stream_options", "stop", "n", "seed", "canvas")
LENGTHS = ("max_tokens", "max_completion_tokens")  # max_new_tokens' names in OpenAI's API
STATUS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
STATUS |= {429: "rate_limit_error", 499: "cancelled_error", 504: "timeout_error"}
SLIDERS = ("max_new_tokens", "steps", "threshold", "block_size", "temperature", "speculate")  # as they apply


class Refused(Exception):
    """A request that is not answered: why, its status, and the field that is to blame."""

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param

    def content(self) -> dict:
        kind = STATUS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}


def refused(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Full):
        return Refused("too many requests wait already; try again later", 429)
    if isinstance(error, Closed):
        return Refused("the server is being ended", 503)
    if isinstance(error, ClientDisconnect):
        return Refused("the client is gone", 499)
    if isinstance(error, TimeoutError):
        return Refused("the request took too long, and was given up", 504)
    if isinstance(error, ValueError):
        return Refused(str(error).replace("argument --", "").replace("--", ""))  # which name flags
    return failed(error)


def failed(error: Exception) -> Refused:
    print(f"serve.py: {cli.explain(error) or repr(error)}", file=sys.stderr)
    return Refused("the server failed, and has noted why", 500)


@dataclass
class Choice:
    """An answer on its way."""

    index: int
    job: Job
    stop: tuple[str, ...]
    text: str = ""  # what is certain of it
    reason: str | None = None  # why it ended
    tokens: int = 0
    forwards: int = 0

    def update(self, progress: Progress) -> str:
        """Takes the newest progress; returns what it adds to the text."""
        (ids, settled, end), *_ = progress.settled_rows()
        over = bool(progress.last.done[0])
        text, before = progress.tokenizer.decode(ids[:end]), self.text
        self.tokens, self.forwards = sum(when > 0 for when in settled[: end + 1]), int(progress.forwards[0])

        # It ends where it says so, at an end token or a stop, or for want of room.
        cut = min((at for at in map(text.find, self.stop) if at >= 0), default=None)
        if over or (cut is not None and not self.revocable):
            stopped = cut is not None or end < len(ids) or progress.infilling
            self.text, self.reason = text[:cut], "stop" if stopped else "length"
        elif not self.revocable:
            # Half a character, and what may be the beginning of a stop, have to wait for what comes after them.
            text = text.rstrip("\ufffd")
            self.text = text[: max(len(before), len(text) - max(map(len, self.stop), default=1) + 1)]
        return self.text[len(before) :]

    @property
    def revocable(self) -> bool:
        return self.job.options.remasking == "p2"  # settled tokens may be masked again: nothing is certain


class Asked(NamedTuple):
    """A request that was understood."""

    form: str  # CHAT or TEXT
    choices: list[Choice]
    prompt_tokens: int
    stream: bool
    with_usage: bool  # at the end of a stream
    canvas: bool
    head: dict  # what begins each answer
    inbox: asyncio.Queue  # (index of a choice, what its job posted)
    deadline: float  # by time.monotonic

    def usage(self) -> dict:
        new, forwards = (sum(getattr(choice, name) for choice in self.choices) for name in ("tokens", "forwards"))
        sums = {"completion_tokens": new, "total_tokens": self.prompt_tokens + new, "forwards": forwards}
        return {"prompt_tokens": self.prompt_tokens} | sums


@dataclass(kw_only=True)
class Wanted(Sampling):
    "sampling"

    max_new_tokens: Annotated[Natural, "TOKENS"] | None = None  # (default: what there is room for)


def sampling(body: dict, defaults: Wanted) -> Wanted:
    """The options that a request asks for, read as on the command line."""
    lengths = [name for name in (*LENGTHS, "max_new_tokens") if body.get(name) is not None]
    if len(lengths) > 1:
        raise Refused(f"{' and '.join(lengths)} are the same; give one", param=lengths[1])
    asked = {name: value for name, value in body.items() if name in flags(Sampling)}
    asked |= {"max_new_tokens": body[name] for name in lengths}  # noqa: B035
    given = {}
    for name, value in asked.items():
        if value is None or (name == "top_p" and value == 1):
            given[name] = None if name == "max_new_tokens" else flags(Sampling)[name].default
            continue
        text = value if isinstance(value, str) else json.dumps(value).strip("[]").title()  # True, and 1,2 of ids
        try:
            given |= vars(Sampling.parser().parse_args([f"--{name}={text}"]))
        except ValueError as error:
            raise Refused(str(refused(error)), param=name) from error
    return replace(defaults, **given)


def checked(body: dict, name: str, kind: type | tuple, default, expected: str):
    """A field of a request, or the default where it is null or missing."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(f"{name} {json.dumps(value):.60}: expected {expected}", param=name)
    return value


class Service:
    """The API over a model; `app` is all of it, for an ASGI server."""

    def __init__(self, args: Serve, model, tokenizer):
        self.args, self.model, self.tokenizer, self.begun = args, model, tokenizer, int(time.time())
        self.defaults = Wanted(**args.only(Sampling) | {"max_new_tokens": None})
        self.engine = Engine(model, args.max_batch_size, args.max_queue, args.seed)
        self.options(self.defaults, [0], None)  # now, not at the first request
        self.engine.start()

        async def error(request: Request, raised: Exception) -> Response:
            told = Refused(raised.detail, raised.status_code) if isinstance(raised, HTTPException) else refused(raised)
            return JSONResponse(told.content(), told.status)

        routes = [
            Route("/", self.page),
            *(Route(f"/{name}.js", self.script) for name in ("canvas", "playback", "chat")),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        kinds = HTTPException, Refused, Full, Closed, TimeoutError, ValueError, ClientDisconnect, Exception
        handlers = dict.fromkeys(kinds, error)
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    # What a request asks for

    def admit(self, request: Request) -> None:
        """Refused unless the client may ask. Without a key only pages from here may: another site's, which a browser
        on this machine shows, could reach us by a name of its own."""
        if self.args.api_key is not None:
            given = request.headers.get("authorization", "").encode("latin-1")  # as headers are read
            if not hmac.compare_digest(given, f"Bearer {self.args.api_key}".encode()):
                raise Refused("the key is missing or wrong; expected the header Authorization: Bearer KEY", 401)
            return
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname  # request.url: ours where it is malformed
        if host not in (*LOOPBACK, self.args.host):
            raise Refused(f"unknown host {host}; expected {self.args.host}", 403)

    async def body(self, request: Request) -> dict:
        """A request's JSON. Another site's page could send it as text, without asking us first."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("expected the header Content-Type: application/json", 415)
        parts, size = [], 0
        async with asyncio.timeout(min(30.0, self.args.max_seconds)):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > self.args.max_bytes:
                    raise Refused(f"the request is longer than {self.args.max_bytes:,} bytes; shorten it", 413)
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request is no JSON ({error})") from error
        if not isinstance(body, dict):
            raise Refused(f"the request is a {type(body).__name__}; expected an object")
        return body

    def asked(self, body: dict, form: str, inbox: asyncio.Queue, post: Callable, deadline: float) -> Asked:
        """What a body asks for. What it names and we do not know, or would not heed, is refused."""
        text = "messages" if form == CHAT else "prompt"
        known = (*FIELDS, *LENGTHS, text, *flags(Sampling), *NEUTRAL, *REMARKS)
        for name, value in body.items():
            if name not in known:
                raise Refused(f"unknown field {name}; {nearest(name, known, 'see serve.py --help')}", param=name)
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                raise Refused(f"{name} {json.dumps(value):.60} is not offered here; leave it out", param=name)
        served = self.args.model_name_or_path
        if body.get("model") not in (None, served):
            raise Refused(f"there is no model {body['model']!r:.80}; expected {served!r}", 404, "model")

        stream, with_canvas = (checked(body, name, bool, False, "true or false") for name in ("stream", "canvas"))
        more = checked(body, "stream_options", dict, {}, "an object with include_usage")
        seed = checked(body, "seed", int, None, "a whole number")
        n = checked(body, "n", int, 1, "a whole number")
        stop = checked(body, "stop", (str, list), [], "a string, or some")
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(each, str) and each for each in stop) or len(stop) > 16:
            raise Refused(f"stop {json.dumps(stop):.60}: expected at most 16 strings, none empty", param="stop")
        if seed is not None and not 0 <= seed < 2**63:
            raise Refused(f"seed {seed}: expected 0 to 2**63 - 1", param="seed")
        if with_canvas and not stream:
            raise Refused("canvas goes with stream: true", param="canvas")

        # An answer to each prompt, n times.
        options = sampling(body, self.defaults)
        prompts = self.chat(body.get(text)) if form == CHAT else self.texts(body.get(text))
        if not 1 <= n * len(prompts) <= self.args.max_batch_size:
            limit = self.args.max_batch_size
            raise Refused(f"{len(prompts)} prompts, n {n}: expected 1 to {limit} answers of a request", param="n")
        choices = []
        for index, (ids, holes) in enumerate(prompt for prompt in prompts for _ in range(n)):
            own = self.options(options, ids, holes)
            drawn = own.temperature > 0 or own.remasking == "random" or own.stochastic_transfer
            progress = Progress(self.tokenizer, [ids], own.max_new_tokens, holes is not None)
            posted = functools.partial(post, index)
            job = Job(ids, holes, own, seed + index if drawn and seed is not None else None, progress, posted)
            choices.append(Choice(index, job, tuple(stop)))
        tokens, usage = sum(len(ids) for ids, _ in prompts), bool(more.get("include_usage"))
        head = {"id": f"{'chatcmpl' if form == CHAT else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        return Asked(form, choices, tokens, stream, usage, with_canvas, head | {"model": served}, inbox, deadline)

    def chat(self, messages) -> list[tuple[list[int], None]]:
        if self.tokenizer.template is None:
            raise Refused("the checkpoint has no chat template; use /v1/completions", param="messages")
        if isinstance(messages, list):
            messages = [one_text(message) if isinstance(message, dict) else message for message in messages]
        check_chat(messages, "messages")
        if messages[-1]["role"] == "assistant":
            raise Refused("messages end in the assistant's turn; leave that out", param="messages")
        ids, _ = self.tokenizer.render(messages, reply=True)
        ids, holes = canvas(self.tokenizer, ids, self.model)
        if any(holes):
            way_out = "/v1/completions fills them in"
            raise Refused(f"{self.tokenizer.mask_token} in a message; {way_out}", param="messages")
        return [(ids, None)]

    def texts(self, prompt) -> list[tuple[list[int], list[bool] | None]]:
        """Texts, or the ids of some, which may have masks to fill in."""
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        found = []
        for each in prompt if several else [prompt]:
            if isinstance(each, list) and all(type(token) is int for token in each):
                ids = each
            elif isinstance(each, str):
                ids = self.tokenizer.encode(each)
            else:
                raise Refused("prompt: expected a text, a list of token ids, or a list of these", param="prompt")
            ids, holes = canvas(self.tokenizer, ids, self.model)
            found.append((ids, holes if any(holes) else None))
        return found

    def options(self, options: Wanted, ids: list[int], holes: list[bool] | None) -> Sampling:
        """What a prompt is decoded with; ValueError where that cannot be done."""
        config, new = self.model.config, options.max_new_tokens
        if new is None:
            room = max(1, config.max_position_embeddings - len(ids))
            new = 0 if holes else min(self.args.max_new_tokens or Sampling.default_length(config), room)
        changes, size = {"max_new_tokens": new}, options.block_size
        if config.objective == "mdlm" and size == self.args.block_size and size and options.block_align != "sequence":
            changes["block_size"] = min(size, new or size)  # ours is no longer than an answer that is to be short
        options = Sampling(**sampler_options(options, config.objective, **changes))
        check_canvas(config, config.objective, options, [ids], holes and [holes], (), None)
        return options

    # Answers

    async def page(self, request: Request) -> Response:
        policy = "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers = {"Content-Security-Policy": policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        return HTMLResponse(filled("chat.html", {}, self.told()), headers=headers)

    async def script(self, request: Request) -> Response:
        return Response(read(request.url.path[1:]), media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    def told(self) -> dict:
        """What the page must know: the model, what its sliders are set to at first, and the states of tokens."""
        config = self.model.config
        values = vars(self.defaults) | {"max_new_tokens": self.options(self.defaults, [0], None).max_new_tokens}
        fits = dict.fromkeys(("steps", "threshold"), config.objective != "ar")
        fits |= {"block_size": config.objective == "mdlm", "speculate": config.context == "causal"}
        return {
            "title": f"{self.args.model_name_or_path}, {config.objective}",
            "chat": self.tokenizer.template is not None,
            "mask": self.tokenizer.mask_token,
            "options": {name: values[name] for name in SLIDERS if fits.get(name, True)},
            "states": [(name, meaning) for name, (meaning, *_) in STATES.items()],
        }

    async def models(self, request: Request) -> Response:
        self.admit(request)
        model = {"id": self.args.model_name_or_path, "object": "model", "created": self.begun, "owned_by": "nanoa2d"}
        name = request.path_params.get("name")
        if name not in (None, model["id"]):
            raise Refused(f"there is no model {name!r:.80}; expected {model['id']!r}", 404, "model")
        return JSONResponse({"object": "list", "data": [model]} if name is None else model)

    async def complete(self, request: Request) -> Response:
        self.admit(request)
        deadline = time.monotonic() + self.args.max_seconds
        body, loop, inbox = await self.body(request), asyncio.get_running_loop(), asyncio.Queue()

        def put(index: int, what: Progress | Exception) -> None:
            if inbox.qsize() < UNREAD or isinstance(what, Exception) or what.last.done:
                inbox.put_nowait((index, what))

        def post(index: int, what: Progress | Exception) -> None:
            with suppress(RuntimeError):  # at the server's end the loop may be closed
                loop.call_soon_threadsafe(put, index, what)

        form = CHAT if request.url.path.endswith("chat/completions") else TEXT
        asked = await run_in_threadpool(self.asked, body, form, inbox, post, deadline)
        if asked.stream:
            events = self.events(asked, request)
            return Events(await anext(events), events, deadline)  # an error before the first is a response of its own
        async with aclosing(self.progress(asked, request)) as steps:
            async for _ in steps:
                pass
        choices = []
        for choice in asked.choices:
            text = {"message": {"role": "assistant", "content": choice.text}} if form == CHAT else {"text": choice.text}
            choices.append({"index": choice.index, **text, "logprobs": None, "finish_reason": choice.reason})
        return JSONResponse({"object": form, **asked.head, "choices": choices, "usage": asked.usage()})

    async def events(self, asked: Asked, request: Request) -> AsyncIterator[str]:
        """A stream's events: of each forward that adds to an answer's text, with a canvas of every one."""
        chat, begun = asked.form == CHAT, set()

        def event(choices: list, **more) -> str:
            form = CHAT + ".chunk" if chat else TEXT
            return f"data: {json.dumps({'object': form, **asked.head, 'choices': choices, **more})}\n\n"

        try:
            async with aclosing(self.progress(asked, request)) as steps:
                async for choice, added, progress in steps:
                    told = {"index": choice.index, "logprobs": None, "finish_reason": choice.reason}
                    if choice.index in begun and not (added or choice.reason or asked.canvas):
                        continue
                    first = {"role": "assistant"} if choice.index not in begun else {}
                    told |= {"delta": first | {"content": added}} if chat else {"text": added}
                    begun.add(choice.index)
                    if asked.canvas:
                        tokens, spans = progress.frame()
                        told["canvas"] = {"forwards": choice.forwards, "tokens": tokens, "spans": drawable(spans)}
                    yield event([told])
            if asked.with_usage:
                yield event([], usage=asked.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            if not begun:
                raise
            yield f"data: {json.dumps(refused(error).content())}\n\n"

    async def progress(self, asked: Asked, request: Request) -> AsyncIterator[tuple[Choice, str, Progress]]:
        """Each choice after its forwards, and what has been added to its text, until all have ended."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            asked.inbox.put_nowait((0, ClientDisconnect()))

        jobs = [choice.job for choice in asked.choices]
        watcher = asyncio.create_task(watch())
        try:
            self.engine.submit(jobs)
            while any(choice.reason is None for choice in asked.choices):
                index, what = await asyncio.wait_for(asked.inbox.get(), asked.deadline - time.monotonic())
                if isinstance(what, ClientDisconnect | Closed):
                    raise what
                if isinstance(what, Exception):
                    raise failed(what)
                choice = asked.choices[index]
                if choice.reason is not None or not (asked.stream or choice.stop or what.last.done):
                    continue
                added = choice.update(what)
                if choice.reason is not None:
                    self.engine.leave([choice.job])
                yield choice, added, what
        finally:
            watcher.cancel()
            self.engine.leave(jobs)


def one_text(message: dict) -> dict:
    """A message of OpenAI's as templates know it: content of parts, of which only texts are offered, as one text."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise Refused("messages: expected content that is text, or parts of type text", param="messages")
        content = "".join(texts)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return message | {"role": role, "content": content}


class Events(StreamingResponse):
    """Server-sent events, of which the first is there. What makes them ends with the response, however that ends."""

    def __init__(self, first: str, rest: AsyncIterator[str], deadline: float):
        super().__init__(rest, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.first, self.deadline = first, deadline

    async def stream_response(self, send) -> None:
        rest = self.body_iterator

        async def whole() -> AsyncIterator[str]:
            yield self.first
            async for event in rest:
                yield event

        self.body_iterator = whole()
        # A client that does not read is not waited for much longer than one that does.
        with suppress(TimeoutError):
            async with aclosing(rest), asyncio.timeout(self.deadline + 5 - time.monotonic()):
                await super().stream_response(send)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def address(args: Serve) -> socket.socket:
    """A socket that listens where the options say."""
    if args.host not in LOOPBACK and not args.api_key:
        raise ValueError(f"--host {args.host} can be reached by others; add --api_key, or leave it at 127.0.0.1")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        return socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        way_out = "choose another; --port 0 takes a free one"
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror or error}; {way_out}") from error


def main(argv: list[str] | None = None) -> None:
    with one_line_errors("serve.py"):
        args = Serve.parse(argv)
        listening = address(args)
        model, tokenizer = open_model(args, args.block_size)
        service = Service(args, model, tokenizer)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {args.model_name_or_path} at http://{host}:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(service.app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        server = uvicorn.Server(config)
        end = server.handle_exit
        server.handle_exit = lambda *signal: (service.engine.close(), end(*signal))  # so that no answer goes on
        try:
            server.run(sockets=[listening])
        finally:
            service.engine.close()
            service.engine.join(timeout=10)


if __name__ == "__main__":
    main(sys.argv[1:])

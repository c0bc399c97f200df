"""serve.py: answers over HTTP are the sampler's, whoever else asks; streams; OpenAI's clients; mistakes; who leaves."""

import asyncio
import contextlib
import functools
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from checkpoints import checkpoint, opened, tokenizer

import cli
import serve
from diffusion import Sampling
from engine import Job
from serve import Serve, Service

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("ar", "mdlm", "bd3lm")
PROMPTS = ["What is 17 + 25?", "Reverse the word ABC.", "hi", "Count the letter of 3, yes?"]


class Running:
    """A server of a checkpoint, on a free port."""

    def __init__(self, name: str = "mdlm", **options):
        path = checkpoint(name)
        options = {"max_new_tokens": 12, "steps": 12, "port": 0} | options
        self.args = Serve(model_name_or_path=path, **options)
        self.model = opened(name)
        self.service = Service(self.args, self.model, tokenizer())
        self.listening = serve.address(self.args)
        self.port = self.listening.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(self.service.app, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def send(self, method: str, path: str, body=None, **headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        body = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def ask(self, path: str, **fields) -> dict:
        """The answer, which must be one."""
        response = self.send("POST", f"/v1/{path}", fields)
        body = json.loads(response.read())
        assert response.status == 200, body
        return body

    def refusal(self, path: str, body, **headers) -> tuple[int, dict]:
        response = self.send("POST", f"/v1/{path}", body, **headers)
        content = json.loads(response.read())
        assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
        return response.status, content["error"]

    def stream(self, path: str, **fields) -> list[dict]:
        response = self.send("POST", f"/v1/{path}", {"stream": True} | fields)
        assert response.status == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.read().decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.service.engine.close()
        self.service.engine.join(10)
        assert not self.thread.is_alive() and not self.service.engine.is_alive()


@pytest.fixture(scope="module")
def servers():
    """servers(name, **options): a server that is shared by the tests of this file."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def shared(name: str, **options) -> Running:
            running = Running(name, **options)
            stack.callback(running.stop)
            return running

        yield shared


def chat_of(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def alone(name: str, ids: list[int], holes=None, **options) -> cli.Answer:
    """What the sampler answers, as sample.py asks it."""
    model = opened(name)
    options = {"max_new_tokens": 0 if holes else 12, "steps": 12} | options
    options = cli.sampler_options(serve.Sampling(**options), model.config.objective)
    answers = cli.Answers(model, tokenizer(), [ids], holes and [holes], options=options, generator=None)
    for _ in answers:
        pass
    return answers.final()[0]


def rendered(prompt: str) -> list[int]:
    return tokenizer().render(chat_of(prompt), reply=True)[0]


def test_a_block_length_of_the_server_gives_way_to_a_short_answer_and_one_of_the_request_does_not(servers):
    server = servers("mdlm", block_size=8)
    wanted = alone("mdlm", tokenizer().encode("one two"), max_new_tokens=4, block_size=4)
    body = server.ask("completions", prompt="one two", max_tokens=4)
    assert body["choices"][0]["text"] == wanted.text
    status, error = server.refusal("completions", {"prompt": "one two", "max_tokens": 4, "block_size": 6})
    assert status == 400 and "block_size 6 exceeds the 4" in error["message"]


@pytest.mark.parametrize("name", [*OBJECTIVES, "causal"])
def test_answers_are_the_samplers(servers, name):
    server = servers(name)
    for prompt in PROMPTS[:2]:
        wanted, ids = alone(name, rendered(prompt)), rendered(prompt)
        body = server.ask("chat/completions", messages=chat_of(prompt))
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": wanted.text}
        assert choice["finish_reason"] == ("stop" if wanted.ended else "length")
        counts = {"prompt_tokens": len(ids), "completion_tokens": wanted.tokens, "forwards": wanted.forwards}
        assert body["usage"] == counts | {"total_tokens": len(ids) + wanted.tokens}
        wanted = alone(name, tokenizer().encode(prompt))
        body = server.ask("completions", prompt=prompt, model=server.args.model_name_or_path)
        assert body["choices"] == [
            {"index": 0, "text": wanted.text, "logprobs": None, "finish_reason": "stop" if wanted.ended else "length"}
        ]


def at_once(calls: list) -> list:
    """What each of the calls returns, all made at the same time, by threads."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("name", [*OBJECTIVES, "causal"])
def test_requests_that_arrive_together_are_decoded_together_and_answered_as_alone(servers, name, monkeypatch):
    server, sizes = servers(name), []
    formed = server.service.engine.formed

    def counted(jobs, before):
        sizes.append((len(jobs), before is not None))
        return formed(jobs, before)

    monkeypatch.setattr(server.service.engine, "formed", counted)
    kinds = [{}, {"temperature": 0, "max_tokens": 7}, {"stop": ["zzz"]}]
    kinds += {"mdlm": [{"threshold": 0.2}], "bd3lm": [{"threshold": 0.2}], "causal": [{"speculate": 3}]}.get(name, [])
    if name != "ar":
        kinds.append({"prompt": "What is <|mask|><|mask|> + 25<|mask|> yes?"})
    asked = [(f"{prompt} {n}", kind) for n in range(2) for prompt in PROMPTS for kind in kinds]

    def wanted(prompt: str, kind: dict) -> str:
        options = {
            {"max_tokens": "max_new_tokens"}.get(k, k): v for k, v in kind.items() if k not in ("prompt", "stop")
        }
        ids = tokenizer().encode(kind.get("prompt", prompt))
        holes = [token == tokenizer().mask_id for token in ids]
        ids = [0 if hole else token for token, hole in zip(ids, holes)]
        return alone(name, ids, holes if any(holes) else None, **options).text

    calls = [functools.partial(server.ask, "completions", **{"prompt": prompt} | kind) for prompt, kind in asked]
    answers = [body["choices"][0]["text"] for body in at_once(calls)]
    assert answers == [wanted(prompt, kind) for prompt, kind in asked]
    assert max(size for size, _ in sizes) > 4 and any(resumed for _, resumed in sizes)
    assert not server.service.engine.rows()


@pytest.mark.parametrize("name", ["mdlm", "causal"])
def test_a_stream_is_the_answer_piece_by_piece(servers, name):
    server, wanted = servers(name), alone(name, rendered("hi"))
    events = server.stream("chat/completions", messages=chat_of("hi"), stream_options={"include_usage": True})
    *pieces, last = events
    assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in pieces]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta["content"] for delta in deltas) == wanted.text
    reasons = [event["choices"][0]["finish_reason"] for event in pieces]
    assert reasons == [None] * (len(reasons) - 1) + ["stop" if wanted.ended else "length"]
    assert last["choices"] == [] and last["usage"]["forwards"] == wanted.forwards
    whole = server.stream("completions", prompt=["hi", "Add"], n=2)
    texts = ["".join(e["choices"][0]["text"] for e in whole if e["choices"][0]["index"] == n) for n in range(4)]
    assert texts == [alone(name, tokenizer().encode(prompt)).text for prompt in ("hi", "hi", "Add", "Add")]


@pytest.mark.parametrize(
    ("name", "fields", "states"),
    [
        ("mdlm", {"prompt": "hi"}, {"masked", "fresh", "settled"}),
        ("mdlm", {"prompt": "hi", "remasking": "p2"}, {"masked", "fresh"}),
        ("mdlm", {"prompt": "a <|mask|> b <|mask|>"}, {"given", "masked", "fresh"}),
        ("causal", {"prompt": "hi", "speculate": 4}, {"masked", "draft", "fresh", "settled"}),
    ],
)
def test_every_event_carries_the_canvas_if_asked_to(servers, name, fields, states):
    server = servers(name)
    events = server.stream("completions", canvas=True, **fields)
    canvases = [event["choices"][0]["canvas"] for event in events]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert [canvas["forwards"] for canvas in canvases] == list(range(len(canvases)))
    assert states <= {state for canvas in canvases for _, state in canvas["spans"]}
    assert "".join(token for token, _ in canvases[-1]["spans"]).replace("↵\n", "\n").replace("·", "") == text
    assert server.ask("completions", **fields)["choices"][0]["text"] == text


def test_a_stop_ends_an_answer_before_it_and_frees_its_place(servers):
    server = servers("ar")
    text = alone("ar", tokenizer().encode("hi"), max_new_tokens=100).text
    stop = text[10:14]
    for path in (server.ask, server.stream):
        body = path("completions", prompt="hi", max_tokens=100, stop=["never", stop])
        choices = [event["choices"][0] for event in (body if isinstance(body, list) else [body])]
        assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"
    assert server.ask("completions", prompt="hi", max_tokens=100, stop=stop)["usage"]["forwards"] < 100


def test_who_names_no_length_gets_what_there_is_room_for(servers):
    answers = [servers("ar", **flags).ask("completions", prompt=[74] * 250) for flags in ({}, {"max_new_tokens": 20})]
    assert [answer["usage"]["total_tokens"] for answer in answers] == [256, 256]


def test_prompts_may_be_ids_and_contents_parts(servers):
    server, ids = servers("bd3lm"), tokenizer().encode("What is")
    texts = [choice["text"] for choice in server.ask("completions", prompt=[ids, ids[:1]])["choices"]]
    assert texts == [alone("bd3lm", ids).text, alone("bd3lm", ids[:1]).text]
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "Add."}, {"role": "user", "content": parts}]
    wanted = [{"role": "system", "content": "Add."}, {"role": "user", "content": "hi"}]
    body = server.ask("chat/completions", messages=messages)
    assert body["choices"][0]["message"]["content"] == alone("bd3lm", tokenizer().render(wanted, reply=True)[0]).text


def test_a_seed_repeats_an_answer_and_no_seed_does_not(servers):
    server = servers("mdlm")
    ask = functools.partial(server.ask, "completions", prompt="hi", temperature=2, n=2, max_tokens=20)
    calls = [functools.partial(ask, seed=3)] * 3 + [ask] * 3
    seeded, free = (answers for answers in (lambda a: (a[:3], a[3:]))(at_once(calls)))
    texts = [[choice["text"] for choice in body["choices"]] for body in seeded]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] != texts[0][1]
    assert len({choice["text"] for body in free for choice in body["choices"]}) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Who comes and who goes


@pytest.fixture
def slow(monkeypatch):
    """slow(**options): a server whose forwards take 20 ms."""
    started = []

    def start(**options) -> Running:
        server = Running("ar", **{"max_new_tokens": 200} | options)
        advance = server.service.engine.advance
        server.service.engine.advance = lambda *jobs: (time.sleep(0.02), advance(*jobs))
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(slow, stream):
    server = slow(max_batch_size=1)
    engine = server.service.engine
    body = json.dumps({"prompt": "hi", "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for client in clients:
        client.sendall(head.encode() + f"{len(body)}\r\n\r\n".encode() + body)
    until(lambda: engine.rows() == 1 and len(engine.waiting) == 2)
    first = next(iter(engine.batches.values())).jobs[0]
    clients[1].close()  # one that waits, perhaps; and all the others
    clients[0].close()
    until(lambda: engine.rows() + len(engine.waiting) == 1)
    clients[2].close()
    until(lambda: engine.rows() + len(engine.waiting) == 0)
    assert first.progress.last.forwards < 150  # of 200


def test_who_goes_while_a_forward_is_told_stays_away(servers):
    engine, posted = servers("ar").service.engine, []
    options = Sampling(**cli.sampler_options(Sampling(max_new_tokens=20), "ar"))
    progress = cli.Progress(tokenizer(), [[74]], 20, False)
    job = Job([74], None, options, None, progress, posted.append)
    add = progress.add
    progress.add = lambda step: (engine.leave([job]), add(step))
    engine.submit([job])
    until(lambda: job.over and not engine.batches)
    assert len(posted) == 1


def test_who_comes_first_is_let_in_first_and_a_queue_has_an_end(slow):
    server = slow(max_batch_size=1, max_queue=2, max_new_tokens=8)
    ended = []

    def ask(n: int) -> None:
        server.ask("completions", prompt=f"{n}", temperature=n % 2)
        ended.append(n)

    with ThreadPoolExecutor(3) as pool:
        for n in range(3):
            pool.submit(ask, n)
            until(lambda n=n: server.service.engine.rows() + len(server.service.engine.waiting) > n or n in ended)
        status, error = server.refusal("completions", {"prompt": "too many"})
    assert (status, error["type"]) == (429, "rate_limit_error") and ended == [0, 1, 2]
    server.ask("completions", prompt="again")


def test_a_request_has_its_time(slow):
    server = slow(max_seconds=0.5)
    status, error = server.refusal("completions", {"prompt": "hi"})
    assert (status, error["type"]) == (504, "timeout_error")
    response = server.send("POST", "/v1/completions", {"prompt": "hi", "stream": True})
    *_, last = [line for line in response.read().decode().split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
    until(lambda: server.service.engine.rows() == 0)


def test_who_does_not_read_keeps_little_waiting_and_finds_the_end(servers, monkeypatch):
    server, inboxes = servers("ar", max_new_tokens=250), []

    class Inbox(asyncio.Queue):
        def __init__(self):
            super().__init__()
            inboxes.append(self)

    monkeypatch.setattr(serve.asyncio, "Queue", Inbox)
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({"prompt": "hi", "stream": True, "canvas": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head + f"{len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        until(lambda: inboxes and inboxes[0].qsize())
        until(lambda: not server.service.engine.rows())
        assert inboxes[0].qsize() <= serve.UNREAD + 1
        with client.makefile(encoding="utf-8") as lines:
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1].strip() == "[DONE]" and len(events) < 200
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert text == alone("ar", tokenizer().encode("hi"), max_new_tokens=250).text


def test_who_never_reads_is_given_up_without_a_traceback():
    async def events():
        while True:
            yield "data: {}"

    async def send(message):
        await asyncio.Event().wait()

    asyncio.run(serve.Events("data: {}", events(), time.monotonic() - 4.9).stream_response(send))


def test_what_fails_in_a_forward_is_told_and_the_next_is_answered(servers, monkeypatch):
    server = servers("bd3lm")
    formed = server.service.engine.formed
    monkeypatch.setattr(server.service.engine, "formed", lambda *jobs: 1 / 0)
    status, error = server.refusal("completions", {"prompt": "hi"})
    assert (status, error["type"]) == (500, "server_error") and "division" not in error["message"]
    monkeypatch.setattr(server.service.engine, "formed", formed)
    server.ask("completions", prompt="hi")


def test_who_finds_no_room_takes_none_from_others(slow, monkeypatch):
    server = slow(max_new_tokens=60)
    formed = server.service.engine.formed

    def narrow(jobs, before):
        if len(jobs) > 1:
            raise MemoryError
        return formed(jobs, before)

    monkeypatch.setattr(server.service.engine, "formed", narrow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.ask, "completions", prompt="hi")
        until(server.service.engine.rows)
        assert server.refusal("completions", {"prompt": "yes"})[0] == 500 and not first.done()
    assert first.result()["choices"][0]["text"] == alone("ar", tokenizer().encode("hi"), max_new_tokens=60).text


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

HI = {"prompt": "hi"}
MISTAKES = [  # path, body, status, words of the message
    ("completions", b"{", 400, "no JSON"),
    ("completions", b"[" * 100_000, 400, "no JSON"),
    ("completions", b"\xff\xfe", 400, "no JSON"),
    ("completions", [], 400, "expected an object"),
    ("completions", {}, 400, "prompt: expected"),
    ("completions", {"prompt": 3}, 400, "prompt: expected"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt: expected"),
    ("completions", {"prompt": [100_000]}, 400, "outside the vocabulary"),
    ("completions", {"prompt": "\ud800"}, 400, "no UTF-8"),
    ("completions", HI | {"model": "gpt-9"}, 404, "there is no model"),
    ("completions", HI | {"temprature": 1}, 400, "did you mean temperature?"),
    ("completions", HI | {"temperature": "hot"}, 400, "invalid float value: 'hot'"),
    ("completions", HI | {"temperature": -1}, 400, "0 (the likeliest token) or more"),
    ("completions", HI | {"temperature": True}, 400, "temperature"),
    ("completions", b'{"prompt": "hi", "temperature": NaN}', 400, "expected a number"),
    ("completions", HI | {"temperature": {"a": 1}}, 400, "temperature"),
    ("completions", HI | {"max_tokens": 10_000}, 400, "exceed the model's context of 256"),
    ("completions", HI | {"max_tokens": 10**12}, 400, "at most 1,000,000,000"),
    ("completions", HI | {"max_tokens": 4, "max_new_tokens": 5}, 400, "are the same"),
    ("completions", HI | {"top_p": 0.5}, 400, "changes nothing at temperature 0"),
    ("completions", HI | {"logprobs": 5}, 400, "not offered here"),
    ("completions", HI | {"stop": ""}, 400, "none empty"),
    ("completions", HI | {"stop": [1]}, 400, "stop [1]"),
    ("completions", HI | {"n": 0}, 400, "expected 1 to"),
    ("completions", HI | {"n": 1000}, 400, "expected 1 to"),
    ("completions", HI | {"n": True}, 400, "whole number"),
    ("completions", HI | {"seed": -1}, 400, "seed -1"),
    ("completions", HI | {"stream": "yes"}, 400, "true or false"),
    ("completions", HI | {"canvas": True}, 400, "canvas goes with stream"),
    ("completions", HI | {"block_size": 4}, 400, "ar model decodes token by token"),
    ("completions", HI | {"threshold": 0.9, "entropy": 1}, 400, "leave out all but one"),
    ("completions", HI | {"speculate": 4}, 400, "causal context"),
    ("chat/completions", {}, 400, "no messages"),
    ("chat/completions", {"messages": "hi"}, 400, "no messages"),
    ("chat/completions", {"messages": [{"role": "god", "content": "hi"}]}, 400, "unknown role"),
    ("chat/completions", {"messages": [{"role": "user", "content": None}]}, 400, "content that is no string"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type text"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "hi"}]}, 400, "assistant's turn"),
    ("chat/completions", {"messages": chat_of("a <|mask|>")}, 400, "/v1/completions fills them in"),
    ("chat/completions", {"messages": chat_of("hi"), "tools": [{}]}, 400, "not offered here"),
    ("nothing", HI, 404, "Not Found"),
    ("models", HI, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), MISTAKES)
def test_a_mistake_is_told_in_openais_form(servers, path, body, status, words):
    found, error = servers("ar").refusal(path, body)
    assert (found, error["code"]) == (status, status) and words in error["message"], error
    assert "--" not in error["message"]


def test_a_long_request_is_refused_before_it_is_read(servers):
    status, error = servers("ar", max_bytes=1000).refusal("completions", {"prompt": "hi" * 1000})
    assert status == 413 and "1,000 bytes" in error["message"]


def test_a_key_is_asked_for_and_another_sites_page_gets_nowhere(servers):
    keyed, open_ = servers("ar", api_key="secret-ä"), servers("ar")
    for header in ({}, {"Authorization": "Bearer nothing"}, {"Authorization": "secret-ä".encode()}):
        status, error = keyed.refusal("completions", HI, **header)
        assert status == 401 and "secret" not in error["message"]
    response = keyed.send("POST", "/v1/completions", HI, Authorization="Bearer secret-ä".encode())
    assert response.status == 200
    for host in ("evil.example", "evil{.example", "127.0.0.1.evil.example", ""):
        assert open_.refusal("completions", HI, Host=host)[0] == 403
    assert open_.refusal("completions", HI, Content_Type="text/plain")[0] == 415


def test_others_are_served_only_with_a_key(capsys):
    for argv, words in (
        (["--host", "0.0.0.0"], "add --api_key"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "127.0.0.1", "--port", "{busy}"], "choose another"),
        (["--block_size", "4"], "token by token"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(SystemExit) as stop:
            argv = [argument.format(busy=busy.getsockname()[1]) for argument in argv]
            serve.main(["--model_name_or_path", checkpoint("ar"), *(["--port", "0"] if len(argv) < 4 else []), *argv])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count("\n") == 1, err


def test_the_program_tells_its_address_and_ends_by_an_interrupt():
    argv = [sys.executable, "serve.py", "--model_name_or_path", checkpoint("mdlm"), "--port", "0", "--steps", "4"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    with subprocess.Popen(argv, cwd=ROOT, preexec_fn=heeding, **pipes) as program:
        address = program.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
            models = json.load(response)["data"]

        # Answers that are on their way end with it: here 32, which take turns.
        long = {"prompt": "hi", "stream": True, "n": 32, "temperature": 1, "seed": 1, "max_tokens": 250, "steps": 250}
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address}/v1/completions", json.dumps(long).encode(), headers)
        with urllib.request.urlopen(asked, timeout=60) as response:
            response.readline()
            program.send_signal(signal.SIGINT)
            *_, last, _ = response.read().decode().split("\n\n")
        _, err = program.communicate(timeout=60)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    assert [model["id"] for model in models] == [checkpoint("mdlm")]
    assert program.returncode == 130 and err == "serve.py: interrupted\n"


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def test_the_openai_package_is_served(servers):
    openai = pytest.importorskip("openai")
    server, wanted = servers("causal"), alone("causal", rendered("hi"))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        ask = functools.partial(client.chat.completions.create, model=model.id, messages=chat_of("hi"))
        body = ask(temperature=0, max_tokens=12, extra_body={"speculate": 3})
        speculated = alone("causal", rendered("hi"), speculate=3)
        assert body.choices[0].message.content == speculated.text and body.usage.forwards == speculated.forwards
        chunks = list(ask(stream=True, extra_body={"canvas": True}))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == wanted.text
        assert chunks[0].choices[0].canvas["spans"][0][1] == "masked"
        assert client.completions.create(model=model.id, prompt="hi").object == "text_completion"
        with pytest.raises(openai.BadRequestError, match="the likeliest token"):
            ask(temperature=-1)
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            ask(model="gpt-9")


def test_lm_evals_client_is_served(servers):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    server = servers("mdlm")
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    model = LocalChatCompletion(model=server.args.model_name_or_path, base_url=url, num_concurrent=4, max_length=256)
    limits = {"until": ["zzz"], "max_gen_toks": 12, "temperature": 0, "do_sample": False}
    asked = [
        Instance("generate_until", {}, (model.apply_chat_template(chat_of(p)), limits), n)
        for n, p in enumerate(PROMPTS)
    ]
    assert model.generate_until(asked, disable_tqdm=True) == [
        alone("mdlm", rendered(prompt)).text for prompt in PROMPTS
    ]

"""64 clients at once on a server, two minutes: some go away, some send garbage; no answer may be lost or another's.

    python tests/load_serve.py [seconds] [clients] [checkpoint]

Without a checkpoint it is a small random one. Prints what came of the requests and the server's memory, and exits with
status 1 where something is wrong. It is also `pytest -m slow tests/load_serve.py`.
"""

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import checkpoint  # noqa: E402

PROMPTS = [
    f"{verb} the {noun} of {n}, yes?" for verb in ("Sort", "Count") for noun in ("word", "digits") for n in (3, 17)
]
OPTIONS = [{}, {"threshold": 0.2}, {"max_tokens": 5}]  # each another batch
GARBAGE = [b"", b"{", b"[]", b'{"prompt": 1}', b"\x00\xff" * 100, b'{"prompt": "hi", "temperature": "hot"}']
GARBAGE += [json.dumps({"prompt": "hi", "steps": -1}).encode(), b'{"prompt": "' + b"x" * 2**21 + b'"}']


class Client:
    def __init__(self, port: int, number: int, end: float, wanted: dict | None, found: Counter):
        self.port, self.chance, self.end, self.wanted, self.found = port, random.Random(number), end, wanted, found

    def post(self, body: bytes, timeout: float = 120) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def reply(self, prompt: str, option: int, stream: bool) -> str:
        connection, response = self.post(json.dumps({"prompt": prompt, "stream": stream, **OPTIONS[option]}).encode())
        try:
            content = response.read().decode()
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {content[:100]}")
        if not stream:
            return json.loads(content)["choices"][0]["text"]
        *lines, last = content.strip().split("\n\n")
        if last != "data: [DONE]":
            raise ValueError(f"a stream without an end: {last[:100]}")
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)

    def run(self) -> None:
        while time.monotonic() < self.end:
            what = self.chance.choices(("answer", "cancel", "garbage"), (6, 2, 1))[0]
            try:
                self.found[getattr(self, what)()] += 1
            except Exception as error:
                self.found["lost"] += 1
                print("lost:", repr(error), flush=True)

    def request(self) -> tuple[str, int, bool]:
        return self.chance.choice(PROMPTS), self.chance.randrange(len(OPTIONS)), self.chance.random() < 0.5

    def answer(self) -> str:
        prompt, option, stream = self.request()
        text, wanted = self.reply(prompt, option, stream), self.wanted[prompt, option]
        if text != wanted:
            print("mixed:", (prompt, option, stream, text, wanted), flush=True)
        return "answers" if text == wanted else "mixed"

    def cancel(self) -> str:
        prompt, option, stream = self.request()
        body = json.dumps({"prompt": prompt, "stream": stream, **OPTIONS[option]}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(self.chance.random() * 0.5)
        return "cancelled"

    def garbage(self) -> str:
        body = self.chance.choice(GARBAGE)
        if self.chance.random() < 0.3:  # no HTTP at all
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
                client.sendall(body[:1000] or b"\r\n")
            return "garbage"
        try:
            connection, response = self.post(body)
        except (BrokenPipeError, ConnectionResetError):  # refused before it was sent
            return "garbage"
        status = response.status
        connection.close()
        return "garbage" if 400 <= status < 500 else "lost"


def memory(pid: int) -> float:
    """Resident MB."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def load(seconds: float = 120.0, clients: int = 64, path: str | None = None) -> Counter:
    """What came of the requests, and the server's memory after a warm-up and at the end, in MB."""
    argv = [sys.executable, "serve.py", "--model_name_or_path", path or checkpoint("mdlm"), "--port", "0"]
    argv += ["--max_new_tokens", "16", "--steps", "8"]
    found = Counter()
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            alone = Client(port, 0, 0.0, None, found)
            wanted = {(p, n): alone.reply(p, n, False) for p in PROMPTS for n in range(len(OPTIONS))}

            def together(seconds: float, counts: Counter) -> None:
                end = time.monotonic() + seconds
                crowd = [Client(port, n, end, wanted, counts) for n in range(clients)]
                threads = [threading.Thread(target=client.run) for client in crowd]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

            together(seconds / 6, Counter())  # whatever it allocates once
            found["MB before"] = round(memory(server.pid))
            together(seconds, found)
            found["mixed"] += sum(alone.reply(p, n, True) != text for (p, n), text in wanted.items())
            found["MB after"] = round(memory(server.pid))
        finally:
            server.terminate()
    return found


def good(found: Counter) -> bool:
    grown = found["MB after"] - found["MB before"]
    return found["answers"] > 0 and found["lost"] == found["mixed"] == 0 and grown < 50


@pytest.mark.slow
def test_nothing_is_lost_or_mixed_and_memory_does_not_grow():
    found = load()
    assert good(found), found


if __name__ == "__main__":
    outcome = load(*map(int, sys.argv[1:3]), *sys.argv[3:])
    print(dict(outcome))
    sys.exit(not good(outcome))

"""A loopback server that speaks enough of OpenAI's protocol to be UnifiedReward, and that fails as it is told.

    with faulty_server("fine") as server:
        ... UnifiedRewardConfig(server=server.url)
        server.behaviour = "500"  # from the next request on

It gives a picture of mean brightness b in [0, 1] the score 1 + 4 b, in every field.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
from PIL import Image

Fault = Literal[
    "fine",
    "slow",  # answers after `FaultyServer.delay` seconds
    "drips",  # sends its answer a byte at a time, for ever
    "dies",  # closes the connection in the middle of its answer
    "500",
    "400",
    "malformed",  # an answer that is no JSON
    "no_choices",  # JSON that is no chat completion
    "no_text",  # a completion without text
    "truncated",  # the words are cut off before the scores
    "truncated_number",  # the words are cut off within the first score
    "nan",
    "ten",
    "silent",  # an empty text
]
TEXT = "Alignment Score (1-5): {0}\nCoherence Score (1-5): {0}\nStyle Score (1-5): {0}\nFinal Score: {0}"


@dataclass(frozen=True)
class Question:
    """What the server was asked."""

    picture: Image.Image
    text: str
    body: dict[str, Any]
    place: int  # how many questions came before

    @property
    def brightness(self) -> float:
        return float(np.asarray(self.picture.convert("RGB"), dtype=np.float64).mean() / 255)


Behaviour = Fault | Callable[[Question], Fault]


class FaultyServer:
    """A server in a thread of its own; ``behaviour`` may be set at any time, from any thread."""

    def __init__(self, behaviour: Behaviour, models: list[str], key: str | None, delay: float, port: int) -> None:
        self.behaviour, self.models, self.key, self.delay = behaviour, models, key, delay
        self.questions: list[Question] = []
        self.connections: set[socket.socket] = set()
        self.under_way, self.most_under_way = 0, 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        """What ``server`` is set to."""
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        """Go away for good: open connections are cut, and new ones refused. May be called again."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_server(
    behaviour: Behaviour = "fine",
    *,
    models: tuple[str, ...] = ("UnifiedReward",),
    key: str | None = None,
    delay: float = 30.0,
    port: int = 0,
) -> Iterator[FaultyServer]:
    """A running server on loopback, stopped at the end.

    Args:
        behaviour: What it does with a question: a fault, or a function from the question to one.
        models: The names that it lists.
        key: The key that it wants; None for none.
        delay: Seconds that it takes when slow.
        port: 0 for any free one.
    """
    server = FaultyServer(behaviour, list(models), key, delay, port)
    try:
        yield server
    finally:
        server.stop()


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def setup(self) -> None:
            super().setup()
            with server.lock:
                server.connections.add(self.connection)

        def finish(self) -> None:
            with server.lock:
                server.connections.discard(self.connection)
            super().finish()

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                self.reply(404, b'{"detail": "Not Found"}')
            elif self.allowed():
                listed = [{"id": name, "object": "model"} for name in server.models]
                self.reply(200, json.dumps({"object": "list", "data": listed}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.reply(404, b'{"detail": "Not Found"}')
            elif self.allowed():
                if body["model"] in server.models:
                    self.answer(_question(server, body))
                else:
                    self.reply(404, f"the model '{body['model']}' does not exist".encode())

        def allowed(self) -> bool:
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.reply(401, b'{"error": "no such key"}')
                return False
            return True

        def answer(self, question: Question) -> None:
            with server.lock:
                server.under_way += 1
                server.most_under_way = max(server.most_under_way, server.under_way)
            try:
                fault = server.behaviour if isinstance(server.behaviour, str) else server.behaviour(question)
                self.fail(fault, question)
            except (BrokenPipeError, ConnectionResetError):  # the client has stopped waiting
                self.close_connection = True
            finally:
                with server.lock:
                    server.under_way -= 1

        def fail(self, fault: Fault, question: Question) -> None:
            score = f"{1 + 4 * question.brightness:.4f}"
            if fault == "slow":
                server.closing.wait(server.delay)
            if fault in {"500", "400"}:
                self.reply(int(fault), b"no room on the device")
            elif fault in {"malformed", "no_choices"}:
                self.reply(200, b'{"choices": [' if fault == "malformed" else b'{"object": "error"}')
            elif fault in {"dies", "drips"}:
                self.reply_in_part(_completion(TEXT.format(score), "stop"), drip=fault == "drips")
            else:
                self.reply(200, _completion(*_words(fault, score)))

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def reply_in_part(self, body: bytes, drip: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(10**6))
            self.end_headers()
            self.wfile.write(body[:40])
            self.wfile.flush()
            while drip and not server.closing.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
            self.close_connection = True

    return Handler


def _question(server: FaultyServer, body: dict[str, Any]) -> Question:
    image, text = body["messages"][0]["content"]
    data = base64.b64decode(image["image_url"]["url"].split(",", 1)[1])
    with server.lock:
        question = Question(Image.open(io.BytesIO(data)), text["text"], body, len(server.questions))
        server.questions.append(question)
    return question


def _words(fault: Fault, score: str) -> tuple[str | None, str]:
    """The text and why it ended."""
    if fault == "truncated":
        return 'Word-wise Scores: [["a", 0.1], ["b', "length"
    if fault == "truncated_number":
        return f"Final Score: {score[:3]}", "length"
    texts = {"no_text": None, "silent": "", "nan": TEXT.format("nan"), "ten": TEXT.format("10")}
    return texts.get(fault, TEXT.format(score)), "stop"


def _completion(text: str | None, finish: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()

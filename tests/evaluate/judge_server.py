"""A judging service in a process of its own: python -m tests.evaluate.judge_server RULE.

It prints its port, answers by RULE, and tells ``GET /count`` how many requests it had.

    longer      the longer answer wins
    first       the first answer wins, whatever it is
    words       the longer answer, with words around the JSON
    tie         always a tie
    nonsense    no verdict in the text
    html        no JSON at all
    empty       a reply without choices
    busy        429 with Retry-After: 0 when a request comes for the first time
    overloaded  529, which is Cloudflare's and others', in place of 429
    always-busy 429 always
    unauthorized 401, with the sent key in the body
    key         401 unless the key is "sesame"
    redirect    302 to another host
    drop        the connection ends in the middle of the reply
    half        nonsense from the fifth request on
    filter      400 where the prompt holds "bomb"
    refusal     words instead of a verdict where the prompt holds "bomb"
    parts       the verdict as a list of parts
    warm        400 where a temperature is named
    trickle     a byte of the reply every 50 ms
    headers     the same from its first header on
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

RULE = sys.argv[1] if len(sys.argv) > 1 else "longer"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    count = 0
    seen: ClassVar[set[str]] = set()
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.reply(200, str(Handler.count).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Handler.lock:
            Handler.count += 1
            number = Handler.count
            new = str(body) not in Handler.seen
            Handler.seen.add(str(body))
        if (status := self.refusal(body, new)) is not None:
            location = {"Location": "http://127.0.0.1:1/"} if status == 302 else {}
            key = self.headers.get("Authorization", "").encode()
            why = b"unsupported: temperature " if RULE == "warm" else b"no: "
            self.reply(status, why + key, {"Retry-After": "0", **location})
            return
        if RULE in ("trickle", "headers"):
            self.trickle()
            return
        if RULE == "drop":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
            return
        if RULE in ("html", "empty"):
            self.reply(200, b"<html>hello" if RULE == "html" else b'{"choices": []}')
            return
        said = self.verdict(body, number)
        content = [{"type": "text", "text": said}] if RULE == "parts" else said
        message = {"role": "assistant", "content": content}
        self.reply(200, json.dumps({"choices": [{"message": message}]}).encode())

    def trickle(self) -> None:
        """Two minutes of bytes, until nobody reads them."""
        start = b"HTTP/1.1 200 OK\r\n" + (b"" if RULE == "headers" else b"\r\n")
        try:
            self.wfile.write(start)
            for _ in range(2400):
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def refusal(self, body: dict[str, Any], new: bool) -> int | None:
        if RULE == "always-busy" or (RULE in ("busy", "overloaded") and new):
            return 529 if RULE == "overloaded" else 429
        if RULE == "unauthorized":
            return 401
        if RULE == "key" and self.headers.get("Authorization") != "Bearer sesame":
            return 401
        if (RULE == "warm" and "temperature" in body) or (RULE == "filter" and bomb_in(body)):
            return 400
        return 302 if RULE == "redirect" else None

    def verdict(self, body: dict[str, Any], number: int) -> str:
        assert body.get("temperature", 0) == 0
        texts = json.loads(body["messages"][-1]["content"])
        a, b = texts["answer A"], texts["answer B"]
        longer = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
        if RULE == "refusal" and bomb_in(body):
            return "I'm sorry, but I can't help with that."
        if RULE == "nonsense" or (RULE == "half" and number > 4):
            return "Both are fine. A and B."
        if RULE == "words":
            return f'I think so:\n```json\n{{"winner": "{longer}"}}\n```\nbecause of it.'
        winner = {"first": "A", "tie": "tie"}.get(RULE, longer)
        return json.dumps({"winner": winner})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def bomb_in(body: dict[str, Any]) -> bool:
    return "bomb" in json.loads(body["messages"][-1]["content"])["prompt"]


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()

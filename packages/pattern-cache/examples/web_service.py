"""A web service whose answers are dear to compute: each is computed once, however many clients ask at the same time.

    python web_service.py                              http://127.0.0.1:8000/layout?blocks=512&window=3
    python web_service.py --port 8080 --warm answers.safetensors

GET /layout?blocks=B&window=W answers with the blocks of keys that each block of rows attends to, as JSON: those at
most W before it, and every block whose distance is a power of two. GET /cache answers with what the cache has done.

With --warm answers are read from that file at the start, where it is there, and written to it at the end (SIGTERM or
Ctrl-C, after the requests that are running). That needs `pip install "dilated-pattern-cache[persistence]"`; the rest
needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dilated_pattern_cache import PatternCache

MOST_BLOCKS = 4096
VERSION = "layout 1"
"""Of the function below. Change it together with the function, and older files of answers are refused."""


def layout(blocks: int, window: int) -> bytes:
    """The answer: a list of columns for every row of blocks."""
    rows = []
    for row in range(blocks):
        distances = {*range(min(window, row) + 1), *(1 << power for power in range(row.bit_length()))}
        rows.append([row - distance for distance in sorted(distances, reverse=True) if distance <= row])
    return json.dumps(rows).encode()


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    server: Server

    def do_GET(self) -> None:
        """Answer."""
        url = urlsplit(self.path)
        if url.path == "/cache":
            self.answer(HTTPStatus.OK, json.dumps(asdict(self.server.cache.info())).encode())
        elif url.path == "/layout":
            try:
                key = self.layout_key(url.query)
            except ValueError as error:  # before the cache is asked: what is wrong needs no entry
                self.answer(HTTPStatus.BAD_REQUEST, json.dumps({"error": str(error)}).encode())
                return
            self.answer(HTTPStatus.OK, self.server.cache.get_or_create(key, lambda: layout(*key[1:])))
        else:
            self.answer(HTTPStatus.NOT_FOUND, b"{}")

    @staticmethod
    def layout_key(query: str) -> tuple[str, int, int]:
        """All that the answer depends on, as plain values. Raises ValueError."""
        fields = {name: values[-1] for name, values in parse_qs(query).items()}
        asked = {"blocks": fields.get("blocks", "64"), "window": fields.get("window", "3")}
        for name, text in asked.items():
            if not text.isdecimal():
                raise ValueError(f"{name}: expected a whole number, got {text!r}")
        blocks, window = int(asked["blocks"]), int(asked["window"])
        if not 0 < blocks <= MOST_BLOCKS or not 0 <= window <= blocks:
            raise ValueError(f"expected 0 < blocks <= {MOST_BLOCKS} and 0 <= window <= blocks, got {blocks}, {window}")
        return "layout", blocks, window

    def answer(self, status: HTTPStatus, body: bytes) -> None:
        """Send it."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """No line for every request."""


class Server(ThreadingHTTPServer):
    """Threads that share one cache."""

    request_queue_size = 128  # Python's 5 would turn clients away that come all at once
    daemon_threads = False  # server_close then waits for the requests that are running

    def __init__(self, address: tuple[str, int], cache: PatternCache[tuple[str, int, int], bytes]) -> None:
        super().__init__(address, Handler)
        self.cache = cache


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--warm", type=Path, help="file of answers, read at the start and written at the end")
    parser.add_argument("--max-bytes", type=int, default=64 * 2**20, help="of all answers that are kept")
    arguments = parser.parse_args()

    # Keys and entries are small beside answers, of which bytes are counted.
    cache = PatternCache(max_entries=None, max_bytes=arguments.max_bytes)
    if arguments.warm is not None and arguments.warm.exists():
        from dilated_pattern_cache.persistence import load

        load(cache, arguments.warm, tag=VERSION)
    with Server(("127.0.0.1", arguments.port), cache) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            # From another thread: shutdown waits for the loop that the signal has interrupted.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        print(f"http://127.0.0.1:{server.server_port}, {len(cache)} answers", flush=True)
        server.serve_forever()
    if arguments.warm is not None:
        from dilated_pattern_cache.persistence import save

        save(cache, arguments.warm, tag=VERSION)
    print(cache.info())


if __name__ == "__main__":
    main()

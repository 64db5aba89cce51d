"""The web chat's server under many clients: errors, memory, time to the first token.

    python -m bench.chat_web --home data/demo --clients 50 --seconds 120 --json

Starts scripts.chat_web over the model and the base of runs/demo.sh and lets so many clients ask its test questions, one
after the other, every second one as a stream. Times are those of the streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from bench.common import print_figures, start
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.retrieval.document import read_queries


@dataclass(kw_only=True)
class Config:
    """Measure the web chat's server."""

    home: Path = Path("data/demo")
    """Base directory of runs/demo.sh."""
    clients: int = 50
    """That ask at the same time."""
    seconds: float = 120.0
    """For so long."""
    threads: int = 2
    """CPU threads of the server."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


@dataclass
class Seen:
    """By all clients together."""

    answers: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def read_stream(response: httpx.Response, began: float) -> tuple[float, int, str]:
    """Seconds until its first token, its tokens, and what was wrong with it."""
    first, tokens, trouble = 0.0, 0, ""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return first, tokens, trouble
        if not line:
            continue
        chunk = json.loads(line[6:])
        trouble = trouble or str(chunk.get("error", ""))
        if any(choice["delta"].get("content") for choice in chunk.get("choices", [])):
            first, tokens = first or time.monotonic() - began, tokens + 1
    return first, tokens, trouble or "the stream broke off"


def ask(url: str, questions: list[str], number: int, until: float, seen: Seen) -> None:
    rng = random.Random(number)
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < until:
            body = {"messages": [{"role": "user", "content": rng.choice(questions)}], "stream": rng.random() < 0.5}
            body["max_tokens"] = 32
            began, first, tokens, trouble = time.monotonic(), 0.0, 0, ""
            try:
                with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        trouble = f"{response.status_code} {response.read().decode()[:200]}"
                    elif not body["stream"]:
                        tokens = json.loads(response.read())["usage"]["completion_tokens"]
                    else:
                        first, tokens, trouble = read_stream(response, began)
            except httpx.HTTPError as error:
                trouble = type(error).__name__
            with seen.lock:
                seen.answers += 1
                seen.tokens += tokens
                seen.seconds.append(time.monotonic() - began)
                if first:
                    seen.first.append(first)
                if trouble:
                    seen.errors.append(trouble)


@contextlib.contextmanager
def served(home: Path, threads: int, log: IO | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and the process of scripts.chat_web over what runs/demo.sh made. log: where its complaints go."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["--knowledge_base", home / "rag_examples/knowledge_base", "--port", port]
    server = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_web", *map(str, command)],
        env={**os.environ, "NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise UserError("the server did not start")
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url, server
    finally:
        server.terminate()
        server.wait(20)


def read_questions(home: Path) -> list[str]:
    return [query["query"] for query in read_queries(home / "rag_examples/queries/test.jsonl")]


def resident(pid: int) -> float:
    """Megabytes that the process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    config = load_config(Config)
    start(config.threads)
    questions = read_questions(config.home)
    with served(config.home, config.threads) as (url, server):
        seen, until = Seen(), time.monotonic() + config.seconds
        clients = [threading.Thread(target=ask, args=(url, questions, n, until, seen)) for n in range(config.clients)]
        for client in clients:
            client.start()
        time.sleep(config.seconds / 4)  # warm: all that it keeps is kept by now
        warm = resident(server.pid)
        for client in clients:
            client.join()
        figures = {
            "clients": config.clients,
            "answers": seen.answers,
            "errors": len(seen.errors),
            "answers_per_s": seen.answers / config.seconds,
            "first_token_p50_ms": 1000 * sorted(seen.first)[len(seen.first) // 2],
            "first_token_p95_ms": 1000 * sorted(seen.first)[int(len(seen.first) * 0.95)],
            "answer_p95_ms": 1000 * sorted(seen.seconds)[int(len(seen.seconds) * 0.95)],
            "memory_warm_mb": warm,
            "memory_end_mb": resident(server.pid),
        }
    for error in sorted(set(seen.errors))[:5]:
        print(f"{seen.errors.count(error)} times: {error}")
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)

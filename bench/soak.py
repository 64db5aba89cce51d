"""The web chat's server for a long time: clients of every kind, none of them answered with an error, and memory that
does not grow.

    python -m bench.soak --home data/demo --clients 20 --minutes 10 --json

Starts scripts.chat_web over the model and the base of runs/demo.sh. Its clients ask test questions all the time: half
of them as streams, a third in one piece, a tenth leave in the middle of a stream, and the others ask what cannot be
answered. An error is: a good question without its whole answer, a bad one that is not told so (4xx), a place that is
still taken when all have gone, a complaint in the server's log. The memory's growth is from the third tenth of the time
to the last: before that, what the server keeps of what it has read comes to its bound.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.chat_web import read_questions, read_stream, resident, served
from bench.common import print_figures, start
from nanochat.common import UserError, run_main
from nanochat.config import load_config

CHAT = "/v1/chat/completions"


@dataclass(kw_only=True)
class Config:
    """Ask the web chat's server for a long time."""

    home: Path = Path("data/demo")
    """Base directory of runs/demo.sh."""
    clients: int = 20
    """That ask at the same time."""
    minutes: float = 10.0
    """For so long."""
    threads: int = 2
    """CPU threads of the server."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


@dataclass
class Seen:
    """By all clients together."""

    asked: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def stream(client: httpx.Client, body: dict) -> str:
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return f"{response.status_code}"
        _, tokens, trouble = read_stream(response, 0.0)
        return trouble or ("" if tokens else "an empty stream")


def leave(client: httpx.Client, body: dict, lines: int) -> str:
    with client.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 200}) as response:
        for _ in zip(range(lines), response.iter_lines(), strict=False):
            pass
        return "" if response.status_code == 200 else f"{response.status_code}"


def whole(client: httpx.Client, body: dict) -> str:
    response = client.post(CHAT, json=body)
    if response.status_code != 200:
        return f"{response.status_code}"
    return "" if response.json()["usage"]["completion_tokens"] and response.json()["sources"] else "an empty answer"


def ask_badly(client: httpx.Client, body: dict, rng: random.Random) -> str:
    text = json.dumps(body)
    contents = [
        text[: rng.randrange(len(text))],
        json.dumps({**body, "temperature": -1}),
        json.dumps({**body, "model": "another"}),
        json.dumps({"messages": [{"role": "user", "content": "word " * 20_000}]}),
        "x" * 3_000_000,
    ]
    status = client.post(CHAT, content=rng.choice(contents), headers={"Content-Type": "application/json"}).status_code
    return "" if status in (400, 404, 413) else f"{status} to a bad question"


def ask(url: str, questions: list[str], number: int, until: float, seen: Seen) -> None:
    rng = random.Random(number)
    with httpx.Client(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            body = {"messages": [{"role": "user", "content": rng.choice(questions)}], "max_tokens": 32}
            kind = rng.choices(["stream", "whole", "leave", "bad"], [50, 33, 10, 7])[0]
            try:
                if kind == "stream":
                    trouble = stream(client, body)
                elif kind == "whole":
                    trouble = whole(client, body)
                elif kind == "leave":
                    trouble = leave(client, body, rng.randrange(1, 12))
                else:
                    trouble = ask_badly(client, body, rng)
            except httpx.HTTPError as error:
                trouble = type(error).__name__
            with seen.lock:
                seen.asked[kind] += 1
                if trouble:
                    seen.errors[f"{kind}: {trouble}"] += 1


def places_left(url: str, seconds: float = 30.0) -> int:
    """Places that are still taken so long after all clients have gone."""
    until = time.monotonic() + seconds
    while (load := httpx.get(f"{url}/health").json()["load"]) and time.monotonic() < until:
        time.sleep(0.1)
    return load


def growth(memory: list[float]) -> float:
    """Of the last tenth over the third."""
    tenth = len(memory) // 10
    return statistics.mean(memory[-tenth:]) / statistics.mean(memory[2 * tenth : 3 * tenth]) - 1


def main() -> None:
    config = load_config(Config)
    if config.minutes < 0.1:
        raise UserError(f"--minutes {config.minutes}: tenths of the time are compared; 0.1 at least, 10 to find leaks")
    start(config.threads)
    questions = read_questions(config.home)
    memory, seen = [], Seen()
    with tempfile.TemporaryFile("w+") as log:
        with served(config.home, config.threads, log) as (url, server):
            until = time.monotonic() + config.minutes * 60
            arguments = [(url, questions, number, until, seen) for number in range(config.clients)]
            clients = [threading.Thread(target=ask, args=given) for given in arguments]
            for client in clients:
                client.start()
            while time.monotonic() < until:
                memory.append(resident(server.pid))
                time.sleep(0.5)
            for client in clients:
                client.join()
            taken = places_left(url)
            seen.errors["places that stay taken"] += taken
            files = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        log.seek(0)
        complaints = [line.rstrip() for line in log if line.strip()]
    seen.errors["lines in the server's log"] += len(complaints)
    for what, times in (+seen.errors).most_common(10):
        print(f"{times} times: {what}")
    for line in complaints[:20]:
        print(f"    {line}")
    tenth = len(memory) // 10
    figures = {
        "soak_errors": seen.errors.total(),
        "soak_memory_growth": growth(memory),
        "soak_memory_warm_mb": statistics.mean(memory[2 * tenth : 3 * tenth]),
        "soak_memory_end_mb": statistics.mean(memory[-tenth:]),
        "soak_memory_peak_mb": max(memory),
        "soak_files_end": files,
        "soak_asked_per_s": seen.asked.total() / (config.minutes * 60),
        **{f"soak_{kind}": times for kind, times in sorted(seen.asked.items())},
    }
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)

"""A second process that turns texts into postings while the first one reads, checks and writes documents.

It is this file, started with `python -m`, not multiprocessing: a user's script needs no guard for it. A request is four
bytes of length and a JSON object {"directory", "texts"}; the answer, when the postings are in the directory, a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nanochat.common import UserError
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.postings import BlockBuilder, Postings

_QUEUED = 2  # requests under way; what comes beyond them the first process does itself


class Helper:
    def __init__(self, analyzer: Analyzer, directory: Path):
        settings = [analyzer.language, str(int(analyzer.stem)), str(int(bool(analyzer.stop_words)))]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.retrieval.helper", *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.directory, self.number = directory, 0
        self.thread = ThreadPoolExecutor(1)
        self.pending: list[Future] = []

    def is_free(self) -> bool:
        self.pending = [future for future in self.pending if not future.done()]
        return len(self.pending) < _QUEUED

    def build(self, texts: list[str]) -> Future:
        """The postings of the texts, when they are there."""
        self.number += 1
        future = self.thread.submit(self._ask, texts, self.directory / f"block-{self.number}")
        self.pending.append(future)
        return future

    def _ask(self, texts: list[str], directory: Path) -> Postings:
        request = json.dumps({"directory": str(directory), "texts": texts}).encode()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(struct.pack("<I", len(request)) + request)
            self.process.stdin.flush()
        if self.process.stdout.readline() != b"done\n":
            raise UserError(
                "the second process of the build has ended (if it says nothing above: killed, perhaps for its memory); "
                "run it again, nothing was changed"
            )
        return Postings.load(directory)

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it, and closes this one
    language, stem, stop_words = sys.argv[1:]
    builder = BlockBuilder(Analyzer(language, stem == "1", stop_words == "1"))
    while len(length := sys.stdin.buffer.read(4)) == 4:
        request = json.loads(sys.stdin.buffer.read(*struct.unpack("<I", length)))
        builder.build(request["texts"]).save(Path(request["directory"]))
        print("done", flush=True)


if __name__ == "__main__":
    main()

"""A knowledge base when things fail: writers killed at any moment, a disk without room, files that may not grow."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from bench.faults_disk import documents, held
from nanochat.retrieval import Document
from nanochat.retrieval.knowledge_base import open_knowledge_base

REPOSITORY = Path(__file__).parents[3]


# --- kill -9


def run_bench(module: str, *arguments: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", f"bench.{module}", *arguments]
    return subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def test_killed_writers_lose_nothing_and_readers_see_nothing_half_written():
    done = run_bench("faults_kb", "--kills", "12", "--every", "7", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    wrong = {name: figures[name] for name in ("lost", "damaged", "wrong_searches", "torn_reads", "points_broken")}
    assert not any(wrong.values()), done.stdout
    assert figures["kills"] == 12 and figures["points"] > 100 and figures["reads"] > 0
    assert sum(number for name, number in figures.items() if name.startswith("killed_")) == 12


# --- a full disk


def test_a_full_disk_is_told_in_a_line_and_leaves_everything_as_it_was():
    done = run_bench("faults_disk", "--json")
    if done.returncode == 2 and "cannot mount" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    refused = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert refused.pop("refused_commands") == 3
    assert set(refused) == {
        f"refused_{what}" for what in ("first_build", "build", "add", "delete", "embed", "rollback")
    }
    assert min(refused.values()) >= 1 and sum(refused.values()) > 80


def command(*arguments: object, most: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess:
    """most: how long files may become."""
    return subprocess.run(
        [sys.executable, "-m", "nanochat.retrieval", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def commands(path: Path, folder: Path) -> dict[str, list[object]]:
    """build, add and delete, with the files they read."""
    for name, some in (("first", documents(0, 40)), ("more", documents(35, 40))):
        (folder / f"{name}.jsonl").write_bytes(b"".join(document.to_line() for document in some))
    return {
        "build": ["--documents", folder / "first.jsonl", "--output", path, "--type", "bm25"],
        "add": ["add", "--documents", folder / "more.jsonl", "--knowledge_base", path],
        "delete": ["delete", "--ids", "d1,d2", "--knowledge_base", path],
    }


def check_refusal(done: subprocess.CompletedProcess, reason: str, path: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: cannot write the knowledge base {path} ({reason}")
    assert done.stderr.count("\n") == 1
    assert "what was there is unchanged" in done.stderr and "make room" in done.stderr


def test_the_command_says_that_a_file_may_not_grow_and_works_once_it_may(tmp_path):
    """The same without a disk to fill."""
    path, before = tmp_path / "kb", None
    for arguments in commands(path, tmp_path).values():
        for most in (100, 1000):
            if arguments[0] == "delete" and most == 1000:
                continue  # it writes less than that, but for the manifest
            check_refusal(command(*arguments, most=most), "File too large", path)
            assert held(path) == before
            assert not before or (not list(path.glob(".building-*")) and len(list(path.glob("v*"))) <= 2)
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
        before = held(path)
    assert set(before) == {f"d{n}" for n in range(75)} - {"d1", "d2"}
    exported = tmp_path / "exported.jsonl"
    done = command("export", "--output", exported, "--knowledge_base", path, most=1000)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and not list(tmp_path.glob("*exported*"))
    assert done.stderr.startswith(f"error: {exported}: cannot be written (File too large)")


def test_a_file_that_is_cut_at_its_very_end_is_noticed(tmp_path):
    """Of an array, the end that is written only as it is closed; all other files are shorter than what may be."""
    text = " ".join(f"w{n:03}" for n in range(781))
    (tmp_path / "one.jsonl").write_bytes(Document("d0", "", text).to_line())
    build = ["--documents", tmp_path / "one.jsonl", "--output", tmp_path / "kb", "--type", "bm25"]
    assert command(*build).returncode == 0
    sizes = sorted(entry["size"] for entry in open_knowledge_base(tmp_path / "kb").manifest["files"].values())
    assert sizes[-2] < 9000 < sizes[-1]
    check_refusal(command(*build, most=9000), "File too large", tmp_path / "kb")
    assert open_knowledge_base(tmp_path / "kb", verify=True).version == "v0001"

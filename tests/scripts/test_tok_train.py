"""python -m scripts.tok_train, run as a user runs it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import tok_train

REPOSITORY = Path(tok_train.__file__).parents[1]


def run(base_dir: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.tok_train", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["river", "mountain", "the", "of", "old", "town", "bridge", "was", "built", "1987"]
    path = tmp_path / "corpus.jsonl"
    records = [{"id": str(i), "title": f"Place {i}", "text": " ".join(rng.choices(words, k=30))} for i in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_trains_a_tokenizer_where_the_other_scripts_look(tmp_path: Path, corpus: Path) -> None:
    done = run(tmp_path / "base", "--input", str(corpus), "--vocab_size", "300")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "base" / "tokenizer")
    assert tokenizer.vocab_size == 300
    assert f"vocabulary: 300 tokens, {len(SPECIAL_TOKENS)} of them special\n" in done.stdout
    assert tokenizer.fingerprint in done.stdout
    bytes_per_token = float(done.stdout.split("held-out text: ")[1].split()[0])
    assert 1.5 < bytes_per_token < 6


def test_several_inputs_an_output_and_a_limit(tmp_path: Path, corpus: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    (more / "a.txt").write_text("zebra " * 100)
    output = tmp_path / "out"
    done = run(
        tmp_path, "--input", f"{more},{corpus}", "--vocab_size", "5000", "--output", str(output), "--max_chars=600"
    )
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(output)
    assert b" zebra" in tokenizer.token_bytes  # of this text alone, the 600 characters end before the other file
    assert b" river" not in tokenizer.token_bytes
    assert "trained on 600 characters" in done.stdout
    assert f"vocabulary: {tokenizer.vocab_size} tokens" in done.stdout
    assert "(asked: 5000)" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--input is required: Text to learn from"),
        (["--input", "nope.jsonl"], "nope.jsonl does not exist"),
        (["--input", "{bad}"], "bad.jsonl:2: not a line of JSON"),
        (["--input", "{empty}"], "no text in "),
        (["--input", "{corpus}", "--vocab_size", "100"], "vocab_size 100 is too small"),
        (["--input", "{corpus}", "--max_chars", "0"], "--max_chars 0"),
        (["--input", "{corpus}", "--vocabsize", "300"], "did you mean --vocab_size?"),
    ],
)
def test_mistakes_give_one_line_and_write_nothing(tmp_path: Path, corpus: Path, argv: list[str], message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text(" \n")
    files = {"bad": tmp_path / "bad.jsonl", "empty": tmp_path / "empty.txt", "corpus": corpus}
    done = run(tmp_path / "base", *(argument.format(**files) for argument in argv))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "base" / "tokenizer").exists()

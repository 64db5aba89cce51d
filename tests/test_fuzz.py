"""Everything that reads what people give, fed with damaged and random input: a result or one clear line."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fuzz import PARSERS, TooSlow, at_most, complaint, fuzz
from bench.fuzz_inputs import Everything
from nanochat.common import UserError
from nanochat.config import config_to_dict, load_config, save_config

FACTS = gzip.compress(b"".join(b"Film %d|directed_by|Ann %d\n" % (n, n * n) for n in range(50)), mtime=0)
REPOSITORY = Path(__file__).parents[1]
NEEDS = {"own_md": "markdown_it", "own_html": "bs4", "own_pdf": "fpdf", "own_docx": "docx"}
COUNT = 100


@pytest.mark.parametrize("parser", PARSERS)
def test_any_input_gives_a_result_or_one_clear_line(parser):
    if parser in NEEDS:
        pytest.importorskip(NEEDS[parser])
    found = fuzz(parser, COUNT, seed=1)
    assert not found["crashes"], "\n".join(found["crashes"][:5])
    assert found["inputs"] > COUNT / 2
    assert found["refused"] < found["inputs"]  # some of it is read


@pytest.mark.parametrize(
    ("parser", "content", "told"),
    [
        ("triples_gz", FACTS[:20] + b"\xff" * 20 + FACTS[40:], "damaged; fetch it again"),
        ("triples", b'<a> <b> "\\uD800 \\UFFFFFFFF" .\n<a> <b> <c> .\n', None),
        ("squad", b'{"data": ' + b"9" * 5000 + b"}", "thousands of digits"),
        ("hotpotqa_lines", b'{"_id": ' + b"9" * 5000 + b"}", "thousands of digits"),
        ("config_file", b"count = 1\0", "null bytes"),
        ("config_file", b"raise ValueError('one\\ntwo')", r"in.py:1: .*\(ValueError: one two\)"),
        ("config_file", b"count = " + b"-" * 20_000 + b"1", "nested too deeply"),
    ],
)
def test_what_was_found_once(tmp_path, parser, content, told):
    run, _, name, without_line = PARSERS[parser]
    path = tmp_path / name
    path.write_bytes(content)
    if told is None:
        run(path)
        return
    with pytest.raises(UserError, match=told) as caught:
        run(path)
    assert complaint(str(caught.value), path, without_line) is None


def test_a_flag_that_is_not_utf8_is_saved_and_read_again(tmp_path):
    config = load_config(Everything, ["--path", "caf\udce9", "--name", "é\ud800"])
    save_config(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text("utf-8")) == config_to_dict(config)


def test_what_is_no_clear_line_is_told():
    path = Path("folder/in.jsonl")
    assert complaint("folder/in.jsonl:3: content is empty", path, "no documents in it") is None
    assert complaint("folder/in.jsonl: no documents in it", path, "no documents in it") is None
    assert "without the line's number" in complaint("folder/in.jsonl: content is empty", path, "no documents in it")
    assert "without the file's name" in complaint("content is empty", path, "no documents in it")
    assert "not one line" in complaint("folder/in.jsonl:3: content\nis empty", path, "^$")
    with pytest.raises(TooSlow), at_most(0.01):
        while True:
            pass


def test_the_command_counts():
    done = subprocess.run(
        [sys.executable, "-m", "bench.fuzz", "--count", "20", "--parsers", "documents,tokenizer", "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert figures["inputs"] >= 30 and figures["crashes"] == 0

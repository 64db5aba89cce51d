"""Promises of nanochat/config.py: precedence, types, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from nanochat import config as config_module
from nanochat.common import UserError
from nanochat.config import config_to_dict, format_config, load_config, save_config

REPOSITORY = Path(config_module.__file__).parents[1]


@dataclass
class Settings:
    """Settings of a test."""

    knowledge_base: str
    """Directory of the knowledge base.

    Made with python -m nanochat.retrieval.
    """
    top_k: int = 5
    """Documents per question."""
    learning_rate: float = 3e-4
    use_rewards: bool = False
    """Train with rewards."""
    seed: Optional[int] = None  # noqa: UP045 - the old spelling has to work too
    stop_at: float | None = None
    note: Optional[str] = None  # noqa: UP045
    base_tasks: list[str] = field(default_factory=lambda: ["SmolTalk"])
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["simple", "bm25"] = "simple"
    output: Path | None = None


def load(*argv: str) -> Settings:
    return load_config(Settings, ["--knowledge_base", "kb", *argv])


def config_file(directory: Path, text: str) -> str:
    path = directory / "recipe.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--top_k", "7"], "top_k", 7),
        (["--top-k", "7"], "top_k", 7),
        (["--top_k=7"], "top_k", 7),
        (["--top-k=7"], "top_k", 7),
        (["--top_k", "1_000"], "top_k", 1000),
        (["--top_k", "1e6"], "top_k", 1_000_000),
        (["--top_k", "-1"], "top_k", -1),
        (["--top_k", "1", "--top_k", "2"], "top_k", 2),
        (["--learning_rate", "1e-2"], "learning_rate", 0.01),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--use_rewards"], "use_rewards", True),
        (["--use-rewards", "--top_k", "7"], "use_rewards", True),
        (["--use_rewards", "true"], "use_rewards", True),
        (["--use_rewards", "False"], "use_rewards", False),
        (["--use_rewards=false"], "use_rewards", False),
        (["--seed", "3"], "seed", 3),
        (["--seed", "None"], "seed", None),
        (["--stop_at", "none"], "stop_at", None),
        (["--stop_at", "0.5"], "stop_at", 0.5),
        (["--note", "two words"], "note", "two words"),
        (["--note="], "note", ""),
        (["--note=--top_k"], "note", "--top_k"),
        (["--note", "a.py"], "note", "a.py"),
        (["--base_tasks", "SmolTalk,GSM8K"], "base_tasks", ["SmolTalk", "GSM8K"]),
        (["--base_tasks", "SmolTalk, GSM8K"], "base_tasks", ["SmolTalk", "GSM8K"]),
        (["--base_tasks", ""], "base_tasks", []),
        (["--betas", "0.8,0.9"], "betas", (0.8, 0.9)),
        (["--kind", "bm25"], "kind", "bm25"),
        (["--output", "a/b"], "output", Path("a/b")),
    ],
)
def test_flags_are_read_in_every_spelling(argv: list[str], name: str, value: object) -> None:
    loaded = getattr(load(*argv), name)
    assert loaded == value
    assert type(loaded) is type(value)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    recipe = config_file(tmp_path, "top_k = 7\nlearning_rate = 1\nbase_tasks = 'A,B'\noutput = 'x'\nbetas = [0, 1]\n")
    loaded = load("--top_k", "9", recipe)
    assert (loaded.top_k, loaded.learning_rate, loaded.use_rewards) == (9, 1.0, False)
    assert (loaded.base_tasks, loaded.output, loaded.betas) == (["A", "B"], Path("x"), (0.0, 1.0))


def test_later_file_overrides_earlier_file(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("top_k = 1\nseed = 1\n")
    second.write_text("top_k = 2\n")
    loaded = load(str(first), "--use_rewards", str(second))
    assert (loaded.top_k, loaded.seed, loaded.use_rewards) == (2, 1, True)


def test_helpers_in_a_config_file_are_not_settings(tmp_path: Path) -> None:
    source = """
from __future__ import annotations
import math
from math import sqrt, pi
_wide = True
def double(x):
    local = x
    return local * 2
top_k: int = double(4) if _wide else [step for step in range(3)][0]
"""
    assert load(config_file(tmp_path, source)).top_k == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topk", "5"], "unknown setting --topk; did you mean --top_k?"),
        (["--top-kk=5"], "unknown setting --top-kk; did you mean --top_k?"),
        (["--zzzzzzzz", "5"], "unknown setting --zzzzzzzz; --help lists them"),
        (["--top_k", "five"], "--top_k: 'five' is not a whole number"),
        (["--top_k", "1.5"], "--top_k: '1.5' is not a whole number"),
        (["--top_k", "inf"], "--top_k: 'inf' is not a whole number"),
        (["--top_k", "true"], "--top_k: 'true' is not a whole number"),
        (["--top_k"], "--top_k needs a value: a whole number"),
        (["--top_k", "--use_rewards"], "--top_k needs a value: a whole number"),
        (["--learning_rate", "fast"], "--learning_rate: 'fast' is not a number"),
        (["--use_rewards", "maybe"], "--use_rewards: 'maybe' is not true or false"),
        (["--seed", "x"], "--seed: 'x' is not a whole number or none"),
        (["--kind", "bm26"], "--kind: 'bm26' is not one of simple, bm25; did you mean 'bm25'?"),
        (["--betas", "1"], "--betas: '1' is not a comma-separated list of 2"),
        (["--betas", "1,x"], "--betas: 'x' is not a number"),
        (["stray"], "unexpected argument 'stray'"),
        (["missing.py"], "cannot read the config file missing.py"),
    ],
)
def test_mistakes_on_the_line_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("top_k = 5\ntopk = 3\n", 2, "unknown setting topk; did you mean top_k?"),
        (
            "for item in []:\n    pass\nzzzzzzzzz = 1\n",
            3,
            "unknown setting zzzzzzzzz; the name of a helper begins with _",
        ),
        ("\ntop_k = 'five'\n", 2, "top_k: 'five' is not a whole number"),
        ("top_k = '5'\n", 1, "top_k: '5' is not a whole number"),
        ("top_k = 1.5\n", 1, "top_k: 1.5 is not a whole number"),
        ("top_k = True\n", 1, "top_k: True is not a whole number"),
        ("learning_rate = '3e-4'\n", 1, "learning_rate: '3e-4' is not a number"),
        ("use_rewards = 'true'\n", 1, "use_rewards: 'true' is not true or false"),
        ("use_rewards = 1\n", 1, "use_rewards: 1 is not true or false"),
        ("kind = 'bm26'\n", 1, "did you mean 'bm25'?"),
        ("base_tasks = ['A', 5]\n", 1, "base_tasks: 5 is not text"),
        ("note = ('a',\n  'b')\n", 1, "note: ('a', 'b') is not text or none"),
        ("top_k = 5\ntop_k = (\n", 2, "not valid Python"),
        ("top_k = 5\n\nseed = 1 / 0\n", 3, "the config file failed (ZeroDivisionError"),
        ("def f():\n    raise KeyError('x')\nseed = f()\n", 2, "the config file failed (KeyError"),
    ],
)
def test_mistakes_in_a_file_carry_file_and_line(tmp_path: Path, source: str, line: int, message: str) -> None:
    path = config_file(tmp_path, source)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_config_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_bytes(b"top_k = 5 # \xff\n")
    with pytest.raises(UserError, match="not a Python text file"):
        load(str(path))


def test_missing_required_setting_says_what_it_is() -> None:
    with pytest.raises(UserError) as error:
        load_config(Settings, [])
    assert str(error.value) == "--knowledge_base is required: Directory of the knowledge base."


def test_required_setting_may_come_from_the_file(tmp_path: Path) -> None:
    assert load_config(Settings, [config_file(tmp_path, "knowledge_base = 'kb'")]).knowledge_base == "kb"


def test_saved_and_printed_config_hold_every_value(tmp_path: Path) -> None:
    loaded = load("--output", "a/b")
    save_config(loaded, tmp_path / "config.json")
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == config_to_dict(loaded)
    assert saved["output"] == str(Path("a/b"))
    assert saved["betas"] == [0.9, 0.95]
    lines = format_config(loaded).splitlines()
    assert len(lines) == len(saved)
    assert len({line.index("=") for line in lines}) == 1
    assert "  top_k          = 5" in lines


SCRIPT = """
from dataclasses import dataclass
from nanochat.common import run_main
from nanochat.config import load_config

@dataclass
class Settings:
    knowledge_base: str
    '''Directory of the knowledge base.'''
    top_k: int = 5
    '''Documents per question.'''
    use_rewards: bool = False

run_main(lambda: print(load_config(Settings)))
"""


def run_script(directory: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = directory / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), *argv]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_help_shows_docstrings_required_settings_and_the_file_s_values(tmp_path: Path) -> None:
    done = run_script(tmp_path, config_file(tmp_path, "top_k = 17"), "--help")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "--knowledge_base STR" in words
    assert "(required)" in words
    assert "Documents per question. (default: 17)" in words


def test_a_mistake_is_one_line_on_stderr_and_status_2(tmp_path: Path) -> None:
    done = run_script(tmp_path, "--knowledge_base", "kb", "--topk", "5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown setting --topk; did you mean --top_k?\n"

"""docs/training.md and runs/slurm.sh: every command there is one that the scripts and torchrun take."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.config import load_config

REPOSITORY = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    text = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").split("\n")
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if any(word.startswith(("scripts.", "nanochat.")) for word in words)]


def taken(words: list[str]) -> None:
    """Raise, or leave, where torchrun or the script does not know a word."""
    module = next(word for word in words if word.startswith(("scripts.", "nanochat.")))
    at = words.index(module)
    if words[0] == "torchrun":
        run = importlib.import_module("torch.distributed.run")
        given = run.get_args_parser().parse_args(words[1:])
        assert given.training_script == module and given.module
    if module == "nanochat.retrieval":
        module, at = "nanochat.retrieval.__main__", at + 1  # after the name comes what is to be done
    loaded = importlib.import_module(module)
    load_config(loaded.Config, words[at + 1 :])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_page_has_commands_that_are_taken(words):
    taken(words)


def test_there_are_some_and_a_wrong_word_is_found():
    assert len(commands()) >= 6
    with pytest.raises(Exception, match="unknown setting --rsume"):
        taken(["torchrun", "--standalone", "-m", "scripts.base_train", "--input", "x", "--rsume", "auto"])
    with pytest.raises(SystemExit):
        taken(["torchrun", "--standalone", "--max-restart-s", "3", "-m", "scripts.base_train", "--input", "x"])


def slurm(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """The job script, with a srun that says what it is given and a scontrol that knows two machines."""
    for name, body in {"srun": 'printf "%s\\n" "$@"', "scontrol": "printf 'node7\\nnode9\\n'"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7,9]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "4"}
    return subprocess.run(
        ["bash", str(REPOSITORY / "runs/slurm.sh"), *argv],
        env={**os.environ, **job, "SLURM_SUBMIT_DIR": str(REPOSITORY), "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_a_slurm_job_is_one_torchrun_on_each_machine(tmp_path):
    done = slurm(tmp_path, "scripts.base_train", "--input", "a text", "--depth", "20")
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[0] == ".venv/bin/torchrun" and words[-2:] == ["--resume", "auto"]
    assert words[words.index("--input") + 1] == "a text"  # one word still
    given = {"--nnodes": "2", "--nproc_per_node": "4", "--rdzv_endpoint": "node7:29500", "--rdzv_id": "77"}
    assert {name: words[words.index(name) + 1] for name in given} == given
    taken(["torchrun", *words[1:]])
    done = slurm(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: give the script to run")

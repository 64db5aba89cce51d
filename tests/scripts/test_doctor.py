"""python -m scripts.doctor: on a machine where all is well, with packages broken or missing, and parts that fail."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from scripts import _packages, _self_test, doctor

REPOSITORY = Path(doctor.__file__).parents[1]
SECRETS = {"NANOCHAT_API_KEY": "sk-one-1234", "OPENAI_API_KEY": "sk-two-1234", "MILVUS_TOKEN": "sk-three-1234"}
TESTED = ["--seconds", "200"]  # of a busy machine
SELF_TEST = "self-test (at most 200 s)"
TABLE = ["--import_packages", "false", "--self_test", "false"]


def run(home: Path, *argv: str, **environment: str) -> tuple[int, str, dict]:
    """(exit status, what is printed, the last line) of the command; stderr must stay empty."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.doctor", "--json", *argv],
        cwd=REPOSITORY,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def in_process(monkeypatch, capsys, home: Path, *argv: str) -> tuple[int, str]:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    monkeypatch.setattr(sys, "argv", ["doctor", *argv])
    status = 0
    try:
        doctor.main()
    except SystemExit as left:
        status = left.code
    return status, capsys.readouterr().out


def without(folder: Path, *packages: str) -> str:
    """A PYTHONPATH on which those packages cannot be imported."""
    for package in packages:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise ImportError('lib\\nmissing.so: cannot open')\n")
    return str(folder)


def test_the_command_tells_broken_packages_and_no_secret(tmp_path, make_model, small_tokenizer):
    pytest.importorskip("faiss")
    home = tmp_path / "home"
    model = make_model(small_tokenizer.vocab_size)
    save_checkpoint(home / "checkpoints/base/tiny", 7, model, small_tokenizer, {})
    broken = without(tmp_path, "faiss", "transformers", "torch_geometric", "pymilvus")  # those that take long to import
    status, text, last = run(home, *TESTED, PYTHONPATH=broken, **SECRETS)
    assert status == 0 and last["ok"] and not last["failed"]  # they are optional
    tested = last["found"][SELF_TEST]
    assert list(tested) == list(_self_test.CHECKS) and all(check["ok"] for check in tested.values())
    packages = last["found"]["packages"]
    extras = importlib.metadata.metadata("nanochat").get_all("Provides-Extra")
    assert {"required", *extras} <= packages.keys()
    dense, version = packages["dense"]["said"], importlib.metadata.version("faiss-cpu")
    assert f"faiss-cpu {version} is broken: ImportError: lib missing.so: cannot open; there is without: " in dense
    assert '"faiss-cpu>=1.8"' in dense.rpartition("; pip install ")[2]
    assert "broken" in packages["deeprag"]["said"] and "broken" not in packages["web"]["said"]
    assert last["found"]["base directory"]["base/tiny"] == {"ok": True, "said": "step 7"}
    assert last["found"]["environment"]["NANOCHAT_BASE_DIR"]["said"] == str(home)
    assert last["found"]["environment"]["NANOCHAT_API_KEY"]["said"] == "set, not shown"
    assert not any(secret in text for secret in SECRETS.values())
    assert [path.name for path in home.iterdir()] == ["checkpoints"]  # nothing is left of the self-test


def test_without_torch_the_rest_is_told(tmp_path):
    argv = ["--import_packages", "false", *TESTED]
    status, text, last = run(tmp_path / "home", *argv, PYTHONPATH=without(tmp_path, "torch"))
    machine, tested = last["found"]["machine"], last["found"][SELF_TEST]
    assert status == 1 and not last["ok"]
    assert not machine["torch"]["ok"] and "lib missing.so" in machine["torch"]["said"]
    assert machine["cpu"]["said"].startswith("cannot be told: ImportError") and machine["memory"]["ok"]
    assert {name for name, check in tested.items() if check["ok"]} == {"knowledge base"}
    assert "failed: torch (machine), training (self-test" in text


def test_a_damaged_checkpoint_is_told(tmp_path, monkeypatch, capsys, make_model, small_tokenizer):
    root = tmp_path / "checkpoints/rag/tiny"
    model = make_model(small_tokenizer.vocab_size)
    for step in (2, 4, 6):
        save_checkpoint(root, step, model, small_tokenizer, {}, keep=3)
    (root / "step_000006/COMPLETE").unlink()  # as if its removal had been cut short
    status, text = in_process(monkeypatch, capsys, tmp_path, *TABLE)
    assert status == 0 and "step 2, 4, 6 unfinished, not read\n" in text
    weights = root / "step_000004/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the right size, so only its checksum tells
    assert in_process(monkeypatch, capsys, tmp_path, *TABLE)[0] == 0
    for content, argv in ((weights.read_bytes(), ["--verify", "true"]), (whole[:-100], []), (b"", [])):
        weights.write_bytes(content)
        status, text = in_process(monkeypatch, capsys, tmp_path, *TABLE, *argv)
        assert status == 1 and f"{root / 'step_000004'} is damaged (" in text and "step_000002 is" not in text
        assert "failed: rag/tiny (base directory)" in text


def test_a_failed_check_gives_exit_status_1(tmp_path, monkeypatch, capsys):
    def fails(place: Path) -> str:
        raise ValueError("no\ngood")

    monkeypatch.setitem(_self_test.CHECKS, "scan", fails)
    status, text = in_process(monkeypatch, capsys, tmp_path, "--import_packages", "false", "--json", "true", *TESTED)
    tested = json.loads(text.splitlines()[-1])["found"][SELF_TEST]
    assert status == 1 and tested.pop("scan") == {"ok": False, "said": "ValueError: no good"}
    assert len(tested) == len(_self_test.CHECKS) - 1 and all(check["ok"] for check in tested.values())
    (tmp_path / "file").touch()
    status, text = in_process(monkeypatch, capsys, tmp_path / "file/below", *TABLE)
    assert status == 1 and "cannot create the base directory" in text


def test_the_time_limit_holds(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(_self_test, "CHECKS", {"long": lambda place: str(never.wait(30)), "next": lambda place: ""})
    began = time.monotonic()
    found = list(_self_test.self_test(0.3, None))
    never.set()
    assert doctor.Config().seconds == 20
    assert time.monotonic() - began < 10 and [(name, well) for name, well, _ in found] == [("long", 0), ("next", 0)]
    assert found[0][2].startswith("not finished: the 0.3 seconds") and found[1][2].startswith("not run: ")


def spoilt(name: str, monkeypatch) -> None:
    """Break what a check of the self-test looks at, a little."""
    from nanochat import checkpoint_manager
    from nanochat.model import ssd
    from nanochat.model.cache import Cache
    from nanochat.optim import NamedOptimizers
    from nanochat.retrieval.lexical import LexicalRetriever

    if name == "training":
        monkeypatch.setattr(NamedOptimizers, "step", lambda self: None)
    if name == "checkpoint":
        load = checkpoint_manager.load_file
        nearly = lambda *args, **kw: {key: value * (1 + 1e-6) for key, value in load(*args, **kw).items()}  # noqa: E731
        monkeypatch.setattr(checkpoint_manager, "load_file", nearly)
    if name == "scan":
        scan = ssd.ssd_scan
        monkeypatch.setattr(ssd, "ssd_scan", lambda *args: scan(*args[:-1], None))  # as if documents were one
    if name == "decoding":
        advance = Cache.advance
        monkeypatch.setattr(Cache, "advance", lambda self, count, valid: advance(self, count + 1, valid))
    if name == "knowledge base":
        monkeypatch.setattr(LexicalRetriever, "delete", lambda self, ids, new_directory=None: None, raising=False)


@pytest.mark.parametrize("name", ["training", "checkpoint", "scan", "decoding", "knowledge base"])
def test_the_self_test_finds_what_is_broken(name, monkeypatch, tmp_path):
    (tmp_path / "before").mkdir()
    assert _self_test.CHECKS[name](tmp_path / "before")
    spoilt(name, monkeypatch)
    (tmp_path / "after").mkdir()
    with pytest.raises(UserError):
        _self_test.CHECKS[name](tmp_path / "after")


def test_another_device_is_compared_with_the_cpu(monkeypatch):
    from nanochat.model import kernels, ssd

    monkeypatch.setattr(kernels, "PACKAGES", {})
    cpu = torch.device("cpu")
    assert "scan by torch " in _self_test._compared_with_cpu(cpu)
    scan = ssd.ssd_scan
    monkeypatch.setattr(ssd, "ssd_scan", lambda x, *rest: scan(1.05 * x, *rest))
    with pytest.raises(UserError, match="too far from the CPU: scan by torch 5e-02, gradients 0e"):
        _self_test._compared_with_cpu(cpu)


def test_packages_too_old_absent_and_of_another_system(monkeypatch):
    lines = [
        "numpy<1",
        "nowhere[part]>=2; extra == 'dense'",
        "elsewhere>=1; sys_platform == 'none' and extra == 'dense'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = {name: (well, said) for name, well, said in _packages.packages(imports=True)}
    numpy = importlib.metadata.version("numpy")
    assert found["required"] == (False, f'numpy {numpy} is not <1; pip install "numpy<1"')
    assert found["dense"][0] and found["dense"][1].startswith("nowhere missing; there is without: simple and bm25")
    assert found["dense"][1].endswith('pip install "nowhere[part]>=2"') and found["web"] == (True, "")
    monkeypatch.undo()
    extras = importlib.metadata.metadata("nanochat").get_all("Provides-Extra")
    assert set(extras) <= set(_packages.WITHOUT), "say what works without the new extra"

"""Checkpoints come back whole, a killed writer harms nothing, and what cannot be loaded says so in one line."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys

import pytest
import torch

from nanochat.checkpoint_manager import (
    checkpoint_root,
    find_model_tag,
    list_steps,
    load_checkpoint,
    load_model,
    mark_complete,
    newest,
    require_space,
    save_checkpoint,
    verify,
)
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer


@pytest.fixture
def model(small_tokenizer, make_model):
    return make_model(small_tokenizer.vocab_size)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, small_tokenizer, make_model, tied):
    model = make_model(small_tokenizer.vocab_size, "TM", tie_embeddings=tied)
    state = {"embed.weight/exp_avg": torch.randn(3, 4).t(), "embed.weight/step": torch.tensor(7.0)}
    meta = {"training_config": {"max_seq_len": 64}, "rng": [1, 2]}
    path = save_checkpoint(tmp_path, 5, model, small_tokenizer, meta, state)
    assert path == tmp_path / "step_000005"
    loaded, tokenizer, read, read_state = load_checkpoint(tmp_path)
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.embed.weight) == tied
    assert tokenizer.fingerprint == small_tokenizer.fingerprint
    assert (read["step"], read["rng"], read["training_config"]) == (5, [1, 2], {"max_seq_len": 64})
    assert read_state.keys() == state.keys()
    assert all(torch.equal(read_state[k], state[k]) for k in state)
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    assert load_checkpoint(tmp_path, with_optimizer=False)[3] is None
    # a loaded model can be trained on: its weights are leaves with gradients, tied ones still one
    loaded(tokens, tokens).backward()
    assert all(p.is_leaf and p.grad is not None for p in loaded.parameters())
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_incomplete_directories_are_ignored(tmp_path, small_tokenizer, model):
    for step in (2, 4):
        save_checkpoint(tmp_path, step, model, small_tokenizer, {"at": step})
    shutil.copytree(tmp_path / "step_000004", tmp_path / "step_000009")
    (tmp_path / "step_000009" / "COMPLETE").unlink()
    shutil.copytree(tmp_path / "step_000004", tmp_path / ".writing-step_000010")
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_000011").touch()
    assert list_steps(tmp_path) == [2, 4]
    assert load_checkpoint(tmp_path)[2]["at"] == 4
    assert load_checkpoint(tmp_path, 2)[2]["at"] == 2
    with pytest.raises(UserError, match=r"step 9 .*there are \[2, 4\]"):
        load_checkpoint(tmp_path, 9)
    with pytest.raises(UserError, match="no complete checkpoint in"):
        load_checkpoint(tmp_path / "nowhere")


def test_keeps_the_newest_and_replaces_an_earlier_run(tmp_path, small_tokenizer, model):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, model, small_tokenizer, {"run": 1})
    assert list_steps(tmp_path) == [20, 30]
    save_checkpoint(tmp_path, 40, model, small_tokenizer, {"run": 1}, keep=3)
    assert list_steps(tmp_path) == [20, 30, 40]
    # a new run into the same directory: its first checkpoint must not be dropped as the oldest, nor hidden by old ones
    save_checkpoint(tmp_path, 20, model, small_tokenizer, {"run": 2})
    assert list_steps(tmp_path) == [20]
    assert load_checkpoint(tmp_path)[2]["run"] == 2


def child(work, *arguments):
    """Run it in a forked process; its exit status."""
    pid = os.fork()
    if not pid:
        try:  # whatever happens, the child must not go on as a second test run
            signal.alarm(30)
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(number, root):
    """Die, with no cleanup and no finally, before the number-th time that something below root is opened, made,
    renamed or removed."""
    seen = itertools.count(1)

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            inside = len(arguments) > 1 and arguments[-1] not in (-1, None) and event in ("os.remove", "os.rmdir")
            if (inside or str(arguments[0]).startswith(str(root))) and next(seen) == number:
                os._exit(9)

    sys.addaudithook(hook)


@pytest.mark.parametrize(("step", "others"), [(3, [1, 2]), (2, [1, 2]), (1, [1, 2])], ids=["new", "same", "earlier"])
def test_a_writer_killed_at_any_moment_leaves_the_newest_state_whole(tmp_path, small_tokenizer, model, step, others):
    """step: a new one; one that an earlier run has; one before others of an earlier run."""
    original, root = tmp_path / "original", tmp_path / "root"
    for old in others:
        save_checkpoint(original, old, model, small_tokenizer, {"run": 1})
    seen = set()
    for number in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)

        def save(number=number):
            die_at(number, root)
            save_checkpoint(root, step, model, small_tokenizer, {"run": 2})

        status = child(save)
        loaded, _, meta, _ = load_checkpoint(root)
        assert same_weights(loaded, model)
        assert (meta["step"], meta["run"]) in {(2, 1), (step, 2)}
        seen.add((meta["step"], meta["run"]))
        for complete in list_steps(root):
            verify(newest(root, complete))
        if status == 0:
            break
        assert status == 9
        save_checkpoint(root, 4, model, small_tokenizer, {})  # what lies half-written is in nobody's way
        assert list_steps(root)[-1] == 4
        assert not [file for file in root.iterdir() if not re.fullmatch(r"step_\d{6}", file.name)]
    assert number > 15 and seen == {(2, 1), (step, 2)}


def test_a_full_disk_is_told_and_the_old_checkpoint_stays(tmp_path, small_tokenizer, model, monkeypatch):
    save_checkpoint(tmp_path, 1, model, small_tokenizer, {})
    before = {p: p.read_bytes() for p in (tmp_path / "step_000001").iterdir()}
    most = (tmp_path / "step_000001/model.safetensors").stat().st_size

    def filled():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing on is an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most // 2, most // 2))
        with pytest.raises(UserError, match=r"cannot write .*step_000002 \(.+\); .*step_000001 is whole"):
            save_checkpoint(tmp_path, 2, model, small_tokenizer, {})

    assert child(filled) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "step_000001").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["step_000001"]
    save_checkpoint(tmp_path, 2, model, small_tokenizer, {})
    with pytest.raises(UserError, match=r"need 1e\+06 GB more, and .* GB are free.*step_000002 is whole"):
        require_space(tmp_path, 10**15)
    require_space(tmp_path / "not" / "there", 1000)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json", "tokenizer.json"])
def test_a_changed_byte_is_noticed(tmp_path, small_tokenizer, model, name):
    path = save_checkpoint(tmp_path, 1, model, small_tokenizer, {}, {"embed.weight/step": torch.tensor(1.0)})
    content = bytearray((path / name).read_bytes())
    content[-3] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"step_000001 is damaged \({name} is not as it was written\)"):
        load_checkpoint(tmp_path)
    if name == "optimizer.safetensors":  # it is not read, and not looked at, where only the model is wanted
        load_checkpoint(tmp_path, with_optimizer=False)


def test_checkpoints_from_before_checksums_still_load(tmp_path, small_tokenizer, model):
    path = save_checkpoint(tmp_path, 1, model, small_tokenizer, {})
    (path / "COMPLETE").write_text("")
    assert same_weights(load_checkpoint(tmp_path)[0], model)


def test_another_tokenizer_is_refused(tmp_path, small_tokenizer, model):
    path = save_checkpoint(tmp_path, 1, model, small_tokenizer, {})
    Tokenizer.train(["something else entirely"] * 3, 280).save(path)
    mark_complete(path)
    with pytest.raises(UserError, match=r"step_000001: tokenizer.json is not the one"):
        load_checkpoint(tmp_path)


def edit_meta(path, **changes):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({k: v for k, v in {**meta, **changes}.items() if v is not None}))
    mark_complete(path)


DAMAGE = {
    "weights cut off": lambda p: os.truncate(p / "model.safetensors", 1000),
    "weights missing": lambda p: (p / "model.safetensors").unlink(),
    "optimizer cut off": lambda p: os.truncate(p / "optimizer.safetensors", 20),
    "meta not JSON": lambda p: (p / "meta.json").write_text("{"),
    "meta not UTF-8": lambda p: (p / "meta.json").write_bytes(b"\xff\xfe"),
    "meta a list": lambda p: (p / "meta.json").write_text("[]"),
    "meta without config": lambda p: edit_meta(p, model_config=None),
    "meta without tokenizer": lambda p: edit_meta(p, tokenizer_fingerprint=None),
    "unknown model setting": lambda p: edit_meta(p, model_config={"vocab_size": 320, "colour": "red"}),
    "impossible pattern": lambda p: edit_meta(p, model_config={"vocab_size": 320, "block_pattern": "XY"}),
    "tokenizer cut off": lambda p: os.truncate(p / "tokenizer.json", 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_line(tmp_path, small_tokenizer, model, damage):
    path = save_checkpoint(tmp_path, 1, model, small_tokenizer, {}, {"embed.weight/step": torch.tensor(1.0)})
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=r"step_000001.* (is damaged|not a readable)"):
        load_checkpoint(tmp_path)


def test_other_formats_and_shapes_are_named(tmp_path, small_tokenizer, model):
    path = save_checkpoint(tmp_path, 1, model, small_tokenizer, {})
    config = json.loads((path / "meta.json").read_text())["model_config"]
    edit_meta(path, model_config={**config, "d_model": 64})
    with pytest.raises(UserError, match=r"model.safetensors does not match its config"):
        load_checkpoint(tmp_path)
    edit_meta(path, model_config=config, format_version=99)
    with pytest.raises(UserError, match="format version 99, this program reads 1"):
        load_checkpoint(tmp_path)


def test_load_model_picks_the_newest_tag_and_lists_known_ones(tmp_path, monkeypatch, small_tokenizer, model):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no checkpoint of source 'mid'.*python -m scripts.chat_sft"):
        load_model("mid")
    for tag, step, written in (("zebra", 50, 1000), ("apple", 7, 3000), ("mango", 900, 2000)):
        path = save_checkpoint(checkpoint_root("mid", tag), step, model, small_tokenizer, {"tag": tag})
        os.utime(path / "COMPLETE", (written, written))
    (checkpoint_root("mid", "empty") / "step_000001").mkdir(parents=True)
    (checkpoint_root("mid", "a_file")).touch()
    assert find_model_tag("mid") == "apple"

    loaded, _, meta = load_model("mid")
    assert (meta["tag"], loaded.training) == ("apple", False)
    loaded, _, meta = load_model("mid", model_tag="zebra", phase="train")
    assert (meta["tag"], loaded.training) == ("zebra", True)
    assert all(p.requires_grad for p in loaded.parameters())
    for unknown in ("pear", "empty"):
        with pytest.raises(UserError, match=f"mid.{unknown}; there are: apple, mango, zebra"):
            load_model("mid", model_tag=unknown)
    with pytest.raises(UserError, match=r"no complete checkpoint of step 8 .*there are \[7\]"):
        load_model("mid", step=8)

"""Promises of nanochat/common.py: one-line errors, atomic files, a light import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import common
from nanochat.common import UserError, atomic_write_bytes, atomic_write_text, get_base_dir, print0, run_main

REPOSITORY = Path(common.__file__).parents[1]


def test_run_main_turns_a_user_error_into_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("the file\nis bad")

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the file is bad\n"


def test_run_main_exits_130_on_ctrl_c() -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 130


def test_run_main_hides_no_other_error() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: print(1 / 0))


def test_print0_prints_on_the_main_process_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print0("main")
    monkeypatch.setenv("RANK", "1")
    print0("other")
    assert capsys.readouterr().out == "main\n"


def test_base_dir_is_created_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert get_base_dir() == tmp_path / "a" / "b"
    assert get_base_dir().is_dir()


def test_base_dir_that_cannot_be_made_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        get_base_dir()


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "long old text é")
    atomic_write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_failed_atomic_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_goes_through_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    atomic_write_bytes(target, b"old")
    link.symlink_to(target)
    atomic_write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_compute_init_seeds_and_refuses_what_is_not_there() -> None:
    torch = pytest.importorskip("torch")
    compute = common.compute_init("cpu", seed=3)
    first = torch.rand(4)
    assert compute.is_main
    assert compute.world_size == 1
    common.compute_init("cpu", seed=3)
    assert torch.equal(first, torch.rand(4))
    with pytest.raises(UserError, match="unknown device"):
        common.compute_init("warp-drive")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            common.compute_init("cuda")
        assert common.compute_init("auto").device.type == "cpu"


def test_common_does_not_import_torch() -> None:
    code = "import sys, nanochat.common, nanochat.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0

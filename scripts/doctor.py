"""What this machine has, what is missing, and whether the parts work on it.

    python -m scripts.doctor                      # a table, then a self-test of at most 20 seconds
    python -m scripts.doctor --self_test false    # the table alone
    python -m scripts.doctor --json               # and all of it as one JSON object in the last line

Exit status 1 when something failed, 0 when all is well; an optional package that is missing is no failure. It uses no
network, and of environment variables it shows the names alone but for the two that are folders. Each line is found out
by itself, with its imports: where torch or another package is missing or broken, the others still say what they know.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, get_base_dir, quiet, run_main
from nanochat.config import load_config
from scripts._packages import packages
from scripts._self_test import THREAD, one_line, self_test

SHOWN = ("NANOCHAT_BASE_DIR", "NANOCHAT_DATA")  # environment variables whose values are no secrets
Said = tuple[bool, str]  # whether it is well, and what there is to say


@dataclass(kw_only=True)
class Config:
    """Say what this machine has and what is missing, and test the parts on it."""

    self_test: bool = True
    """Train, save, load, decode and search something tiny."""
    seconds: float = 20.0
    """The self-test's time limit."""
    import_packages: bool = True
    """Import the packages that are installed, which finds broken ones; false: look at versions only, in no time."""
    verify: bool = False
    """Read every checkpoint whole and compare checksums; false: look at sizes only, in no time."""
    json: bool = False
    """Print everything as one JSON object in the last line."""


def _tell(find: Callable[[], str | Said]) -> Said:
    """What find() says. What cannot be told is no failure by itself: the package that it takes is listed too."""
    try:
        with quiet():
            said = find()
    except Exception as error:  # a broken package can raise anything
        return True, f"cannot be told: {one_line(error)}"
    return said if isinstance(said, tuple) else (True, said)


# --- the machine


def python_version() -> str:
    return f"{platform.python_version()} on {platform.platform()} ({sys.executable})"


def torch_build() -> Said:
    try:
        import torch
    except Exception as error:
        return False, f"cannot be imported ({one_line(error)}): install it again, as README.md says"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip and f"ROCm {torch.version.hip}"
    return True, f"{torch.__version__}, built for {build or 'the CPU alone'}"


def processor() -> str:
    import torch

    from nanochat.training import resolve_dtype

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = resolve_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return f"{usable} cores, {torch.get_num_threads()} threads in torch; bf16 in hardware: {'yes' if fast else 'no'}"


def memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    return f"{total / 1e9:.1f} GB" + (f", {int(found[1]) * 1024 / 1e9:.1f} GB available" if found else "")


def gpus() -> str:
    import torch

    if torch.backends.mps.is_available():
        return "Apple's, with --device mps"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")
    if not found and not driver().startswith("none"):
        return "there is one (see driver), which this build of torch does not see: install torch for its CUDA version"
    return "; ".join(found) or "none"


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    lines = sorted(set(done.stdout.split("\n")) - {""})
    return "; ".join(lines) if done.returncode == 0 and lines else f"none (nvidia-smi: {done.stdout or done.stderr})"


def scan_kernels() -> str:
    import torch

    from nanochat.model.kernels import PACKAGES, set_ssm_kernel

    if not torch.cuda.is_available():
        return "torch, the only one without a CUDA GPU"
    there = []
    for name in PACKAGES:
        with contextlib.suppress(UserError):  # not installed
            set_ssm_kernel(name)
            there.append(name)
    set_ssm_kernel("auto")
    return f"{[*there, 'torch'][0]} (there are: {', '.join([*there, 'torch'])})"


def attention() -> str:
    import torch

    if not torch.cuda.is_available():
        return "our blocks of queries (nanochat/model/packed.py)"
    kinds = ("flash", "mem_efficient", "cudnn")
    return "torch's, fused: " + ", ".join(k for k in kinds if getattr(torch.backends.cuda, f"{k}_sdp_enabled")())


def fp8() -> str:
    import torch

    from nanochat.model.fp8 import fp8_config

    try:
        fp8_config(torch.device("cuda" if torch.cuda.is_available() else "cpu"), emulate=False)
    except UserError as error:
        return f"no: {error}"
    return "yes, with --fp8 --compile"


def processes() -> str:
    import torch.distributed as dist

    there = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    return "torchrun over " + (", ".join(name for name, well in there.items() if well) or "nothing")


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    return found or "none: --compile and compiled decoding need g++ or clang++"


def open_files() -> str:
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    hint = "; a server of many segments and clients needs more: ulimit -n 4096" if 0 <= now < 1024 else ""
    return f"{now} (at most {most}){hint}"


def environment() -> Iterator[tuple[str, bool, str]]:
    for name in sorted({*SHOWN, *(name for name in os.environ if name.startswith("NANOCHAT_"))}):
        value = os.environ.get(name)
        yield name, True, "not set" if value is None else value if name in SHOWN else "set, not shown"


# --- the base directory


def disk() -> Said:
    try:
        base = get_base_dir()
        free = shutil.disk_usage(base).free
    except (UserError, OSError) as error:
        return False, one_line(error)
    if not os.access(base, os.W_OK):
        return False, f"{base} cannot be written to: change its rights, or set NANOCHAT_BASE_DIR to another one"
    hint = "; --plan of a training script says what its checkpoints take" if free < 10e9 else ""
    return True, f"{base}, {free / 1e9:.1f} GB free{hint}"


def checkpoints(checksums: bool) -> Iterator[tuple[str, bool, str]]:
    """(folder, whether it is well, its steps) of every model in the base directory."""
    try:
        root = get_base_dir() / "checkpoints"
        found = [path for path in root.rglob("step_*") if path.name[5:].removesuffix(".new").isdigit()]
    except (UserError, OSError):
        return  # disk() has said so
    if not found:
        yield "checkpoints", True, "none yet"
    for folder in sorted({path.parent for path in found}):
        steps, damaged = [], []
        for path in sorted(path for path in found if path.parent == folder):
            complete = (path / "COMPLETE").exists()
            steps.append(path.name[5:].lstrip("0") + ("" if complete else " unfinished, not read"))
            if complete and (fault := _fault(path, checksums)):
                damaged.append(f"{path} is damaged ({fault}): delete it to fall back to the one before")
        yield str(folder.relative_to(root)), not damaged, "; ".join([f"step {', '.join(steps)}", *damaged])


def _fault(directory: Path, checksums: bool) -> str:
    """What is wrong with a checkpoint; "" if nothing is."""
    try:
        from safetensors import safe_open

        json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        written = (directory / "COMPLETE").read_text(encoding="utf-8")  # empty in old ones
        for name, entry in json.loads(written)["files"].items() if written else ():
            if (directory / name).stat().st_size != entry["size"]:
                return f"{name} is not of the size that was written"
        files = sorted(directory.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="numpy"):  # compares the file's size with what its header promises
                pass
        if checksums:
            from nanochat.checkpoint_manager import verify

            verify(directory)
    except Exception as error:  # safetensors has an error of its own, and it or torch may be broken
        return one_line(error)
    return "" if files else "no *.safetensors in it"


# --- the report

MACHINE = {
    "python": python_version,
    "torch": torch_build,
    "cpu": processor,
    "memory": memory,
    "gpu": gpus,
    "driver": driver,
    "scan kernel": scan_kernels,
    "attention": attention,
    "fp8": fp8,
    "processes": processes,
    "C++ compiler": compiler,
    "open files": open_files,
}


def examine(config: Config) -> Iterator[tuple[str, str, bool, str]]:
    """(part, name, whether it is well, what there is to say), found out one by one."""
    for name, find in MACHINE.items():
        yield "machine", name, *_tell(find)
    for row in packages(config.import_packages):
        yield "packages", *row
    usable, said = disk()
    yield "base directory", "place", usable, said
    for row in checkpoints(config.verify):
        yield "base directory", *row
    for row in environment():
        yield "environment", *row
    if config.self_test:
        for row in self_test(config.seconds, get_base_dir() if usable else None):
            yield f"self-test (at most {config.seconds:g} s)", *row


def main() -> None:
    config = load_config(Config)
    began = time.monotonic()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    failed = []
    for part, name, well, said in examine(config):
        if part not in found:
            print(f"\n{part}" if found else part)
        found.setdefault(part, {})[name] = {"ok": well, "said": said}
        failed += [] if well else [f"{name} ({part})"]
        print(f"  {name:<17} {'ok    ' if well else 'FAILED'} {said}", flush=True)
    print(f"\n{'all is well' if not failed else 'failed: ' + ', '.join(failed)}")
    if config.json:
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"ok": not failed, "failed": failed, "seconds": seconds, "found": found}))
    sys.stdout.flush()
    if any(thread.name == THREAD for thread in threading.enumerate()):
        os._exit(1)  # a check that was not finished is still running, and Python would not end well beside it
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)

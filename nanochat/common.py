"""What every part of the project needs: clear errors, the base directory, devices and ranks, atomic files.

torch is imported inside the functions that use it, so that `nanochat.retrieval` can share this file and still run,
and start quickly, on a machine that has no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


class Stopped(Exception):
    """A signal has ended the work, and what was done is saved."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit status 2, Ctrl-C becomes status 130, a run
    that saved and stopped when it was told to by SIGTERM status 143, by SIGINT 130."""
    try:
        main()
    except UserError as error:
        print("error: " + " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"stopped by {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)


def print0(*args: Any, **kwargs: Any) -> None:
    """print, on the main process only, flushed so that a log file can be followed."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*args, **{"flush": True, **kwargs})


def get_base_dir() -> Path:
    """Where tokenizers, checkpoints and caches live: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat. Created if absent."""
    configured = os.environ.get("NANOCHAT_BASE_DIR")
    base_dir = Path(configured).expanduser() if configured else Path.home() / ".cache" / "nanochat"
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the base directory {base_dir} ({error.strerror}); set NANOCHAT_BASE_DIR to another one"
        ) from error
    return base_dir


@dataclass
class Compute:
    """The device this process computes on, and its place among the processes of the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def compute_init(device: str = "auto", seed: int = 0) -> Compute:
    """Pick the device, join the process group when torchrun started us, and seed every generator.

    "auto" takes CUDA where there is one and the CPU elsewhere; "mps" has to be asked for by name.
    Every rank gets the same seed, so that all of them initialise the same weights.
    """
    import torch

    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device {device!r}: use auto, cpu, cuda or mps") from error
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} asked for, but torch sees no CUDA GPU; use --device cpu or --device auto")
    if torch_device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' asked for, but torch sees no Apple GPU; use --device cpu or --device auto")

    if torch_device.type == "cuda":
        if torch_device.index is None:
            torch_device = torch.device("cuda", local_rank)
        if torch_device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} found); "
                "lower --nproc_per_node"
            )
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32

    # RANK is set by torchrun only; with one process under torchrun a group still exists, so collectives work
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        backend, place = ("nccl", {"device_id": torch_device}) if torch_device.type == "cuda" else ("gloo", {})
        torch.distributed.init_process_group(backend, store=_meeting_place(), rank=rank, world_size=world_size, **place)

    seed_everything(seed)
    return Compute(torch_device, rank, local_rank, world_size)


def _meeting_place() -> Any:
    """The store in which ranks find each other. torchrun keeps one through all restarts, where those that are started
    again would read where the killed ones were; on one machine the number of the restart tells them apart, of several
    each may count another."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if (
        os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    ):
        print0("restarts over several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun on each")
    return store


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next allocation instead of returning it to the system, and the system to
    back it with huge pages.

    Training on a CPU allocates and frees the same large tensors every step. By default each comes as fresh pages that
    the kernel has to map and clear, an eighth of a small model's step; and looking up thousands of pages of 4 KB takes
    a tenth of it. Elsewhere than on Linux with glibc it does nothing.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -2, -4, 14  # malloc.h, mman.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    # one large stretch of addresses (not of memory) for the heap, whose pages are huge wherever they are touched
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.free(libc.malloc(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))
    mallopt(M_TOP_PAD, 64 << 20)
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/self/maps") as maps:
        heap = next(line for line in maps if line.rstrip().endswith("[heap]")).split()[0]
        start, end = (int(address, 16) for address in heap.split("-"))
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(start, end - start, MADV_HUGEPAGE)


def compute_cleanup() -> None:
    """Leave the process group, if there is one; together, since the main process may still be writing its report and
    its peers must not tear their connections to it down meanwhile."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def atomic_write_bytes(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, whole or piece by piece, so that a reader, or a crash, sees the old content or the new, never half
    of one."""
    target = Path(os.path.realpath(path))  # through a link: the file behind it is replaced, the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush(target.parent)  # the rename itself must reach the disk too


def flush(path: Path) -> None:
    """A file or a directory to disk, now: a rename must not arrive there before what it names."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write_text(path: str | Path, text: str) -> None:
    """atomic_write_bytes for UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around imports of transformers and peft: they try every kernel of torchao, which warns of each that this machine
    lacks, and peft's use of transformers warns of names that will change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def save_array(path: Path, array: np.ndarray) -> None:
    """As np.save, but for a full disk: NumPy hands files to C, which loses the end of a small array without a word."""
    save_rows(path, array.shape, array.dtype, [array])


def save_rows(path: Path, shape: tuple[int, ...], dtype: Any, parts: Iterable[np.ndarray]) -> None:
    """An array of this shape, its rows part by part. Written and not mapped: a page of a map that the disk has no room
    for is no error but the end of the process."""
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data)

"""Save, find and load checkpoints: safetensors and JSON, written beside and renamed, marked complete last.

    <base dir>/checkpoints/<source>/<model_tag>/step_000500/
        model.safetensors       parameters by name
        optimizer.safetensors   optimizer state by "parameter/state", whole tensors: any number of ranks reads it
        lora.safetensors        where LoRA was trained: its matrices, which model.safetensors holds merged
        tokenizer.json          the tokenizer the model was trained with
        meta.json               model config, training config, step, data position, RNG, git revision
        COMPLETE                written last: size and checksum of every file; a directory without it is ignored

Sources are the stages of training: base, mid, rag, refrag, refrag_rl, agent_sft, agent, embed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.common import UserError, flush, get_base_dir, sha256_of
from nanochat.model.lm import HybridLM, ModelConfig
from nanochat.model.lora import has_lora, merged, save_adapter
from nanochat.tokenizer import Tokenizer

T = TypeVar("T")
FORMAT_VERSION = 1
MARKER = "COMPLETE"
BESIDE = "beside.safetensors"  # of another module that was trained along with the model
OPTIMIZER = "optimizer.safetensors"
_NEW = ".new"
_SCRIPTS = {
    "base": "base_train",
    "mid": "chat_sft",
    "rag": "rag_finetune",
    "embed": "embed_finetune",
    "refrag": "refrag_finetune",
    "refrag_rl": "refrag_finetune",
    "agent_sft": "agent_train",
    "agent": "agent_train",
}


def checkpoint_root(source: str, model_tag: str) -> Path:
    return get_base_dir() / "checkpoints" / source / model_tag


def find_model_tag(source: str, model_tag: str = "") -> str:
    """The given tag, or the most recently written one of this source."""
    root = get_base_dir() / "checkpoints" / source
    tags = [d for d in root.iterdir() if list_steps(d)] if root.is_dir() else []
    if model_tag:
        if not list_steps(root / model_tag):
            known = f"; there are: {', '.join(sorted(d.name for d in tags))}" if tags else ""
            raise UserError(f"no complete checkpoint in {root / model_tag}{known}")
        return model_tag
    if not tags:
        hint = f": train one with python -m scripts.{_SCRIPTS[source]}" if source in _SCRIPTS else ""
        raise UserError(f"no checkpoint of source '{source}' in {root}{hint}")
    return max(tags, key=lambda d: (_of_step(d, list_steps(d)[-1]) / MARKER).stat().st_mtime).name


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def list_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints in root, ascending."""
    if not root.is_dir():
        return []
    names = {d.name.removesuffix(_NEW) for d in root.glob("step_*") if (d / MARKER).exists()}
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def _of_step(root: Path, step: int) -> Path:
    """Where it is; what replaces a checkpoint of the same step stands beside it until that one is gone."""
    new = root / (_step_name(step) + _NEW)
    return new if (new / MARKER).exists() else root / _step_name(step)


def save_checkpoint(
    root: Path,
    step: int,
    model: HybridLM,
    tokenizer: Tokenizer,
    meta: dict,
    optimizer_state: dict[str, Tensor] | None = None,
    keep: int = 2,
    beside: nn.Module | None = None,
) -> Path:
    """Write root/step_XXXXXX, as `commit` does."""

    def write(directory: Path) -> None:
        # a tied weight is one tensor under two names; safetensors wants it once
        tensors = {k: v.contiguous() for k, v in merged(model).items()}
        if model.config.tie_embeddings:
            del tensors["lm_head.weight"]
        save_file(tensors, directory / "model.safetensors")
        if has_lora(model):
            save_adapter(model, directory)
        if beside is not None:
            save_beside(directory, beside)
        if optimizer_state is not None:
            save_file({k: v.contiguous() for k, v in optimizer_state.items()}, directory / OPTIMIZER)
        tokenizer.save(directory)

    about = {"model_config": asdict(model.config), "tokenizer_fingerprint": tokenizer.fingerprint}
    return commit(root, step, write, about | meta, keep)


def commit(root: Path, step: int, write: Callable[[Path], None], meta: dict, keep: int = 2) -> Path:
    """Write root/step_XXXXXX whole or not at all, then drop all but the newest `keep` checkpoints, and those of later
    steps: they are of an earlier run that this one replaces, and would be taken for its newest. write: called with the
    directory to write to. UserError where there is no room; what was there is there still."""
    root.mkdir(parents=True, exist_ok=True)
    _clear_up(root)
    temporary = root / f".writing-{_step_name(step)}"
    try:
        temporary.mkdir()
        write(temporary)
        meta = {"format_version": FORMAT_VERSION, "step": step, "git_revision": git_revision(), **meta}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        for file in temporary.rglob("*"):
            if file.is_file():  # safetensors makes files that nobody else may read
                file.chmod(temporary.stat().st_mode & 0o666)
            flush(file)
        mark_complete(temporary)
        flush(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # what was written of it keeps the disk full
        raise UserError(f"cannot write {root / _step_name(step)} ({_reason(error)}); {_last(root)}") from error
    final = root / _step_name(step)
    if final.exists():
        new = temporary.rename(root / (final.name + _NEW))
        flush(root)
        _remove(final)
        new.rename(final)
    else:
        temporary.rename(final)
    flush(root)
    steps = list_steps(root)
    kept = [s for s in steps if s <= step][-keep:]
    for old in set(steps) - set(kept):
        _remove(root / _step_name(old))
    return final


def mark_complete(directory: Path) -> None:
    """Say that a checkpoint is whole, and what its files are."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / MARKER]
    entries = {file.relative_to(directory).as_posix(): _entry(file) for file in files}
    with open(directory / MARKER, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _entry(file: Path) -> dict:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def verify(directory: Path, without: Collection[str] = ()) -> None:
    """Compare a checkpoint's files with what was written; UserError if one is not the same. without: files that will
    not be read. Checkpoints from before there were checksums pass."""
    try:
        written = (directory / MARKER).read_text(encoding="utf-8")
        for name, entry in json.loads(written)["files"].items() if written else ():
            if name in without:
                continue
            if not (directory / name).exists():
                raise ValueError(f"{name} is missing")
            if _entry(directory / name) != entry:
                raise ValueError(f"{name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{directory} is damaged ({e}): delete it to fall back to the one before") from e


def require_space(root: Path, size: int, kept: int = 0) -> None:
    """UserError if root's disk has no room for a checkpoint of so many bytes that is written while `kept` others are
    there; what root has already is not counted twice."""
    needed = size * (1 + max(0, kept - len(list_steps(root))))
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{root}: checkpoints need {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free; make room, or set "
            f"NANOCHAT_BASE_DIR to another disk; {_last(root)}"
        )


def _last(root: Path) -> str:
    steps = list_steps(root)
    return f"{_of_step(root, steps[-1])} is whole (--resume auto)" if steps else "there is no checkpoint before it"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[-1]


def _clear_up(root: Path) -> None:
    """After a writer that was killed: away with half a checkpoint, and on with a replacement that was cut short."""
    for stale in root.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for new in root.glob(f"step_*{_NEW}"):
        old = new.with_name(new.name.removesuffix(_NEW))
        if old.exists():
            _remove(old)
        new.rename(old)


def newest(root: Path, step: int | None = None, with_optimizer: bool = False) -> Path:
    """Directory of the newest complete checkpoint, or of this step's, with files as they were written. UserError if
    there is none. with_optimizer: whether its state will be read, and has to be looked at too."""

    def verified(directory: Path) -> Path:
        verify(directory, () if with_optimizer else (OPTIMIZER,))
        return directory

    return _read(root, step, verified)


def _read(root: Path, step: int | None, read: Callable[[Path], T]) -> T:
    """What `read` makes of the newest complete checkpoint, or of this step's; once more where a training run has
    removed or replaced it meanwhile."""
    while True:
        steps = list_steps(root)
        if not steps:
            raise UserError(f"no complete checkpoint in {root}")
        if step is not None and step not in steps:
            raise UserError(f"no complete checkpoint of step {step} in {root}; there are {steps}")
        directory = _of_step(root, steps[-1] if step is None else step)
        before = _identity(directory)
        try:
            found = read(directory)
        except UserError:
            if _identity(directory) == before:
                raise
            continue
        if _identity(directory) == before:
            return found


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        about = (directory / MARKER).stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def read_meta(directory: Path) -> dict:
    """Of a checkpoint; it must be of the format that this program reads."""
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{directory}: format version {meta['format_version']}, this program reads {FORMAT_VERSION}")
    return meta


def save_beside(directory: Path, module: nn.Module) -> None:
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, directory / BESIDE)


def load_beside(directory: Path, module: nn.Module) -> None:
    """The weights of what was trained beside a model, from its checkpoint."""
    try:
        module.load_state_dict(load_file(directory / BESIDE))
    except (OSError, SafetensorError, RuntimeError) as e:
        raise UserError(f"{directory / BESIDE} cannot be read ({str(e).splitlines()[-1]})") from e


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first: a removal cut short must not leave half a checkpoint marked
    shutil.rmtree(checkpoint)


def git_revision() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def load_checkpoint(
    root: Path, step: int | None = None, device: torch.device | str = "cpu", with_optimizer: bool = True
) -> tuple[HybridLM, Tokenizer, dict, dict[str, Tensor] | None]:
    """(model, tokenizer, meta, optimizer state or None) of root's newest complete checkpoint, or of `step`."""
    return _read(root, step, lambda directory: _load(directory, device, with_optimizer))


def _load(
    directory: Path, device: torch.device | str, with_optimizer: bool
) -> tuple[HybridLM, Tokenizer, dict, dict[str, Tensor] | None]:
    verify(directory, () if with_optimizer else (OPTIMIZER,))
    try:
        meta = read_meta(directory)
        config = ModelConfig(**meta["model_config"])
        tensors = load_file(directory / "model.safetensors", device=str(device))
        if config.tie_embeddings:
            tensors["lm_head.weight"] = tensors["embed.weight"]
        optimizer_file = directory / OPTIMIZER
        wanted = with_optimizer and optimizer_file.exists()
        optimizer_state = load_file(optimizer_file, device=str(device)) if wanted else None
        fingerprint = meta["tokenizer_fingerprint"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{directory} is damaged ({e}): delete it to fall back to the one before") from e
    tokenizer = Tokenizer.load(directory)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{directory}: tokenizer.json is not the one this model was trained with; put the original back"
        )
    with torch.device("meta"):
        model = HybridLM(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise UserError(f"{directory}/model.safetensors does not match its config: {str(e).splitlines()[-1]}") from e
    if config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    meta |= {"directory": str(directory), "model_tag": directory.parent.name}
    return model, tokenizer, meta, optimizer_state


def load_model(
    source: str,
    device: torch.device | str = "cpu",
    phase: str = "eval",
    model_tag: str = "",
    step: int | None = None,
) -> tuple[HybridLM, Tokenizer, dict]:
    """The newest complete checkpoint of a source ("base", "mid", "rag"), ready to use.

    phase "eval" or "train" sets the module's mode. Without model_tag, the tag written last.
    """
    root = checkpoint_root(source, find_model_tag(source, model_tag))
    model, tokenizer, meta, _ = load_checkpoint(root, step, device, with_optimizer=False)
    model.requires_grad_(True)
    model.train(phase == "train")
    return model, tokenizer, meta

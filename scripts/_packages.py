"""The packages of scripts.doctor: what the project's metadata asks for, and what of it is there and not broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import quiet
from scripts._self_test import one_line

WITHOUT = {  # what works without an extra's packages
    "fast": "BM25 searches in NumPy, with the same results",
    "dense": "simple and bm25 search, and our own model as the encoder (--model self)",
    "deeprag": "the dsi index as one of our own models (--model lm)",
    "kg": "all of D-RAG, which tests compare with it",
    "hf": "our own models and data from files",
    "lora": "training of all weights",
    "own": "text and JSONL files",
    "web": "chat in the terminal (scripts.rag_chat)",
    "wandb": "metrics.jsonl and report.md, which every run writes",
    "gpu": "the scan in PyTorch, no FP8, faiss on the CPU",
    "mamba": "the kernels of fla-core, or PyTorch",
    "milvus": "knowledge bases of our own, in process or served",
    "dev": "everything but tests, linter and benchmarks",
}
IMPORTS_NOT = ("test", "tests", "docs", "examples")  # what some packages leave beside themselves


def packages(imports: bool) -> Iterator[tuple[str, bool, str]]:
    """(extra, whether it is well, what is installed and what is not) of what the project's own metadata asks for;
    "required" first."""
    try:
        from packaging.requirements import Requirement

        metadata = importlib.metadata.metadata("nanochat")
        lines = importlib.metadata.requires("nanochat") or []
    except importlib.metadata.PackageNotFoundError:
        yield "required", False, "nanochat is not installed, so its packages are not known: pip install -e ."
        return
    except Exception as error:
        yield "required", False, f"cannot be told ({one_line(error)}): pip install -e . once more"
        return
    requirements = [Requirement(line) for line in lines]
    modules: dict[str, list[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items() if imports else ():
        for name in names:
            modules.setdefault(name.lower(), []).append(module)
    for extra in ("", *(metadata.get_all("Provides-Extra") or [])):
        own = [r for r in requirements if not r.marker or r.marker.evaluate({"extra": extra})]
        if extra:
            own = [r for r in own if r.marker and not r.marker.evaluate({"extra": ""})]
        there, absent = [], []
        for wanted in own:
            # the packages of dev are those of others, and tools that no script imports
            found, well = _installed(wanted, modules, imports and extra != "dev")
            there.append(found) if well else absent.append((found, wanted))
        said = [", ".join(there)] if there else []
        if absent:
            names = " ".join(f'"{r.name}{_extras(r)}{r.specifier}"' for _, r in absent)
            said.append(", ".join(found for found, _ in absent))
            said += [f"there is without: {WITHOUT[extra]}"] if extra in WITHOUT else []
            said.append(f"pip install {names}")
        yield extra or "required", bool(extra) or not absent, "; ".join(said)
    if changed := _changed(requirements):
        yield (
            "metadata",
            True,
            f"older than pyproject.toml ({changed}), so this list is too: pip install -e . once more",
        )


def _changed(requirements: list[Any]) -> str:
    """Packages that are in one of the checkout's pyproject.toml and the installed metadata alone; "" if there are none,
    or if there is no telling."""
    try:
        import tomllib  # Python 3.11
        from packaging.requirements import Requirement

        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (ImportError, OSError, KeyError, ValueError):
        return ""
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return ", ".join(sorted({Requirement(line).name for line in lines} ^ {r.name for r in requirements}))


def _extras(requirement: Any) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _installed(wanted: Any, modules: dict[str, list[str]], imports: bool) -> tuple[str, bool]:
    """A requirement's package with its version, and whether it is there, new enough and, if it is tried, not broken."""
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted.name} missing", False
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} {version} is not {wanted.specifier}", False
    for module in modules.get(wanted.name.lower(), []) if imports else ():
        if not module.isidentifier() or module.startswith("_") or module in IMPORTS_NOT:
            continue
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except (Exception, SystemExit) as error:
            return f"{wanted.name} {version} is broken: {one_line(error)}", False
    return f"{wanted.name} {version}", True

"""Metadata filters: which documents may be found at all.

    {"lang": "en"}                          equal
    {"lang": ["en", "de"]}                  one of these
    {"year": {"gte": 2020, "lt": 2024}}     a range: gt, gte, lt, lte; numbers with numbers, strings with strings
    {"lang": "en", "year": {"gte": 2020}}   both

A document whose metadata has a list passes if one of its items does; one without the field never passes. `source` is a
field like the others. The filter is applied before the best are chosen: it cannot leak a document, nor cost one.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.store import DocumentStore, field_values

_COMPARE = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_SIGNS = {"=": "eq", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def matching_rows(documents: DocumentStore, where: dict[str, Any]) -> np.ndarray:
    """Rows, ascending."""
    rows = None
    for name, wanted in where.items():
        values = documents.fields.get(name, {})
        found = [documents.rows_with(field) for field in _matching_fields(name, values, wanted)]
        of_field = np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int32)
        rows = of_field if rows is None else np.intersect1d(rows, of_field, assume_unique=True)
    return np.arange(len(documents)) if rows is None else rows


def _matching_fields(name: str, values: dict[tuple[bool, Any], list[int]], wanted: Any) -> list[int]:
    if not isinstance(wanted, dict):
        options = wanted if isinstance(wanted, (list, tuple, set)) else [wanted]
        return [field for value in options for field in values.get((isinstance(value, bool), value), ())]
    unknown = wanted.keys() - _COMPARE.keys()
    if unknown or not wanted:
        raise UserError(f"filter on {name!r}: {sorted(unknown)} is no comparison; use gt, gte, lt, lte")
    fields = []
    for (_, value), numbers in values.items():
        if all(_comparable(value, limit) and _COMPARE[sign](value, limit) for sign, limit in wanted.items()):
            fields += numbers
    return fields


def passes(document: Document, where: dict[str, Any]) -> bool:
    """The same for one document."""
    for name, wanted in where.items():
        values = {(isinstance(value, bool), value): [0] for of, value in field_values(document) if of == name}
        if not _matching_fields(name, values, wanted):
            return False
    return True


def _comparable(value: Any, limit: Any) -> bool:
    return isinstance(value, str) == isinstance(limit, str)


def parse_filters(conditions: list[str]) -> dict[str, Any]:
    """From the command line: lang=en, lang=en|de, year>=2020. A number or a boolean also stands for its spelling."""
    where: dict[str, Any] = {}
    for condition in conditions:
        match = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|=|>|<)\s*(.*?)\s*", condition)
        if match is None or not match[3]:
            raise UserError(f"filter {condition!r}: write it like lang=en, lang=en|de, year>=2020")
        name, sign, text = match.groups()
        if sign == "=":
            where[name] = [value for option in text.split("|") for value in _readings(option)]
        else:
            where.setdefault(name, {})[_SIGNS[sign]] = _readings(text)[0]
    return where


def _readings(text: str) -> list[Any]:
    if text in ("true", "false"):
        return [text == "true", text]
    for kind in (int, float):
        try:
            return [kind(text), text]
        except ValueError:
            pass
    return [text]

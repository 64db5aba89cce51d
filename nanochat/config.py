"""One dataclass, a Python config file and --flags become one typed, checked config.

A script declares its settings as a flat dataclass, with a docstring under each field, and calls `load_config`:

    python -m scripts.rag_finetune configs/rag_tiny.py --knowledge_base data/kb --top_k 5

Defaults come from the dataclass, a config file (plain assignments, a Python file) overrides them, flags override both.
One converter checks values from both, so `--top_k five` and `top_k = "five"` fail alike: one line that says what is
wrong, where (file and line), and which setting was probably meant. tyro writes the --help page from the docstrings, and
is loaded for nothing else.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import json
import runpy
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nanochat.common import UserError, atomic_write_text

Config = TypeVar("Config")

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def load_config(config_class: type[Config], argv: list[str] | None = None, prog: str | None = None) -> Config:
    """Build the config from defaults, config files (arguments ending in .py) and flags, or raise UserError."""
    argv = sys.argv[1:] if argv is None else argv
    hints = get_type_hints(config_class)
    field_types = {field.name: hints[field.name] for field in dataclasses.fields(config_class) if field.init}
    files, flags, wants_help = _split_argv(argv, field_types)

    values: dict[str, Any] = {}
    for path in files:
        values.update(_read_config_file(path, field_types))
    for name, text in flags.items():
        try:
            values[name] = _convert(text, field_types[name], from_text=True)
        except ValueError as error:
            raise UserError(f"--{name}: {error}") from None

    required = [
        field.name
        for field in dataclasses.fields(config_class)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if wants_help:
        _print_help(config_class, values, missing, prog)
    if missing:
        meaning = _field_docstring(config_class, missing[0])
        others = f" (also missing: {', '.join('--' + name for name in missing[1:])})" if missing[1:] else ""
        raise UserError(f"--{missing[0]} is required{': ' + meaning if meaning else ''}{others}")
    return config_class(**values)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def format_config(config: Any) -> str:
    """The config as aligned lines, for a script to print before it starts."""
    values = config_to_dict(config)
    width = max(map(len, values), default=0)
    return "\n".join(f"  {name:<{width}} = {value!r}" for name, value in values.items())


def save_config(config: Any, path: str | Path) -> None:
    """Write the config as JSON, atomically."""
    text = json.dumps(config_to_dict(config), indent=2, ensure_ascii=False) + "\n"
    # bytes of a path that are not UTF-8 are halves of surrogate pairs here, which JSON can only escape
    atomic_write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _split_argv(argv: list[str], field_types: dict[str, Any]) -> tuple[list[Path], dict[str, str], bool]:
    """Arguments -> config files, flags by field name with their text, and whether help is asked for."""
    files: list[Path] = []
    flags: dict[str, str] = {}
    position = 0
    while position < len(argv):
        argument = argv[position]
        position += 1
        if argument in ("-h", "--help"):
            return files, flags, True
        if argument.startswith("--"):
            spelled, has_value, value = argument[2:].partition("=")
            name = spelled.replace("-", "_")
            if name not in field_types:
                raise UserError(
                    f"unknown setting --{spelled}{_nearest(name, field_types, '--') or '; --help lists them'}"
                )
            if not has_value:
                following = argv[position] if position < len(argv) else None
                absent = following is None or following.startswith("--")
                if _is_bool(field_types[name]) and (absent or following.endswith(".py")):
                    value = "true"
                elif absent:
                    raise UserError(f"--{name} needs a value: {_describe(field_types[name])}")
                else:
                    value = following
                    position += 1
            flags[name] = value
        elif argument.endswith(".py"):
            files.append(Path(argument))
        else:
            raise UserError(
                f"unexpected argument {argument!r}: a setting is --name value (lists with commas, no spaces), "
                "a config file ends in .py"
            )
    return files, flags, False


def _read_config_file(path: Path, field_types: dict[str, Any]) -> dict[str, Any]:
    """Run a config file and take the settings it assigns. Errors carry the file and the line."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        tree = ast.parse(source, filename=str(path))
    except OSError as error:
        raise UserError(f"cannot read the config file {path} ({error.strerror})") from error
    except SyntaxError as error:
        where = f"{path}:{error.lineno}" if error.lineno else path  # of a NUL the parser does not say where
        raise UserError(f"{where}: not valid Python ({error.msg})") from error
    except (MemoryError, RecursionError):
        raise UserError(f"{path}: not usable Python (nested too deeply)") from None
    except ValueError as error:  # not UTF-8, or a NUL
        raise UserError(f"{path}: not a Python text file ({error})") from error

    try:
        namespace = runpy.run_path(str(path), run_name="config")
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: the config file failed ({reason})") from error

    assigned = _assigned_lines(tree)
    values = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, (types.ModuleType, types.FunctionType)):
            continue
        if name not in field_types:
            if name in assigned:  # what is only imported is a helper
                hint = _nearest(name, field_types, "") or "; the name of a helper begins with _"
                raise UserError(f"{path}:{assigned[name]}: unknown setting {name}{hint}")
            continue
        try:
            values[name] = _convert(value, field_types[name], from_text=False)
        except ValueError as error:
            raise UserError(f"{path}:{assigned.get(name, 1)}: {name}: {error}") from None
    return values


def _assigned_lines(tree: ast.Module) -> dict[str, int]:
    """The last line on which each module-level name is assigned."""
    lines: dict[str, int] = {}
    pending: list[ast.AST] = list(tree.body)
    own_scope = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    own_scope += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    while pending:
        node = pending.pop(0)
        if isinstance(node, own_scope):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
        pending.extend(ast.iter_child_nodes(node))
    return lines


def _convert(value: Any, wanted: Any, from_text: bool) -> Any:
    """value as the wanted type, or ValueError. from_text: it is a flag's text, so numbers and words may be spelled."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    refusal = ValueError(f"{value!r} is not {_describe(wanted)}")
    if wanted is Any:
        return value
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or (from_text and value.lower() == "none")):
            return None
        for choice in arguments:
            if choice is not type(None):
                try:
                    return _convert(value, choice, from_text)
                except ValueError:
                    continue
        raise refusal
    if origin is Literal:
        for choice in arguments:
            if (value == choice and type(value) is type(choice)) or (from_text and value == str(choice)):
                return choice
        near = difflib.get_close_matches(str(value), [str(choice) for choice in arguments], n=1)
        raise ValueError(f"{refusal}{f'; did you mean {near[0]!r}?' if near else ''}")
    if wanted in (list, tuple) or origin in (list, tuple):
        if isinstance(value, str):
            value = [item.strip() for item in value.split(",") if item.strip()]
            from_text = True
        if not isinstance(value, (list, tuple)):
            raise refusal
        kinds = [kind for kind in arguments if kind is not Ellipsis] or [Any]
        if origin is tuple and Ellipsis not in arguments and len(value) != len(kinds):
            raise refusal
        kinds = kinds if len(kinds) == len(value) else kinds[:1] * len(value)
        items = [_convert(item, kind, from_text) for item, kind in zip(value, kinds, strict=True)]
        return tuple(items) if wanted is tuple or origin is tuple else items
    if wanted is bool:
        if isinstance(value, bool):
            return value
        if from_text and value.lower() in TRUE_WORDS + FALSE_WORDS:
            return value.lower() in TRUE_WORDS
        raise refusal
    if wanted in (int, float):
        if isinstance(value, bool) or not isinstance(value, str if from_text else (int, float)):
            raise refusal
        try:
            return float(value) if wanted is float else _to_int(value)
        except (ValueError, OverflowError):
            raise refusal from None
    if wanted is str and isinstance(value, str):
        return value
    if wanted is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    if isinstance(wanted, type) and isinstance(value, wanted):
        return value
    raise refusal


def _to_int(value: float | str) -> int:
    """An int from 5, "5", "1_000" or a round float such as 1e6; ValueError for 1.5."""
    if not isinstance(value, float):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if not value.is_integer():
        raise ValueError(value)
    return int(value)


def _describe(wanted: Any) -> str:
    """A type in words, for an error message."""
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if wanted in (list, tuple) or origin in (list, tuple):
        count = f" of {len(arguments)}" if origin is tuple and Ellipsis not in arguments else ""
        return f"a comma-separated list{count}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words.get(wanted, "none" if wanted is type(None) else str(wanted))


def _is_bool(wanted: Any) -> bool:
    return wanted is bool or bool in get_args(wanted)


def _nearest(name: str, field_types: dict[str, Any], dashes: str) -> str:
    near = difflib.get_close_matches(name, field_types, n=1, cutoff=0.5)
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def _field_docstring(config_class: type, name: str) -> str:
    """The first line of the docstring under a field, or of the comment beside it; "" if there is none."""
    for cls in config_class.__mro__:
        if name not in inspect.get_annotations(cls):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(cls))
            body = ast.parse(source).body[0].body
        except (OSError, TypeError, SyntaxError, AttributeError):
            return ""
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", None) == name:
                text = getattr(getattr(following, "value", None), "value", None)
                if isinstance(following, ast.Expr) and isinstance(text, str):
                    return text.strip().splitlines()[0]
                return source.splitlines()[statement.end_lineno - 1][statement.end_col_offset :].strip(" #")
    return ""


def _print_help(config_class: type, values: dict[str, Any], missing: list[str], prog: str | None) -> None:
    """Let tyro print the settings, with the values that the config files on the line give, and exit."""
    import tyro

    if prog is None:
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        prog = f"python -m {spec.name}" if spec and spec.name else None
    default = config_class(**values, **dict.fromkeys(missing, tyro.MISSING))
    tyro.cli(
        config_class,
        prog=prog,
        args=["--help"],
        default=default,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )

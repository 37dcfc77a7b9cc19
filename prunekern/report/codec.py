"""Report <-> JSON, driven by the dataclasses' own type hints, so a new field needs no code here."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from prunekern.errors import ArtefactError
from prunekern.report.model import Report

FORMAT = "prunekern-report"
VERSION = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def dumps(report: Report) -> str:
    """Strict JSON (non-finite numbers as the strings "nan", "inf", "-inf"), with derived figures included."""
    document = {"format": FORMAT, "version": VERSION, "report": _encode(report)}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def loads(text: str) -> Report:
    """The report in `text`; raises `ArtefactError` naming the place that is wrong."""
    try:
        document = json.loads(text)
    except ValueError as problem:
        raise ArtefactError(f"report JSON: not valid JSON ({problem}). Write the report again.") from problem
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtefactError(f"report JSON: no {FORMAT!r} document. Pass the text of a report.json.")
    if document.get("version") != VERSION:
        raise ArtefactError(
            f"report JSON: version {document.get('version')!r}, this release reads {VERSION}. "
            "Read it with the release that wrote it, or run the study again."
        )
    report = _decode(Report, document.get("report"), "report")
    assert isinstance(report, Report)
    return report


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        names = [item.name for item in fields(value)] + list(getattr(value, "derived", ()))
        return {name: _encode(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _wrong(path: str, expected: str, value: Any) -> NoReturn:
    raise ArtefactError(f"report JSON, {path}: expected {expected}, found {value!r:.80}. Write it again.")


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin is tuple:
        return _decode_tuple(get_args(kind), value, path)
    if origin is dict:
        if not isinstance(value, dict):
            _wrong(path, "an object", value)
        return {key: _decode(get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal:
        return value if value in get_args(kind) else _wrong(path, f"one of {get_args(kind)}", value)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(kind), value, path)
    return _decode_scalar(kind, value, path)


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        _wrong(path, "an object", value)
    hints = get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    if unknown := set(value) - set(known) - set(getattr(kind, "derived", ())):
        _wrong(path, "only known keys", sorted(unknown))
    needed = {name for name, item in known.items() if item.default is item.default_factory is MISSING}
    if missing := needed - set(value):
        _wrong(path, f"the keys {sorted(missing)}", sorted(value))
    given = {name: _decode(hints[name], value[name], f"{path}.{name}") for name in known if name in value}
    return kind(**given)


def _decode_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong(path, "a list", value)
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        _wrong(path, f"{len(arguments)} items", value)
    return tuple(
        _decode(kind, item, f"{path}[{index}]")
        for index, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )


def _decode_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if float in kinds and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if type(value) in kinds or (isinstance(value, bool) and int in kinds):
        return value
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], value, path)
    _wrong(path, " or ".join(kind.__name__ for kind in rest), value)


def _decode_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float:
        if isinstance(value, str) and value in _NON_FINITE:
            return _NON_FINITE[value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        _wrong(path, "a number", value)
    if type(value) is not kind:
        _wrong(path, f"{kind.__name__}", value)
    return value

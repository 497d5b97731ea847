"""JSON schemas of what ``--json`` prints: from the dataclasses of the reports, whose docstrings say what a key means.

``RESULTS`` names for every verb its report, ``ADDED`` the keys that its ``to_json`` adds from properties, ``LEFT_OUT``
the fields that only live in memory. A plan is no dataclass: its keys are written out here. A test holds every schema
against what the commands print, and no key may be missing or too many.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mergekit_lr.report.application import AppliedFigures, ApplyReport
from mergekit_lr.report.compression import AdapterReport, ModuleChange
from mergekit_lr.report.extraction import ExtractReport, ModuleFigures
from mergekit_lr.report.merging import MergeReport
from mergekit_lr.verbs.compare import CompareReport
from mergekit_lr.verbs.inspect import AdapterView, CheckpointView, ModuleView
from mergekit_lr.verbs.push.report import PushReport
from mergekit_lr.verbs.report import PageReport

Schema = dict[str, Any]
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}

RESULTS = {
    "extract": ExtractReport,
    "compress": AdapterReport,
    "convert": AdapterReport,
    "apply": ApplyReport,
    "merge": MergeReport,
    "inspect-adapter": AdapterView,
    "inspect-checkpoint": CheckpointView,
    "compare": CompareReport,
    "push": PushReport,
    "report": PageReport,
}
LEFT_OUT = {
    ExtractReport: {"adapter"},
    AdapterReport: {"adapter"},
    ApplyReport: {"tensors"},
    MergeReport: {"result", "adapter"},
}
RENAMED: dict[Any, dict[str, str]] = {MergeReport: {"format": "dialect"}, PushReport: {"nbytes": "bytes"}}
IMPORTED = {
    "Tensor": Any,
    "Adapter": Any,
    "CompareReport": CompareReport,
}  # for type checkers alone, where they are used
ADDED = {
    ModuleFigures: ("energy", "error"),
    ModuleChange: ("energy", "error"),
    AppliedFigures: ("rounding_error",),
    ModuleView: ("effective_rank",),
    AdapterView: ("total_rank", "norm"),
}
TOTALS: dict[Any, tuple[str, ...]] = {
    ExtractReport: ("energy", "error", "total_rank", "states"),
    AdapterReport: ("energy", "error", "rounding", "rank_before", "total_rank", "states"),
    ApplyReport: ("norm", "rounding_error", "states"),
    MergeReport: ("norm", "rounding_error"),
    PushReport: ("nbytes", "states"),
}
COMMON = {  # what a key is wherever the docstring has no need to say it
    "totals": "Figures of the whole result.",
    "base": "The base model.",
    "finetuned": "The fine-tune.",
    "source": "What was read.",
    "repo": "Its name on the Hub.",
    "ref": "What was read.",
    "name": "Of the tensor, file or module.",
    "kind": "How the weight maps to a matrix.",
    "shape": "Of the weight.",
    "dtype": "Of the result's tensors.",
    "nbytes": "Size in bytes.",
    "seconds": "What it took.",
    "verb": "The command.",
    "notes": "What a user should know.",
    "read_bytes": "Of what was read.",
    "written_bytes": "Of what was written.",
    "peak_bytes": "The most memory held.",
    "space": "Where the method ran.",
    "files": "With their bytes.",
    "config": "The configuration that was written.",
    "interference": "0 where no direction of one adapter is shared by another.",
    "hints": "What the figures suggest.",
    "modules": "One by one.",
}
WORST = {"type": ["string", "null"], "description": "The module with the largest relative error."}


def of(report: Any) -> Schema:
    """The schema of a dataclass: its fields, what ``to_json`` adds, and no other key."""
    said, hints = _said(report.__doc__ or ""), get_type_hints(report, localns=IMPORTED)
    names = [field.name for field in fields(report) if field.name not in LEFT_OUT.get(report, set())]
    called: dict[str, str] = RENAMED.get(report, {})
    keys: dict[str, Schema] = {}
    for name in names:
        keys[called.get(name, name)] = _typed(hints[name]) | _description(said.get(name) or COMMON.get(name, ""))
    keys |= {name: _property(report, name) for name in ADDED.get(report, ())}
    if report is ModuleView:
        keys["rank_99"] = {"type": "integer"} | _description(ModuleView.rank_for.__doc__ or "")
    if report is ApplyReport:
        adapter = {"ref": {"type": "string"}, "weight": {"type": "number"}, "dialect": {"type": "string"}}
        keys["adapters"] = {"type": "array", "items": _closed(adapter)}
    if report in TOTALS:
        totals: dict[str, Schema] = {}
        for name in TOTALS[report]:
            totals[called.get(name, name)] = keys[name] if name in keys else _property(report, name)
        totals |= {"worst": WORST} if hasattr(report, "worst") else {}
        # A merge counts its states beside the other totals, under their own names.
        whole = _open(totals) if report is MergeReport else _closed(totals)
        keys = {"totals": whole | _description(COMMON["totals"])} | keys
    return _closed(keys) | _description((report.__doc__ or "").partition("\n\n")[0])


def plan() -> Schema:
    """The schema of ``lrmerge plan`` and ``lrmerge merge --dry-run``."""
    word, number, words = {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "string"}}
    counts = {"type": "object", "additionalProperties": number}
    tensor = _closed({"name": word, "state": word, "rule": word, "bytes": number}, optional=("bytes",))
    keys = {
        "method": word | {"description": "The merge method."},
        "kind": word | {"description": "model or adapter: what would be written."},
        "to": {"type": ["string", "null"], "description": "Of an adapter: the dialect."},
        "space": word | {"description": "Of adapters: full, core or knots."},
        "models": words | {"description": "The models or adapters."},
        "base": {"type": ["string", "null"], "description": "Of adapters: what they go onto."},
        "options": {"type": "object", "description": "The options of the run."},
        "read_bytes": number | {"description": "Of weights to read."},
        "download_bytes": number | {"description": "Of files on the Hub that are not here yet."},
        "written_bytes": number | {"description": "Of a model: size of the result."},
        "peak_bytes": number | {"description": "The most memory that will be held."},
        "seconds": {"type": "number", "description": "About how long the arithmetic takes, within a factor of two."},
        "batches": number | {"description": "Steps of the run."},
        "workers": number | {"description": "Computed side by side."},
        "device": word | {"description": "cpu, or the accelerator."},
        "files": counts | {"description": "Of a model: the files of the result with their bytes."},
        "notes": words | {"description": "What a user should know."},
        "vocabulary": {
            "type": ["object", "null"],
            "description": "Where the recipe asks for one: which rows come whence.",
        },
        "states": counts | {"description": "How many tensors end in which state."},
        "tensors": {"type": "array", "items": tensor, "description": "Every tensor with its state and rule."},
    }
    return _closed(keys, optional=("to", "space", "base", "written_bytes", "files", "vocabulary"))


def doctor() -> Schema:
    """The schema of ``lrmerge doctor``."""
    text = {"type": "string"}
    lines = {"type": "array", "items": text}
    topics = {"packages": lines, "devices": lines, "linear algebra": text, "free memory": text, "free disk": lines}
    return _closed({**topics, "Hub": text})


def methods() -> Schema:
    """The schema of ``lrmerge methods``: a mapping of names."""
    word, flag = {"type": "string"}, {"type": "boolean"}
    words = {"type": "array", "items": word}
    limit = {"type": ["number", "null"]}
    parameter = {
        "kind": word, "default": {}, "required": flag, "per_model": flag, "choices": {"type": "array"},
        "low": limit, "high": limit, "text": word,
    }  # fmt: skip
    counts = {"type": "array", "items": {"type": ["integer", "null"]}}
    keys = {
        "description": word | {"description": "One line."},
        "paper": word | {"description": "arXiv id, DOI, or the program that it comes from."},
        "link": word | {"description": "To the paper."},
        "takes": word | {"description": "weights, deltas or factors."},
        "spaces": words | {"description": "Where it runs."},
        "base": word | {"description": "required, optional or none, of a method on weights."},
        "models": counts | {"description": "Least and most inputs; null for no limit."},
        "random": flag | {"description": "It draws random numbers."},
        "body": words | {"description": "What it does, further."},
        "formula": words | {"description": "In plain text."},
        "use_when": word, "not_when": word, "cost": word,
        "example": word | {"description": "Parameters of a recipe, as YAML."},
        "parameters": {"type": "object", "additionalProperties": _closed(parameter)},
        "recipe": word | {"description": "A whole recipe, as YAML."},
    }  # fmt: skip
    return {"type": "object", "additionalProperties": _closed(keys)}


SCHEMAS: dict[str, Callable[[], Schema]] = {
    **{verb: lambda report=report: of(report) for verb, report in RESULTS.items()},
    "plan": plan,
    "doctor": doctor,
    "methods": methods,
}


def described(schema: Schema) -> str:
    """The keys of a schema as tables in Markdown: those of the top, then those of every kind of entry."""
    parts, inside = [], schema
    if "properties" not in schema:
        parts, inside = ["One entry for every name:"], schema["additionalProperties"]
    parts.append(_table(inside))
    for key, value in inside["properties"].items():
        nested = value.get("items", value) if "properties" not in value else value
        nested = nested if "properties" in nested else value.get("additionalProperties") or {}
        if isinstance(nested, dict) and "properties" in nested:
            parts += [f"## Each of {key}" if value.get("type") != "object" or nested is not value else f"## {key}"]
            parts += [nested["description"]] if "description" in nested else []
            parts.append(_table(nested))
    return "\n\n".join(parts)


def _table(schema: Schema) -> str:
    rows = ["| key | type | what it is |", "|---|---|---|"]
    for key, value in schema["properties"].items():
        missing = "" if key in schema["required"] else " Not always there."
        rows.append(f"| `{key}` | {_type(value)} | {value.get('description', '')}{missing} |")
    return "\n".join(rows).replace("||", "\\|\\|")


def _type(value: Schema) -> str:
    kind = value.get("type", "any")
    if kind == "array":
        return f"array of {_type(value.get('items', {}))}"
    if isinstance(kind, list):
        return " or ".join(kind)
    return kind


def _typed(hint: Any) -> Schema:
    """The schema of a type annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if is_dataclass(hint):
        return of(hint)
    if origin is tuple:
        return {"type": "array", "items": _typed(inner[0]) if inner[-1] is Ellipsis else {}}
    if origin is dict:
        return {"type": "object"} | ({"additionalProperties": _typed(inner[1])} if inner[1] is not Any else {})
    if origin is Literal:
        return {"enum": list(inner), "type": "string"}
    if origin in (Union, UnionType):
        each = [_typed(one) for one in inner]
        return each[0] | {"type": [one["type"] for one in each]}
    raise TypeError(f"{hint} has no schema")


def _property(report: Any, name: str) -> Schema:
    getter = getattr(report, name).fget
    return _typed(get_type_hints(getter)["return"]) | _description(getter.__doc__)


def _said(text: str) -> dict[str, str]:
    """What a docstring says of fields: ``name: text.`` or ``one, other: text.`` in its running text."""
    text = " ".join(text.split())
    found: dict[str, str] = {}
    parts = re.split(r"(?<=\.) ((?:\w+, )*\w+): ", f". {text}")
    for names, said in zip(parts[1::2], parts[2::2], strict=True):
        found |= dict.fromkeys(names.split(", "), said.strip())
    return found


def _description(text: str) -> Schema:
    text = " ".join(text.split()).replace("``", "`")
    return {"description": text[:1].upper() + text[1:]} if text else {}


def _closed(keys: dict[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    required = [key for key in keys if key not in optional]
    return {"type": "object", "properties": keys, "required": required, "additionalProperties": False}


def _open(keys: dict[str, Schema]) -> Schema:
    return _closed(keys) | {"additionalProperties": {"type": "integer"}}

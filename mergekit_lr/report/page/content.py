"""All verbs in one form: what the page shows, before it is drawn.

A cell is what all modules of one layer and one kind are together; in most models that is one module. Sums of squares
add up, so norms, errors and energies of a cell are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from mergekit_lr.report.page.manifests import Comparison, Manifest, Module
from mergekit_lr.report.page.places import Place, places_of
from mergekit_lr.report.quantities import duration, percent, size


class Total(NamedTuple):
    """One figure of the whole result, and a word on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """All modules of one layer and kind. squared_error: what was lost of ``squared_norm``."""

    place: Place
    modules: tuple[Module, ...]
    squared_norm: float
    squared_error: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(self.squared_norm)

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class Content:
    """What one page says.

    verb: of the result, or ``compare``. lost_by: what made the errors. cells: of what changed, in model order.
    comparison: of the inputs. facts: what it was made from and by, as (what, text). recipe: YAML of a merge.
    """

    title: str
    verb: str
    summary: str
    totals: tuple[Total, ...]
    notes: tuple[str, ...]
    cells: tuple[Cell, ...] = ()
    states: tuple[tuple[str, int], ...] = ()
    lost_by: str = ""
    comparison: Comparison | None = None
    facts: tuple[tuple[str, str], ...] = ()
    recipe: str = ""


def content_of(read: Manifest | Comparison, *, name: str = "") -> Content:
    """The content of a page. ``name``: of the result, where the manifest does not say it."""
    if isinstance(read, Comparison):
        return _comparison(read)
    modules = [m for m in (*read.modules, *read.tensors, *read.changed) if m.state not in ("copied", "converted")]
    lost_by = {"merge": "truncation" if read.kind == "adapter" else "rounding", "apply": "rounding"}
    totals, summary = {
        "extract": _extracted,
        "compress": _squeezed,
        "convert": _squeezed,
        "merge": _merged,
        "apply": _applied,
    }[read.verb](read)
    return Content(
        title=named(read.out) if read.out else name,
        verb=read.verb,
        summary=summary,
        totals=(*totals, Total("Time", duration(read.seconds), f"peak memory {size(read.peak_bytes)}")),
        notes=tuple(read.notes),
        cells=cells_of(modules),
        states=tuple(_states(read)),
        lost_by=lost_by.get(read.verb, "truncation"),
        comparison=read.similarity,
        facts=tuple(_facts(read)),
        recipe=yaml.safe_dump(_without_folders(read.recipe), sort_keys=False, allow_unicode=True)
        if read.recipe
        else "",
    )


def cells_of(modules: Sequence[Module]) -> tuple[Cell, ...]:
    """Modules by layer and kind."""
    groups: dict[Place, list[Module]] = {}
    for place, module in zip(places_of([m.name for m in modules]), modules, strict=True):
        groups.setdefault(place, []).append(module)
    return tuple(
        Cell(place, tuple(group), sum(m.squared_norm for m in group), sum(map(_lost, group)))
        for place, group in groups.items()
    )


def named(ref: str) -> str:
    """A reference as it may be shown to others: of a path its last part, a Hub id whole."""
    return PurePath(ref).name if ref.startswith(("/", "~", ".")) or ":\\" in ref else ref


def _lost(module: Module) -> float:
    if module.kept is not None:
        return max(module.squared_norm - module.kept, 0.0)
    return module.squared_error + module.rounding


def _worst(read: Manifest) -> list[Total]:
    """The module with the largest error, where anything was lost at all."""
    worst = max(cells_of(read.modules), key=lambda cell: cell.error, default=None)
    if worst is None or not worst.error:
        return []
    name = read.totals.worst or worst.modules[0].name
    return [Total("Worst module", f"{worst.error:.4f}", name.removesuffix(".weight"))]


def _extracted(read: Manifest) -> tuple[list[Total], str]:
    t = read.totals
    share = f"{read.adapter_bytes / max(read.finetuned_bytes, 1):.1%} of the fine-tune".replace("%", " %")
    summary = f"A LoRA out of the full fine-tune {named(read.finetuned)} of {named(read.base or '')}."
    return [
        Total("Energy kept", percent(t.energy or 0.0), "of the squared norm of the whole change"),
        Total("Relative error", f"{t.error or 0.0:.4f}", "Frobenius norm"),
        Total("Modules", str(len(read.modules)), f"total rank {t.total_rank or 0}"),
        Total("Size", size(read.adapter_bytes), share),
        *_worst(read),
    ], summary


def _squeezed(read: Manifest) -> tuple[list[Total], str]:
    t = read.totals
    done = "brought to lower ranks" if read.verb == "compress" else f"written as {read.to}"
    return [
        Total("Energy kept", percent(t.energy or 0.0), "of the squared norm of all deltas"),
        Total("Relative error", f"{t.error or 0.0:.4f}", "Frobenius norm"),
        Total("Total rank", f"{t.total_rank or 0}", f"before {t.rank_before or 0}"),
        Total("Size", size(read.bytes_after), f"before {size(read.bytes_before)}"),
        *_worst(read),
    ], f"The adapter {named(read.source)}, {done}."


def _merged(read: Manifest) -> tuple[list[Total], str]:
    space = "" if read.space in ("", "full") else f" in the space {read.space}"
    what = "adapters" if read.adapters else "models"
    count = len([ref for ref in read.models if ref != read.base])
    merged = sum(count for state, count in read.states.items() if state == "merged")
    lost = Total(
        "Lost", f"{read.totals.rounding_error or 0.0:.2%}".replace("%", " %"),
        f"of it, by {'truncation' if read.kind == 'adapter' else 'rounding'}",
    )  # fmt: skip
    return [
        Total("Method", read.method, space.strip() or f"{count} {what}"),
        Total("Norm of the change", f"{read.totals.norm or 0.0:.4g}", "against the base" if read.base else ""),
        lost,
        Total("Merged", f"{merged}", f"of {sum(read.states.values())} tensors"),
        Total("Size", size(read.written_bytes)),
    ], f"{count} {what} merged by {read.method}{space}."


def _applied(read: Manifest) -> tuple[list[Total], str]:
    count = len(read.adapters)
    done = "taken out" if read.unmerge else "baked in"
    error = read.totals.rounding_error or 0.0
    return [
        Total("Changed", str(len(read.changed)), f"of {sum(read.states.values())} tensors"),
        Total("Norm of the change", f"{read.totals.norm or 0.0:.4g}"),
        Total("Rounding error", f"{error:.2%}".replace("%", " %"), f"of the change, to {read.dtype}"),
        Total("Size", size(read.written_bytes)),
    ], f"{named(read.base or '')} with {'one adapter' if count == 1 else f'{count} adapters'} {done}."


def _comparison(read: Comparison) -> Content:
    count = len(read.names)
    pairs = [read.cosine[t][u] for t in range(count) for u in range(t)]
    totals = (
        Total("Adapters", str(count)),
        Total("Modules in common", str(len(read.modules)), f"{len(read.alone)} are in one adapter only"),
        Total("Cosine", f"{sum(pairs) / max(len(pairs), 1):.3f}", "of the deltas, mean over pairs"),
        Total("Interference", f"{read.interference:.2f}", "0 where directions are orthogonal"),
    )
    title = " and ".join(read.names) if count < 4 else f"{count} adapters"
    return Content(title, "compare", "How alike adapters of one base are.", totals, tuple(read.hints), comparison=read)


def _states(read: Manifest) -> Iterable[tuple[str, int]]:
    counted = dict(read.states)
    if not counted:
        for entry in (*read.modules, *read.others):
            state = entry.state or "decomposed"
            counted[state] = counted.get(state, 0) + 1
    return counted.items()


def _facts(read: Manifest) -> Iterable[tuple[str, str]]:
    given = [ref for ref in (read.finetuned, read.source, *read.models) if ref != read.base]
    given += [f"{named(one.ref)}, weight {one.weight:g}" for one in read.adapters if one.weight is not None]
    yield from (("Base", named(ref)) for ref in [read.base] if ref)
    yield from (("Input", named(ref)) for ref in given if ref)
    yield from (("File", f"{file}, {size(nbytes)}") for file, nbytes in read.files.items())
    chosen = {key: value for key, value in read.options.items() if value not in (None, [], {}, False)}
    for key, value in chosen.items():
        yield f"Option {key}", str(_without_folders(value))
    yield "Versions", ", ".join(f"{name} {version}" for name, version in read.versions.items())


def _without_folders(value: Any) -> Any:
    """``value`` with every absolute path brought to its last part: a page is shown to others."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    return named(value) if isinstance(value, str) else value

"""The card of a merged model or adapter: what was merged how, with the recipe that makes it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_lr.methods.registry import methods
from mergekit_lr.report.adapter_card import WORST, base_of, named_base, unread
from mergekit_lr.report.card import HOME, Content, write_card
from mergekit_lr.report.citations import PAPERS, SPACES
from mergekit_lr.report.command import command
from mergekit_lr.report.inputs import Input, portable, stated_hub_id
from mergekit_lr.report.loading import library, loading_a_model, loading_an_adapter, pipeline_tag
from mergekit_lr.report.manifest import FILE
from mergekit_lr.report.markdown import bullets, code, fenced, listed, table
from mergekit_lr.report.merging import MergeReport

if TYPE_CHECKING:
    from mergekit_lr.checkpoint.checkpoint import Checkpoint
    from mergekit_lr.verbs.merge.adapter_sources import Opened
    from mergekit_lr.verbs.merge.sources import Source

_LIMITS = ("Changes are measured on weights. How well the result does its tasks was not measured.",)


def models_merged(sources: Iterable[Source]) -> list[Input]:
    """The models of a recipe, and the LoRAs that they were read with."""
    found = []
    for source in sources:
        checkpoint = source.checkpoint
        found.append(Input.of("model", checkpoint.ref, checkpoint.folder, config=checkpoint.config))
        folders = dict.fromkeys(file.parent for file in source.files)
        found += [Input.of("adapter", source.ref.rpartition("+")[2], folder) for folder in folders]
    return list({one.ref: one for one in found}.values())


def adapters_merged(adapters: Iterable[Opened], base: Checkpoint | None) -> list[Input]:
    """The adapters of a recipe, after their base where it was given."""
    found = [Input.of("base", base.ref, base.folder, config=base.config)] if base is not None else []
    for one in adapters:
        file = one.files[0] if one.files else None
        place = file.parent if file is not None and file.name.startswith("adapter_") else file
        found.append(Input.of("adapter", one.ref, place, metadata=one.adapter.metadata))
    return found


def write_merging_card(
    report: MergeReport,
    recipe: Mapping[str, Any],
    inputs: Sequence[Input],
    folder: Path,
    options: Mapping[str, Any],
) -> None:
    """Write the card of the merge in ``folder``. ``recipe``: the content of its document. ``options``: of the run."""
    adapter = report.kind == "adapter"
    inputs = [replace(one, role="base") if one.ref == report.base else one for one in inputs]
    merged = [code(one.name) for one in inputs if one.role != "base"] or [code(one.name) for one in inputs]
    given = [one for one in inputs if one.role == "base"]
    hub = given[0].hub if given else stated_hub_id(report.base, *(one.card.get("base_model") for one in inputs))
    base = base_of(given[0], config=given[0].config) if given else named_base(report.base, hub)
    paper = methods()[report.method].paper
    space = "" if report.space == "full" else f" in the space {code(report.space)}"
    again = command("merge", ["recipe.yaml"], options, inputs, out=("OUT",))
    documents = [*_parts(recipe, report.out).values(), recipe]
    text = yaml.safe_dump_all([_portable(one, inputs) for one in documents], sort_keys=False, allow_unicode=True)
    content = Content(
        what=f"{'A LoRA' if adapter else 'A model'} merged by the method {code(report.method)}{space} with "
        f"[lrmerge]({HOME}), from {listed(merged) if len(merged) < 7 else f'{len(merged)} inputs'}.",
        sections={
            "Load it": loading_an_adapter(folder, base) if adapter else loading_a_model(folder),
            "What changed": f"{_totals(report)}\n\n{_worst(report)}",
            "Limits": bullets([*_LIMITS, *([unread(hub)] if adapter and hub and not given else [])]),
        },
        notes=report.notes,
        again=f"{fenced(text, 'yaml')}\n\nas `recipe.yaml`, then\n\n{again}",
        papers=[key for key in (paper, SPACES.get(report.space, "")) if key in PAPERS],
        base_model=[hub] if adapter and hub else [] if adapter else [repo for one in inputs for repo in one.ids],
        relation="adapter" if adapter else "merge",
        tags=[*(["lora"] if adapter else []), "lrmerge", "merge", report.method],
        library_name="peft" if adapter else library(report.config),
        pipeline_tag=pipeline_tag(base.config if adapter else report.config),
    )
    write_card(folder, report.out, content, inputs)


def _totals(report: MergeReport) -> str:
    loss = "rounding" if report.kind == "model" else "truncation"
    rows = [
        ["tensors" if report.kind == "model" else "modules", _states(report)],
        ["norm of the change", f"{report.norm:.4g}"],
        [f"lost of it by {loss}", f"{report.rounding_error:.2%}"],
    ]
    if ranks := [tensor.rank for tensor in report.tensors if tensor.rank is not None]:
        rows.append(["rank", f"{min(ranks)} to {max(ranks)}, {sum(ranks)} in all"])
    return table(["figure", "value"], rows)


def _states(report: MergeReport) -> str:
    return ", ".join(f"{count} {state}" for state, count in report.states.items())


def _worst(report: MergeReport) -> str:
    def error(tensor) -> float:
        return (tensor.rounding / tensor.squared_norm) ** 0.5 if tensor.squared_norm else 0.0

    merged = [tensor for tensor in report.tensors if tensor.squared_norm > 0]
    lossless = all(error(tensor) < 5e-5 for tensor in merged)  # what would be printed as 0.00%
    worst = sorted(merged, key=lambda tensor: -tensor.norm if lossless else -error(tensor))[:WORST]
    which = "changed most" if lossless else "lost most of their change"
    columns = ["name", "norm of the change", "lost of it"]
    rows = [[code(tensor.name), f"{tensor.norm:.4g}", f"{error(tensor):.2%}"] for tensor in worst]
    if len({tensor.rule for tensor in merged}) > 1:
        columns.append("rule")
        rows = [[*row, code(tensor.rule)] for row, tensor in zip(rows, worst, strict=True)]
    return f"The {len(rows)} of {len(report.tensors)} that {which}:\n\n{table(columns, rows)}"


def _parts(recipe: Any, out: str | None) -> dict[str, Any]:
    """The documents of a recipe that were merged first, each before those that name it: by the folder of its result.

    They lie beside the result while it is made, as ``OUT.parts/NAME``, with their manifests.
    """
    if isinstance(recipe, Mapping | list | tuple):
        inner = recipe.values() if isinstance(recipe, Mapping) else recipe
        return {folder: part for value in inner for folder, part in _parts(value, out).items()}
    if not isinstance(recipe, str) or not recipe.isprintable() or out is None:
        return {}
    folder, beside = Path(recipe).absolute(), Path(out).resolve()
    if folder.parent.resolve() != beside.with_name(f"{beside.name}.parts") or not (folder / FILE).is_file():
        return {}
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))["recipe"]
    return _parts(content, out) | {recipe: content}


def _portable(value: Any, inputs: Sequence[Input]) -> Any:
    """A recipe without paths of this disk."""
    if isinstance(value, Mapping):
        return {key: _portable(entry, inputs) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(entry, inputs) for entry in value]
    if isinstance(value, str):
        return Path(value).name if Path(value).parent.name.endswith(".parts") else portable(value, inputs)
    return value

"""How an earlier merge by opcm came about: what its manifest says of it, so that a recipe can let more models join.

A merge does not show by what it was scaled, so every merge by opcm writes it into ``lrmerge.json``: of each tensor
``opcm``, with the count of models, and for each matrix of a stack the scale and the mean norm. A recipe with
``continued`` reads it while it is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.errors import FormatError, MismatchError
from mergekit_lr.methods.opcm import Tally
from mergekit_lr.recipe.reading import Path_, Recipe
from mergekit_lr.report.manifest import FILE, describe
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_sources import Opened
from mergekit_lr.verbs.merge.layers import Job

PLACE: Path_ = ("parameters", "continued")  # of the recipe, for errors
_NONE = "is no merge by opcm that can go on"


def record(tallies: Sequence[Tally]) -> dict[str, Any]:
    """The figure of one tensor for the manifest, from the tallies of its matrices; nothing where there are none."""
    if not tallies:
        return {}
    scales, norms = [tally.scale for tally in tallies], [tally.mean_norm for tally in tallies]
    return {"opcm": {"count": tallies[0].count, "scale": scales, "mean_norm": norms}}


class _Record(BaseModel):
    """What ``record`` writes."""

    count: int = Field(ge=1)
    scale: list[float] = Field(min_length=1)
    mean_norm: list[float]

    @model_validator(mode="after")
    def _of_the_same_matrices(self) -> _Record:
        if len(self.scale) != len(self.mean_norm):
            raise ValueError("scale and mean_norm are of equally many matrices")
        return self


class _Tensor(BaseModel):
    name: str
    opcm: _Record | None = None


class _Manifest(BaseModel):
    """Of a manifest, what counts here."""

    base: str | None = None
    inputs: dict[str, dict[str, Any]] = {}
    tensors: list[_Tensor]


@dataclass(frozen=True)
class Earlier:
    """An earlier merge: what the recipe calls it, how many models are in it, and the tallies of each tensor."""

    ref: str
    count: int
    tallies: Mapping[str, tuple[Tally, ...]]

    def of(self, name: str) -> tuple[Tally, ...]:
        """The tallies of a tensor.

        Raises:
            MismatchError: the manifest has none of it.
        """
        bare = name.partition(".")[2]  # files of picture models put a component before it
        found = self.tallies.get(name) or self.tallies.get(bare)
        if found is None:
            raise MismatchError(
                f"{self.ref}: its {FILE} does not say how opcm scaled {name}; merge it again with this version, or "
                "leave the tensor out with targets: exclude"
            )
        return found


def continued_jobs(recipe: Recipe, jobs: Iterable[Job]) -> Iterator[Job]:
    """All ``jobs``; those that continue an earlier merge with the tallies of their tensor.

    Raises:
        LrmergeError: the first model is no merge by opcm, is one on another base, or nothing joins it.
    """
    known: dict[str, Earlier] = {}
    for job in jobs:
        if not (job.merged and recipe.method.continues and job.arguments.get("continued")):
            yield job
            continue
        source, name = job.inputs[0]
        if source.ref not in known:
            if source.applied is not None:
                raise recipe.place.error(PLACE, f"{source.ref} {_NONE}: it has a LoRA on it")
            folder = source.checkpoint.folder
            base = job.base.source.checkpoint if job.base is not None else None
            files = [folder / FILE] if folder is not None else []
            known[source.ref] = _read(recipe, source.ref, len(job.inputs), files, base)
        yield replace(job, earlier=known[source.ref].of(source.aliases.get(name, name)))


def continued_steps(recipe: Recipe, opened: Sequence[Opened], steps: Sequence[Step], base: Base | None) -> list[Step]:
    """All ``steps``; those that continue an earlier merge with the tallies of what they merge.

    What the earlier merge does not hold, no model in it has changed.

    Raises:
        LrmergeError: the first adapter is no merge by opcm, is one on another base, or nothing joins it.
    """
    if not recipe.method.continues or not any(step.arguments.get("continued") for step in steps):
        return list(steps)
    first = opened[0]
    files = [place for file in first.files for place in (file.with_suffix(f".{FILE}"), file.parent / FILE)]
    earlier = _read(recipe, first.ref, len(opened), files, base.checkpoint if base is not None else None)
    unchanged = (Tally(scale=1.0, mean_norm=0.0, count=earlier.count),)
    return [
        replace(step, earlier=unchanged if step.given[0] is None else earlier.of(step.label))
        if step.arguments.get("continued")
        else step
        for step in steps
    ]


def _read(recipe: Recipe, ref: str, inputs: int, files: Sequence[Path], base: Checkpoint | None) -> Earlier:
    """The earlier merge ``ref``, the first of so many inputs; its manifest is one of ``files``."""
    if inputs < 2:
        raise recipe.place.error(PLACE, f"{ref} is all there is; list what joins it behind it")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        where = "lies beside it" if files else "is there of what is in memory, or not made yet"
        raise recipe.place.error(PLACE, f"{ref} {_NONE}: no {FILE} {where}")
    content = read_config(file)
    made = " ".join(str(content[key]) for key in ("verb", "method") if key in content)
    if made != "merge opcm":
        raise recipe.place.error(PLACE, f"{ref} {_NONE}: {file} is of {made or 'no run'}")
    try:
        said = _Manifest.model_validate(content)
    except ValidationError as problem:
        first = problem.errors()[0]
        where, what = ".".join(map(str, first["loc"])), first["msg"].lower().removeprefix("value error, ")
        raise FormatError(f"{file}: {where}: {what}; the manifest is damaged") from None
    records = {tensor.name: tensor.opcm for tensor in said.tensors if tensor.opcm is not None}
    if not records:
        raise MismatchError(f"{file}: does not say how opcm scaled what it merged; merge {ref} again with this version")
    then = said.inputs.get(said.base or "") or said.inputs.get("base")
    if then is not None and base is not None and _differ(then, describe(base)):
        raise MismatchError(
            f"{ref}: was merged on another base, {then.get('ref')}; the files of {base.ref} are not the same"
        )
    tallies = {
        name: tuple(Tally(scale, norm, one.count) for scale, norm in zip(one.scale, one.mean_norm, strict=True))
        for name, one in records.items()
    }
    return Earlier(ref, next(iter(records.values())).count, tallies)


def _differ(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two descriptions are surely of different checkpoints: by digests of files, or else by revisions."""
    before, after = _digests(then), _digests(now)
    if both := before.keys() & after.keys():
        return any(before[key] != after[key] for key in both)
    return len({one["revision"] for one in (then, now) if "revision" in one}) > 1


def _digests(described: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    kinds = ("sha256", "header_sha256")
    return {(file["file"], kind): file[kind] for file in described.get("files", ()) for kind in kinds if kind in file}

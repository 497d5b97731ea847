"""What applying adapters will do to every tensor, from headers alone: new rows, untied, converted, or copied.

The output's tensors are cut into pieces of a few MiB: rows of a parameter that changes, or rows that are copied. A
piece reads what it writes, so memory does not grow with the model or with its largest tensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.pair import layout_of
from mergekit_lr.checkpoint.quantized import refuse_quantised
from mergekit_lr.checkpoint.shards import Files, Header, as_in, cut_at, has_index
from mergekit_lr.checkpoint.writer import total_bytes
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, parse_size, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.verbs.apply.adapters import Given, Reference, open_onto, pairs
from mergekit_lr.verbs.apply.change import Part, own_shape
from mergekit_lr.verbs.apply.config import config_of, refuse_tied, resized
from mergekit_lr.verbs.apply.rows import Span, cut, is_scaled, spans_of
from mergekit_lr.verbs.apply.targets import Target, targets

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PIECE = 1 << 21  # entries of a changed piece, whose arithmetic takes a dozen bytes for each
COPY = 8 << 20  # bytes of a copied piece

Rounding = Literal["nearest", "stochastic"]
RANDOM = {"nearest": 0, "stochastic": 20}  # bytes per entry that its random bits and sums take


class Task(NamedTuple):
    """One node's work: the rows of ``part``, read from and written to ``spans``; a copy where there is no target."""

    target: Target | None
    part: Part | None
    spans: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class ApplyPlan:
    """Everything that ``apply`` will do.

    targets: parameters that change. untied: those that got a tensor of their own. resized:
    whether the vocabulary has another size now. outputs: every tensor of the result.
    files: where each goes. config: of the result. states: tensor of the output to what happens to it.
    """

    base: Checkpoint
    layout: Layout
    given: tuple[Given, ...]
    targets: tuple[Target, ...]
    untied: tuple[str, ...]
    resized: bool
    outputs: dict[str, Header]
    files: Files
    index: bool
    config: dict[str, Any]
    states: dict[str, str]
    schedule: Schedule
    resources: Resources
    seed: int | None
    notes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def written(self) -> int:
        """Bytes of all tensors of the result."""
        return total_bytes(self.outputs.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds most of the result's bytes."""
        return _main_dtype(self.outputs)

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most."""
        return self.resources.memory - self.resources.working + self.schedule.peak

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "base": self.base.ref,
            "adapters": [{"ref": g.ref, "weight": g.weight, "dialect": g.dialect} for g in self.given],
            "options": self.options,
            "layout": self.layout.source,
            "device": str(self.resources.device),
            "workers": self.resources.workers,
            "batches": len(self.schedule.batches),
            "read_bytes": self.schedule.cost.read,
            "download_bytes": self.base.to_download,
            "written_bytes": self.written,
            "peak_bytes": self.peak,
            "files": {name: total_bytes(held.values()) for name, held in self.files.items()},
            "notes": list(self.notes),
            "changed": [
                {"name": t.name, "kind": str(t.parameter.kind), "shape": list(t.parameter.shape), "by": t.how}
                for t in self.targets
            ],
            "tensors": [
                {"name": name, "state": state, "bytes": total_bytes([self.outputs[name]])}
                for name, state in self.states.items()
            ],
        }


def plan_apply(
    base: str | Path | Checkpoint | Mapping[str, Tensor],
    adapters: Iterable[Reference | tuple[Reference, float]],
    *,
    unmerge: bool = False,
    rounding: Rounding = "nearest",
    dtype: str | torch.dtype | None = None,
    shard_size: str | int | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> ApplyPlan:
    """The plan of ``apply`` with the same arguments; reads headers, and the adapters."""
    options = {"unmerge": unmerge, "rounding": rounding, "dtype": _dtype_name(dtype), "shard_size": shard_size}
    options |= {"memory": memory, "device": device, "threads": threads, "seed": seed}
    if rounding not in ("nearest", "stochastic"):
        raise UsageError(f"--rounding {rounding}: choose nearest or stochastic")
    asked = pairs(adapters)
    opened = Checkpoint.open(base)
    refuse_quantised(opened.ref, opened.tensors)
    layout = layout_of(opened)
    given = tuple(open_onto(opened, layout, ref, weight, unmerge=unmerge) for ref, weight in asked)
    found = targets(layout, given)
    outputs = _outputs(opened, found.changing, DTYPES[options["dtype"]] if dtype else None)
    config = config_of(opened, found, options["dtype"])
    refuse_tied(found.untied, outputs, config)
    beside = {new: old for target in found.changing for old, new in target.names.items()}
    files = as_in(opened, outputs, beside)
    available = resources(device=device, memory=memory, threads=threads)
    covered: dict[str, list[tuple[int, int]]] = defaultdict(list)
    nodes = [node for target in found.changing for node in _nodes(opened, target, outputs, covered, rounding)]
    nodes += [node for name in outputs for node in _copies(opened, name, outputs, covered[name], rounding)]
    return ApplyPlan(
        base=opened,
        layout=layout,
        given=given,
        targets=found.changing,
        untied=found.untied,
        resized=resized(opened, found) is not None,
        outputs=outputs,
        files=files if shard_size is None else cut_at(files, _shard_size(shard_size)),
        index=shard_size is None and has_index(opened),
        config=config,
        states={name: _state(opened, name, header, covered[name]) for name, header in outputs.items()},
        schedule=schedule(nodes, budget=available.working, workers=available.workers),
        resources=available,
        seed=seed if rounding == "stochastic" else None,
        notes=tuple(note for one in given for note in one.notes)
        + tuple(_notes(opened, found.untied, unmerge, outputs)),
        options=options,
    )


def _outputs(base: Checkpoint, changing: Sequence[Target], dtype: torch.dtype | None) -> dict[str, Header]:
    """Dtype and shape of every tensor of the result. A weight in fp8 with a scale is written as bfloat16."""

    def stored(name: str, own: torch.dtype) -> torch.dtype:
        if not own.is_floating_point:
            return own
        return dtype or (torch.bfloat16 if is_scaled(base, name) else own)

    outputs = {name: (stored(name, info.dtype), info.shape) for name, info in base.tensors.items()}
    for target in changing:
        for old, new in target.names.items():
            outputs[new] = outputs[old]
        if target.fresh:
            name = target.parameter.blocks[0][0].tensor
            saved = target.changes[0].saved
            assert saved is not None
            own = base.tensors[name].dtype if name in base.tensors else saved.dtype
            outputs[name] = (stored(name, own), target.parameter.shape)
    return outputs


def _nodes(
    base: Checkpoint,
    target: Target,
    outputs: Mapping[str, Header],
    covered: dict[str, list[tuple[int, int]]],
    rounding: Rounding,
) -> Iterator[Node]:
    """One node for each piece of each matrix of ``target``; what they write is noted in ``covered``."""
    parameter = target.parameter
    rows, columns = own_shape(parameter)
    for index, blocks in enumerate(parameter.blocks):
        spans = list(spans_of(base, target, index))
        if parameter.join == 0:
            ends = [sum(s.rows for s in spans[: i + 1]) for i in range(len(spans))]
        else:
            ends = [spans[0].rows]
        fits = sum(s.rows for s in spans) == rows if parameter.join == 0 else sum(s.width for s in spans) == columns
        if not fits or any(s.width != columns for s in spans if parameter.join == 0):
            raise MismatchError(
                f"{base.ref}: {parameter.name} is {[rows, columns]} by its config, its tensors "
                f"({blocks[0].tensor}) are of another shape; config.json belongs to another model"
            )
        for span in spans:
            covered[span.name].append((span.start * span.width, (span.start + span.rows) * span.width))
        # A piece lies within one block where blocks lie below each other, and spans all of them side by side.
        at_once = target.whole or any(span.source and is_scaled(base, span.source) for span in spans)
        step = rows if at_once else max(1, PIECE // max(columns, 1))
        bounds = [0, *ends] if not target.whole else [0, rows]
        for low, high in pairwise(bounds):
            for start in range(low, high, step):
                stop = min(start + step, high)
                here = tuple(cut(spans, start, stop, stacked=parameter.join == 0))
                yield _node(base, target, Part(parameter, index, start, stop), here, outputs, rounding)


def _node(
    base: Checkpoint,
    target: Target,
    part: Part,
    spans: tuple[Span, ...],
    outputs: Mapping[str, Header],
    rounding: Rounding,
) -> Node:
    rows, (_, columns) = part.stop - part.start, own_shape(part.parameter)
    size = rows * columns
    read = sum(s.entries * base.tensors[s.source].dtype.itemsize for s in spans if s.source is not None)
    written = sum(s.entries * outputs[s.name][0].itemsize for s in spans)
    rank = sum(change.rank for change in target.changes)
    # The result, the base's rows or the rounded ones widened, what is written; DoRA and its like hold copies.
    memory = read + (8 + RANDOM[rounding]) * size + written + 8 * rank * (rows + columns)
    memory += sum(24 * size for change in target.changes if not change.additive or change.made is not None)
    cost = Cost(max(read, 1), memory, 2.0 * size * max(rank, 1))
    label = target.name if part.parameter.matrices == 1 else f"{target.name}[{part.index}]"
    return Node(f"{label}:{part.start}", "apply", _place(base, spans[0]), cost, Task(target, part, spans))


def _copies(
    base: Checkpoint, name: str, outputs: Mapping[str, Header], covered: list[tuple[int, int]], rounding: Rounding
) -> Iterator[Node]:
    """Nodes for the rows of ``name`` that no target writes: copied byte for byte, or converted."""
    if name not in base.tensors:
        return
    info, dtype = base.tensors[name], outputs[name][0]
    step = max(1, COPY // info.dtype.itemsize)
    size, position = math.prod(info.shape), 0
    if is_scaled(base, name):
        step = max(size, 1)
    for low, high in [*sorted(covered), (size, size)]:
        for start in range(position, low, step):
            span = Span(name, name, start, min(step, low - start), 1)
            read = span.rows * info.dtype.itemsize
            more = span.rows * (8 + RANDOM[rounding] + dtype.itemsize)
            memory = read if dtype is info.dtype else read + more
            yield Node(
                f"={name}:{start}", "apply", _place(base, span), Cost(read, memory, 0.0), Task(None, None, (span,))
            )
        position = high


def _place(base: Checkpoint, span: Span) -> tuple[str, int]:
    if span.source is None:
        return "", 0
    info = base.tensors[span.source]
    return str(info.file), info.offset + span.start * span.width * info.dtype.itemsize


def _state(base: Checkpoint, name: str, header: Header, covered: list[tuple[int, int]]) -> str:
    if name not in base.tensors:
        return "new"
    if covered:
        return "changed"
    return "copied" if header[0] is base.tensors[name].dtype else "converted"


def _notes(base: Checkpoint, untied: Sequence[str], unmerge: bool, outputs: Mapping[str, Header]) -> Iterator[str]:
    for name in untied:
        yield f"{name} is untied: the adapter does not change both ends of the tie alike; the config says so"
    if any(is_scaled(base, name) for name in base.tensors):
        yield "the base's fp8 weights are written dequantised"
    if unmerge:
        narrow = str(_main_dtype(outputs)).removeprefix("torch.")
        yield (
            f"merging rounded every weight to {narrow}, and taking out rounds again: a weight comes back to within a "
            "unit in the last place of the larger of its two values, not bit for bit"
        )


def _main_dtype(outputs: Mapping[str, Header]) -> torch.dtype:
    """The dtype that holds most of the result's bytes."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for header in outputs.values():
        sizes[header[0]] += total_bytes([header])
    return max(sizes, key=lambda dtype: sizes[dtype])


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name is not None and name not in DTYPES:
        raise UsageError(f"--dtype {name}: choose {', '.join(DTYPES)}")
    return name


def _shard_size(size: str | int) -> int:
    if (parsed := parse_size(size)) < 1:
        raise UsageError(f"--shard-size {size}: at least 1 byte")
    return parsed

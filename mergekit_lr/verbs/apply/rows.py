"""The rows of tensors on disk that make up a matrix of a parameter: found from headers, read without the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.safetensors import prefault, read_tensor
from mergekit_lr.verbs.apply.targets import Target


class Span(NamedTuple):
    """``rows`` rows from ``start`` on of a tensor on disk seen as rows of ``width`` entries; in the matrix that they
    are a part of they begin at ``column``. source: tensor of the base, None where it has none. name: of the output."""

    source: str | None
    name: str
    start: int
    rows: int
    width: int
    column: int = 0

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return self.rows * self.width


def spans_of(base: Checkpoint, target: Target, index: int) -> Iterator[Span]:
    """Matrix ``index`` of a target, one span for each of its blocks."""
    column = 0
    for block in target.parameter.blocks[index]:
        shape = target.parameter.shape if target.fresh else base.tensors[block.tensor].shape
        inner = shape if block.index is None else shape[1:]
        rows, width = (inner[0] if inner else 1), math.prod(inner[1:])
        low, high = block.rows or (0, rows)
        first = (block.index or 0) * rows + low
        source = None if target.fresh else block.tensor
        yield Span(source, target.names.get(block.tensor, block.tensor), first, high - low, width, column)
        column += width if target.parameter.join else 0


def cut(spans: Sequence[Span], start: int, stop: int, *, stacked: bool) -> Iterator[Span]:
    """Rows ``start:stop`` of the matrix that ``spans`` make up, below each other (``stacked``) or side by side."""
    above = 0
    for span in spans:
        low, high = max(start - above, 0), min(stop - above, span.rows)
        if low < high:
            yield span._replace(start=span.start + low, rows=high - low)
        above += span.rows if stacked else 0


def is_scaled(checkpoint: Checkpoint, name: str) -> bool:
    """Whether ``name`` is stored in fp8 beside a scale, and read as their product."""
    return name in checkpoint._scales


def read_span(checkpoint: Checkpoint, span: Span) -> Tensor:
    """The rows of one span, (rows, width), mapped from the file and brought into memory where that is possible."""
    assert span.source is not None
    info = checkpoint.tensors[span.source]
    if checkpoint.folder is None or info.file.suffix != ".safetensors" or is_scaled(checkpoint, span.source):
        whole = checkpoint.read(span.source).reshape(-1)
        return whole[span.start * span.width :][: span.entries].reshape(span.rows, span.width)
    checkpoint.fetch()
    size = info.dtype.itemsize
    place = info._replace(
        shape=(span.rows, span.width), offset=info.offset + span.start * span.width * size, nbytes=span.entries * size
    )
    rows = read_tensor(place)
    prefault(rows)
    return rows


def join(parts: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
    """The rows of a matrix from those of its spans; itself where there is one."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=1 if any(span.column for span in spans) else 0)


def split(rows: Tensor, spans: Sequence[Span]) -> list[Tensor]:
    """The inverse of ``join``."""
    if any(span.column for span in spans):
        return [rows[:, span.column : span.column + span.width] for span in spans]
    return list(rows.split([span.rows for span in spans]))

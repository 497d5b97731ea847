"""Does an adapter fit: its base, parameter by parameter, or an inference server."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.adapter.open import open_adapter
from mergekit_lr.adapter.target import TARGETS, fit
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import layout_of
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import UsageError


def check_base(adapter: str | Path, base: str | Path | Checkpoint) -> tuple[str, ...]:
    """Everything in ``adapter`` that finds no place in ``base``, one line each; empty where all of it fits.

    PEFT loads an adapter whose keys meet no module without an error, and it then does nothing.

    Raises:
        LrmergeError: one of the two cannot be read.
    """
    checkpoint = Checkpoint.open(base)
    layout = layout_of(checkpoint)
    # Without the layout: what does not fit shall be listed, not stop at the first.
    opened = open_adapter(adapter).adapter
    problems = []
    for name, weight in opened.weights.items():
        parameter = layout.by_name.get(name)
        if parameter is None:
            problems.append(f"{name}: the base has no such parameter")
        elif _expected(parameter) != tuple(weight.delta.shape):
            problems.append(f"{name}: factors of {list(weight.delta.shape)}, the base has {list(_expected(parameter))}")
    for name, tensor in opened.saved.items():
        parameter = layout.by_name.get(name)
        if parameter is None and name not in layout.missing:
            problems.append(f"{name}: saved in full, the base has no such parameter")
        elif parameter is not None and parameter.shape != tuple(tensor.shape):
            problems.append(f"{name}: saved as {list(tensor.shape)}, the base has {list(parameter.shape)}")
    return tuple(problems)


def check_server(adapter: str | Path, target: str, base: str | Path | None = None) -> tuple[str, ...]:
    """What a server does with ``adapter`` that its user should know.

    Raises:
        MismatchError: the server cannot load it, with the reason.
        UsageError: an unknown server.
    """
    if target not in TARGETS:
        raise UsageError(f"--for {target}: choose {', '.join(TARGETS)}")
    layout = layout_of(Checkpoint.open(base)) if base is not None else None
    return fit(open_adapter(adapter, layout=layout).adapter, target, layout).notes


def _expected(parameter: Parameter) -> tuple[int, ...]:
    """Shape that the delta of ``parameter`` has as factors: a stack of experts keeps its leading axis."""
    stack = parameter.kind in (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED)
    return (parameter.shape[0], *parameter.matrix_shape) if stack else parameter.matrix_shape

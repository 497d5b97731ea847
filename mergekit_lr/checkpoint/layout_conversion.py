"""transformers' conversion of tensors on disk to parameters in memory, followed on names and shapes alone.

Key by key as its loader does it: renamings first, then at most one conversion, then the prefix of a model with or
without its head. A conversion that joins or cuts along an axis becomes ``Block`` lists; any other is reported.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from mergekit_lr.checkpoint.parameter import Block

Shapes = dict[str, tuple[int, ...]]
Blocks = tuple[tuple[Block, ...], ...]


class Sources(NamedTuple):
    """What makes one parameter: for each matrix of its stack the blocks, joined along ``join``."""

    blocks: Blocks
    join: int = 0


def whole(name: str) -> Sources:
    """The tensor as it is."""
    return Sources(((Block(name),),))


def operations(converter: Any) -> list[str]:
    """Class names of a conversion's operations, in order."""
    return [type(operation).__name__ for operation in converter.operations]


def follow(shapes: Shapes, model: Any, mapping: list[Any]) -> tuple[dict[str, Sources], dict[str, str]]:
    """Every tensor on disk through the loader's renaming, the tensors of a conversion together."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    sources: dict[str, Sources] = {}
    unused: dict[str, str] = {}
    grouped: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            unused[name] = f"no parameter of {type(model).__name__}"
        elif pattern is None:
            sources[target] = whole(name)
        else:
            grouped[target][pattern].append(name)
    for target, collected in grouped.items():
        converter = by_pattern[next(iter(collected))]
        made = _convert(target, collected, converter, shapes, state)
        if made is None:
            reason = f"loaded through {' and '.join(operations(converter))}, which no joining of tensors describes"
            unused |= {name: reason for names in collected.values() for name in names}
        else:
            sources |= made
    return sources, unused


def _convert(
    target: str, collected: dict[str, list[str]], converter: Any, shapes: Shapes, state: dict[str, Any]
) -> dict[str, Sources] | None:
    """One conversion as blocks, or None where its operations are no joining or cutting along an axis."""
    lists = [collected[pattern] for pattern in converter.source_patterns if pattern in collected]
    match operations(converter), converter.operations:
        case ["MergeModulelist"], [merge] if merge.dim == 0 and len(lists) == 1:
            return {target: Sources(tuple((Block(name),) for name in lists[0]))}
        case ["MergeModulelist", "Concatenate"], [merge, join] if merge.dim == 0 and join.dim > 0:
            if len({len(names) for names in lists}) == 1:
                rows = tuple(tuple(Block(name) for name in names) for names in zip(*lists, strict=True))
                return {target: Sources(rows, join.dim - 1)}
        case ["Concatenate"], [join] if len(lists) > 1:
            return {target: Sources((tuple(Block(name) for names in lists for name in names),), join.dim)}
        case ["Transpose"], [turn] if turn.check_dims and len(lists[0]) == 1:
            # It turns the tensor only where it does not fit as it is.
            if shapes[lists[0][0]] == tuple(state[target].shape):
                return {target: whole(lists[0][0])}
        case ["Chunk" | "Split"], [cut] if cut.dim == 0 and len(lists) == 1 and len(lists[0]) == 1:
            name, start, made = lists[0][0], 0, {}
            first = converter.target_patterns[0]
            for pattern in converter.target_patterns:
                part = target.replace(first, pattern)
                if part not in state:
                    return None
                stop = start + state[part].shape[0]
                made[part] = Sources(((Block(name, rows=(start, stop)),),))
                start = stop
            return made if start == shapes[name][0] else None
    return None

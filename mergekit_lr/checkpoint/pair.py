"""A base and its fine-tune, parameter by parameter, under the names of the base's model in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import Layout, parameters
from mergekit_lr.checkpoint.names import aligned, unwrapped
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter
from mergekit_lr.checkpoint.quantized import refuse_quantised
from mergekit_lr.errors import FormatError, MismatchError

Vocabulary = Literal["refuse", "keep", "truncate"]


@dataclass(frozen=True)
class Pair:
    """One parameter on both sides. ``grown``: its table has more rows in the fine-tune than in the base."""

    base: Parameter
    finetuned: Parameter
    grown: bool = False

    @property
    def name(self) -> str:
        """The name in memory, the base's."""
        return self.base.name


@dataclass(frozen=True)
class Pairing:
    """All parameters of a base and its fine-tune.

    pairs: those that both have. added: those that only the fine-tune has (a new head). layout: of the model that an
    adapter goes onto. unused: tensors of either side that belong to no parameter, to the reason.
    """

    pairs: tuple[Pair, ...]
    added: tuple[Parameter, ...]
    layout: Layout
    unused: dict[str, str]


def pair(base: Checkpoint, finetuned: Checkpoint, *, vocab: Vocabulary = "refuse") -> Pairing:
    """Match the parameters of ``finetuned`` and ``base`` by their names in memory.

    The names are the base's, unless the fine-tune has parameters that the base lacks (a classification head on a
    bare backbone): then the model that the adapter goes onto is the fine-tune's class, and so are the names.

    Raises:
        FormatError: a side is quantised.
        MismatchError: different architectures, a parameter that the fine-tune lacks, shapes that differ; or a grown
            vocabulary and ``vocab="refuse"``.
    """
    for checkpoint in (base, finetuned):
        refuse_quantised(checkpoint.ref, checkpoint.tensors)
    mine, theirs = layout_of(base), layout_of(finetuned)
    old, new = mine.by_name, _renamed(theirs, mine)
    layout = mine
    if new.keys() - old.keys() and not old.keys() - new.keys():
        layout, old, new = theirs, _renamed(mine, theirs), theirs.by_name
    # A tie that both sides keep is one tensor; where only one keeps it, the ends are compared one by one.
    kept_ties = {name for name in layout.ties if _is_tied(old.get(name), mine) and _is_tied(new.get(name), theirs)}
    layout = _untied(layout, kept_ties)
    missing = [name for name in old if name not in new and name not in mine.ties]
    if missing:
        _refuse_missing(base, finetuned, missing, len(old))
    both = [name for name in old if name in new and name not in kept_ties]
    pairs = tuple(_matched(old[name], new[name], base, finetuned, vocab) for name in both)
    added = tuple(p for name, p in new.items() if name not in old and not _is_tied(p, theirs))
    return Pairing(pairs, added, layout, {**theirs.unused, **mine.unused})


def _untied(layout: Layout, kept: set[str]) -> Layout:
    """``layout`` with only those ties that both sides keep: the ends of any other change on their own.

    PEFT wraps or replaces the modules at both ends one by one, so each can have its own change.
    """
    broken = tuple(end for end in layout.tied if end.name not in kept)
    if not broken:
        return layout
    return replace(
        layout,
        parameters=(*layout.parameters, *broken),
        tied=tuple(end for end in layout.tied if end.name in kept),
        ties={name: source for name, source in layout.ties.items() if name in kept},
    )


class Sides(NamedTuple):
    """One matrix (or vector) of a pair as both checkpoints store it, in the parameter's own layout."""

    finetuned: Tensor
    base: Tensor


def read_pair(pair: Pair, index: int, base: Checkpoint, finetuned: Checkpoint) -> Sides:
    """Matrix ``index`` of ``pair`` from both sides, the fine-tune's extra rows cut off."""
    new, old = read_matrix(finetuned, pair.finetuned, index), read_matrix(base, pair.base, index)
    return Sides(new[: old.shape[0]] if pair.grown else new, old)


def read_matrix(checkpoint: Checkpoint, parameter: Parameter, index: int = 0) -> Tensor:
    """Matrix ``index`` of ``parameter`` in its own layout: mapped where it is one block, joined where it is several."""
    blocks = [_read_block(checkpoint, block) for block in parameter.blocks[index]]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=parameter.join)


def _read_block(checkpoint: Checkpoint, block: Block) -> Tensor:
    tensor = checkpoint.read(block.tensor, block.index)
    return tensor if block.rows is None else tensor[slice(*block.rows)]


def read_whole(checkpoint: Checkpoint, parameter: Parameter) -> Tensor:
    """The parameter in its shape in memory, all its matrices together."""
    if parameter.matrices == 1:
        return read_matrix(checkpoint, parameter).reshape(parameter.shape)
    return torch.stack([read_matrix(checkpoint, parameter, i) for i in range(parameter.matrices)])


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout under unwrapped names, its blocks under the names on disk."""
    on_disk = {bare: name for name, bare in unwrapped(checkpoint.tensors).items()}
    infos = {bare: (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) for bare, name in on_disk.items()}
    layout = parameters(infos, checkpoint.config)
    if all(bare == name for bare, name in on_disk.items()):
        return layout

    def disk(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        return tuple(replace(block, tensor=on_disk[block.tensor]) for block in blocks)

    def renamed(found: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
        return tuple(replace(p, blocks=tuple(disk(blocks) for blocks in p.blocks)) for p in found)

    return replace(layout, parameters=renamed(layout.parameters), tied=renamed(layout.tied))


def _renamed(layout: Layout, reference: Layout) -> dict[str, Parameter]:
    """The parameters of ``layout`` under the names of ``reference``, where the two differ by a prefix."""
    shapes = {name: parameter.shape for name, parameter in reference.by_name.items()}
    names = aligned({name: parameter.shape for name, parameter in layout.by_name.items()}, shapes)
    return {names[name]: replace(parameter, name=names[name]) for name, parameter in layout.by_name.items()}


def _is_tied(parameter: Parameter | None, layout: Layout) -> bool:
    """Whether ``parameter``, of ``layout`` under whatever name, is the other end of a tie (or not there at all)."""
    return parameter is None or any(
        parameter.blocks == end.blocks and end.kind is parameter.kind for end in layout.tied
    )


def _matched(base: Parameter, new: Parameter, a: Checkpoint, b: Checkpoint, vocab: Vocabulary) -> Pair:
    if base.shape == new.shape:
        return Pair(base, new)
    table = base.shape[1:] == new.shape[1:] and len(base.shape) in (1, 2)
    if not (table and new.shape[0] > base.shape[0] and base.kind in (Kind.EMBEDDING, Kind.LINEAR)):
        raise MismatchError(
            f"{base.name} has shape {list(base.shape)} in {a.ref} and {list(new.shape)} in {b.ref}: not a fine-tune of "
            "this base"
        )
    if vocab == "refuse":
        raise MismatchError(
            f"{base.name} grew from {base.shape[0]} rows in {a.ref} to {new.shape[0]} in {b.ref}; choose --vocab keep "
            "(save the grown tables in full) or --vocab truncate (leave the new rows out)"
        )
    return Pair(base, new, grown=True)


def _refuse_missing(base: Checkpoint, finetuned: Checkpoint, missing: list[str], count: int) -> None:
    names = [(checkpoint.config.get("architectures") or ["?"])[0] for checkpoint in (base, finetuned)]
    what = f" ({names[0]} and {names[1]})" if "?" not in names else ""
    if len(missing) > count // 2:
        raise MismatchError(f"{base.ref} and {finetuned.ref} are different architectures{what}")
    raise MismatchError(
        f"{finetuned.ref} lacks {len(missing)} of the {count} parameters of {base.ref}{what}, first {missing[0]}"
    )


def refuse_nan(sides: Sides, pair: Pair, base: Checkpoint, finetuned: Checkpoint) -> None:
    """Raise for a pair whose difference is not finite: one side holds NaN or Inf, or the difference overflows.

    Raises:
        FormatError: naming the file and the tensor.
    """
    refuse_nan_in(sides.finetuned, pair.finetuned, finetuned)
    refuse_nan_in(sides.base, pair.base, base)
    raise FormatError(f"{finetuned.ref}: tensor {pair.name} minus the base's overflows; one of the two is damaged")


def refuse_nan_in(tensor: Tensor, parameter: Parameter, checkpoint: Checkpoint) -> None:
    """Raise where ``tensor``, read as ``parameter`` of ``checkpoint``, holds NaN or Inf.

    Raises:
        FormatError: naming the file and the tensor.
    """
    # In float32, as float8 knows no isfinite.
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        info = checkpoint.tensors[parameter.blocks[0][0].tensor]
        place = info.file if checkpoint.folder else checkpoint.ref
        raise FormatError(
            f"{place}: tensor {parameter.blocks[0][0].tensor} holds NaN or Inf; the checkpoint is damaged"
        )

"""Which way each changed parameter travels in a PEFT adapter: as factors, in a saved module, or into the base.

PEFT has three slots. *Factors*: a LoRA on the module (``target_modules``) or on the parameter itself
(``target_parameters``: stacked experts). *Saved modules* (``modules_to_save``): a module replaced whole, so all
of its parameters must be there, changed or not. *The base*: a tensor of the file that bears the name of a base
parameter is loaded into it; that is how PEFT's own ``bias="all"`` works, and it fits any parameter, but
disabling the adapter does not undo it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind, Parameter

_MATRICES = (Kind.LINEAR, Kind.TRANSPOSED, Kind.CONVOLUTION, Kind.EMBEDDING)


@dataclass(frozen=True)
class Carry:
    """How a set of changes travels. Every changed parameter is in exactly one of the first two or in ``refused``.

    factors: parameters whose change goes as low-rank factors.
    saved: parameters to be given in full, changed ones and those that their module must bring along.
    base: those of ``saved`` that are loaded into the base itself and stay when the adapter is disabled.
    refused: what no slot holds, to the reason.
    reasons: matrices of ``saved`` that are no factors, to the reason why.
    notes: what a user of the adapter should know.
    """

    factors: tuple[str, ...]
    saved: tuple[str, ...]
    base: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def carry(layout: Layout, changed: Iterable[str], *, full: Collection[str] = (), tables: bool = True) -> Carry:
    """Decide the slot of every changed parameter.

    Args:
        layout: The base model.
        changed: Names in memory (or names on disk that belong to no parameter) of what differs from the base.
        full: Parameters that shall be saved in full though they could be factors.
        tables: Whether embedding tables may be factors; else they are saved in full.

    Returns:
        The slots, all in module order.
    """
    changed = set(changed)
    own = {parameter.name for parameter in layout.parameters}
    refused = {name: layout.unused.get(name, "the model has no such parameter") for name in sorted(changed - own)}
    factors: list[str] = []
    whole: list[Parameter] = []
    reasons: dict[str, str] = {}
    obstacles = {
        parameter.name: _obstacle(layout, parameter, full, tables)
        for parameter in layout.parameters
        if parameter.name in changed
    }
    stacks = any(why is None and layout.by_name[name].carrier == "parameter" for name, why in obstacles.items())
    for parameter in layout.parameters:
        if parameter.name not in changed:
            continue
        obstacle = obstacles[parameter.name]
        if stacks and obstacle is None and parameter.kind is Kind.TRANSPOSED:
            obstacle = "PEFT has no LoRA on a Conv1D in one adapter with a LoRA on a parameter"
        if obstacle is None:
            factors.append(parameter.name)
            continue
        whole.append(parameter)
        if parameter.kind is not Kind.VECTOR:
            reasons[parameter.name] = obstacle
    targets = {end.module for name in factors for end in layout.ends(name)}
    saved = _with_siblings(layout, whole, targets)
    ordered = tuple(parameter.name for parameter in layout.parameters if parameter.name in saved)
    modules = saved_modules(layout, saved, targets)
    base = tuple(name for name in ordered if not _in_modules(layout, name, modules))
    return Carry(tuple(factors), ordered, base, refused, reasons, tuple(_notes(layout, factors, base)))


def saved_modules(layout: Layout, saved: Collection[str], targets: Collection[str]) -> tuple[str, ...]:
    """Modules that ``modules_to_save`` can replace whole: no child modules, all of their parameters in ``saved``.

    Args:
        layout: The base model.
        saved: Names of the parameters given in full; a tie given at one end counts for all of its ends.
        targets: Modules that bear a LoRA.
    """
    given = {end.name for name in saved for end in layout.ends(name)}
    content: dict[str, set[str]] = {}
    for name in (*layout.by_name, *layout.missing):
        content.setdefault(name.rpartition(".")[0], set()).add(name)
    replaceable = _replaceable(layout, targets)
    chosen = {module for module, names in content.items() if names <= given and replaceable(module)}
    # A tie is replaced at every end or, through the base, at none.
    broken = {
        layout.ties.get(end.name, end.name)
        for end in layout.by_name.values()
        if end.name in given and end.module not in chosen
    }
    return tuple(
        module
        for module in content
        if module in chosen and not any(layout.ties.get(name, name) in broken for name in content[module])
    )


def _obstacle(layout: Layout, parameter: Parameter, full: Collection[str], tables: bool) -> str | None:
    """Why the change of a parameter cannot be factors; None where it can. A tie must bear them at every end."""
    if parameter.name in full:
        return "asked for in full"
    for end in layout.ends(parameter.name):
        if not end.carrier:
            return end.obstacle or "no LoRA layer exists for a parameter of this kind"
        if end.kind is Kind.EMBEDDING and not tables:
            return "an embedding table"
    return None


def _with_siblings(layout: Layout, whole: list[Parameter], targets: set[str]) -> set[str]:
    """Names to be saved: those asked for, and the rest of each module that is better replaced whole."""
    names = {parameter.name for parameter in whole}
    replaceable = _replaceable(layout, targets)
    siblings: dict[str, set[str]] = defaultdict(set)
    for parameter in layout.parameters:
        siblings[parameter.module].add(parameter.name)
    for parameter in whole:
        weight = layout.by_name.get(f"{parameter.module}.weight")
        # The bias of an unchanged matrix would bring the matrix along: it goes into the base alone.
        if weight is not None and weight.kind in _MATRICES and weight.name not in names:
            continue
        for end in layout.ends(parameter.name):
            if replaceable(end.module):
                names |= siblings[end.module]
    return names


def _replaceable(layout: Layout, targets: Collection[str]) -> Callable[[str], bool]:
    """A test whether PEFT can put another module in the place of this one, and of this one alone."""
    paths = sorted(layout.modules)
    backwards = sorted(path[::-1] for path in layout.modules)
    # A ParameterList holds its parameters under numbers; PEFT refuses to replace one.
    lists = {name.rpartition(".")[0] for name in layout.by_name if name.rpartition(".")[2].isdigit()}
    below = "\n".join(f".{target}." for target in targets)

    def replaceable(module: str) -> bool:
        if not module or module in lists:
            return False
        child = bisect_left(paths, module + ".")
        if child < len(paths) and paths[child].startswith(module + "."):
            return False
        # PEFT takes every module whose path *ends in* the name, without regard to dots ("norm": "layernorm").
        other = bisect_left(backwards, module[::-1]) + 1
        if other < len(backwards) and backwards[other].startswith(module[::-1]):
            return False
        # Nor may it be a target, or a target lie below any module of this name.
        return f".{module}." not in below

    return replaceable


def _in_modules(layout: Layout, name: str, modules: Collection[str]) -> bool:
    return all(end.module in modules for end in layout.ends(name))


def _notes(layout: Layout, factors: list[str], base: tuple[str, ...]) -> Iterable[str]:
    tied = [name for name in factors if len(layout.ends(name)) > 1]
    if tied:
        yield (
            f"{', '.join(tied)} is tied: its factors stand at every end; PEFT's merge_and_unload would add them "
            "once per end to the one table, so untie it before merging with PEFT"
        )
    if base:
        yield (
            f"{len(base)} parameters are loaded into the base itself, as PEFT does with biases: disabling the "
            "adapter does not undo them"
        )

"""One set of names for a base and its fine-tune, whatever their training wrappers added.

Training frameworks save ``_orig_mod.model.layers...`` or ``module.model.layers...`` for what the model calls
``model.layers...``. Those wrapper names mean nothing and are taken off. Whole moves (``language_model.model.`` for
``model.language_model.``) are the model's own business: the layout resolves both sides to names in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Each name on disk to the name without wrappers.

    ``module`` is a wrapper only where every name begins with it; the others are wrappers anywhere. Names that would
    collide keep their wrappers.
    """
    anywhere = set(WRAPPERS[:-1])
    parts = {name: [part for part in name.split(".") if part not in anywhere] for name in names}
    while parts and all(len(split) > 1 and split[0] == "module" for split in parts.values()):
        parts = {name: split[1:] for name, split in parts.items()}
    bare = {name: ".".join(split) for name, split in parts.items()}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in names}


def aligned(names: Mapping[str, tuple[int, ...]], reference: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Map ``names`` (with shapes) onto ``reference`` where they differ by one leading prefix only.

    Both are names in memory. One side may have been saved from the bare backbone (``layers.0...``) and the other
    with its head (``model.layers.0...``). The prefix that makes the most names and shapes meet is taken; a name that
    meets none stays as it is.
    """
    unmatched = [name for name in names if name not in reference]
    if not unmatched:
        return {name: name for name in names}
    wanted = [name for name in reference if name not in names]
    candidates = {(a.removesuffix(b), "") for a in unmatched for b in wanted if a != b and a.endswith("." + b)}
    candidates |= {("", b.removesuffix(a)) for a in unmatched for b in wanted if a != b and b.endswith("." + a)}

    def renamed(name: str, change: tuple[str, str]) -> str:
        return change[1] + name.removeprefix(change[0]) if name.startswith(change[0]) else name

    def meets(change: tuple[str, str]) -> int:
        return sum(reference.get(renamed(name, change)) == names[name] for name in unmatched)

    best = max(sorted(candidates), key=meets, default=None)
    if best is None or meets(best) == 0:
        return {name: name for name in names}
    return {name: name if name in reference else renamed(name, best) for name in names}

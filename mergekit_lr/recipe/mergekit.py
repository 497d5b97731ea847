"""What mergekit's files say in their own way: references to models, parameters that change nothing here, defaults."""

from __future__ import annotations

from typing import Any

from mergekit_lr.methods.registry import Method

# Parameters of mergekit's that say how it stores things, not what it computes.
WITHOUT_EFFECT = ("int8_mask",)


def as_reference(value: Any) -> Any:
    """``path@revision+lora`` for mergekit's mapping ``{model: {path, revision}, lora: {path, revision}}``."""
    if not isinstance(value, dict):
        return value
    if unknown := value.keys() - {"model", "lora", "path", "revision"}:
        raise ValueError(f"a model's reference has no key {min(unknown)!r}; write org/name@revision+lora")
    if "path" in value:
        return "@".join(str(value[key]) for key in ("path", "revision") if value.get(key))
    parts = [value.get("model"), value.get("lora")]
    return "+".join(str(as_reference(part)) for part in parts if part)


def defaults(method: Method) -> dict[str, Any]:
    """The parameters that make a method of ours compute what mergekit does, for files without ``version``."""
    compat = method.parameters.get("compat")
    return {"compat": "mergekit"} if compat is not None and "mergekit" in compat.choices else {}

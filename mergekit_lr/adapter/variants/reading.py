"""From a PEFT adapter of any type but plain LoRA to the changes it makes: which tensor belongs to which module.

Keys look like ``base_model.model.<module>.<name>``; what the modules share is ``base_model.<name>``. The base's
own parameter names decide where a module's path ends, so that no name is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants import residual
from mergekit_lr.adapter.variants.site import Site, as_matrix, from_matrix
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, MismatchError

# PEFT's name of a type -> the file here that has its mathematics.
TYPES = {
    "ADALORA": "adalora",
    "BEFT": "beft",
    "BOFT": "boft",
    "BONE": "miss",
    "C3A": "c3a",
    "DELORA": "delora",
    "FOURIERFT": "fourierft",
    "FROD": "frod",
    "GLORA": "glora",
    "GRALORA": "gralora",
    "HIRA": "hira",
    "HRA": "hra",
    "IA3": "ia3",
    "LOHA": "loha",
    "LOKR": "lokr",
    "MISS": "miss",
    "OFT": "oft",
    "OSF": "osf",
    "PSOFT": "psoft",
    "PVERA": "vera",
    "RANDLORA": "randlora",
    "ROAD": "road",
    "SHIRA": "shira",
    "SUPERTUNING": "supertuning",
    "TINYLORA": "tinylora",
    "VBLORA": "vblora",
    "VERA": "vera",
    "WAVEFT": "waveft",
}
# Types that replace values instead of changing them, and hold no mathematics: name in the file -> what it is.
REPLACING = {"LN_TUNING": "ln_tuning_layers.", "TRAINABLE_TOKENS": "trainable_tokens_delta"}
# Fields of a configuration that hold for a change of weights, whatever type it came from.
NEUTRAL = ("task_type", "revision", "modules_to_save")
PREFIX = "base_model.model."

Delta = LowRank | Tensor


@dataclass(frozen=True)
class Variant:
    """An adapter of another type than LoRA, read but not yet turned into deltas.

    sites: one per adapted module, in the order of the base's modules. parameters: of the base, by name in memory.
    saved, token_rows, base, config, metadata: as in :class:`~mergekit_lr.adapter.adapter.Adapter`.
    """

    method: ModuleType | None
    sites: tuple[Site, ...]
    parameters: Mapping[str, Parameter]
    saved: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    base: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def deltas(self) -> Iterator[tuple[str, Delta]]:
        """(parameter, change), one module at a time.

        The change is factors, or a dense matrix (d_out, d_in) in the layout of ``nn.Linear``; a bias's is 1-D.

        Raises:
            UsageError: the type needs the base's weights and none was given.
            FormatError: a tensor is missing.
        """
        if self.method is None:
            return
        bias_delta_of = getattr(self.method, "bias_delta_of", None)
        for site in self.sites:
            delta = self.method.delta_of(site)
            if delta is not None:
                _check_shape(site, delta)
                yield f"{site.module}.weight", delta
            if bias_delta_of and (bias := bias_delta_of(site)) is not None:
                yield f"{site.module}.bias", bias

    def adapter(self) -> Adapter:
        """The whole as one value: low-rank changes as factors, the others dense under ``added``, all in memory."""
        weights, added = {}, {}
        for name, delta in self.deltas():
            parameter = self.parameters[name]
            if isinstance(delta, LowRank):
                weights[name] = AdaptedWeight(parameter.kind, delta, parameter.shape)
            else:
                added[name] = from_matrix(delta, parameter.kind, parameter.shape)
        config = {key: self.config[key] for key in NEUTRAL if self.config.get(key) is not None}
        return Adapter(weights, self.saved, self.token_rows, self.base, config, self.metadata, added=added)


def open_variant(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    parameters: Mapping[str, Parameter],
    *,
    read: Callable[[Parameter], Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Variant:
    """Sort an adapter's tensors by the modules of its base.

    Args:
        tensors: Content of ``adapter_model.safetensors``.
        config: Content of ``adapter_config.json``.
        parameters: The base's parameters by name in memory, in the model's order.
        read: Gives a parameter of the base in its own layout; needed by multiplicative types only.
        metadata: String metadata of the file.

    Raises:
        FormatError: a type without weight changes (prompts, routers), or a key that belongs to no module of the base
            or is no part of the type.
    """
    method = _method(config)
    known = method.TENSORS if method else frozenset()
    found = _Sorted()
    for key, tensor in tensors.items():
        _sort(key, tensor, config, parameters, known, found)
    sites = _sites(found, config, parameters, read)
    fields = {"base": config.get("base_model_name_or_path"), "config": dict(config), "metadata": dict(metadata or {})}
    return Variant(method, sites, parameters, found.saved, found.token_rows, **fields)


def _method(config: Mapping[str, Any]) -> ModuleType | None:
    kind = str(config.get("peft_type"))
    if kind == "LORA" and residual.method_of(config):
        return residual
    if kind in REPLACING:
        return None
    if kind not in TYPES:
        known = ", ".join(sorted((*TYPES, *REPLACING)))
        raise FormatError(
            f"an adapter of type {kind} has no weight changes that can be read here; types that have: {known}, and "
            "LORA with init_lora_weights pissa or olora, or with kasa_config"
        )
    return import_module(f"mergekit_lr.adapter.variants.{TYPES[kind]}")


@dataclass(frozen=True)
class _Sorted:
    """Where each tensor went."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)


def _sort(key, tensor, config, parameters, known, found: _Sorted) -> None:
    """Put one tensor where it belongs, or refuse it by name."""
    if key.startswith("base_model.") and not key.startswith(PREFIX):
        found.shared[key.removeprefix("base_model.")] = tensor
        return
    name = key.removeprefix(PREFIX)
    whole = name.replace("base_layer.", "").replace("ln_tuning_layers.", "")
    if whole in parameters:
        _check_saved(key, tensor, parameters[whole])
        found.saved[whole] = tensor
        return
    module, part = _split(name, parameters)
    if part in ("trainable_tokens_delta", "token_adapter.trainable_tokens_delta") and module:
        found.token_rows[f"{module}.weight"] = (_token_indices(config, module), tensor)
    elif module and part in known:
        found.modules.setdefault(module, {})[part] = tensor
    else:
        where = f"module {module} has no such part" if module else "its module is not in the base"
        raise FormatError(f"tensor {key} is not understood in an adapter of type {config['peft_type']}: {where}")


def _split(name: str, parameters: Mapping[str, Parameter]) -> tuple[str, str]:
    """(module, part): the longest leading path that owns a weight in the base, and the rest; ("", name) if none."""
    module = name
    while module:
        module = module.rpartition(".")[0]
        if f"{module}.weight" in parameters:
            return module, name[len(module) + 1 :]
    return "", name


def _sites(found: _Sorted, config, parameters, read) -> tuple[Site, ...]:
    order = {p.module: i for i, p in enumerate(parameters.values()) if p.name.endswith(".weight")}
    modules = sorted(found.modules, key=order.__getitem__)
    shapes = [parameters[f"{module}.weight"].matrix_shape for module in modules]

    def reader(name: str) -> Callable[[], Tensor] | None:
        parameter = parameters.get(name)
        if parameter is None or read is None:
            return None
        return lambda: as_matrix(read(parameter), parameter.kind)

    return tuple(
        Site(
            module=module,
            tensors=found.modules[module],
            config=config,
            shape=shapes[index],
            order=index,
            shapes=shapes,
            shared=found.shared,
            base_weight=reader(f"{module}.weight"),
            base_bias=reader(f"{module}.bias"),
        )
        for index, module in enumerate(modules)
    )


def _token_indices(config: Mapping[str, Any], module: str) -> list[int]:
    """The rows that a module's trained tokens replace."""
    indices = config.get("token_indices") or config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
    if indices is None:
        raise FormatError(f"{module}: the configuration does not say which token rows were trained")
    return list(indices)


def _check_saved(key: str, tensor: Tensor, parameter: Parameter) -> None:
    if parameter.kind is not Kind.EMBEDDING and tuple(tensor.shape) != tuple(parameter.shape):
        raise MismatchError(
            f"tensor {key} has shape {list(tensor.shape)}, the base's {parameter.name} has {list(parameter.shape)}"
        )


def _check_shape(site: Site, delta: Delta) -> None:
    if tuple(delta.shape) != tuple(site.shape):
        raise MismatchError(
            f"{site.module}: the adapter's change has shape {list(delta.shape)}, the base's weight "
            f"{list(site.shape)}: this adapter belongs to another base"
        )

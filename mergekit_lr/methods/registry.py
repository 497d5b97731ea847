"""Every merge method by name: what it takes, where it may run, and its parameters, read from the signature.

    @method("iso_c", paper="2502.04959", takes="deltas", spaces=("full", "core"))
    def iso_c(deltas, /, *, weights: PerModel = 1.0, scale: Number = 1.0): ...

A method is called with a sequence of T inputs, one per model, each (..., m, n), or ``LowRank``, and gives one of
them. Leading axes are a batch, a vector is a matrix (..., 1, n). The sequence may make its items when they are
asked for: methods that need one at a time hold one at a time.

The decorator checks the arguments and brings the numbers into a form that broadcasts: a ``Number`` is a float or
a tensor (..., 1, 1); a ``PerModel`` or ``Share`` is a list of T of those. A caller gives a float, for ``PerModel``
also a list of T floats, or a tensor of the batch's shape (...), for ``PerModel`` (..., T).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from torch import Tensor

from mergekit_lr.errors import UsageError


@dataclass(frozen=True)
class Numeric:
    """A number that may differ per tensor: marks the annotation of a parameter."""

    per_model: bool = False
    low: float = float("-inf")
    high: float = float("inf")


Number: TypeAlias = Annotated[Any, Numeric()]
PerModel: TypeAlias = Annotated[Any, Numeric(per_model=True)]
Share: TypeAlias = Annotated[Any, Numeric(per_model=True, low=0.0, high=1.0)]

# Not parameters of a user: given by whoever runs the method.
_PROVIDED = ("base", "keys", "start", "measured", "earlier", "tallies")
_ALIASES = {"weight": "weights", "lambda": "scale"}  # mergekit's names


@dataclass(frozen=True)
class Parameter:
    """One option of a method.

    kind: "number", "integer", "flag", "choice", "text" or "tensor". per_model: may be a list of T. per_tensor: may
    differ within a batch. default: None and ``required`` false means that the method finds its own.
    """

    name: str
    kind: str
    default: Any
    required: bool
    per_model: bool = False
    per_tensor: bool = False
    choices: tuple[Any, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True)
class Method:
    """A registered method.

    function: the checked function. paper: arXiv id, or where it comes from. takes: "weights", "deltas" or
    "factors". spaces: where it may run. parameters: by name. vectors: what is done with 1-D tensors instead, or
    None for the same. factored: given ``LowRank`` deltas it returns ``LowRank`` without a dense matrix. random:
    it needs stream keys. elementwise: whether, with these arguments, an element of the result depends on the same
    element of the inputs alone, on its place (``start``), and on what ``measure`` finds in a pass over all blocks
    (``measured``): a tensor is then merged a block at a time (``mergekit_lr.methods.blocks``). keeps: the most bytes
    that the pass keeps of a tensor. basis: what the result in a space depends on: its "own" basis, "any" orthonormal
    one alike, or "none" (linear rules). spectral: its work on matrices (m, n) is SVDs or products of such, m n
    min(m, n), and not m n: what a plan's estimate of time goes by. continues: more models can join its result
    later, with what it puts into ``tallies``: ``earlier`` of the next call. base: "required", "optional" or "none" for
    a method on weights. models: least and most inputs. inner: its further parameters are those of another method.
    """

    name: str
    function: Callable[..., Any]
    description: str
    paper: str
    takes: str
    spaces: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    vectors: Callable[..., Any] | None
    factored: bool
    random: bool
    placed: bool
    elementwise: Callable[[Mapping[str, Any]], bool]
    measure: Callable[..., Any] | None
    keeps: int
    basis: str
    spectral: bool
    continues: bool
    base: str
    models: tuple[int, int | None]
    inner: bool

    def bound(self, given: Mapping[str, Any], count: int) -> dict[str, Any]:
        """The arguments for ``count`` models, checked and in the form that broadcasts."""
        return _arguments(self.name, self.parameters, given, count, self.inner)


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    takes: Literal["weights", "deltas", "factors"],
    spaces: Sequence[str] = ("full",),
    vectors: Callable[..., Any] | None = None,
    factored: bool = False,
    elementwise: Callable[[Mapping[str, Any]], bool] | bool = False,
    measure: Callable[..., Any] | None = None,
    keeps: int = 0,
    basis: Literal["own", "any", "none"] = "own",
    spectral: bool = False,
    models: tuple[int, int | None] = (1, None),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the method ``name``; the arguments are the fields of :class:`Method`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        parameters = _parameters(function, signature)
        inner = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

        @wraps(function)
        def checked(inputs: Any, /, **given: Any) -> Any:
            count = len(inputs)
            if count < models[0] or (models[1] is not None and count > models[1]):
                wanted = str(models[0]) if models[0] == models[1] else f"{models[0]} or more"
                raise UsageError(f"{name} merges {wanted} models, got {count}")
            return function(inputs, **_arguments(name, parameters, given, count, inner))

        base = signature.parameters.get("base")
        _METHODS[name] = Method(
            name=name,
            function=checked,
            description=(inspect.getdoc(function) or "").partition("\n\n")[0].replace("\n", " "),
            paper=paper,
            takes=takes,
            spaces=tuple(spaces),
            parameters=parameters,
            vectors=vectors,
            factored=factored or takes == "factors",
            random="keys" in signature.parameters,
            placed="start" in signature.parameters,
            elementwise=elementwise if callable(elementwise) else _always if elementwise else _never,
            measure=measure,
            keeps=keeps,
            basis=basis,
            spectral=spectral,
            continues="tallies" in signature.parameters,
            base="none" if base is None else "required" if base.default is base.empty else "optional",
            models=models,
            inner=inner,
        )
        return checked

    return register


def _always(_: Mapping[str, Any]) -> bool:
    return True


def _never(_: Mapping[str, Any]) -> bool:
    return False


def methods() -> dict[str, Method]:
    """All methods by name, in alphabetical order: description, paper, what each takes, its parameters."""
    package = import_module("mergekit_lr.methods")
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def find(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: there is none; the nearest name is in the message.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"there is no merge method {name!r}{_nearest(name, known)}")
    return known[name]


def canonical(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters under our names where they had mergekit's (``weight``, ``lambda``)."""
    return {_ALIASES.get(name, name): value for name, value in parameters.items()}


def _parameters(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Parameter]:
    hints = get_type_hints(function, include_extras=True)
    result = {}
    for p in signature.parameters.values():
        if p.kind is not p.KEYWORD_ONLY or p.name in _PROVIDED:
            continue
        options = [o for o in (get_args(hints[p.name]) or (hints[p.name],)) if o is not type(None)]
        marks = [m for m in getattr(hints[p.name], "__metadata__", ()) if isinstance(m, Numeric)]
        mark = marks[0] if marks else Numeric()
        choices = get_args(hints[p.name]) if get_origin(hints[p.name]) is Literal else ()
        kinds = {bool: "flag", int: "integer", float: "number", str: "text"}
        result[p.name] = Parameter(
            name=p.name,
            kind="number" if marks else "choice" if choices else kinds.get(options[0], "tensor"),
            default=None if p.default is p.empty else p.default,
            required=p.default is p.empty,
            per_model=mark.per_model,
            per_tensor=bool(marks),
            choices=choices,
            low=mark.low,
            high=mark.high,
        )
    return result


def _arguments(
    name: str, parameters: Mapping[str, Parameter], given: Mapping[str, Any], count: int, inner: bool
) -> dict[str, Any]:
    """What to call the function with."""
    arguments = {}
    for key, value in canonical(given).items():
        if key in _PROVIDED or (inner and key not in parameters):
            arguments[key] = value
            continue
        if key not in parameters:
            raise UsageError(f"{name} has no parameter {key!r}{_nearest(key, parameters)}")
        arguments[key] = _checked(name, parameters[key], value)
    missing = [p.name for p in parameters.values() if p.required and p.name not in arguments]
    if missing:
        raise UsageError(f"{name} needs {missing[0]!r}: give it as a parameter")
    for p in parameters.values():
        value = arguments.get(p.name, p.default)
        if p.per_model:
            arguments[p.name] = _per_model(name, p.name, value, count)
        elif p.per_tensor and isinstance(value, Tensor):
            arguments[p.name] = value[..., None, None]
    return arguments


def _checked(name: str, parameter: Parameter, value: Any) -> Any:
    """``value`` if it is what the parameter takes."""
    where = f"{name}: {parameter.name!r}"
    if value is None and parameter.default is None and not parameter.required:
        return value
    numbers = value if parameter.per_model and isinstance(value, Sequence) and not isinstance(value, str) else [value]
    match parameter.kind:
        case "choice" if value not in parameter.choices:
            names = ", ".join(repr(c) for c in parameter.choices)
            raise UsageError(f"{where} must be one of {names}, got {value!r}")
        case "flag" if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, got {value!r}")
        case "integer" if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{where} must be a whole number, got {value!r}")
        case "number":
            for number in numbers:
                if isinstance(number, Tensor) and parameter.per_tensor:
                    fits = bool(((number >= parameter.low) & (number <= parameter.high)).all())
                elif isinstance(number, bool) or not isinstance(number, int | float):
                    raise UsageError(f"{where} must be a number, got {number!r}")
                else:
                    fits = parameter.low <= number <= parameter.high
                if not fits:
                    raise UsageError(f"{where} must be from {parameter.low:g} to {parameter.high:g}, got {number!r}")
    return value


def _per_model(name: str, key: str, value: Any, count: int) -> list[Any] | None:
    """A list with one entry per model, each a number or a tensor that broadcasts over (..., m, n)."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.shape[-1:] != (count,):
            raise UsageError(f"{name}: {key!r} has shape {list(value.shape)}, expected {count} along its last axis")
        values = value.unbind(-1)
        return list(value.tolist()) if value.ndim == 1 else [v[..., None, None] for v in values]
    if isinstance(value, Sequence):
        if len(value) != count:
            raise UsageError(f"{name}: {key!r} has {len(value)} values, expected one for each of {count} models")
        return list(value)
    return [value] * count


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.0)
    return f", did you mean {near[0]!r}?" if near else "; it has none"

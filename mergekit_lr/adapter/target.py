"""What inference servers accept of a LoRA, and how to make an adapter fit.

vLLM, SGLang and TensorRT-LLM read one rank and one alpha for the whole adapter, factors of linear layers only, and
experts one by one. An adapter is made to fit without changing what it does: ranks are padded with zeros to one
that the server allocates, scalings go into B so that alpha is the rank, stacks of experts are split. What cannot be
said that way (modules saved in full, DoRA, biases) is refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mergekit_lr.adapter import experts
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import MismatchError


@dataclass(frozen=True)
class Server:
    """name: as people write it. ranks: the ones it allocates memory for, ascending; any where empty."""

    name: str
    ranks: tuple[int, ...] = ()


SERVERS = {
    "vllm": Server("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512)),
    "sglang": Server("SGLang"),
    "tensorrt-llm": Server("TensorRT-LLM"),
}
# PEFT itself loads whatever we write; as a target it only says that the result is a PEFT folder.
TARGETS = ("peft", *SERVERS)


class Fitted(NamedTuple):
    """An adapter that a server accepts, and what a user should know about it."""

    adapter: Adapter
    notes: tuple[str, ...]


def fit(adapter: Adapter, target: str, layout: Layout | None = None) -> Fitted:
    """The same change in the form that ``target`` accepts.

    Args:
        adapter: what to serve. target: one of :data:`TARGETS`. layout: the base, for the names of single experts.

    Raises:
        MismatchError: the server cannot do what the adapter does; the message names it.
    """
    if target == "peft":
        return Fitted(adapter, ())
    server = SERVERS[target]
    _refuse(adapter, server)
    fused = experts.is_fused(adapter)
    if fused:
        adapter = experts.split(adapter, layout)
    highest = max(weight.delta.rank for weight in adapter.weights.values())
    rank = _allowed(server, highest)
    weights = {name: replace(w, delta=_uniform(w, rank)) for name, w in adapter.weights.items()}
    notes = []
    if fused and layout is None:
        notes.append("experts are named gate_proj, up_proj and down_proj; give --base where the base has other names")
    if padded := sum(weight.delta.rank < rank for weight in adapter.weights.values()):
        notes.append(f"{padded} modules are padded with zeros to rank {rank}, the one rank that {server.name} reads")
    if head := next((name for name in weights if name.endswith("lm_head.weight")), None):
        notes.append(f"{head}: {server.name} takes a LoRA on the output head for some architectures only")
    return Fitted(replace(adapter, weights=weights), tuple(notes))


def rewrite_config(folder: Path) -> None:
    """Make ``adapter_config.json`` as plain as servers read it: target modules by their last names, no patterns."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    targets = config["target_modules"]
    names = targets.replace("\\", "").split("|") if isinstance(targets, str) else targets
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in names})
    config["task_type"] = config.get("task_type") or "CAUSAL_LM"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse(adapter: Adapter, server: Server) -> None:
    """Stop at the first thing that the server cannot load."""

    def refuse(name: str, what: str) -> MismatchError:
        return MismatchError(f"{name}: {server.name} loads {what}")

    for name, weight in adapter.weights.items():
        if weight.magnitude is not None:
            raise refuse(name, "no DoRA; fold it with lrmerge convert --dora fold --base BASE")
        if weight.bias is not None:
            raise refuse(name, "no biases of LoRA layers; train without lora_bias, or apply the adapter to its base")
        if weight.kind not in (Kind.LINEAR, Kind.TRANSPOSED, *experts.STACKS):
            raise refuse(name, f"factors of linear layers only, this is a weight of kind {weight.kind}")
    for field, what in (
        ("saved", "no modules saved in full; apply the adapter to its base and serve that"),
        ("added", "no differences in full; convert the adapter with --to peft first"),
        ("token_rows", "no trained token rows; apply the adapter to its base and serve that"),
    ):
        if held := getattr(adapter, field):
            raise refuse(min(held), what)
    if not any(weight.delta.rank for weight in adapter.weights.values()):
        raise refuse("the adapter", "nothing from it: it changes no weight")
    if adapter.config.get("alora_invocation_tokens"):
        raise refuse("alora_invocation_tokens", "no activated LoRA: it would act on every token")


def _allowed(server: Server, rank: int) -> int:
    """The least rank of the server that holds ``rank``."""
    fitting = [allowed for allowed in server.ranks or (rank,) if allowed >= rank]
    if not fitting:
        most = server.ranks[-1]
        raise MismatchError(
            f"the adapter has rank {rank}, {server.name} loads {most} at most; compress it with --max-rank {most}"
        )
    return fitting[0]


def _uniform(weight: AdaptedWeight, rank: int) -> LowRank:
    """The delta at ``rank`` with scaling 1, in the dtype that it has."""
    delta = weight.delta
    B = delta.B if delta.scaling == 1 else (delta.B.float() * delta.scaling).to(delta.B.dtype)
    return LowRank(experts.padded(delta.A, rank, 0), experts.padded(B, rank, 1))

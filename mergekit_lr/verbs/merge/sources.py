"""The models of a recipe, opened by their headers: under common names, ties resolved, ``model+lora`` as one model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.names import unwrapped
from mergekit_lr.checkpoint.pair import layout_of
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.quantized import refuse_quantised
from mergekit_lr.checkpoint.safetensors import prefault
from mergekit_lr.checkpoint.shards import Header, MemoryOutput
from mergekit_lr.graph.journal import NoJournal
from mergekit_lr.graph.node import Node
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.verbs.apply.compute import Application
from mergekit_lr.verbs.apply.plan import ApplyPlan, plan_apply
from mergekit_lr.verbs.apply.rows import is_scaled

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
POSITIONS = re.compile(r"position|\bwpe\b")  # embeddings too, of places and not of tokens
NUMBER = re.compile(r"\.(\d+)\.")


class Layers(NamedTuple):
    """The repeated part of a model: names ``stem.0.rest`` to ``stem.(count - 1).rest``; count 0 where there is none."""

    stem: str
    count: int

    def of(self, name: str) -> int | None:
        """The layer that ``name`` belongs to."""
        match = NUMBER.search(name)
        return int(match[1]) if match and name[: match.start()] == self.stem and self.count else None

    def moved(self, name: str, to: int) -> str:
        """``name`` with layer ``to`` in place of its own."""
        return f"{self.stem}.{to}.{name[len(self.stem) + 1 :].partition('.')[2]}"


@dataclass(frozen=True, eq=False)
class Source:
    """One model.

    ref: what the recipe calls it. checkpoint: the model, without its LoRA. headers: common name to dtype and shape.
    disk: common name to the name on disk. aliases: tied ends that have no tensor, to the common name of what they
    share. flat: names of convolutions, whose kernel is flattened. tables: names of embeddings. tokens: names of what
    has a row for each token, embeddings and heads. applied: the LoRA that goes onto it, by the nodes that write each
    tensor. files: of the LoRA.
    """

    ref: str
    checkpoint: Checkpoint
    headers: dict[str, Header]
    disk: dict[str, str]
    aliases: dict[str, str]
    layers: Layers
    flat: frozenset[str]
    tables: frozenset[str]
    tokens: frozenset[str]
    applied: ApplyPlan | None = None
    files: tuple[Path, ...] = ()
    _nodes: dict[str, list[Node]] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Of the model, untied where its LoRA unties it."""
        untied = self.applied is not None and self.applied.untied
        return self.checkpoint.config | ({"tie_word_embeddings": False} if untied else {})

    @property
    def token_rows(self) -> int:
        """Rows of the table of tokens; 0 where there is none."""
        return max((self.headers[name][1][0] for name in self.tokens & self.headers.keys()), default=0)

    def only(self, names: Container[str]) -> Source:
        """The part of the model that has these tensors."""
        headers = {name: header for name, header in self.headers.items() if name in names}
        aliases = {end: whole for end, whole in self.aliases.items() if end in names and whole in headers}
        return replace(self, headers=headers, aliases=aliases, layers=layers_of(headers, self.checkpoint.config))

    def header(self, name: str) -> Header:
        """Dtype and shape of a tensor, of what it shares where it is a tied end."""
        return self.headers[self.aliases.get(name, name)]

    def place(self, name: str) -> tuple[str, int]:
        """File and offset of a tensor, for the order of reading."""
        info = self.checkpoint.tensors.get(self.disk[self.aliases.get(name, name)])
        return (str(info.file), info.offset) if info is not None else ("", 0)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored."""
        dtype, shape = self.header(name)
        return dtype.itemsize * math.prod(shape)

    def read(self, name: str) -> Tensor:
        """The tensor under its common name, brought into memory; with a LoRA in float32."""
        own = self.disk[self.aliases.get(name, name)]
        if self.applied is not None:
            return self._with_lora(self.applied, own)
        tensor = self.checkpoint.read(own)
        if self.checkpoint.folder is not None:
            prefault(tensor)
        return tensor

    def has_parts(self, name: str) -> bool:
        """Whether a part of a tensor can be read without the rest."""
        return self.applied is None and self.checkpoint.has_parts(self.disk[self.aliases.get(name, name)])

    def parts(self, name: str) -> Callable[[int, int], Tensor]:
        """What gives elements [start, stop) of a tensor that has parts, counted flat. Do not write into them."""
        return self.checkpoint.parts(self.disk[self.aliases.get(name, name)])

    def announce(self, name: str) -> None:
        """Say that a tensor is going to be read in parts soon."""
        self.checkpoint.announce(self.disk[self.aliases.get(name, name)])

    def _with_lora(self, plan: ApplyPlan, own: str) -> Tensor:
        memory = MemoryOutput({own: plan.outputs[own]}, {})
        work = Application(plan.base, plan.outputs, plan.resources.device, None, memory, NoJournal())
        for node in self._nodes[own]:
            batch = Batch((node,))
            [piece] = work.compute(batch, work.read(batch))
            for span, part in zip(node.work.spans, piece.parts, strict=True):
                if span.name == own:
                    memory.write(own, span.start * span.width, part)
        return memory.tensors[own]


class Input(NamedTuple):
    """A tensor of a model, by its common name."""

    source: Source
    name: str

    @property
    def header(self) -> Header:
        """Its dtype and shape."""
        return self.source.header(self.name)

    @property
    def rows(self) -> int:
        """Length of its first axis."""
        return self.header[1][0]

    @property
    def has_tokens(self) -> bool:
        """Whether it has a row for each token."""
        return self.source.aliases.get(self.name, self.name) in self.source.tokens


def open_source(ref: str | Checkpoint | Mapping[str, Tensor], *, device: str = "auto") -> Source:
    """Open a model, ``path`` or ``org/name@revision``, with ``+LORA`` where one goes onto it.

    Raises:
        FormatError: a file is damaged, or its weights are quantised. MismatchError: the LoRA is another model's.
    """
    called = ref if isinstance(ref, str) else ref.ref if isinstance(ref, Checkpoint) else "memory"
    whole, plus, lora = called.rpartition("+")
    if not plus or not isinstance(ref, str) or Path(called).expanduser().exists():
        whole, lora = called, ""
    checkpoint = Checkpoint.open(whole if isinstance(ref, str) else ref)
    refuse_quantised(checkpoint.ref, checkpoint.tensors)
    names = unwrapped(checkpoint.tensors)
    headers = {
        bare: (torch.bfloat16 if is_scaled(checkpoint, disk) else info.dtype, info.shape)
        for disk, bare in names.items()
        for info in (checkpoint.tensors[disk],)
    }
    layout = layout_of(checkpoint)
    kinds = {block.tensor: p.kind for p in layout.parameters for blocks in p.blocks for block in blocks}
    aliases = {
        end.name: names[end.blocks[0][0].tensor]
        for end in layout.tied
        if end.name not in headers and len(end.blocks) == len(end.blocks[0]) == 1
    }
    plan, nodes = None, {}
    if lora:
        plan = plan_apply(checkpoint, [(lora, 1.0)], dtype="float32", device=device)
        for node in (node for batch in plan.schedule.batches for node in batch.nodes):
            for own in {span.name for span in node.work.spans}:
                nodes.setdefault(own, []).append(node)
        headers = {names.get(disk, disk): header for disk, header in plan.outputs.items()}
        names |= {disk: disk for disk in plan.outputs if disk not in names}
        aliases = {end: target for end, target in aliases.items() if end not in headers}
    layers = layers_of(headers, checkpoint.config)
    tables = frozenset(names[t] for t, kind in kinds.items() if kind is Kind.EMBEDDING)
    heads = {names[t] for t, kind in kinds.items() if kind is Kind.LINEAR or names[t].endswith("bias")}
    return Source(
        ref=called,
        checkpoint=checkpoint,
        headers=headers,
        disk={bare: disk for disk, bare in names.items()},
        aliases=aliases,
        layers=layers,
        flat=frozenset(names[t] for t, kind in kinds.items() if kind is Kind.CONVOLUTION),
        tables=tables,
        tokens=tokens_of(headers, (plan or checkpoint).config, tables, {n for n in heads if layers.of(n) is None}),
        applied=plan,
        files=tuple(file for given in plan.given for file in given.files) if plan else (),
        _nodes=nodes,
    )


def tokens_of(
    headers: Mapping[str, Header], config: Mapping[str, Any], tables: Set[str], heads: Set[str]
) -> frozenset[str]:
    """What has a row for each token: embeddings, heads and their biases with as many rows as the config has tokens."""
    sizes = {value for key, value in _flat_config(config) if key == "vocab_size"}
    sizes = sizes or {headers[name][1][0] for name in tables & headers.keys()}
    return frozenset(
        name
        for name in (tables | heads) & headers.keys()
        if headers[name][1][0] in sizes and not POSITIONS.search(name)
    )


def layers_of(headers: Mapping[str, Header], config: Mapping[str, Any]) -> Layers:
    """The layers of a model: the stem with as many indices as the config says, otherwise with the most tensors."""
    tally: Counter[str] = Counter()
    indices: dict[str, set[int]] = {}
    for name in headers:
        if match := NUMBER.search(name):
            stem = name[: match.start()]
            tally[stem] += 1
            indices.setdefault(stem, set()).add(int(match[1]))
    if not tally:
        return Layers("", 0)
    wanted = {value for key, value in _flat_config(config) if key in LAYER_COUNTS}
    stem = max(tally, key=lambda s: (len(indices[s]) in wanted, tally[s]))
    return Layers(stem, max(indices[stem]) + 1)


def _flat_config(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys and values of a config and of the configs inside it; lists are no values of interest."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat_config(value)
        elif isinstance(value, int):
            found.append((key, value))
    return found

"""What a merge of models will do to every tensor, from headers alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.shards import Files, Header, as_in, cut_at, has_index
from mergekit_lr.checkpoint.writer import total_bytes
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, parse_size, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.methods.blocks import STEP, step_on
from mergekit_lr.recipe.reading import Module, Recipe
from mergekit_lr.verbs.apply.plan import DTYPES
from mergekit_lr.verbs.compare import CompareReport
from mergekit_lr.verbs.merge.alignment import Alignment
from mergekit_lr.verbs.merge.chat import chat_template
from mergekit_lr.verbs.merge.config import merged_config, renumbered
from mergekit_lr.verbs.merge.earlier import continued_jobs
from mergekit_lr.verbs.merge.layers import Job, Slice, jobs_of, modules_of, slices_of
from mergekit_lr.verbs.merge.sources import Input, Source, open_source
from mergekit_lr.verbs.merge.tokenizer import note_on_tokens
from mergekit_lr.verbs.merge.vocabulary import Vocabulary, vocabulary_of

SHARD = 5 * 10**9  # bytes of a file where the layers are put together anew


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Everything that a merge of models will do.

    template: the model whose config, tokenizer and files the result follows. jobs: one per tensor. outputs: dtype and
    shape of each. states: tensor to what happens to it: merged, copied, converted, or aligned, which is a copy with the
    rows of its tokens in another order. rules: to how, in words. vocabulary: that of the result, where the recipe asks
    for one. chat_template: its text, where the recipe asks for one.
    """

    recipe: Recipe
    sources: dict[str, Source]
    template: Source
    jobs: tuple[Job, ...]
    outputs: dict[str, Header]
    files: Files
    index: bool
    config: dict[str, Any]
    states: dict[str, str]
    rules: dict[str, str]
    schedule: Schedule
    resources: Resources
    notes: tuple[str, ...]
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    similarity: CompareReport | None = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None

    @property
    def alignments(self) -> dict[str, Alignment]:
        """Tensors whose rows come to the order of the vocabulary."""
        return {job.name: job.alignment for job in self.jobs if job.alignment is not None}

    @property
    def vocabulary_json(self) -> dict[str, Any] | None:
        """What is done to which rows, ready for JSON."""
        return self.vocabulary.to_json(self.alignments) if self.vocabulary is not None else None

    @property
    def written(self) -> int:
        """Bytes of all tensors of the result."""
        return total_bytes(self.outputs.values())

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most."""
        return self.resources.memory - self.resources.working + self.schedule.peak

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "method": self.recipe.method.name,
            "kind": "model",
            "models": list(self.sources),
            "options": self.options,
            "read_bytes": self.schedule.cost.read,
            "download_bytes": sum(source.checkpoint.to_download for source in self.sources.values()),
            "written_bytes": self.written,
            "peak_bytes": self.peak,
            "batches": len(self.schedule.batches),
            "workers": self.resources.workers,
            "device": str(self.resources.device),
            "files": {name: total_bytes(held.values()) for name, held in self.files.items()},
            "notes": list(self.notes),
            "vocabulary": self.vocabulary_json,
            "states": dict(Counter(self.states.values())),
            "tensors": [
                {"name": name, "state": state, "rule": self.rules[name], "bytes": total_bytes([self.outputs[name]])}
                for name, state in self.states.items()
            ],
        }


def plan_models(
    recipe: Recipe,
    *,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    given: Mapping[str, Checkpoint] | None = None,
) -> MergePlan:
    """The plan of merging the ``models``, ``slices`` or ``modules`` of a recipe; reads headers only.

    given: models in memory by the names that the recipe has for them.
    """
    doc = recipe.document
    dtype = chosen_dtype(recipe, dtype)
    size = shard_size if shard_size is not None else doc.output.shard_size
    options = {"dtype": dtype, "shard_size": size, "memory": memory, "device": device, "threads": threads, "seed": seed}
    _check_base(recipe)
    sources = {ref: open_source((given or {}).get(ref, ref), device=device) for ref in recipe.references}
    modules = [(module, slices_of(recipe, module, own)) for module, own in modules_of(recipe, sources)]
    template = sources[doc.base_model or _first_model(recipe)]
    slices = _stacked(recipe, modules, template)
    vocabulary = vocabulary_of(recipe, sources, template)
    if vocabulary is not None:
        options["vocabulary"] = vocabulary.digest
    jobs = tuple(job for _, own in modules for job in continued_jobs(recipe, jobs_of(recipe, own, vocabulary)))
    outputs = {job.name: _header(job, DTYPES[dtype] if dtype else None) for job in jobs}
    available = resources(device=device, memory=memory, threads=threads)
    return MergePlan(
        recipe=recipe,
        sources=sources,
        template=template,
        jobs=jobs,
        outputs=outputs,
        files=_files(template, outputs, size, anew=len(slices) > 1),
        index=size is None and len(slices) == 1 and has_index(template.checkpoint),
        config=merged_config(template, outputs, slices, dtype, vocabulary),
        states={job.name: _state(recipe, job, outputs[job.name]) for job in jobs},
        rules={job.name: rule_of(recipe, job) for job in jobs},
        schedule=schedule(
            [_node(recipe, job, outputs[job.name], available) for job in jobs],
            budget=available.working,
            workers=available.workers,
        ),
        resources=available,
        notes=(*recipe.notes, *_notes(recipe, sources, template, vocabulary, jobs)),
        seed=seed,
        options=options,
        vocabulary=vocabulary,
        chat_template=chat_template(recipe, sources, template),
    )


def _check_base(recipe: Recipe) -> None:
    if recipe.document.base_model is not None:
        return
    parts = [(module, part) for module in recipe.modules for part in module.entry.slices or (None,)]
    if all(part is not None and part.base_model is not None for _, part in parts):
        return
    if recipe.method.takes == "deltas":
        raise recipe.place.error((), f"{recipe.method.name} merges differences from a base: base_model is missing")
    if recipe.method.base == "required":
        raise recipe.place.error((), f"{recipe.method.name} needs a base: base_model is missing")


def _first_model(recipe: Recipe) -> str:
    entry = recipe.modules[0].entry
    if entry.models is not None:
        return entry.models[0].model
    first = (entry.slices or [])[0]
    return first.base_model or first.sources[0].model


def _stacked(recipe: Recipe, modules: Sequence[tuple[Module, list[Slice]]], template: Source) -> list[Slice]:
    """The slices that make up the layers which the config counts; other modules keep the layers that they have."""
    main, taken = None, list(range(template.layers.count))
    for module, slices in modules:
        layers = slices[0].given[0].source.layers
        chosen = [layer for part in slices for layer in range(part.given[0].first, part.given[0].end)]
        if layers.stem == template.layers.stem and main is None:
            main, taken = slices, chosen
        elif chosen != (taken if layers.stem == template.layers.stem else list(range(layers.count))):
            raise recipe.place.error(module.path, "takes other layers than the rest of the model")
    return main if main is not None else modules[0][1]


def chosen_dtype(recipe: Recipe, dtype: str | None) -> str | None:
    """The dtype of the result: an option, ``output.dtype``, mergekit's ``out_dtype`` or ``dtype``; None keeps it.

    Raises:
        UsageError: not a dtype that can be written.
    """
    doc = recipe.document
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    return dtype or doc.output.dtype or doc.out_dtype or doc.dtype


def is_copy(recipe: Recipe, job: Job) -> bool:
    """Whether the result is an input as it is."""
    scale = job.arguments.get("scale", [1.0])
    return not job.merged or (recipe.method.name == "passthrough" and scale in ([1], 1))


def origin_of(recipe: Recipe, job: Job) -> Input:
    """The tensor that is copied where nothing is merged: the only input of passthrough, otherwise the template's."""
    return job.inputs[0] if recipe.method.name == "passthrough" else job.template


def used_by(recipe: Recipe, job: Job) -> list[Input]:
    """What a tensor of the result is made of: its inputs, and behind them its base where it has one."""
    if is_copy(recipe, job):
        return [origin_of(recipe, job)]
    return [*job.inputs, *([job.base] if job.base is not None else [])]


def in_blocks(recipe: Recipe, job: Job) -> bool:
    """Whether a tensor is read, merged and written a block of elements at a time, never held whole."""
    header = job.template.header
    large = len(header[1]) > 1 and math.prod(header[1]) >= STEP
    parts = job.alignment is not None or all(i.source.has_parts(i.name) for i in used_by(recipe, job))
    if not large or not parts:
        return False
    return is_copy(recipe, job) or recipe.method.elementwise(job.arguments)


def rule_of(recipe: Recipe, job: Job) -> str:
    """What happens to a tensor, in words."""
    if is_copy(recipe, job):
        source = origin_of(recipe, job)
        order = ", rows in the order of the new vocabulary" if job.alignment is not None else ""
        return f"copy of {source.source.ref} {source.name}{order}"
    return rule_in_words(recipe.method.name, job.arguments)


def rule_in_words(name: str, given: Mapping[str, Any]) -> str:
    """A method with its arguments."""
    return f"{name}({', '.join(f'{key}={_short(value)}' for key, value in given.items())})"


def _short(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def _header(job: Job, dtype: torch.dtype | None) -> Header:
    held = job.template.source
    own, shape = job.template.header
    if job.alignment is not None:
        shape = (job.alignment.rows, *shape[1:])
    if held.applied is not None and dtype is None:  # a LoRA is merged in float32, the model has its own dtype
        info = held.checkpoint.tensors.get(held.disk.get(job.template.name, ""))
        own = info.dtype if info is not None and info.dtype.is_floating_point else own
    return (dtype if dtype is not None and own.is_floating_point else own), shape


def _state(recipe: Recipe, job: Job, header: Header) -> str:
    if not is_copy(recipe, job):
        return "merged"
    if job.alignment is not None:
        return "aligned"
    return "copied" if origin_of(recipe, job).header[0] is header[0] else "converted"


def _node(recipe: Recipe, job: Job, header: Header, available: Resources) -> Node:
    shape = header[1]
    entries = math.prod(shape)
    copied = is_copy(recipe, job)
    used = used_by(recipe, job)
    opened = used if job.alignment is None else job.alignment.inputs
    read = sum(item.source.nbytes(item.name) for item in opened)
    blocked = in_blocks(recipe, job)
    held = min(entries, step_on(available.device)) if blocked else entries
    # Every input as it is read, widened, and made sparse; the result, what is written, and a method's temporaries.
    widened = 4 * held * (1 if copied else 2 * len(used) + 6)
    kept = min(entries * len(used) // 8, recipe.method.keeps) if blocked and not copied else 0
    if job.alignment is None:
        opening = read * held // max(entries, 1)
    else:  # rows are found all over the mapped tables
        opening = read + job.alignment.nbytes(len(used)) * held // max(entries, 1)
    working = opening + widened + kept + header[0].itemsize * held
    cost = Cost(max(read, 1), working, 8.0 * entries * len(used))
    key = json.dumps(job.arguments, sort_keys=True, default=str)
    dtypes = tuple(item.header[0] for item in used)
    alone = job.name if copied or blocked or len(shape) > 2 or job.alignment is not None else ""
    signature = (recipe.method.name, copied, shape, header[0], dtypes, key, alone)
    return Node(job.name, signature, used[0].source.place(used[0].name), cost, job)


def _files(template: Source, outputs: Mapping[str, Header], size: str | int | None, *, anew: bool) -> Files:
    on_disk = {template.disk.get(name, name): header for name, header in outputs.items()}
    names = {template.disk.get(name, name): name for name in outputs}
    if not anew and on_disk.keys() & template.checkpoint.tensors.keys():
        files = as_in(template.checkpoint, on_disk, {})
        files = {file: {names[name]: header for name, header in held.items()} for file, held in files.items()}
    else:
        files, size = {"model.safetensors": dict(outputs)}, SHARD if size is None else size
    if size is None:
        return files
    parsed = parse_size(size, "--shard-size")
    if parsed < 1:
        raise UsageError(f"--shard-size {size}: at least 1 byte")
    return cut_at(files, parsed)


def _notes(
    recipe: Recipe, sources: Mapping[str, Source], template: Source, vocabulary: Vocabulary | None, jobs: Sequence[Job]
) -> list[str]:
    notes = []
    if recipe.method.random and recipe.document.version is None:
        notes.append(f"{recipe.method.name} draws at random: the same distribution as mergekit's, not the same numbers")
    if template.checkpoint.folder is None:
        notes.append("the template is in memory: no tokenizer goes along")
    if vocabulary is None:
        return notes + note_on_tokens(sources, template)
    gone = renumbered(template.config, vocabulary)[1]
    notes += [f"the config's {key} names a token that the result lacks; see config.json" for key in dict.fromkeys(gone)]
    return notes + vocabulary.lines({job.name: job.alignment for job in jobs if job.alignment is not None})

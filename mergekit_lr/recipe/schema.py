"""The keys of a recipe and the types of their values: pydantic models, strict, an unknown key is an error.

Values of parameters are checked against the method's signature (``recipe.parameters``), since they depend on it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mergekit_lr.recipe.mergekit import as_reference

Reference: TypeAlias = Annotated[str, BeforeValidator(as_reference), Field(min_length=1)]
Settings: TypeAlias = dict[str, Any]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Size: TypeAlias = str | int


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelEntry(_Strict):
    """One of ``models``: a folder, a file or a Hub id ``org/name@revision``, with ``+LORA`` where one goes onto it."""

    model: Reference
    parameters: Settings | None = None


class SourceEntry(ModelEntry):
    """One of a slice's ``sources``: the layers [first, end) of a model."""

    layer_range: list[int] = Field(min_length=2, max_length=2)


class SliceEntry(_Strict):
    """Layers of the result, in order of the ``slices``: one range of each source, all equally long."""

    sources: list[SourceEntry] = Field(min_length=1)
    parameters: Settings | None = None
    base_model: Reference | None = None


class ModuleEntry(_Strict):
    """One of ``modules``, parts of a model that are merged each in its own way: its ``models`` or its ``slices``."""

    models: list[ModelEntry] | None = Field(None, min_length=1)
    slices: list[SliceEntry] | None = Field(None, min_length=1)
    parameters: Settings | None = None


class AdapterEntry(_Strict):
    """One of ``adapters``: a PEFT folder, a file of any dialect or a Hub id."""

    adapter: Reference
    parameters: Settings | None = None


class Output(_Strict):
    """What to write. Of an adapter, at most one of ``rank``, ``energy`` and ``size`` says how far to truncate.

    ``format``: the dialect of an adapter. ``target``: the server that it must load in. ``component``: the part of a
    pipeline that it is of. ``dora``: keep magnitudes, or fold what they do into differences.
    """

    kind: Literal["model", "adapter"] | None = None
    format: Literal["peft", "kohya", "lycoris", "diffusers", "comfy"] | None = None
    target: Literal["peft", "vllm", "sglang", "tensorrt-llm"] | None = None
    component: str | None = None
    dora: Literal["keep", "fold"] = "keep"
    dtype: Dtype | None = None
    shard_size: Size | None = None
    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    size: Size | None = None


class Targets(_Strict):
    """Regular expressions over names: which tensors are merged. The others are the base's."""

    include: list[str] = []
    exclude: list[str] = []


class Push(_Strict):
    """Where on the Hub the result goes once it is merged; the other keys are options of ``push``."""

    repo: str = Field(min_length=1)
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    collection: str | None = None
    base_model: list[str] = []
    overwrite: bool = False


class Tokenizer(_Strict):
    """mergekit's ``tokenizer``."""

    source: Reference = "union"
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class Document(_Strict):
    """One document of a recipe file: exactly one of ``models``, ``slices``, ``modules`` and ``adapters``."""

    version: Literal[1] | None = None
    name: str | None = Field(None, pattern=r"^[\w][\w.-]*$")
    merge_method: str
    models: list[ModelEntry] | None = Field(None, min_length=1)
    slices: list[SliceEntry] | None = Field(None, min_length=1)
    modules: dict[str, ModuleEntry] | None = Field(None, min_length=1)
    adapters: list[AdapterEntry] | None = Field(None, min_length=1)
    base_model: Reference | None = None
    parameters: Settings | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Reference | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    space: Literal["full", "core", "knots"] = "full"
    output: Output = Output()
    targets: Targets = Targets()
    push: str | Push | None = None

"""Model merging and adapter surgery through the low rank of what fine-tuning changed.

import mergekit_lr as lr

report = lr.extract("org/base", "org/finetuned", "out", rank=64)
adapter, dialect = lr.open_adapter("out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
    from mergekit_lr.adapter.lowrank import LowRank
    from mergekit_lr.adapter.open import open_adapter
    from mergekit_lr.checkpoint.checkpoint import Checkpoint
    from mergekit_lr.errors import LrmergeError
    from mergekit_lr.methods.merge_tensors import merge_tensors
    from mergekit_lr.methods.registry import methods
    from mergekit_lr.report.application import ApplyReport
    from mergekit_lr.report.compression import AdapterReport
    from mergekit_lr.report.extraction import ExtractReport
    from mergekit_lr.report.merging import MergeReport
    from mergekit_lr.verbs.apply import apply
    from mergekit_lr.verbs.apply.plan import plan_apply
    from mergekit_lr.verbs.compare import compare
    from mergekit_lr.verbs.compress import compress
    from mergekit_lr.verbs.compress.plan import plan_compress
    from mergekit_lr.verbs.convert import convert
    from mergekit_lr.verbs.convert.plan import plan_convert
    from mergekit_lr.verbs.extract import extract
    from mergekit_lr.verbs.extract.plan import plan_extract
    from mergekit_lr.verbs.inspect import inspect
    from mergekit_lr.verbs.merge.in_memory import merge_adapters, merge_state_dicts
    from mergekit_lr.verbs.merge.verb import merge, plan_merge
    from mergekit_lr.verbs.push import PushReport, push
    from mergekit_lr.verbs.report import write_report

# Looked up when first used, so that importing the package does not import torch.
_PLACES = {
    "AdaptedWeight": "mergekit_lr.adapter.adapter",
    "Adapter": "mergekit_lr.adapter.adapter",
    "AdapterReport": "mergekit_lr.report.compression",
    "ApplyReport": "mergekit_lr.report.application",
    "Checkpoint": "mergekit_lr.checkpoint.checkpoint",
    "ExtractReport": "mergekit_lr.report.extraction",
    "LowRank": "mergekit_lr.adapter.lowrank",
    "LrmergeError": "mergekit_lr.errors",
    "MergeReport": "mergekit_lr.report.merging",
    "PushReport": "mergekit_lr.verbs.push",
    "apply": "mergekit_lr.verbs.apply",
    "compress": "mergekit_lr.verbs.compress",
    "compare": "mergekit_lr.verbs.compare",
    "convert": "mergekit_lr.verbs.convert",
    "extract": "mergekit_lr.verbs.extract",
    "inspect": "mergekit_lr.verbs.inspect",
    "merge": "mergekit_lr.verbs.merge",
    "merge_adapters": "mergekit_lr.verbs.merge.in_memory",
    "merge_state_dicts": "mergekit_lr.verbs.merge.in_memory",
    "merge_tensors": "mergekit_lr.methods.merge_tensors",
    "methods": "mergekit_lr.methods.registry",
    "open_adapter": "mergekit_lr.adapter.open",
    "plan_apply": "mergekit_lr.verbs.apply.plan",
    "plan_compress": "mergekit_lr.verbs.compress.plan",
    "plan_convert": "mergekit_lr.verbs.convert.plan",
    "plan_extract": "mergekit_lr.verbs.extract.plan",
    "plan_merge": "mergekit_lr.verbs.merge.verb",
    "push": "mergekit_lr.verbs.push",
    "write_report": "mergekit_lr.verbs.report",
}
__all__ = [
    "AdaptedWeight",
    "Adapter",
    "AdapterReport",
    "ApplyReport",
    "Checkpoint",
    "ExtractReport",
    "LowRank",
    "LrmergeError",
    "MergeReport",
    "PushReport",
    "apply",
    "compare",
    "compress",
    "convert",
    "extract",
    "inspect",
    "merge",
    "merge_adapters",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "open_adapter",
    "plan_apply",
    "plan_compress",
    "plan_convert",
    "plan_extract",
    "plan_merge",
    "push",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)

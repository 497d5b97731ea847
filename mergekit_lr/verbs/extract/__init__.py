"""Extract a LoRA from a full fine-tune."""

from mergekit_lr.verbs.extract.verb import extract

__all__ = ["extract"]

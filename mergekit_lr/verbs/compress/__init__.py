"""Compress an adapter to lower ranks."""

from mergekit_lr.verbs.compress.verb import compress

__all__ = ["compress"]

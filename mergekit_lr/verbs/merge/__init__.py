"""Merge models and adapters by a recipe."""

from mergekit_lr.verbs.merge.verb import merge

__all__ = ["merge"]

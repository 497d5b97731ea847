"""Bake adapters into a base, or take them out."""

from mergekit_lr.verbs.apply.verb import apply

__all__ = ["apply"]

"""Convert an adapter between dialects, types and layouts."""

from mergekit_lr.verbs.convert.verb import convert

__all__ = ["convert"]

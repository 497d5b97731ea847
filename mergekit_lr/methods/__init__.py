"""Merge methods: pure functions on tensors, one file per paper. ``registry`` finds them by name.

The package itself can be called: ``mergekit_lr.methods()`` is ``registry.methods()``. A subpackage hides a function of
the same name in its parent from the moment it is imported, so it has to answer for it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_lr.methods.registry import Method


class _Methods(ModuleType):
    def __call__(self) -> dict[str, Method]:
        from mergekit_lr.methods.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods

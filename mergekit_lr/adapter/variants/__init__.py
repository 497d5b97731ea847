"""PEFT's adapter types other than LoRA, each as the change it makes to the base's weights.

One file per type. Each has ``TENSORS``, the names it keeps per module, and ``delta_of(site)``, which gives
factors where the change is exactly low-rank, a dense matrix where it is not, both in the layout of
``nn.Linear``; ``bias_delta_of(site)`` where the type changes biases too. :func:`open_variant` reads a folder's
tensors; :meth:`Variant.deltas` then yields one module at a time, so that no more than one dense delta is alive.
"""

from mergekit_lr.adapter.variants.reading import TYPES, Variant, open_variant
from mergekit_lr.adapter.variants.site import Site

__all__ = ["TYPES", "Site", "Variant", "open_variant"]

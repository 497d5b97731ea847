"""Property tests here draw small cases, many of them; times are not their business."""

from hypothesis import settings

settings.register_profile("adapters", deadline=None, max_examples=60)
settings.load_profile("adapters")

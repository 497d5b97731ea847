"""PEFT's adapter folder (``adapter_config.json``, ``adapter_model.safetensors``), both ways, for type LORA.

``carry`` decides how each changed parameter of a model can travel in such a folder, ``save`` writes an adapter
so that PEFT loads it with no missing and no unexpected key, ``open_peft`` reads one back. Checked against
PEFT 0.21; the rules that are not in its documentation stand as comments where they are obeyed.
"""

from mergekit_lr.adapter.peft_carry import Carry, carry
from mergekit_lr.adapter.peft_read import open_peft
from mergekit_lr.adapter.peft_write import save

__all__ = ["Carry", "carry", "open_peft", "save"]

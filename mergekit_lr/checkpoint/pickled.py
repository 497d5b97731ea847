"""PyTorch's own files (.bin, .pt): read as tensors only, never as code."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.errors import FormatError


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped where its format allows it.

    Raises:
        FormatError: the file is damaged, or holds anything else than a flat table of tensors.
    """
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"{path}: not readable as tensors alone ({reason[:120]}); convert it to safetensors"
        ) from None
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise FormatError(f"{path}: holds more than a table of tensors; convert it to safetensors")
    return {str(name): tensor.detach() for name, tensor in held.items()}

"""Multislerp of deltas where no model changed anything, as in every tensor that fine-tuning left frozen."""

from __future__ import annotations

import pytest
import torch

import mergekit_lr as lr


def test_a_tensor_that_no_model_changed_stays_the_base():
    base = torch.randn(4, 5)
    merged = lr.merge_tensors("multislerp", [base] * 3, base=base)
    torch.testing.assert_close(merged, base, atol=0, rtol=0)


def test_models_that_cancel_have_no_mean_direction():
    base = torch.zeros(1, 2)
    around = [torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, 0.75**0.5]]), torch.tensor([[-0.5, -(0.75**0.5)]])]
    with pytest.raises(lr.LrmergeError, match="cancel"):
        lr.merge_tensors("multislerp", around, base=base, eps=1e-6)

"""The fast dropout against what torch's own promises."""

import pytest
import torch
from torch import nn

from reclm.nn.layers import Dropout


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_it_drops_as_often_as_torchs_and_scales_the_same(p):
    """800,000 elements: the fraction kept lies within 5 standard deviations of 1 - p."""
    x = torch.ones(8, 1000, 100)
    torch.manual_seed(0)
    ours, theirs = Dropout(p)(x), nn.Dropout(p)(x)
    kept = (ours != 0).float()
    assert abs(kept.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(ours.unique(), theirs.unique(), rtol=1e-4, atol=0)


def test_elements_are_independent():
    """Each 64-bit draw serves four neighbours: they, and neighbours of neighbours, must not correlate."""
    torch.manual_seed(1)
    kept = (Dropout(0.3)(torch.ones(400_000)) != 0).double()
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = torch.corrcoef(torch.stack([kept[:-lag], kept[lag:]]))[0, 1]
        assert abs(correlation.item()) < 5 / 400_000**0.5, lag


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7, 3)])
def test_the_gradient_goes_through_the_same_mask(dtype, shape):
    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert out.dtype == dtype and out.shape == shape
    torch.testing.assert_close(out, x * x.grad)


def test_same_seed_same_mask_and_nothing_in_evaluation():
    x, dropout = torch.randn(50, 50), Dropout(0.5)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(dropout(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(dropout.eval()(x), x)

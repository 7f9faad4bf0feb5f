"""What a GPU computes in another way than reference.py, wherever the two could differ."""

from __future__ import annotations

import pytest
import torch

import gemma_ar_norm

HIDDEN = 1024
NUMBERS = 1 << 16  # of 16 bits
AT_ONCE = 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_sum_of_two_16_bit_numbers(dtype):
    """T(a + b), of two words at once, is the fp32 sum rounded: all 2^32 of them."""
    bits = torch.arange(NUMBERS, dtype=torch.int32, device="cuda").to(torch.int16)
    every = bits.view(dtype)
    x = every.expand(AT_ONCE, NUMBERS).reshape(-1, HIDDEN).contiguous()
    weight = torch.zeros(HIDDEN, dtype=dtype, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for some in every.split(AT_ONCE):
        residual = some[:, None].expand(AT_ONCE, NUMBERS).reshape(-1, HIDDEN)
        _, got = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, weight, residual)
        want = (residual.float() + x.float()).to(dtype)
        same = got.view(torch.int16) == want.view(torch.int16)
        wrong += (~(same | (got.isnan() & want.isnan()))).sum()
    assert wrong.item() == 0

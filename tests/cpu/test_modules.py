"""FusedAllReduceGemmaRMSNorm: the calls it makes, whose weights it has, and what it refuses.

One rank: what several ranks add is the function's, and is tested there (test_processes.py).
"""

from __future__ import annotations

import subprocess
import sys

import checks
import pytest
import torch
from torch import nn

import gemma_ar_norm
from gemma_ar_norm import FusedAllReduceGemmaRMSNorm

HIDDEN = 64
fused_call = gemma_ar_norm.fused_allreduce_gemma_rmsnorm


class GemmaNorm(nn.Module):
    """As the norms of transformers are; bias 0 makes it Gemma 3n's."""

    def __init__(self, hidden=HIDDEN, eps=1e-6, bias=1.0, dtype=torch.float32):
        super().__init__()
        self.eps, self.bias = eps, bias
        self.weight = nn.Parameter(torch.randn(hidden).mul(0.2).to(dtype))

    def forward(self, x):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (self.bias + self.weight.float())).type_as(x)


class VllmNorm(GemmaNorm):
    """It names its eps as vLLM does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.variance_epsilon = self.eps
        self.epsilon = self.__dict__.pop("eps")

    def forward(self, x):
        self.eps = self.epsilon
        try:
            return super().forward(x)
        finally:
            del self.eps


def rows(seed=0, dtype=torch.bfloat16, shape=(2, 3, HIDDEN)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def equal(got, want):
    for one, other in zip(got, want, strict=True):
        checks.assert_bit_equal(one, other)


@torch.no_grad()
def test_it_makes_the_call_with_its_weights():
    x, residual = rows(1), rows(2)
    norm = FusedAllReduceGemmaRMSNorm(HIDDEN, eps=1e-5, weight_bias=0.5, dtype=torch.bfloat16)
    norm.weight.normal_()
    want = fused_call(x, norm.weight, residual, eps=1e-5, weight_bias=0.5)
    equal(norm(x, residual), want)
    alone = norm(x)
    assert isinstance(alone, torch.Tensor)
    checks.assert_bit_equal(alone, fused_call(x, norm.weight, eps=1e-5, weight_bias=0.5)[0])


@torch.no_grad()
def test_a_new_one_scales_by_one():
    x, residual = rows(1, torch.float32), rows(2, torch.float32)
    norm_out, residual_out = FusedAllReduceGemmaRMSNorm(HIDDEN)(x, residual)
    torch.testing.assert_close(norm_out.square().mean(-1), torch.ones(2, 3))
    torch.testing.assert_close(residual_out, x + residual)


@torch.no_grad()
def test_the_sandwich_holds_two_weights():
    x, residual = rows(1), rows(2)
    norm = FusedAllReduceGemmaRMSNorm(HIDDEN, sandwich=True, dtype=torch.bfloat16)
    assert sorted(norm.state_dict()) == ["post_weight", "weight"]
    norm.weight.normal_()
    norm.post_weight.normal_()
    equal(norm(x, residual), fused_call(x, norm.weight, residual, post_weight=norm.post_weight))
    with pytest.raises(ValueError, match="post_weight: a residual beside it is required"):
        norm(x)


@pytest.mark.parametrize("kind", [GemmaNorm, VllmNorm])
@torch.no_grad()
def test_from_module_has_the_very_weight(kind):
    x, residual = rows(1, torch.float32), rows(2, torch.float32)
    layer = nn.ModuleDict({"norm": kind(eps=1e-5)})
    before = layer["norm"]
    keys = {key: value.data_ptr() for key, value in layer.state_dict().items()}
    layer["norm"] = FusedAllReduceGemmaRMSNorm.from_module(before)
    assert layer["norm"].weight is before.weight
    assert layer["norm"].eps == 1e-5
    assert {key: value.data_ptr() for key, value in layer.state_dict().items()} == keys

    got, _ = layer["norm"](x, residual)
    torch.testing.assert_close(got, before(x + residual))
    # Updates are seen, on both sides.
    before.weight.add_(1.0)
    equal(layer["norm"](x, residual), fused_call(x, before.weight, residual, eps=1e-5))
    layer.load_state_dict({"norm.weight": torch.full((HIDDEN,), 0.0039)})
    equal(layer["norm"](x, residual), fused_call(x, before.weight, residual, eps=1e-5))
    assert before.weight[0].item() == pytest.approx(0.0039)


@torch.no_grad()
def test_one_is_added_in_float32_to_a_bfloat16_weight():
    x = rows(1)
    norm = GemmaNorm(dtype=torch.bfloat16)
    norm.weight.fill_(0.0039)  # 1 + this is 1 in bfloat16
    got = FusedAllReduceGemmaRMSNorm.from_module(norm)(x)
    norm.weight.zero_()
    assert (got != FusedAllReduceGemmaRMSNorm.from_module(norm)(x)).any()


@torch.no_grad()
def test_from_module_as_a_sandwich_leaves_the_post_norm_in_its_place():
    x, residual = rows(1), rows(2)
    layer = nn.ModuleDict({"post": GemmaNorm(), "pre": GemmaNorm()}).to(torch.bfloat16)
    post, pre = layer["post"], layer["pre"]
    keys = list(layer.state_dict())
    layer["pre"] = FusedAllReduceGemmaRMSNorm.from_module(pre, post_norm=post)
    assert list(layer.state_dict()) == keys
    equal(
        layer["pre"](x, residual),
        fused_call(x, pre.weight, residual, post_weight=post.weight),
    )
    # The model is moved, and the weights are others: both are still shared.
    layer.to(torch.float32)
    post.weight.add_(1.0)
    x, residual = x.float(), residual.float()
    equal(
        layer["pre"](x, residual),
        fused_call(x, layer["pre"].weight, residual, post_weight=post.weight),
    )
    post.weight = nn.Parameter(torch.zeros(HIDDEN))
    equal(
        layer["pre"](x, residual),
        fused_call(x, layer["pre"].weight, residual, post_weight=torch.zeros(HIDDEN)),
    )


def test_a_norm_of_another_formula_is_refused():
    plain = GemmaNorm(bias=0.0)
    with pytest.raises(ValueError, match=r"norm: .*computes something else"):
        FusedAllReduceGemmaRMSNorm.from_module(plain)
    assert FusedAllReduceGemmaRMSNorm.from_module(plain, weight_bias=0.0).weight_bias == 0.0
    wrong_eps = GemmaNorm(eps=1e-6)
    wrong_eps.forward = lambda x: GemmaNorm.forward(wrong_eps_twin, x)
    wrong_eps_twin = GemmaNorm(eps=1e-5)
    wrong_eps_twin.weight = wrong_eps.weight
    with pytest.raises(ValueError, match="computes something else"):
        FusedAllReduceGemmaRMSNorm.from_module(wrong_eps)
    with pytest.raises(ValueError, match=r"post_norm: .*computes something else"):
        FusedAllReduceGemmaRMSNorm.from_module(GemmaNorm(), post_norm=plain)
    with pytest.raises(ValueError, match="post_norm: the eps"):
        FusedAllReduceGemmaRMSNorm.from_module(GemmaNorm(), post_norm=GemmaNorm(eps=1e-5))
    with pytest.raises(TypeError, match="norm: a module with a weight"):
        FusedAllReduceGemmaRMSNorm.from_module(nn.Linear(4, 4))


def test_a_wrong_hidden_size_is_refused():
    for wrong in (0, -8, 2.0, True):
        with pytest.raises(ValueError, match="hidden_size: a positive int is required"):
            FusedAllReduceGemmaRMSNorm(wrong)


def test_gradients_are_refused_as_in_the_function():
    with pytest.raises(ValueError, match="weight: requires_grad=False is required"):
        FusedAllReduceGemmaRMSNorm(HIDDEN)(rows(dtype=torch.float32))


@torch.no_grad()
def test_it_is_one_op_in_a_graph():
    x, residual = rows(1), rows(2)
    norm = FusedAllReduceGemmaRMSNorm(HIDDEN, sandwich=True, dtype=torch.bfloat16)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    equal(compiled(x, residual), norm(x, residual))


def test_importing_the_package_imports_neither_transformers_nor_dtensor():
    """And both are there when `fuse` is named."""
    program = """
import sys, gemma_ar_norm
lazy = ("transformers", "torch.distributed.tensor", "gemma_ar_norm.huggingface")
assert [name for name in lazy if name in sys.modules] == [], sys.modules.keys()
assert "fuse" in dir(gemma_ar_norm)
gemma_ar_norm.fuse
assert "gemma_ar_norm.huggingface" in sys.modules and "transformers" not in sys.modules
try:
    gemma_ar_norm.fused
except AttributeError as error:
    assert "no attribute 'fused'" in str(error)
else:
    raise AssertionError("an attribute that is not there")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_that_fuse_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"model: one of a family that fuse\(\) knows .*Gemma 3"):
        gemma_ar_norm.fuse(nn.Linear(4, 4))

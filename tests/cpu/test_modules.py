"""FusedAllReduceGemmaRMSNorm: the calls it makes, whose weights it has, and what it refuses.

One rank: what several ranks add is the function's, and is tested there (test_processes.py).
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import checks
import pytest
import torch
import torch.distributed as dist
from torch import nn

import gemma_ar_norm
from gemma_ar_norm import FusedAllReduceGemmaRMSNorm, groups
from gemma_ar_norm.workspace import LocalRank

HIDDEN = 64
fused_call = gemma_ar_norm.fused_allreduce_gemma_rmsnorm


class GemmaNorm(nn.Module):
    """As the norms of transformers are; bias 0 makes it Gemma 3n's."""

    def __init__(self, hidden=HIDDEN, eps=1e-6, bias=1.0, dtype=torch.float32):
        super().__init__()
        self.eps, self.bias = eps, bias
        self.weight = nn.Parameter(torch.randn(hidden).mul(0.2).to(dtype))

    def normed(self, x):
        x32 = x.float()
        return x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self.normed(x) * (self.bias + self.weight.float())).type_as(x)


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


class LlamaNorm(GemmaNorm):
    """It rounds before the weight, too."""

    def forward(self, x):
        return self.weight * self.normed(x).type_as(x)


class NarrowBiasNorm(GemmaNorm):
    """It adds 1 in bfloat16."""

    def forward(self, x):
        return (self.normed(x) * (1.0 + self.weight.bfloat16()).float()).type_as(x)


class SloppyNorm(GemmaNorm):
    """A Gemma norm, by other steps, and an rstd that is off by some ulps of float32."""

    def forward(self, x):
        x32 = x.float()
        rstd = (x32.norm(dim=-1, keepdim=True).square() / x.shape[-1] + self.eps).pow(-0.5)
        normed = x32 * (rstd * (1 + 2.0**-20))
        return (normed * self.weight.float() + self.bias * normed).type_as(x)


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [64, 1536, 2048, 2560])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_large_weights_hide_no_other_bias(dtype, hidden, seed):
    torch.manual_seed(seed)
    norm = GemmaNorm(hidden, bias=0.0, dtype=dtype)
    for outliers, size in ((1, 20.0), (3, 100.0)):
        norm.weight.normal_(1.0, 0.1)
        norm.weight[torch.randperm(hidden)[:outliers]] = size
        with pytest.raises(ValueError, match="computes something else"):
            FusedAllReduceGemmaRMSNorm.from_module(norm)
        FusedAllReduceGemmaRMSNorm.from_module(norm, weight_bias=0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [64, 1536, 5376])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_rounding_before_the_weight_is_refused(dtype, hidden, seed):
    torch.manual_seed(seed)
    norm = LlamaNorm(hidden, dtype=dtype)
    for scale in (0.2, 5.0):
        norm.weight.normal_(1.0, scale)
        with pytest.raises(ValueError, match="rounded once, is required; got LlamaNorm"):
            FusedAllReduceGemmaRMSNorm.from_module(norm, weight_bias=0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [64, 1536, 5376])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_bias_added_in_bfloat16_is_refused(dtype, hidden, seed):
    torch.manual_seed(seed)
    norm = NarrowBiasNorm(hidden, dtype=dtype)
    for weight in (torch.randn(hidden) * 0.2, torch.full((hidden,), 0.0039), torch.tensor(1e-4)):
        norm.weight.copy_(weight)
        with pytest.raises(ValueError, match="got NarrowBiasNorm, which computes something else"):
            FusedAllReduceGemmaRMSNorm.from_module(norm)


def some_weights(hidden):
    yield torch.randn(hidden) * 0.2
    yield torch.randn(hidden) * 1e-6
    yield torch.randn(hidden) * 1e-3 - 1  # the sum with the bias nearly cancels
    for value in (-1.0, 0.0, 1.0, 3000.0):
        yield torch.full((hidden,), value)
    with_outliers = torch.randn(hidden) * 0.1
    with_outliers[::20] = 150.0
    yield with_outliers


@pytest.mark.parametrize("hidden", [1, 64, 5376])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_gemma_norm_is_taken_whatever_its_weights_and_eps(dtype, hidden):
    torch.manual_seed(0)
    for weight in some_weights(hidden):
        for eps in (0, 0.0, 1e-12, 1e-6, 1):
            for bias in (0.0, 1.0):
                for kind in (GemmaNorm, SloppyNorm):
                    norm = kind(hidden, eps, bias, dtype)
                    norm.weight.copy_(weight)
                    made = FusedAllReduceGemmaRMSNorm.from_module(norm, weight_bias=bias)
                    assert (type(made.eps), made.eps) == (float, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_eps_that_it_does_not_compute_with_is_refused(dtype):
    for eps, said in ((1e-6, 1.1e-6), (1e-6, 0), (0.0, 1e-6), (1e-5, 1e-6)):
        norm = GemmaNorm(dtype=dtype, eps=said)
        twin = GemmaNorm(dtype=dtype, eps=eps)
        twin.weight = norm.weight
        norm.forward = twin.forward
        with pytest.raises(ValueError, match="computes something else"):
            FusedAllReduceGemmaRMSNorm.from_module(norm)


def test_an_eps_that_is_no_number_is_refused():
    for wrong in (True, "1e-6", None):
        with pytest.raises(TypeError, match="norm: a module with a weight of one dimension and an"):
            FusedAllReduceGemmaRMSNorm.from_module(GemmaNorm(eps=wrong))


def test_a_norm_that_returns_another_dtype_or_no_tensor_is_refused():
    for wrong in (lambda x: x.double(), lambda x: (x, None)):
        norm = GemmaNorm()
        norm.forward = lambda x, norm=norm, wrong=wrong: wrong(GemmaNorm.forward(norm, x))
        with pytest.raises(ValueError, match="computes something else"):
            FusedAllReduceGemmaRMSNorm.from_module(norm)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def a_local_rank():
    rank = LocalRank(0, 2, groups.LOCAL_PREFIX + "of_test_modules", None, None)
    groups.register_local(rank)
    return rank


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle])
@torch.no_grad()
def test_a_copy_has_the_same_group(one_rank, duplicate):
    for group in (dist.group.WORLD, dist.new_group(), a_local_rank(), "a name", None):
        norm = FusedAllReduceGemmaRMSNorm(HIDDEN, eps=1e-5, group=group, sandwich=True)
        norm.weight.normal_()
        found = duplicate(nn.Sequential(norm))[0]
        assert found.group is group or found.group == group == "a name"
        assert found.__dict__.keys() == norm.__dict__.keys()
        assert found.eps == 1e-5
        equal(found.state_dict().values(), norm.state_dict().values())
        if duplicate is not copy.copy:
            assert found.weight.data_ptr() != norm.weight.data_ptr()
    default = FusedAllReduceGemmaRMSNorm(HIDDEN, group=dist.group.WORLD)
    checks.assert_bit_equal(duplicate(default)(rows()), default(rows()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_of_a_layer_has_its_own_post_norm(one_rank, duplicate):
    layer = nn.ModuleDict({"post": GemmaNorm(), "pre": GemmaNorm()})
    made = FusedAllReduceGemmaRMSNorm.from_module(
        layer["pre"], post_norm=layer["post"], group=dist.group.WORLD
    )
    layer["pre"] = made
    found = duplicate(layer)
    assert found["pre"]._post_norm == (found["post"],) != made._post_norm


def test_a_pickle_needs_its_group_when_it_is_loaded(one_rank):
    group = dist.new_group()
    data = pickle.dumps(FusedAllReduceGemmaRMSNorm(HIDDEN, group=group))
    name = group.group_name
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=f"group: the group '{name}', which .*; make that group"):
        pickle.loads(data)


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

"""What the torch.compile pass must leave alone: the graph is as it was, and the report says why."""

from __future__ import annotations

import checks
import fusion_models as models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from fusion_models import EPS, functional, hugging_face
from fusion_tools import compiled, defined_vllm_ops, lines, two_fake_ranks
from torch import Tensor
from torch.nn.functional import rms_norm

BF16, FP16, FP32 = checks.DTYPES
HIDDEN = 64


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with two_fake_ranks(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vllm_ops():
    with defined_vllm_ops() as ops:
        yield ops


def norm(v: Tensor, weight: Tensor) -> Tensor:
    return hugging_face(v, weight, 1.0, EPS)


def assert_left(model, arguments, words, **options):
    """No graph changes; the first all-reduce is left with these words. And the values are right."""
    left = compiled(model, **options)
    outputs = left(*arguments)
    for gm, before in zip(left.graphs, left.before, strict=True):
        assert lines(gm) == before
    assert [record.form for record in left.records] == [""] * len(left.records)
    assert words in left.records[0].reason
    for got, want in zip(outputs, model(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


# Each model is given x [4, 64], residual [4, 64] and weight [64], all bf16. It is a residual block
# of the contract but for one thing.


def other_users_of_the_all_reduce(x, residual, weight):
    a = functional(2 * x)
    h = residual + a
    return norm(h, weight), h, a + 1


def residual_of_one_row(x, residual, weight):
    h = functional(2 * x) + residual[:1]
    return norm(h, weight), h


def residual_without_rows(x, residual, weight):
    h = residual[0] + functional(2 * x)
    return norm(h, weight), h


def residual_of_more_rows(x, residual, weight):
    h = functional(2 * x[:1]) + residual
    return norm(h, weight), h


def residual_of_one_number_a_row(x, residual, weight):
    h = functional(2 * x) + residual[:, :1]
    return norm(h, weight), h


def residual_in_fp32(x, residual, weight):
    h = functional(2 * x) + residual.float()
    return norm(h, weight).to(x.dtype), h


def residual_in_fp16(x, residual, weight):
    h = functional(2 * x) + residual.half()
    return norm(h, weight), h


def residual_multiplied(x, residual, weight):
    h = torch.add(functional(2 * x), residual, alpha=2)
    return norm(h, weight), h


def a_sum_that_is_not_rounded(x, residual, weight):
    """As vLLM's reference has it: the norm sees the sum in fp32."""
    h = residual.float() + functional(2 * x).float()
    return norm(h, weight).to(x.dtype), h.to(x.dtype)


def the_sum_twice(x, residual, weight):
    a = functional(2 * x)
    return norm(a + a, weight), residual


def llamas_rounding(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (1.0 + weight) * normed.to(x.dtype), h


def llamas_rounding_and_an_fp32_weight(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return ((1.0 + weight.float()) * normed.to(x.dtype)).to(x.dtype), h


def no_weight(x, residual, weight):
    h = residual + functional(2 * x)
    return rms_norm(h.float(), h.shape[-1:], None, EPS).to(x.dtype), h


def a_number_as_the_weight(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * 1.5).to(x.dtype), h


def weight_in_float64(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.double())).to(x.dtype), h


def fp32_rows_and_a_weight_in_float64(x, residual, weight):
    v32 = residual.float() + functional(2 * x.float())
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return normed * weight.double(), v32


def one_plus_weight_in_bf16(x, residual, weight):
    h = residual + functional(2 * x)
    return rms_norm(h, h.shape[-1:], 1.0 + weight, EPS), h


def one_plus_weight_in_bf16_and_converted(x, residual, weight):
    h = residual + functional(2 * x)
    return hugging_face(h, 1.0 + weight, 0.0, EPS), h


def plain_with_one_plus_weight_in_bf16(x, residual, weight):
    a = functional(2 * x)
    return rms_norm(a, a.shape[-1:], 1.0 + weight, EPS), a


def result_not_rounded(x, residual, weight):
    h = residual + functional(2 * x)
    normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)
    return normed * (1.0 + weight.float()), h


def result_rounded_to_fp16(x, residual, weight):
    h = residual + functional(2 * x)
    normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).half(), h


def computed_in_bf16(x, residual, weight):
    h = residual + functional(2 * x)
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return normed * (1.0 + weight), h


def computed_in_bf16_but_for_the_weight(x, residual, weight):
    h = residual + functional(2 * x)
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h


def divided_by_the_root(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 / torch.sqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h


def negative_eps(x, residual, weight):
    return hugging_face(h := residual + functional(2 * x), weight, 1.0, -EPS), h


def squares_of_all_rows(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(0, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h


def squares_of_the_whole(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean((0, 1), keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h


def squares_of_a_part(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32[:, :32].pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h


def reciprocal_root_used_twice(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    rstd = torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (v32 * rstd * (1.0 + weight.float())).to(x.dtype), h, rstd


def mean_used_twice(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    mean = v32.pow(2).mean(-1, keepdim=True)
    return (v32 * torch.rsqrt(mean + EPS) * (1.0 + weight.float())).to(x.dtype), h, mean


def normalised_row_used_twice(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + weight.float())).to(x.dtype), h, normed


def another_rows_root(x, residual, weight):
    h = residual + functional(2 * x)
    rstd = torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (x.float() * rstd * (1.0 + weight.float())).to(x.dtype), h


def a_weight_a_row(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + residual.float())).to(x.dtype), h


def a_weight_for_all(x, residual, weight):
    h = residual + functional(2 * x)
    return norm(h, weight[:1]), h


def weight_in_fp16(x, residual, weight):
    v32 = (h := residual + functional(2 * x)).float()
    normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * weight.half()).to(x.dtype), h


def weight_of_the_sum(x, residual, weight):
    """The weight comes after the sum's other users."""
    h = residual + functional(2 * x)
    return norm(h, weight * h.mean().exp()), h


def an_average(x, residual, weight):
    a = funcol.all_reduce(2 * x, "avg", dist.group.WORLD)
    return norm(residual + a, weight), a


def several_at_once(x, residual, weight):
    (a,) = funcol.all_reduce_coalesced([2 * x], "sum", dist.group.WORLD)
    return norm(residual + a, weight), residual


def rows_that_are_not_contiguous(x, residual, weight):
    a = functional((2 * x).t().contiguous().t())
    return norm(residual + a, weight), residual


def residual_that_is_not_contiguous(x, residual, weight):
    h = residual.t().contiguous().t() + functional(2 * x)
    return norm(h, weight), h


def a_view_that_changes_the_rows(x, residual, weight):
    h = residual.view(8, 32) + functional(2 * x).view(8, 32)
    return norm(h, weight[:32]), h


def nothing_behind(x, residual, weight):
    return functional(2 * x), residual


def another_operation(x, residual, weight):
    h = torch.tanh(residual + functional(2 * x))
    return norm(h, weight), h


LEFT = {
    other_users_of_the_all_reduce: "the all-reduce's result has other users: add",
    residual_of_one_row: "the residual's shape is (1, 64) instead of (4, 64)",
    residual_without_rows: "the residual's shape is (64,) instead of (4, 64)",
    residual_of_more_rows: "the residual's shape is (4, 64) instead of (1, 64)",
    residual_of_one_number_a_row: "the residual's shape is (4, 1) instead of (4, 64)",
    residual_in_fp32: "the residual is torch.float32; torch.bfloat16 as of the all-reduce",
    residual_in_fp16: "the residual is torch.float16; torch.bfloat16 as of the all-reduce",
    residual_multiplied: "alpha",
    a_sum_that_is_not_rounded: "no RMSNorm follows",
    the_sum_twice: "the sum is added to itself",
    llamas_rounding: "rounded before the weight, as in Llama's norm",
    llamas_rounding_and_an_fp32_weight: "rounded before the weight, as in Llama's norm",
    no_weight: "has no weight",
    a_number_as_the_weight: "multiplied by a number instead of a weight",
    weight_in_float64: "1.0 + weight is added in torch.float64 instead of float32",
    fp32_rows_and_a_weight_in_float64: "the weight is torch.float64",
    one_plus_weight_in_bf16: "1.0 + weight is added in torch.bfloat16 instead of float32",
    one_plus_weight_in_bf16_and_converted: "a number is added to the weight in torch.bfloat16",
    plain_with_one_plus_weight_in_bf16: "1.0 + weight is added in torch.bfloat16",
    result_not_rounded: "the norm's result is not rounded to torch.bfloat16",
    result_rounded_to_fp16: "the norm's result is not rounded to torch.bfloat16",
    computed_in_bf16: "the norm is computed in torch.bfloat16, not in float32",
    computed_in_bf16_but_for_the_weight: "the norm is computed in torch.bfloat16, not in float32",
    divided_by_the_root: "no RMSNorm follows",
    negative_eps: "eps is -1e-06",
    squares_of_all_rows: "the mean is not over the last dimension",
    squares_of_the_whole: "the mean is not over the last dimension",
    squares_of_a_part: "no RMSNorm follows",
    reciprocal_root_used_twice: "the reciprocal root is used elsewhere too",
    mean_used_twice: "within the norm, is used elsewhere too",
    normalised_row_used_twice: "the normalised row is used elsewhere too",
    another_rows_root: "the reciprocal root does not multiply the row that it is of",
    a_weight_a_row: "the weight's shape is (4, 64) instead of one row's",
    a_weight_for_all: "the weight's shape is (1,) instead of one row's",
    weight_in_fp16: "the weight is torch.float16; torch.bfloat16 or float32 is required",
    weight_of_the_sum: "needs the sum before",
    an_average: "it is no sum but 'avg'",
    several_at_once: "is not an all-reduce that is matched",
    rows_that_are_not_contiguous: "the rows are not contiguous",
    residual_that_is_not_contiguous: "is not contiguous, and the fused result would be",
    a_view_that_changes_the_rows: "a view changes their length",
    nothing_behind: "no RMSNorm follows; the sum goes to output",
    another_operation: "no RMSNorm follows; the sum goes to add",
}


def normal(*shape, dtype=BF16, std=1.0):
    generator = torch.Generator().manual_seed(checks.fresh_seed())
    return (torch.randn(shape, generator=generator) * std).to(dtype)


@pytest.mark.parametrize("model", LEFT, ids=lambda model: model.__name__)
def test_left_alone(model):
    arguments = (normal(4, HIDDEN), normal(4, HIDDEN), normal(HIDDEN, std=0.1))
    assert_left(model, arguments, LEFT[model])


def block(x, residual, weight):
    h = residual + functional(2 * x)
    return norm(h, weight), h


def test_the_block_they_differ_from_is_fused():
    fused = compiled(block)
    fused(normal(4, HIDDEN), normal(4, HIDDEN), normal(HIDDEN))
    assert fused.forms == ["residual"]


def test_a_reciprocal_root_that_the_backward_pass_needs():
    x, residual, weight = normal(4, HIDDEN), normal(4, HIDDEN), normal(HIDDEN, std=0.1)
    for form in ("residual", "plain"):
        weight = weight.detach().requires_grad_()
        model = block if form == "residual" else lambda x, r, w: (norm(functional(2 * x), w), r)
        with torch.enable_grad():
            assert_left(model, (x, residual, weight), "is used elsewhere too")


def test_eps_that_is_no_constant():
    """What dynamic=True makes of a module's eps."""
    module = models.Block("residual", models.RMSNorm(normal(HIDDEN)))
    words = "eps is no constant: dynamic=True"
    assert_left(module, (normal(4, HIDDEN), normal(4, HIDDEN)), words, dynamic=True)


@pytest.mark.parametrize(("hidden", "dtype"), [(12, BF16), (6, FP32), (16400, BF16)], ids=str)
def test_hidden_sizes_that_the_op_does_not_take(hidden, dtype):
    arguments = (normal(2, hidden, dtype=dtype), normal(2, hidden, dtype=dtype), normal(hidden))
    multiple = 16 // dtype.itemsize
    words = f"the hidden size {hidden} is no multiple of {multiple} from {multiple} to 16384"
    assert_left(block, arguments, words)


def test_float64():
    def model(x, residual, weight):
        h = residual + functional(2 * x)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight), h

    arguments = (normal(4, 64), normal(4, 64), normal(64))
    assert_left(model, [a.double() for a in arguments], "the rows are torch.float64")


def test_an_op_in_between_that_writes_in_place():
    """The fused op would read x after it."""
    library = torch.library.Library("fusion_test", "FRAGMENT")
    library.define("touch(Tensor(a!) x) -> ()")
    touch = torch.ops.fusion_test.touch.default

    def insert_behind(target):
        def insert(graph):
            node = graph.find_nodes(op="call_function", target=target)[0]
            with graph.inserting_after(node):
                graph.call_function(touch, (next(iter(graph.nodes)),))

        return insert

    library.impl("touch", lambda x: None, "CompositeExplicitAutograd")
    arguments = (normal(4, HIDDEN), normal(4, HIDDEN), normal(HIDDEN))
    # x is read by the all-reduce, the weight late.
    for target in (torch.ops._c10d_functional.wait_tensor.default, torch.ops.aten.rsqrt.default):
        words = "touch_default, in between, writes in place"
        assert_left(block, arguments, words, change=insert_behind(target))
    library._destroy()


def test_vllms_norms_that_are_another_arithmetic(vllm_ops):
    """Its norm rounds to the weight's dtype before the weight; a part of a row is another mean; a
    group's name may be anybody's."""
    ir = vllm_ops.vllm_ir
    world = dist.group.WORLD.group_name

    def low_precision_weight(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return ir.fused_add_rms_norm(a, residual, 1.0 + weight, EPS)

    def low_precision_weight_of_plain(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return ir.rms_norm(a, weight, EPS), a

    def without_weight(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return ir.rms_norm(a, None, EPS), a

    def variance_size(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return ir.rms_norm(a, 1.0 + weight.float(), EPS, 32), a

    def broadcast_residual(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return ir.fused_add_rms_norm(a, residual[:1], 1.0 + weight.float(), EPS)

    def other_users(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, world)
        return *ir.fused_add_rms_norm(a, residual, 1.0 + weight.float(), EPS), a + 1

    def unknown_group(x, residual, weight):
        a = vllm_ops.vllm.all_reduce(2 * x, "tp:0")
        return ir.rms_norm(a, 1.0 + weight.float(), EPS), a

    arguments = (normal(4, HIDDEN), normal(4, HIDDEN), normal(HIDDEN, std=0.1))
    for model, words in {
        low_precision_weight: "rounds before a weight that is not float32",
        low_precision_weight_of_plain: "rounds before a weight that is not float32",
        without_weight: "without a weight, or with a variance_size",
        variance_size: "without a weight, or with a variance_size",
        broadcast_residual: "the residual's shape is (1, 64) instead of (4, 64)",
        other_users: "the all-reduce's result has other users: add",
        unknown_group: "no group is known by the name 'tp:0'",
    }.items():
        assert_left(model, arguments, words)

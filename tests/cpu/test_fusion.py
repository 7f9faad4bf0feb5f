"""What the torch.compile pass fuses, and that the values are those of the contract.

In one process (fusion_tools.py). What it leaves alone: test_fusion_left.py. Through all of Inductor
and with other processes: test_fusion_inductor.py.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import checks
import fusion_models as models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from fusion_models import Block, Decoder, RMSNorm
from fusion_tools import FUSED, compiled, defined_vllm_ops, two_fake_ranks
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import gemma_ar_norm
from gemma_ar_norm import reference
from gemma_ar_norm.fusion import PASS_OPTION

BF16, FP16, FP32 = checks.DTYPES
# Of an eager norm from ours: both compute in fp32 and round once, so by one rounding of T.
ONE_ROUNDING = {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with two_fake_ranks(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vllm_ops():
    with defined_vllm_ops() as ops:
        yield ops


def normal(*shape, dtype=BF16, std=1.0, seed=None):
    generator = torch.Generator().manual_seed(checks.fresh_seed() if seed is None else seed)
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def block_of(form, dtype=BF16, hidden=64, *, weight_dtype=None, eps=1e-6, bias=1.0, how=None, **kw):
    how = how or models.hugging_face
    norms = [
        RMSNorm(normal(hidden, dtype=weight_dtype or dtype, std=0.1), bias, eps, how)
        for _ in range(2)
    ]
    return Block(form, *norms, **kw)


def assert_contract(block, x, residual, outputs):
    """The bits of the contract, of a block whose ranks have 2 x and nothing. And near eager."""
    sandwich, plain = block.form == "sandwich", block.form == "plain"
    for got, want in zip(
        outputs,
        reference.fused_allreduce_gemma_rmsnorm(
            [2 * x, torch.zeros_like(x)],
            block.norm.weight,
            None if plain else residual,
            post_weight=block.post_norm.weight if sandwich else None,
            eps=block.norm.eps,
            weight_bias=block.norm.bias,
        ),
        strict=True,
    ):
        checks.assert_bit_equal(got, want, block.form)
    tolerance = ONE_ROUNDING[x.dtype] * (4 if sandwich else 1)
    for got, want in zip(outputs, block(x, residual), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_fused(block, x, residual, **options):
    """Compiles and calls the block: it is one fused call, of the right arguments and values."""
    fused = compiled(block, **options)
    outputs = fused(x, residual)
    assert fused.forms == [block.form]
    calls = fused.nodes("gemma_ar_norm")
    assert [call.target for call in calls] == [FUSED]
    assert calls[0].args[4:] == (
        pytest.approx(block.norm.eps, rel=1e-7),
        block.norm.bias,
        dist.group.WORLD.group_name,
        "auto",
    )
    for name in ("all_reduce.", "wait_tensor", "rsqrt", "mean", "pow", "sqrt"):
        assert fused.nodes(name) == []
    assert_contract(block, x, residual, outputs)
    return fused


# -------------------------------------------------------------------------------- what is matched


@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("all_reduce", models.ALL_REDUCES)
def test_forms_dtypes_and_all_reduces(all_reduce, dtype, form):
    """With the other choices spread over them: rows, weights, bias, eps, order of the operands."""
    at = checks.DTYPES.index(dtype) + 3 * checks.FORMS.index(form) + (all_reduce == "in place")
    block = block_of(
        form,
        dtype,
        weight_dtype=(dtype, FP32)[at % 2],
        bias=(1.0, 0.0)[at // 2 % 2],
        eps=(1e-6, 0.0, 0.25)[at % 3],
        all_reduce=models.ALL_REDUCES[all_reduce],
        residual_first=at % 2 == 0,
    )
    shape = ((6, 64), (2, 5, 64), (1, 64))[(at + 1) % 3]
    assert_fused(block, normal(*shape, dtype=dtype), normal(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("how", models.NORMS)
def test_ways_to_write_a_norm(how, dtype):
    for form, bias in (("residual", 1.0), ("sandwich", 0.0)):
        block = block_of(form, dtype, bias=bias, how=models.NORMS[how], residual_first=False)
        assert_fused(block, normal(3, 64, dtype=dtype), normal(3, 64, dtype=dtype))


def test_weights_of_other_biases_and_in_fp32():
    for bias in (-1.0, 0.5):
        assert_fused(
            block_of("residual", bias=bias, weight_dtype=FP32), normal(3, 64), normal(3, 64)
        )


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, BF16), (BF16, FP16)])
def test_weights_of_another_dtype(dtype, weight_dtype):
    """They are converted to fp32 as the model did it; the op takes the result."""
    block = block_of("residual", dtype, weight_dtype=weight_dtype)
    x, residual = normal(3, 64, dtype=dtype), normal(3, 64, dtype=dtype)
    fused = compiled(block)
    outputs = fused(x, residual)
    assert fused.forms == ["residual"]
    block.norm.weight = nn.Parameter(block.norm.weight.float(), False)
    assert_contract(block, x, residual, outputs)


def test_a_row_that_is_converted_twice():
    weight = normal(64, std=0.1)

    def model(x, residual):
        h = residual + models.functional(2 * x)
        normed = h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + models.EPS)
        return (normed * (1.0 + weight.float())).to(x.dtype), h

    x, residual = normal(3, 64), normal(3, 64)
    fused = compiled(model)
    outputs = fused(x, residual)
    assert fused.forms == ["residual"]
    assert fused.nodes("all_reduce.") == []
    assert_contract(Block("residual", RMSNorm(weight)), x, residual, outputs)


def test_other_users_of_the_sum_get_residual_out():
    """Of all three forms: the model goes on with the sum, and the fp32 copy that the norm makes."""

    class Model(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, residual):
            norm_out, h = self.block(x, residual)
            return norm_out, h, h * 3, h.float().abs().sum(-1), self.block.norm(h) + 1

    for form in checks.FORMS:
        model = Model(block_of(form))
        x, residual = normal(3, 64), normal(3, 64)
        fused = compiled(model)
        outputs = fused(x, residual)
        assert fused.forms == [form]
        assert fused.nodes("all_reduce.") == []
        assert_contract(model.block, x, residual, outputs[:2])
        norm_out, h = outputs[:2]
        for got, want in zip(outputs[2:4], (h * 3, h.float().abs().sum(-1)), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(outputs[4], norm_out + 1, rtol=2**-7, atol=0)


def test_other_users_of_the_norms_own_copy_in_fp32():
    """It is made of residual_out then."""
    block = block_of("residual")

    def model(x, residual):
        h = residual + models.functional(2 * x)
        v32 = h.float()
        normed = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + models.EPS)
        return (normed * (1.0 + block.norm.weight.float())).to(x.dtype), h, v32 * 3

    x, residual = normal(3, 64), normal(3, 64)
    fused = compiled(model)
    *outputs, v96 = fused(x, residual)
    assert fused.forms == ["residual"]
    assert fused.nodes("all_reduce.") == []
    assert_contract(block, x, residual, outputs)
    checks.assert_bit_equal(v96, outputs[1].float() * 3, "of the fp32 copy")


def test_two_norms_of_one_sum():
    """The first is fused; the second goes on from residual_out."""
    block, second = block_of("residual"), RMSNorm(normal(64), eps=1e-3)

    def model(x, residual):
        norm_out, h = block(x, residual)
        return norm_out, h, second(h)

    x, residual = normal(3, 64), normal(3, 64)
    fused = compiled(model)
    outputs = fused(x, residual)
    assert fused.forms == ["residual"]
    assert_contract(block, x, residual, outputs[:2])
    torch.testing.assert_close(outputs[2], second(outputs[1]), rtol=2**-7, atol=0)


def test_a_view_between_the_all_reduce_and_the_rest():
    for form in ("plain", "residual"):
        block = block_of(
            form, all_reduce=lambda x: models.functional(x.view(10, 64)).view(2, 5, 64)
        )
        assert_fused(block, normal(2, 5, 64), normal(2, 5, 64))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_in_place_all_reduce_of_a_linear_s_output(dynamic):
    """As in transformers' tensor parallelism: the linear's output is a view of a product, and the
    all-reduce writes into it."""
    linear = nn.Linear(64, 64, bias=False, dtype=BF16)
    linear.weight = nn.Parameter(torch.eye(64, dtype=BF16), False)  # so that 2 x stays 2 x
    block = block_of("residual", all_reduce=lambda x: models.in_place(linear(x)))
    with torch._dynamo.config.patch(specialize_float=True):
        assert_fused(block, normal(2, 3, 64), normal(2, 3, 64), dynamic=dynamic)


def test_a_residual_that_is_updated_in_place():
    norm = RMSNorm(normal(64, std=0.1))

    def model(x, residual):
        residual += models.functional(2 * x)
        return norm(residual)

    x, residual = normal(3, 64), normal(3, 64)
    before = residual.clone()
    fused = compiled(model)
    norm_out = fused(x, residual)
    assert fused.forms == ["residual"]
    assert_contract(Block("residual", norm), x, before, (norm_out, residual))


def test_a_residual_that_is_another_all_reduce():
    norm = RMSNorm(normal(64, std=0.1))

    def model(x, y):
        h = models.functional(2 * x) + models.functional(3 * y)
        return norm(h), h

    x, y = normal(3, 64), normal(3, 64)
    fused = compiled(model)
    outputs = fused(x, y)
    assert fused.forms[0] == "residual"
    assert "no RMSNorm follows; the sum goes to fused_allreduce_rmsnorm" in fused.forms[1]
    block = Block("residual", norm)
    assert_contract(block, x, 3 * y, outputs)


@pytest.mark.parametrize("use_local_output", [True, False])
@pytest.mark.parametrize("form", ["residual", "sandwich"])
def test_dtensor_rowwise_parallel(form, use_local_output):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    block = block_of(form, hidden=16)
    block.linear = nn.Linear(32, 16, bias=False, dtype=BF16)
    block.linear.requires_grad_(False)
    block.all_reduce = block.linear  # its output is all-reduced by the style
    style = RowwiseParallel(use_local_output=use_local_output)
    parallelize_module(block, mesh, {"linear": style})
    residual = normal(3, 16)
    if not use_local_output:
        for norm in (block.norm, block.post_norm):
            replicated = distribute_tensor(norm.weight.data, mesh, [Replicate()])
            norm.weight = nn.Parameter(replicated, False)
        residual = distribute_tensor(residual, mesh, [Replicate()])
    x = normal(3, 16)
    fused = compiled(block)
    outputs = fused(x, residual)
    assert fused.forms == [form]
    assert fused.nodes("all_reduce.") == []
    for got, want in zip(outputs, block(x, residual), strict=True):
        if not use_local_output:
            got, want = got.to_local(), want.to_local()
        torch.testing.assert_close(got, want, rtol=2**-5, atol=2**-5)


def test_a_group_of_its_own():
    group = dist.new_group([0, 1])
    block = block_of("residual", all_reduce=lambda x: funcol.all_reduce(x, "sum", group))
    fused = compiled(block)
    x, residual = normal(3, 64), normal(3, 64)
    assert_contract(block, x, residual, fused(x, residual))
    (call,) = fused.nodes("gemma_ar_norm")
    assert call.args[6] == group.group_name != dist.group.WORLD.group_name


def test_dynamic_rows_are_one_graph():
    """Left to itself, the second number of rows makes a graph for all. With dynamic=True the first
    one does; floats are to be constants then, or eps is none."""
    for form, dynamic, shapes, graphs in (
        ("sandwich", None, [(3, 64), (5, 64), (9, 64)], [1, 2, 2]),
        ("residual", True, [(2, 3, 64), (4, 5, 64)], [1, 1]),
    ):
        block = block_of(form)
        fused = compiled(block, dynamic=dynamic)
        counts = []
        with torch._dynamo.config.patch(specialize_float=True):
            for shape in shapes:
                x, residual = normal(*shape), normal(*shape)
                assert_contract(block, x, residual, fused(x, residual))
                counts.append(len(fused.graphs))
        assert counts == graphs
        assert set(fused.forms) == {form}


def test_a_sandwich_that_is_not_one_is_plain():
    """The first norm is fused alone, and the note says why."""

    def different_eps(block):
        block.post_norm.eps = 1e-3

    def different_bias(block):
        block.post_norm.bias = 0.0

    def different_dtype(block):
        block.post_norm.weight = nn.Parameter(block.post_norm.weight.float(), False)

    for change, words in (
        (different_eps, "different eps or bias"),
        (different_bias, "different eps or bias"),
        (different_dtype, "weights have different dtypes"),
    ):
        block = block_of("sandwich")
        change(block)
        fused = compiled(block)
        x, residual = normal(3, 64), normal(3, 64)
        outputs = fused(x, residual)
        assert fused.forms == ["plain"]
        assert words in fused.records[0].reason
        p, _ = reference.fused_allreduce_gemma_rmsnorm(
            [2 * x, torch.zeros_like(x)],
            block.post_norm.weight,
            eps=block.post_norm.eps,
            weight_bias=block.post_norm.bias,
        )
        checks.assert_bit_equal(outputs[1], residual + p, "residual + p")


def test_the_sandwich_gives_way_where_its_inside_is_used():
    """The all-reduce's result, or the first norm's."""
    for which in (0, 1):
        block = block_of("sandwich")

        def model(x, residual, block=block, which=which):
            a = models.functional(2 * x)
            p = block.post_norm(a)
            h = residual + p
            return block.norm(h), h, (a, p)[which] - 1

        x, residual = normal(3, 64), normal(3, 64)
        fused = compiled(model)
        outputs = fused(x, residual)
        assert fused.forms == ["plain"]
        a = torch.stack([2 * x, torch.zeros_like(x)])
        p, _ = reference.fused_allreduce_gemma_rmsnorm(a, block.post_norm.weight)
        checks.assert_bit_equal(outputs[1], residual + p, "residual + p")
        checks.assert_bit_equal(outputs[2], (2 * x, p)[which] - 1, "the other user")
        assert ("is used by sub" in fused.records[0].reason) == (which == 0)


def test_layers_of_a_decoder():
    generator = torch.Generator().manual_seed(checks.fresh_seed())
    decoder = Decoder([block_of(f) for f in ("residual", "sandwich") * 2], BF16, generator)
    x, residual = normal(3, 64), normal(3, 64)
    fused = compiled(decoder)
    outputs = fused(x, residual)
    assert fused.forms == ["residual", "sandwich"] * 2
    assert fused.nodes("all_reduce.") == []
    for got, want in zip(outputs, decoder(x, residual), strict=True):
        # Roundings of T that fall otherwise go through the layers behind.
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < 2**-6


# ----------------------------------------------------------------------------------- vLLM's model


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(16, BF16), (16, FP16), (64, BF16), (64, FP16), (1152, BF16)]
)
def test_the_model_of_vllms_own_test(vllm_ops, hidden, dtype):
    for ops in (None, vllm_ops):
        model = models.VllmTestModel(hidden, dtype, checks.fresh_seed(), ops)
        x = normal(8, hidden, dtype=dtype)
        fused = compiled(model)
        got = fused(x)
        assert fused.forms == ["plain", "residual", "residual", "residual"]
        for name in ("all_reduce.", "wait_tensor", "vllm"):
            assert fused.nodes(name) == []
        calls = fused.nodes("gemma_ar_norm")
        assert [call.args[5] for call in calls] == [1.0] * 4
        placeholders = [n for n in fused.graphs[0].graph.nodes if n.op == "placeholder"]
        for call in calls:
            assert call.args[1] in placeholders, "the weight itself, not 1 + weight"
        want = model(x)
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < 4 * ONE_ROUNDING[dtype]


def test_vllms_norms_in_the_sandwich(vllm_ops):
    weights = [normal(64, std=0.1) for _ in range(2)]

    def model(x, residual):
        a = vllm_ops.vllm.all_reduce(2 * x, dist.group.WORLD.group_name)
        p = vllm_ops.vllm_ir.rms_norm(a, 1.0 + weights[0].float(), models.EPS)
        return vllm_ops.vllm_ir.fused_add_rms_norm(
            p, residual, 1.0 + weights[1].float(), models.EPS
        )

    x, residual = normal(3, 64), normal(3, 64)
    block = Block("sandwich", RMSNorm(weights[1]), RMSNorm(weights[0]))
    for last_layer in (False, True):  # nobody wants its residual_out
        fused = compiled((lambda *inputs: model(*inputs)[:1]) if last_layer else model)
        outputs = fused(x, residual)
        assert fused.forms == ["sandwich"]
        assert fused.nodes("vllm") == []
        residual_out = outputs[1] if not last_layer else residual + block.post_norm(2 * x)
        assert_contract(block, x, residual, (outputs[0], residual_out))


def test_vllms_names_of_groups(vllm_ops, monkeypatch):
    """vLLM has a name of its own for a group; the op gets the process group's."""
    group = dist.new_group([0, 1])
    state = ModuleType("vllm.distributed.parallel_state")
    state._groups = {"tp:0": lambda: SimpleNamespace(device_group=group), "gone:0": lambda: None}
    fusion_pass = gemma_ar_norm.inductor_options()[PASS_OPTION]
    without = fusion_pass.uuid()
    monkeypatch.setitem(sys.modules, state.__name__, state)

    def model(x):
        a = vllm_ops.vllm.all_reduce(2 * x, "tp:0")
        return vllm_ops.vllm_ir.rms_norm(a, 1.0 + weight.float(), 1e-6)

    weight = normal(64)
    fused = compiled(model)
    fused(normal(3, 64))
    assert fused.forms == ["plain"]
    assert fused.nodes("gemma_ar_norm")[0].args[6] == group.group_name
    assert fusion_pass.uuid() != without, "the cache would give a graph with another group"


# ------------------------------------------------------------------------------- options and report


class Users(CustomGraphPass):
    """A pass that a user already has: it makes every 2 a 3."""

    def __init__(self, uuid="users"):
        self.name = uuid

    def __call__(self, graph):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
            node.args = tuple(3 if argument == 2 else argument for argument in node.args)

    def uuid(self):
        return self.name


def test_options_are_kept_and_passes_chained():
    given = {"triton.cudagraphs": True, PASS_OPTION: Users()}
    options = gemma_ar_norm.inductor_options(given)
    assert options is not given
    assert given == {"triton.cudagraphs": True, PASS_OPTION: given[PASS_OPTION]}
    assert options["triton.cudagraphs"] is True
    assert set(options) == set(given)
    block = block_of("residual")
    x, residual = normal(3, 64), normal(3, 64)
    fused = compiled(block, options=given)
    norm_out, _ = fused(x, residual)
    assert fused.forms == ["residual"]
    want, _ = reference.fused_allreduce_gemma_rmsnorm([3 * x], block.norm.weight, residual)
    checks.assert_bit_equal(norm_out, want, "the user's pass came first")

    ours = options[PASS_OPTION]
    assert gemma_ar_norm.inductor_options(options)[PASS_OPTION] is ours
    with config.patch(post_grad_custom_pre_pass=given[PASS_OPTION]):
        from_config = gemma_ar_norm.inductor_options()[PASS_OPTION]
    assert from_config.before == (given[PASS_OPTION],)
    of_a_list = gemma_ar_norm.inductor_options({PASS_OPTION: [Users("a"), Users("b")]})
    assert [one.name for one in of_a_list[PASS_OPTION].before] == ["a", "b"]
    assert gemma_ar_norm.inductor_options()[PASS_OPTION].before == ()


def test_a_users_pass_learns_whether_the_graph_is_for_inference():
    from torch._inductor import custom_graph_pass

    said = []
    if not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"):
        pytest.skip(f"torch {torch.__version__} has no such passes")

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            said.append(is_inference)

        def uuid(self):
            return "aware"

    ours = gemma_ar_norm.inductor_options({PASS_OPTION: Aware()})[PASS_OPTION]
    assert isinstance(ours, custom_graph_pass.CustomInferenceAwareGraphPass)
    for is_inference in (True, False):
        ours(torch.fx.Graph(), is_inference)
    assert said == [True, False]


def test_uuids_tell_passes_apart():
    def uuid(**options):
        return gemma_ar_norm.inductor_options(options)[PASS_OPTION].uuid()

    assert uuid() == uuid() is not None
    with_users = {PASS_OPTION: Users()}
    assert uuid() != uuid(**with_users) == uuid(**with_users) != uuid(**{PASS_OPTION: Users("b")})
    # What has no name cannot be cached.
    assert uuid(**{PASS_OPTION: Users("")}) is None
    assert uuid(**{PASS_OPTION: lambda graph: None}) is None


def test_the_uuid_is_that_of_the_sources(monkeypatch, tmp_path):
    from gemma_ar_norm import fusion, fusion_match, fusion_norms, fusion_pass

    def uuid():
        fusion_pass._source_hash.cache_clear()
        return fusion_pass.FusionPass().uuid()

    before = uuid()
    assert uuid() == before
    for module in (fusion, fusion_match, fusion_norms, fusion_pass):
        changed = tmp_path / "changed.py"
        with open(module.__file__) as source:
            changed.write_text(source.read() + "\n")
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(changed))
            assert uuid() != before, module
    assert uuid() == before


def test_wrong_options():
    with pytest.raises(TypeError, match=r"existing: a dict .* is required; got str; pass what"):
        gemma_ar_norm.inductor_options("max-autotune")
    with pytest.raises(TypeError, match=f"{PASS_OPTION}: a pass, .* is required; got str; pass a"):
        gemma_ar_norm.inductor_options({PASS_OPTION: "mine"})


def test_report_counters_and_log(caplog):
    counters.clear()
    with caplog.at_level(logging.INFO, logger="gemma_ar_norm.fusion"):
        block = block_of("sandwich")
        fused = compiled(lambda x, r: (*block(x, r), models.functional(x)))
        fused(normal(3, 64), normal(3, 64))
    first, second = fused.records
    assert (first.form, first.reason, first.all_reduce) == ("sandwich", "", "all_reduce")
    assert (second.form, second.all_reduce) == ("", "all_reduce_1")
    assert second.reason.startswith("no RMSNorm follows")
    assert first.graph == second.graph
    assert "fusion_models.py:" in first.where
    assert caplog.messages == [str(first), str(second)]
    assert str(first).startswith(f"graph {first.graph}, all_reduce: fused (sandwich) [")
    assert f"left: {second.reason} [" in str(second)
    counted = {k: v for k, v in counters["inductor"].items() if k.startswith("gemma_ar_norm")}
    assert counted == {"gemma_ar_norm_sandwich": 1, "gemma_ar_norm_left": 1}
    assert gemma_ar_norm.fusion_report() == []


def test_a_graph_without_all_reduces_is_not_looked_at():
    fused = compiled(lambda x: x + 1)
    fused(normal(3, 64))
    assert fused.records == []


def test_importing_the_package_imports_no_compiler():
    code = (
        "import sys, gemma_ar_norm; gemma_ar_norm.fusion_report(); "
        "print([m for m in sys.modules if m.startswith('torch._inductor')])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert run.stdout.strip() == "[]"

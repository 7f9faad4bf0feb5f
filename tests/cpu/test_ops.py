"""The ops on CPU tensors of one process, and their fake kernels. (Groups: test_processes.py.)"""

from __future__ import annotations

import operator

import checks
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gemma_ar_norm import fused_allreduce_gemma_rmsnorm, groups, library, ops

op = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm
local_op = torch.ops.gemma_ar_norm.add_rmsnorm.out


def arguments_of(made, *, local=False):
    scaling = (made.eps, made.weight_bias)
    tail = () if local else ("", "auto")
    return (made.xs[0], made.weight, made.residual, made.post_weight, *scaling, *tail)


def out_of(made):
    names = ("norm_out", "residual_out")
    return {name: checks.poisoned_like(made.xs[0]) for name in names}


def assert_result(got, made):
    for one, expected in zip(got, made.expected(), strict=True):
        checks.assert_bit_equal(one, expected, made)


@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("overload", ["default", "out", "local"])
def test_cpu_equals_the_reference(overload, dtype, form):
    for rows, hidden, weight_dtype in ((1, 8, dtype), (7, 2880, torch.float32), (0, 16384, dtype)):
        made = checks.make_case(1, rows, hidden, dtype, form, weight_dtype=weight_dtype, eps=1e-5)
        if overload == "default":
            got = op.default(*arguments_of(made))
        else:
            out = out_of(made)
            local = overload == "local"
            result = (local_op if local else op.out)(*arguments_of(made, local=local), **out)
            assert result is None or result == ()
            got = out.values()
        assert_result(got, made)


@pytest.mark.parametrize("form", checks.FORMS)
def test_opcheck(form):
    made = checks.make_case(1, 6, 640, torch.bfloat16, form)
    torch.library.opcheck(op.default, arguments_of(made))
    torch.library.opcheck(op.out, arguments_of(made), out_of(made))
    torch.library.opcheck(local_op, arguments_of(made, local=True), out_of(made))


def test_opcheck_of_strided_input():
    made = checks.make_case(1, 640, 640, torch.float16)
    x, *rest = arguments_of(made)
    torch.library.opcheck(op.default, (x.t(), *rest))


def test_fake_outputs_are_contiguous_and_keep_symbolic_rows():
    def function(x):
        return op.default(x, x[0, 0], x, x[0, 0], 1e-6, 1.0, "", "auto")

    real = torch.randn(640, 4, 5, dtype=torch.float16).permute(2, 1, 0)
    graph = make_fx(function, tracing_mode="symbolic")(real).graph
    x = next(node.meta["val"] for node in graph.nodes if node.op == "placeholder")
    outputs = [n.meta["val"] for n in graph.nodes if n.target is operator.getitem]
    assert len(outputs) == 2
    for out in outputs:
        assert isinstance(out.shape[0], torch.SymInt)
        assert out.shape == x.shape
        assert out.dtype == torch.float16
        assert out.is_contiguous()


def test_fake_kernels_check_the_arguments():
    with FakeTensorMode():
        x = torch.empty(640, 4, 5, dtype=torch.float16).permute(2, 1, 0)
        with pytest.raises(ValueError, match="post_weight: a residual"):
            op.default(x, x[0, 0], None, x[0, 0], 1e-6, 1.0, "", "auto")
        with pytest.raises(ValueError, match="norm_out: a contiguous tensor"):
            op.out(x, x[0, 0], None, None, 1e-6, 1.0, "", "auto", norm_out=x, residual_out=x)


def test_slow_path_errors_are_kept_for_the_caller_and_no_other(monkeypatch):
    given = []
    monkeypatch.setattr(ops, "_C", type("_C", (), {"set_slow_path_error": given.append}))
    x = torch.ones(2, 640)
    ops.slow_path(x, x[0], None, None, 1e-6, 1.0, "nobody", "auto", x, x)
    assert len(given) == 1
    assert "live process group" in given[0]
    # Another error comes by first: the kept one is not its explanation, and is forgotten.
    other = RuntimeError("CUDA error")
    valid = {"x": x, "weight": x[0], "residual": None, "post_weight": None, "eps": 0.0}
    valid["weight_bias"] = 1.0
    assert ops.better_error(other, "nobody", valid) is other
    ops.slow_path(x, x[0], None, None, 1e-6, 1.0, "nobody", "auto", x, x)
    better = ops.better_error(RuntimeError(f"in C++: {given[1]}"), "nobody", valid)
    assert isinstance(better, ValueError)
    assert str(better) == given[1]

    # The call after a workspace was made comes here again: its error is the one that counts.
    def fails_inside(x, *rest, norm_out, residual_out):
        monkeypatch.setattr(ops, "_is_fused", lambda *_: False)
        ops.slow_path(x, *rest, norm_out, residual_out)
        raise RuntimeError(f"in C++: {given[-1]}")

    monkeypatch.setattr(ops, "_is_fused", lambda *_: True)
    monkeypatch.setattr(ops, "fused_allreduce_rmsnorm_out", fails_inside)
    ops.slow_path(x, x[0], None, None, 1e-6, 1.0, "nobody", "auto", x, x)
    better = ops.better_error(RuntimeError(f"in C++: {given[-1]}"), "nobody", valid)
    assert isinstance(better, ValueError)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "_all_reduce", interrupt)
    ops.slow_path(x, x[0], None, None, 1e-6, 1.0, "", "unfused", x, x)
    assert given[-1] == "KeyboardInterrupt"
    assert isinstance(ops.better_error(RuntimeError(given[-1]), "", valid), KeyboardInterrupt)


def test_a_compiled_call_is_made_though_nobody_takes_its_results(monkeypatch):
    """In C++ it is a collective; other ranks may take them. (With Inductor: compile_cases.py.)"""
    made, calls, cpu = checks.make_case(1, 3, 64, torch.bfloat16), [], ops.reference

    class Counting:
        @staticmethod
        def fused_allreduce_gemma_rmsnorm(*arguments, **options):
            calls.append(len(arguments))
            return cpu.fused_allreduce_gemma_rmsnorm(*arguments, **options)

    def drop(x):
        fused_allreduce_gemma_rmsnorm(x, made.weight)
        return x + 1

    monkeypatch.setattr(ops, "reference", Counting)
    torch._dynamo.reset()
    torch.compile(drop, backend="aot_eager", fullgraph=True)(made.xs[0])
    assert len(calls) == 1


def test_the_slow_path_of_one_rank_is_the_local_kernel():
    made = checks.make_case(1, 3, 640, torch.bfloat16, "sandwich")
    out = out_of(made)
    for algorithm in ("auto", "unfused"):
        arguments = (*arguments_of(made)[:-1], algorithm)
        ops.slow_path(*arguments, *out.values())
        assert_result(out.values(), made)


def test_the_slow_path_of_a_closed_local_group(monkeypatch):
    class Rank:
        rank, group_name = 0, groups.LOCAL_PREFIX + "closed"

        def size(self):
            return 2

    given = []
    monkeypatch.setattr(ops, "_C", type("_C", (), {"set_slow_path_error": given.append}))
    rank = Rank()
    groups.register_local(rank)
    x = torch.ones(2, 640)
    for algorithm, words in (("auto", "which was closed; call local_group"), ("unfused", "'auto'")):
        ops.slow_path(x, x[0], None, None, 1e-6, 1.0, rank.group_name, algorithm, x, x)
        assert words in given[-1]


def test_a_missing_or_broken_library_says_what_to_do(tmp_path):
    words = r"libgemma_ar_norm.so: the compiled library is required; got none in .*; build it with"
    with pytest.raises(ImportError, match=words):
        library.load(tmp_path / "libgemma_ar_norm.so")
    broken = tmp_path / "libgemma_ar_norm.so"
    broken.write_text("not an ELF file")
    with pytest.raises(ImportError, match=r"loads in torch .* is required .*got: .*; build it"):
        library.load(broken)

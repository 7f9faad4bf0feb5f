"""The call and explain() in one process: compile, out=, gradients, failed peers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import checks
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, WorkspaceError, groups, ops, plan, workspace
from gemma_ar_norm.library import _C

call = gemma_ar_norm.fused_allreduce_gemma_rmsnorm
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def t(*shape, dtype=BF16, **options):
    return torch.ones(shape, dtype=dtype, **options)


def assert_result(got, made):
    for one, expected in zip(got, made.expected(), strict=True):
        checks.assert_bit_equal(one, expected, made)


# ------------------------------------------------------------------------------------------- errors
# Bad arguments: test_bad_arguments.py.

X, W = t(4, 640), t(640)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("name", ["x", "weight", "residual", "post_weight", "norm_out"])
def test_gradients_are_refused(name, kind):
    made = checks.make_case(1, 2, 640, FP32, "sandwich")
    given = {"x": made.xs[0], "weight": made.weight, **made.options}
    outputs = {"norm_out": t(2, 640, dtype=FP32), "residual_out": t(2, 640, dtype=FP32)}
    (outputs if name in outputs else given)[name].requires_grad_()
    out = kind(outputs.values()) if name in outputs else None
    with pytest.raises(ValueError, match=rf"{name}: requires_grad=False.*{name}.detach\(\)"):
        call(**given, out=out)
    with torch.no_grad():
        assert_result(call(**given, out=out), made)
    with torch.inference_mode():
        assert_result(call(**given), made)


def test_an_expired_deadline_is_raised_with_its_type(monkeypatch):
    def fails(*_):
        raise RuntimeError("PeerTimeoutError: rank 3 did not come")

    class Failed:
        def check(self):
            raise PeerTimeoutError("rank 3", 3, 4, 5)

    monkeypatch.setattr(ops, "fused_allreduce_rmsnorm", fails)
    with pytest.raises(RuntimeError, match="rank 3 did not come") as caught:
        call(X, W)
    assert type(caught.value) is RuntimeError  # nobody knows more
    monkeypatch.setitem(workspace._records, "", Failed())
    with pytest.raises(PeerTimeoutError, match="rank 3") as caught:
        call(X, W)
    error = caught.value
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(same), same.peer, same.call, same.row) == ("rank 3", 3, 4, 5)


# ---------------------------------------------------------------------------------------- the call


def test_a_call_mutates_nothing():
    made = checks.make_case(1, 5, 640, BF16, "sandwich")
    tensors = [made.xs[0], made.weight, made.residual, made.post_weight]
    before = [one.clone() for one in tensors]
    outputs = call(made.xs[0], made.weight, **made.options)
    assert_result(outputs, made)
    for one, old in zip(tensors, before, strict=True):
        checks.assert_bit_equal(one, old)
        assert all(one.data_ptr() != output.data_ptr() for output in outputs)


def test_plain_output_does_not_alias_x():
    norm_out, residual_out = call(X, W)
    assert len({X.data_ptr(), norm_out.data_ptr(), residual_out.data_ptr()}) == 3


def test_misaligned_and_strided_inputs():
    made = checks.make_case(1, 4, 640, BF16, "sandwich")

    def shifted(one):
        buffer = torch.empty(one.numel() + 1, dtype=one.dtype)
        buffer[1:] = one.flatten()
        return buffer[1:].view(one.shape)

    def strided(one):
        return torch.stack([one, one], dim=-1)[..., 0]

    for change in (shifted, strided):
        options = {**made.options, "residual": change(made.residual)}
        assert_result(call(change(made.xs[0]), change(made.weight), **options), made)


# ----------------------------------------------------------------------------------------- compile


def assert_one_op(graphs) -> None:
    """Every graph has our op once, among others."""
    for graph in graphs:
        calls = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        assert len([name for name in calls if "gemma_ar_norm" in name]) == 1, calls
        assert len(calls) > 3, calls


@pytest.mark.parametrize("algorithm", ["auto", "two_shot"])
@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_compile_makes_one_op_and_does_not_recompile_for_rows(how, algorithm):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def eager(x, weight, residual):
        norm_out, residual = call(x + 1, weight, residual * 2, weight_bias=0.0, algorithm=algorithm)
        return norm_out.neg(), residual.abs()

    dynamic = True if how == "dynamic" else None
    layer = torch.compile(eager, fullgraph=True, dynamic=dynamic, backend=counter)

    def check(rows: int) -> int:
        made = checks.make_case(1, rows, 640, BF16, weight_bias=0.0)
        x, residual = made.xs[0], made.residual
        if how == "mark_dynamic" and rows > 1:  # torch has graphs of their own for 0 and 1
            for one in (x, residual):
                torch._dynamo.mark_dynamic(one, 0)
        got = layer(x, made.weight, residual)
        for one, expected in zip(got, eager(x, made.weight, residual), strict=True):
            checks.assert_bit_equal(one, expected, made)
        norm_out, residual_out = replace(made, xs=[x + 1], residual=residual * 2).expected()
        checks.assert_bit_equal(got[0], norm_out.neg(), made)
        checks.assert_bit_equal(got[1], residual_out.abs(), made)
        return counter.frame_count

    counts = [check(rows) for rows in (2, *range(3, 41), 64, 127, 333, 1024, 2048)]
    assert counts == counts[:1] * len(counts)  # torch itself may start over within the first call
    once = counts[0]
    # 0 and 1 are numbers to torch, and not sizes: a graph each at most, and that once.
    few = [check(rows) for rows in (1, 0)]
    assert once <= few[0] <= once + 1
    assert few[0] <= few[1] <= few[0] + 1
    assert [check(rows) for rows in (0, 1, 2, 17, 1, 0, 96)] == few[1:] * 7
    assert_one_op(counter.graphs[once - 1 :])


@pytest.mark.parametrize("alias", ["residual", "none"])
def test_compile_with_out(alias):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x, weight, residual, norm_out, residual_out):
        out = (norm_out, residual if alias == "residual" else residual_out)
        return call(x * 1, weight, residual, out=out)

    for rows in (3, 9):
        made = checks.make_case(1, rows, 640, FP16)
        residual = made.residual.clone()
        norm_out, residual_out = checks.poisoned_like(residual), checks.poisoned_like(residual)
        got = layer(made.xs[0], made.weight, residual, norm_out, residual_out)
        assert_result(got, made)
        assert_result((norm_out, residual if alias == "residual" else residual_out), made)


def test_compiled_by_inductor_with_a_changing_eps():
    torch._dynamo.reset()
    layer = torch.compile(lambda x, w, eps: call(x, w, eps=eps), fullgraph=True, dynamic=True)
    for eps in (1e-6, 1e-5, 0.25):
        made = checks.make_case(1, 3, 640, BF16, "plain", eps=eps)
        assert_result(layer(made.xs[0], made.weight, eps), made)


# ----------------------------------------------------------------------------------------- explain


def test_explain_on_the_cpu():
    said = gemma_ar_norm.explain(64, 5376, device="cpu")
    assert (said.path, said.ranks, said.launches) == ("cpu", 1, 0)
    assert str(said) == "64 x 5376 bfloat16 on 1 rank(s): cpu; the tensors are on the CPU"


def test_explain_on_a_gpu(monkeypatch):
    """As it would answer there: what decides is the workspace that the group has."""

    def explain(rows=64, **options):
        return gemma_ar_norm.explain(rows, 5376, device="cuda", **options)

    assert explain().path == "local"

    class Rank:
        rank, group_name = 0, groups.LOCAL_PREFIX + "explained"

        def size(self):
            return 4

    class Native:
        inbox_bytes = 4 << 20

    rank = Rank()
    assert explain(group=rank).path == "undecided"
    with pytest.raises(ValueError, match=r"algorithm: .* required by a local group"):
        explain(group=rank, algorithm="unfused")
    me = groups.resolve(rank)
    monkeypatch.setitem(workspace._records, me.name, workspace.Workspace(me, "no NVLink"))
    said = explain(group=rank)
    assert (said.path, said.reason, said.launches) == ("unfused", "no NVLink", 1)
    assert explain(0, group=rank).launches == 0
    assert gemma_ar_norm.explain(0, 5376, device="cuda").launches == 0
    assert gemma_ar_norm.explain(2, 5376, device="cuda").launches == 1
    for algorithm in plan.FUSED_ALGORITHMS:
        with pytest.raises(WorkspaceError, match=r"algorithm: 'auto' or 'unfused' .*no NVLink"):
            explain(group=rank, algorithm=algorithm)
        with pytest.raises(WorkspaceError, match=r"algorithm: 'auto' or 'unfused' .*one rank"):
            explain(algorithm=algorithm)

    def made_for(ranks, multiprocessors, one_gpu):
        return plan.make_rules(
            ranks=ranks,
            multiprocessors=multiprocessors,
            compute_capability=(9, 0),
            max_cluster=8,
            shared_device=False,
            one_gpu=one_gpu,
        )

    rules = made_for(4, 132, one_gpu=False)
    fused = workspace.Workspace(me, "all is well", Native(), rules=rules)
    monkeypatch.setitem(workspace._records, me.name, fused)
    row_packs, most = 5376 * 2 // 16, plan.crossover_bytes(4, 9) // (5376 * 2)
    assert 0 < most < 64
    # 4 MiB: 64 rows by one-shot, 113 by two-shot, whose slices are rounded up.
    for rows, options, path, launches in (
        (most, {}, "one_shot", 1),
        (most + 1, {}, "two_shot", 1),
        (64, {"algorithm": "one_shot"}, "one_shot", 1),
        (65, {"algorithm": "one_shot"}, "one_shot", 2),
        (1, {"algorithm": "two_shot"}, "two_shot", 1),
        (113, {}, "two_shot", 1),
        (300, {}, "two_shot", 3),
        (113_000, {}, "two_shot", 1000),
    ):
        said = explain(rows, group=rank, **options)
        assert (said.path, said.launches, said.reason) == (path, launches, "all is well")
        numbers = [rule.numbers for rule in rules]
        found = _C.launches(numbers, 4, 4 << 20, rows, row_packs, **options)
        first = found[0]
        assert (said.launches, said.threads) == (len(found), first["threads"])
        assert said.blocks == first["teams"] * first["blocks_a_team"] > 0
        assert said.evidence == rules[first["rule"]].evidence != ""
        times = "1 launch" if launches == 1 else f"{launches} launches"
        words = f"{rows} x 5376 bfloat16 on 4 rank(s): {path} [{times}, {said.blocks} blocks of "
        assert str(said).startswith(words)
        assert str(said).endswith(f"; all is well; plan: {said.evidence}")
    assert "not measured" in explain(group=rank).evidence
    assert explain(0, group=rank).launches == 0
    # Of 148 rows 84 go by two-shot; of the 64 left 63 by one-shot, which takes no more at once.
    monkeypatch.setattr(Rank, "size", lambda self: 3)
    monkeypatch.setattr(fused, "inbox_bytes", 2 << 20)
    monkeypatch.setattr(fused, "rules", made_for(3, 44, one_gpu=True))
    for rows, launches in ((84, 1), (147, 2), (148, 3), (84_000 + 64, 1002)):
        assert gemma_ar_norm.explain(rows, 4096, group=rank, device="cuda").launches == launches
    assert gemma_ar_norm.explain(1, 5376, group=rank, device="cpu").path == "cpu"
    fused._release.detach()


def test_local_groups_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WorkspaceError, match="local_group: a CUDA GPU is required"):
        gemma_ar_norm.local_group(2)

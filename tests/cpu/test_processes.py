"""Everything that takes several processes and no GPU: gloo groups of 2 and 3 ranks.

Starting processes is what takes the time here. So each number of ranks is one run, in which this
file, as the program of every rank, goes through all the cases; and each case is a test.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import checks
import pytest
import torch
import torch.distributed as dist

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, WorkspaceError, groups, launcher, ops, plan, workspace

sys.path.insert(0, str(Path(__file__).parent))
from fakes import FakeNative, fake_native

TIME_LIMIT_S = 90
call = gemma_ar_norm.fused_allreduce_gemma_rmsnorm


@dataclass
class Me:
    rank: int
    world: int

    def case(self, rows: int, hidden: int = 640, dtype=torch.bfloat16, form="residual", seed=0):
        """The case that all ranks make, but for this rank's own residual."""
        made = checks.make_case(self.world, rows, hidden, dtype, form, seed=SEED + seed)
        return made if form == "plain" else checks.with_other_residual(made, SEED + self.rank)

    def gathered(self, message: Any) -> list[Any]:
        return groups.all_gather_json(groups.resolve(), message)


SEED = int(os.environ.get("SEED", "0"))
CASES: dict[str, Callable[[Me], None]] = {}


def case(function: Callable[[Me], None]) -> Callable[[Me], None]:
    CASES[function.__name__] = function
    return function


def assert_result(got, made, what: object = "") -> None:
    for one, expected in zip(got, made.expected(), strict=True):
        checks.assert_bit_equal(one, expected, f"{what} {made}")


# --------------------------------------------------------------------------------------- exchanges


@case
def json_messages_of_any_length(me: Me) -> None:
    chunk = groups.CHUNK_BYTES
    more = 8 + len('["another exchange",""]')  # 8: how long it is
    around = [chunk * n - more + d for n in (1, 2, 3) for d in (-1, 0, 1)]
    for length in (0, 1, 7, *around):
        got = me.gathered("x" * length + str(me.rank))
        assert got == ["x" * length + str(r) for r in range(me.world)], length
    # One rank has much to say, the others nothing.
    for loud in range(me.world):
        got = me.gathered({"": list(range(9000))} if me.rank == loud else None)
        assert [g is not None for g in got] == [r == loud for r in range(me.world)]
        assert got[loud] == {"": list(range(9000))}
    assert me.gathered(["é🦙\0", 1.5, True]) == [["é🦙\0", 1.5, True]] * me.world


# ----------------------------------------------------------------------------------------- the op


@case
def cpu_calls_equal_the_reference(me: Me) -> None:
    seed = 0
    for dtype in checks.DTYPES:
        for form in checks.FORMS:
            for rows, hidden in ((1, 8), (me.world - 1, 264), (5, 1152)):
                made = me.case(rows, hidden, dtype, form, seed := seed + 1)
                x = made.xs[me.rank].clone()
                assert_result(call(x, made.weight, **made.options), made)
                assert torch.equal(x.view(torch.uint8), made.xs[me.rank].view(torch.uint8))


@case
def special_values(me: Me) -> None:
    made = checks.make_case(me.world, 17, 264, torch.float16, special="mixed", seed=SEED)
    assert_result(call(made.xs[me.rank], made.weight, **made.options), made)


@case
def leading_dimensions_and_strides(me: Me) -> None:
    made = me.case(12, 640)
    x = made.xs[me.rank].view(3, 4, 640).transpose(0, 1)
    residual = made.residual.repeat(1, 2)[:, :640].view(3, 4, 640).transpose(0, 1)
    norm_out, residual_out = call(x, made.weight, residual)
    assert norm_out.shape == (4, 3, 640)
    assert norm_out.is_contiguous()
    assert residual_out.is_contiguous()
    back = [t.transpose(0, 1).reshape(12, 640) for t in (norm_out, residual_out)]
    assert_result(back, made)


@case
def no_rows(me: Me) -> None:
    for shape in ((0, 640), (3, 0, 640)):
        x = torch.empty(shape, dtype=torch.bfloat16)
        weight = torch.zeros(640)
        for one in call(x, weight, x.clone()):
            assert one.shape == shape
    made = me.case(2)
    assert_result(call(made.xs[me.rank], made.weight, **made.options), made)


@case
def out_may_be_residual_or_x(me: Me) -> None:
    for alias in ("none", "residual", "swapped", "x", "both"):
        made = me.case(4, form="sandwich", seed=3)
        x, residual = made.xs[me.rank].clone(), made.residual.clone()
        new = [checks.poisoned_like(x) for _ in range(2)]
        out = {
            "none": (new[0], new[1]),
            "residual": (new[0], residual),
            "swapped": (residual, new[1]),
            "x": (x, new[1]),
            "both": (x, residual),
        }[alias]
        options = {**made.options, "residual": residual}
        got = call(x, made.weight, **options, out=out)
        assert got[0] is out[0]
        assert got[1] is out[1]
        assert_result(got, made, alias)


@case
def subgroups(me: Me) -> None:
    pairs = [[a, b] for b in range(me.world) for a in range(b)] + [[me.world - 1]]
    made_groups = [(members, dist.new_group(members)) for members in pairs]
    for i, (members, group) in enumerate(made_groups):
        if me.rank not in members:
            with pytest.raises(ValueError, match="must be a member of the group"):
                call(torch.zeros(1, 640), torch.zeros(640), group=group)
            continue
        made = checks.make_case(len(members), 3, 640, torch.float16, seed=SEED + i)
        x = made.xs[members.index(me.rank)]
        for named in (group, group.group_name):
            assert_result(call(x, made.weight, **made.options, group=named), made, members)
        one = groups.resolve(group)
        assert (one.rank, one.size) == (members.index(me.rank), len(members))
        assert groups.resolve(group.group_name) == one
    made = me.case(3)
    assert_result(call(made.xs[me.rank], made.weight, **made.options), made, "all")
    assert_result(call(made.xs[me.rank], made.weight, **made.options, group=dist.group.WORLD), made)


@case
def compiled_once_for_all_numbers_of_rows(me: Me) -> None:
    if me.world > 2:
        return  # the same again, and importing dynamo takes each rank a second and a half
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(x, weight, residual):
        norm_out, residual = call(x * 1, weight, residual)
        return norm_out * 1, residual

    for rows in (3, 5, 16, 1, 96, 7):
        made = me.case(rows, seed=rows)
        x, residual = made.xs[me.rank], made.residual
        if rows != 1:  # a size of 1 is another graph for torch, whatever the op
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(residual, 0)
            assert_result(layer(x, made.weight, residual), made)
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------ calls that differ


DIFFERENCES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rows 4 on": lambda a: {**a, "x": a["x"][:3], "residual": a["residual"][:3]},
    "rows 4 ": lambda a: {**a, "x": a["x"][:0], "residual": a["residual"][:0]},
    "hidden 640 on": lambda a: {
        **a,
        "x": a["x"][:, :632],
        "residual": a["residual"][:, :632],
        "weight": a["weight"][:632],
    },
    "x.dtype bfloat16 on": lambda a: {
        name: value.half() if isinstance(value, torch.Tensor) else value
        for name, value in a.items()
    },
    "form residual on": lambda a: {**a, "residual": None},
    "algorithm auto on": lambda a: {**a, "algorithm": "unfused"},
    "weight.dtype bfloat16 on": lambda a: {**a, "weight": a["weight"].float()},
    "eps 1e-06 on": lambda a: {**a, "eps": 1e-5},
    "weight_bias 1.0 on": lambda a: {**a, "weight_bias": 0.0},
}


@case
def what_differs_is_named(me: Me) -> None:
    """On every rank, in that call, and the next call is right. Debug mode plays no part in it."""
    last = me.world - 1
    with mock.patch.dict(os.environ, GEMMA_AR_NORM_DEBUG="1" if me.rank == last else "0"):
        for what, change in DIFFERENCES.items():
            made = me.case(4)
            arguments = {"x": made.xs[me.rank], "weight": made.weight, "residual": made.residual}
            if me.rank == last:
                arguments = change(arguments)
            with pytest.raises(WorkspaceError, match="call: the same on all ranks") as raised:
                call(arguments.pop("x"), **arguments)
            assert what in str(raised.value)
            assert f"on rank {last}" in str(raised.value)
            assert_result(call(made.xs[me.rank], made.weight, **made.options), made)


@case
def a_rank_that_does_something_else(me: Me) -> None:
    """In init, in a call or in another exchange. All are told what each is doing."""
    made = me.case(4)
    ways: dict[str, Callable[[], Any]] = {
        "a call": lambda: call(made.xs[me.rank], made.weight, **made.options),
        "init() (facts)": workspace.init,
        "another exchange": lambda: me.gathered(list(range(3000))),  # in several chunks
    }
    others, last = ", ".join(str(r) for r in range(me.world - 1)), me.world - 1
    others = f"on rank{'s' if me.world > 2 else ''} {others}"
    for ours in ways:
        for theirs in ways:
            if ours == theirs:
                continue
            with pytest.raises(WorkspaceError, match=r"^group: the same on all ranks") as raised:
                ways[theirs if me.rank == last else ours]()
            assert f"got {ours} {others} and {theirs} on rank {last}, on" in str(raised.value)
    assert_result(ways["a call"](), made)


# ------------------------------------------------------------------------------------ the slow path


@case
def the_slow_path_reduces_with_the_group(me: Me) -> None:
    """As C++ calls it for CUDA tensors; it does not look at where they are."""
    group = dist.new_group(list(range(me.world)))
    made = me.case(4, dtype=torch.float32)
    x = made.xs[me.rank].clone()
    out = [checks.poisoned_like(x) for _ in range(2)]
    rest = (made.weight, made.residual, None, 1e-6, 1.0, group.group_name)
    error = mock.Mock()
    with mock.patch.object(ops, "_C", mock.Mock(set_slow_path_error=error)):
        for algorithm in ("unfused", "auto"):
            ops.slow_path(x, *rest, algorithm, *out)
            error.assert_not_called()
            for got, expected in zip(out, made.expected(), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(x, made.xs[me.rank]), "x was changed"
            if algorithm == "unfused":
                assert workspace.find(group.group_name) is None
        found = workspace.find(group.group_name)
        assert not found.fused
        assert "rank 0 has no GPU" in found.reason

        # There is no fused path to be had: an error, which is handed over and not raised.
        ops.slow_path(x, *rest, "one_shot", *out)
        text = error.call_args.args[0]
        assert text.startswith("algorithm: 'auto' or 'unfused' is required")
        assert "has no GPU" in text
    better = ops.better_error(RuntimeError(text), group.group_name, {})
    assert isinstance(better, WorkspaceError)
    dist.destroy_process_group(group)


@case
def the_slow_path_refuses_a_first_call_in_a_capture(me: Me) -> None:
    group = dist.new_group(list(range(me.world)))
    x = torch.ones(2, 640)
    native = mock.Mock()
    with (
        mock.patch.object(ops, "_C", native),
        mock.patch.object(workspace, "is_capturing", return_value=True),
    ):
        ops.slow_path(x, x[0], None, None, 1e-6, 1.0, group.group_name, "auto", x.clone(), x)
    assert "call init() before the capture" in native.set_slow_path_error.call_args.args[0]
    assert workspace.find(group.group_name) is None
    dist.destroy_process_group(group)


@case
def the_slow_path_makes_a_fused_workspace_and_calls_again(me: Me) -> None:
    group = dist.new_group(list(range(me.world)))
    x = torch.ones(2, 640, dtype=torch.float16)
    args = (x, x[0], None, None, 1e-6, 1.0, group.group_name, "auto")
    again = mock.Mock()
    with (
        fake_native(me.rank) as native,
        mock.patch.object(ops, "_C", mock.Mock()) as errors,
        mock.patch.object(ops, "fused_allreduce_rmsnorm_out", again),
    ):
        ops.slow_path(*args, x.clone(), x)
        errors.set_slow_path_error.assert_not_called()
        assert again.call_args.args == args
        made = native.registered[group.group_name]
        assert made.inbox_bytes == native.inbox_bytes(me.world, 256, 256, 640 * 2)
        # C++ knows the workspace by now. If it comes here still, we do not go round in circles.
        ops.slow_path(*args, x.clone(), x)
        assert again.call_count == 1
        assert "given up while" in errors.set_slow_path_error.call_args.args[0]
        dist.destroy_process_group(group)


# ------------------------------------------------------------------------------------------- init


def outcome(me: Me, native: FakeNative, **arguments: Any) -> list[Any]:
    """What init() on a new group comes to, of all ranks. The group is destroyed afterwards."""
    group = dist.new_group(list(range(me.world)))
    try:
        made = workspace.init(group, **arguments)
        mine = ["made", made.fused, made.reason]
    except Exception as error:
        mine = [type(error).__name__, None, str(error)]
    open_ones = len(native.open)
    all_of_them = me.gathered([*mine, open_ones])
    dist.destroy_process_group(group)
    return all_of_them


def assert_all(me: Me, got: list[Any], kind: str, fused: bool | None, *words: str) -> None:
    assert got == [got[0]] * me.world, got
    assert got[0][:2] == [kind, fused], got[0]
    for word in words:
        assert word in got[0][2], got[0]
    assert got[0][3] == (1 if fused else 0), "workspaces left open"


@case
def a_fused_workspace(me: Me) -> None:
    group = dist.new_group(list(range(me.world)))
    name = group.group_name
    with fake_native(me.rank) as native:
        first = workspace.init(
            group, hidden_size=1024, max_rows=10, dtype=torch.float32, timeout_s=1.5
        )
        assert (first.fused, first.rank, first.ranks) == (True, me.rank, me.world)
        assert first.generation == 1
        assert first.inbox_bytes == native.inbox_bytes(me.world, 10, 10, 4096)
        made = native.made[0]
        assert made.peers == [b"\x00handle of %d\xff" % r for r in range(me.world)]
        assert made.timeout_ns == 1_500_000_000
        assert native.registered == {name: made}
        # The plan is made from the least of all ranks' multiprocessors.
        assert {rule[-1] for rule in made.rules} == {132 - (me.world - 1)}

        with pytest.raises(ValueError, match="more than 0"):  # the old one stays
            workspace.init(group, timeout_s=0)
        assert workspace.find(name) is first
        assert not made.closed

        second = workspace.init(group)
        assert (first.closed, made.closed, second.generation) == (True, True, 2)
        assert native.registered == {name: native.made[1]}
        first.close()
        assert native.registered == {name: native.made[1]}, "an old one's end touched the new one"

        made = native.made[1]
        made.failed = (1, 17, 3)
        for check in (second.check, lambda: workspace.check(group)):
            with pytest.raises(PeerTimeoutError, match="rank 1: its rows of call 17") as caught:
                check()
            assert (caught.value.peer, caught.value.call, caught.value.row) == (1, 17, 3)

        second.close()
        second.close()
        assert made.closed
        assert native.registered == {}
        assert workspace.find(name) is None
        with workspace.init(group) as third:
            assert third.generation == 3
        assert native.open == []
    dist.destroy_process_group(group)


@case
def what_makes_all_ranks_unfused(me: Me) -> None:
    last = me.world - 1
    is_last = me.rank == last
    with fake_native(me.rank, no_access={"gpu0": "no NVLink"} if is_last else {}) as native:
        got = outcome(me, native)
        words = f"the GPU of rank {last} does not reach that of rank 0: no NVLink"
        assert_all(me, got, "made", False, words)
    with fake_native(me.rank, open_error="IPC is off" if is_last else "") as native:
        got = outcome(me, native)
        assert [made.disconnected for made in native.made] == [True]  # on every rank, before close
        assert_all(me, got, "made", False, f"rank {last}: IPC is off")
    with fake_native(me.rank) as native:
        if is_last:
            native.peer_access = mock.Mock(side_effect=RuntimeError("CUDA is broken"))
        assert_all(me, outcome(me, native), "made", False, "CUDA is broken")
    with fake_native(me.rank) as native:
        broken = mock.Mock(side_effect=RuntimeError("no device"))
        with mock.patch.object(workspace, "_gpu_facts", broken if is_last else native.gpu_facts):
            got = outcome(me, native)
        assert_all(me, got, "made", False, f"rank {last} has no GPU: no device")
    with fake_native(me.rank) as native:
        with mock.patch.object(workspace, "_host", return_value=f"node{me.rank}/boot"):
            got = outcome(me, native)
        assert_all(me, got, "made", False, "different hosts (node0 and node1)")


@case
def what_makes_all_ranks_raise(me: Me) -> None:
    last = me.world - 1
    is_last = me.rank == last
    with fake_native(me.rank, allocate_error="out of memory" if is_last else "") as native:
        got = outcome(me, native)
        assert len(native.made) == (0 if is_last else 1)
        assert_all(me, got, "WorkspaceError", None, f"rank {last}: out of memory")
    with fake_native(me.rank, version="9.9" if is_last else "1.2.3") as native:
        got = outcome(me, native)
        words = f"got '1.2.3' on rank 0 and '9.9' on rank {last}"
        assert_all(me, got, "WorkspaceError", None, "version", words)
    with fake_native(me.rank) as native:
        got = outcome(me, native, max_rows=7 if is_last else 8)
        assert_all(me, got, "ValueError", None, "max_rows", f"and 7 on rank {last}")
        got = outcome(me, native, max_rows="all" if is_last else 8)
        assert_all(me, got, "TypeError", None, f"rank {last}: max_rows: an int is required")
        got = outcome(me, native, timeout_s=float("nan"))
        assert_all(me, got, "ValueError", None, "timeout_s")
        with mock.patch.object(workspace, "is_capturing", return_value=is_last):
            got = outcome(me, native)
        assert_all(me, got, "WorkspaceError", None, f"rank {last}: ", "before the capture")
        make_rules = plan.make_rules

        def others(**options: Any) -> list[plan.Rule]:
            return [rule._replace(lead_rows=1 + me.rank) for rule in make_rules(**options)]

        with mock.patch.object(plan, "make_rules", others):
            got = outcome(me, native)
        assert_all(me, got, "WorkspaceError", None, "the same launch plan")


@case
def a_destroyed_group_takes_its_workspace_along(me: Me) -> None:
    kept = []  # somebody keeps the group: a compiled graph, say
    with fake_native(me.rank) as native:
        group = dist.new_group(list(range(me.world)))
        name = group.group_name
        workspace.init(group)
        kept.append(group)
        dist.destroy_process_group(group)
        assert native.open == []
        assert native.registered == {}
        assert workspace.find(name) is None
        with pytest.raises(ValueError, match="live process group"):
            groups.resolve(name)


def make_default_group(me: Me, file: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=os.environ[launcher.RENDEZVOUS] + file,
        rank=me.rank,
        world_size=me.world,
    )


@case
def a_name_that_is_used_again(me: Me) -> None:  # the last case: it replaces the default group
    with fake_native(me.rank) as native:
        old = dist.group.WORLD
        name = groups.name_of()
        assert name == old.group_name
        first = workspace.init()
        dist.destroy_process_group()
        assert groups.name_of() == ""
        assert native.open == []
        make_default_group(me, "_2")
        assert groups.name_of() == name
        assert workspace.find(name) is None
        second = workspace.init()
        assert second.generation == first.generation + 1
        assert native.registered[name] is native.open[0]
        # The old group is still kept here. It does not come back under its name, and its end
        # does not touch the new one.
        with pytest.raises(ValueError, match=r"group: a live group .* destroyed"):
            call(torch.ones(1, 640), torch.ones(640), group=old)
        del old
        gc.collect()
        assert workspace.find(name) is second
        assert not second.closed

        # The same where nothing tells that a group is destroyed, and it is kept: the next call
        # sees that another group has the name.
        dist.destroy_process_group()
        with mock.patch.object(groups, "_destroy_witness", return_value=None):
            make_default_group(me, "_3")
            third = workspace.init()
            old = dist.group.WORLD
            dist.destroy_process_group()
            make_default_group(me, "_4")
            assert workspace.find(name) is third
            assert groups.name_of() == name
            assert workspace.find(name) is None
            assert native.open == []
            fourth = workspace.init()
            del old
            gc.collect()
            assert workspace.find(name) is fourth
    workspace.close()


# ------------------------------------------------------------------------------- in each process


def leave_the_group() -> None:
    """Ends the threads of the default group, and says so where they do not end.

    One that drops the last reference to a tensor while the interpreter ends is itself ended, by
    Python, and that aborts the process. It is torch's (2.13), and was seen in 1 of some 20 runs.
    """
    ending = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()  # the threads end with the group, and mocks that were called with it are in cycles
    if ending() is not None:
        print(json.dumps({"case": "exit", "failure": "the destroyed group is kept"}))


def main() -> None:
    rank, world, _ = launcher.init_from_env()
    me = Me(rank, world)
    # At the exit the newest is called first: the workspace that is left open, then this.
    weakref.finalize(dist, leave_the_group)
    for name, function in CASES.items():
        start = time.monotonic()
        print(json.dumps({"case": name, "started": True}), flush=True)
        try:
            function(me)
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        seconds = time.monotonic() - start
        print(json.dumps({"case": name, "failure": failure, "seconds": seconds}), flush=True)
        failed = torch.tensor([failure != ""], dtype=torch.int32)
        dist.all_reduce(failed)
        if failed.item():
            break  # the ranks may be in different places of their calls
    # Left open, for the exit of the interpreter.
    with fake_native(rank) as native:
        workspace.init()
        native.open[0].close = lambda: print(json.dumps({"case": "exit", "failure": ""}))


# ---------------------------------------------------------------------------------------- in pytest


@dataclass
class Run:
    result: launcher.Result
    reports: list[dict[str, dict[str, Any]]]  # of each rank: case -> the last thing it said


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def run(request) -> Run:
    seed = str(checks.fresh_seed())
    result = launcher.run(
        [sys.executable, "-W", "ignore", __file__],
        request.param,
        timeout_s=TIME_LIMIT_S,
        gpus=0,
        env={"SEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        show="nothing",
    )
    reports = []
    for output in result.outputs:
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
        reports.append({line["case"]: line for line in lines})
    return Run(result, reports)


@pytest.mark.parametrize("name", [*CASES, "exit"])
def test_processes(run: Run, name: str) -> None:
    for rank, report in enumerate(run.reports):
        if name not in report or "failure" not in report[name]:
            state = "was still running" if name in report else "was not reached"
            pytest.fail(
                f"{name} {state} on rank {rank}: exit code {run.result.exit_code} "
                f"{run.result.reason}\n{run.result.transcript()[-6000:]}"
            )
        assert not report[name]["failure"], f"rank {rank}:\n{report[name]['failure']}"
    if name == "exit":
        assert run.result.exit_code == 0, run.result.transcript()


if __name__ == "__main__":
    main()

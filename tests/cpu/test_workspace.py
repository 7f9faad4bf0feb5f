"""What ranks agree on, and a workspace's life, in one process. (Several: test_processes.py.)"""

from __future__ import annotations

import concurrent.futures
import gc
import os
import threading
import types
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch
from fakes import FakeNative, FakeWorkspace, fake_native

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, WorkspaceError, groups, plan, workspace
from gemma_ar_norm.groups import Group
from gemma_ar_norm.workspace import Facts, Workspace, verdict

RANKS = [
    Facts(
        version="1.0",
        protocol=1,
        hidden_size=8192,
        max_rows=256,
        dtype="torch.bfloat16",
        timeout_s=30.0,
        host="node/boot",
        pid=100 + rank,
        device=rank,
        uuid=f"gpu{rank}",
        compute_capability=(9, 0),
        multiprocessors=132,
        max_cluster=8,
    )
    for rank in range(9)
]
ACCESS = [[""] * 3] * 3


def changed(rank: int, **changes) -> list[Facts]:
    facts = list(RANKS[:3])
    facts[rank] = replace(facts[rank], **changes)
    return facts


def test_verdict_fused():
    for ranks in range(2, 9):
        found = verdict(RANKS[:ranks], [[""] * ranks] * ranks)
        assert (found.fused, found.error) == (True, None)
        assert found.reason == f"{ranks} ranks of one host reach each other's memory"
    # Several ranks may share a GPU, and GPUs may differ.
    assert verdict(changed(1, uuid="gpu0"), ACCESS).fused
    assert verdict(changed(1, compute_capability=(8, 6), multiprocessors=84), ACCESS).fused


UNFUSED = {
    "one rank": (RANKS[:1], None, "one rank: there is nothing to reduce"),
    "nine ranks": (RANKS, None, "9 ranks: the fused kernels take 8 at most"),
    "no GPU": (changed(1, no_gpu="torch sees none"), None, "rank 1 has no GPU: torch sees none"),
    "hosts": (changed(2, host="other/b"), None, "ranks 0 and 2 are on different hosts (node and o"),
    "same name": (changed(2, host="node/b"), None, "ranks 0 and 2 are on different hosts (node"),
    "old GPU": (changed(0, compute_capability=(7, 5)), None, "rank 0 has compute capability 7.5; "),
    "threads": (changed(2, pid=100), None, "ranks 0 and 2 are one process; local_group()"),
    "no access": (RANKS[:3], [["", "", ""], ["no NVLink", "", ""], ["", "far", ""]],
                  "the GPU of rank 1 does not reach that of rank 0: no NVLink"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFUSED)
def test_verdict_unfused(name):
    facts, access, words = UNFUSED[name]
    found = verdict(facts, access)
    assert (found.fused, found.error) == (False, None)
    assert words in found.reason


ERRORS = {
    "version": ({"version": "2.0"}, WorkspaceError, "version: .*'1.0' on rank 0 and '2.0' on rank"),
    "protocol": (
        {"protocol": 2},
        WorkspaceError,
        "protocol: .* 1 on rank 0 and 2 on rank 1; insta",
    ),
    "cannot": ({"error": "memory: none"}, WorkspaceError, "^rank 1: memory: none"),
    "wrong": ({"error": "max_rows: 0", "error_type": "ValueError"}, ValueError, "rank 1: max_rows"),
    "type": ({"error": "max_rows: x", "error_type": "TypeError"}, TypeError, "rank 1: max_rows"),
    "odd type": ({"error": "x", "error_type": "SystemExit"}, WorkspaceError, "rank 1: x"),
    "hidden_size": ({"hidden_size": 64}, ValueError, "hidden_size: the same on all ranks.*8192 on"),
    "max_rows": ({"max_rows": 64}, ValueError, "max_rows: .* 256 on rank 0 and 64 on rank 1; call"),
    "dtype": ({"dtype": "torch.float16"}, ValueError, "dtype: .*'torch.bfloat16' on rank 0"),
    "timeout_s": ({"timeout_s": 1.0}, ValueError, "timeout_s: .* 30.0 on rank 0 and 1.0 on rank 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_verdict_error(name):
    changes, kind, words = ERRORS[name]
    # Of several findings an error comes first, also where the ranks could not be fused anyway.
    for facts in (changed(1, **changes), changed(1, **changes, no_gpu="none")):
        found = verdict(facts)
        assert not found.fused
        assert type(found.error) is kind
        with pytest.raises(kind, match=words):
            raise found.error


def test_the_lowest_rank_is_named():
    facts = changed(1, error="one")
    facts[2] = replace(facts[2], error="two")
    assert str(verdict(facts).error) == "rank 1: one"


def test_facts_of_another_build_are_read_as_far_as_they_go():
    assert Facts.of({**asdict(RANKS[0]), "news": 1}) == RANKS[0]
    assert Facts.of({**asdict(RANKS[0]), "compute_capability": [9, 0]}) == RANKS[0]
    assert "version" in str(verdict([RANKS[0], Facts.of({})]).error)


def test_one_rank_has_no_use_for_a_workspace():
    with gemma_ar_norm.init() as made:
        assert (made.fused, made.ranks, made.inbox_bytes) == (False, 1, 0)
        assert made.reason == "one rank: there is nothing to reduce"
        assert workspace.find("") is made
        made.check()
        gemma_ar_norm.check()
        assert "unfused: one rank" in repr(made)
    assert made.closed
    assert "closed" in repr(made)
    assert workspace.find("") is None
    for function in (gemma_ar_norm.check, gemma_ar_norm.synchronize, gemma_ar_norm.close):
        function()


# ---------------------------------------------------------------------------------------- its life


def make(native: FakeNative, name: str = "g") -> tuple[Workspace, FakeWorkspace]:
    inner = native.Workspace(0, 0, 2, 4096, 1, [])
    made = Workspace(Group(name, 0, 2), "test", inner)
    workspace._register(made)
    return made, inner


def test_a_workspace_is_kept_until_it_is_closed():
    with fake_native() as native:
        made, inner = make(native)
        del made
        gc.collect()
        assert not inner.closed
        workspace.find("g").close()
        assert inner.closed
        assert native.registered == {}


def test_a_workspace_that_nobody_has_any_more_is_released():
    with fake_native() as native:
        made, inner = make(native)
        del workspace._records["g"]
        del made
        gc.collect()
        assert inner.closed


def test_inside_a_capture_the_release_waits():
    with fake_native() as native:
        made, inner = make(native)
        with mock.patch.object(workspace, "is_capturing", return_value=True):
            made.close()
        assert native.registered == {}  # at once: no call finds it
        assert not inner.closed
        workspace._release_postponed()
        assert inner.closed


def test_while_another_thread_captures_the_release_is_tried_again():
    with fake_native() as native:
        made, inner = make(native)
        inner.close = mock.Mock(side_effect=[False, False, True])
        made.close()
        for tries in (2, 3, 3):
            workspace._release_postponed()
            assert inner.close.call_count == tries
        assert workspace._postponed == []


def test_two_threads_may_release_what_was_postponed():
    closing, go_on = threading.Event(), threading.Event()

    def close() -> bool:
        closing.set()
        return go_on.wait(20)

    workspace._postponed.extend(types.SimpleNamespace(close=close) for _ in range(2))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        both = [threads.submit(workspace._release_postponed) for _ in range(2)]
        assert closing.wait(20)
        go_on.set()
        for one in both:
            one.result(20)
    assert workspace._postponed == []


def test_errors_of_a_release_are_nobodys():
    with fake_native() as native:
        made, inner = make(native)
        inner.close = mock.Mock(side_effect=RuntimeError("the driver is shutting down"))
        made.close()
        made.close()
        inner.close.assert_called_once()


def test_a_forked_child_leaves_the_parents_gpu_alone():
    with fake_native() as native:
        made, inner = make(native)
        child = os.getpid() + 1
        with mock.patch.object(os, "getpid", return_value=child):
            made.close()
        assert not inner.closed


def test_generations_count_for_each_name():
    with fake_native() as native:
        seen = []
        for name in ("a", "b", "a"):
            made, _ = make(native, name)
            seen.append(made.generation)
            made.close()
        assert seen[1] == 1
        assert seen[2] == seen[0] + 1


def test_check_names_the_peer():
    with fake_native() as native:
        made, inner = make(native)
        made.check()
        inner.failed = (1, 7, 0)
        with pytest.raises(PeerTimeoutError, match="rank 1: its rows of call 7 on group 'g'"):
            made.synchronize()
        inner.overlapped = True
        with pytest.raises(WorkspaceError, match="group 'g' one after the other are required"):
            made.check()
        made.close()
        made.check()


def test_synchronize_learns_what_peers_have_reported():
    """check() does not: it waits for nothing."""
    with fake_native() as native:
        made, inner = make(native)
        inner.reported = (0, 7, 0)
        made.check()
        with pytest.raises(PeerTimeoutError, match="rank 0: its rows of call 7"):
            made.synchronize()
        made.close()
        made.synchronize()


def test_a_local_rank_cannot_be_initialised():
    class Rank:
        rank, group_name = 0, groups.LOCAL_PREFIX + "9.0"

        def size(self):
            return 2

    with pytest.raises(ValueError, match="group: a process group is required; got 'gemma_ar_norm"):
        gemma_ar_norm.init(Rank())


EARLY, NEVER = plan.Trigger.AFTER_PUSH, plan.Trigger.NEVER


@pytest.mark.parametrize(
    ("uuids", "percentages", "expected"),
    [
        (("a", "b"), (100, 100), (132, 8, EARLY, False)),  # a GPU each
        (("a", "a"), (50, 50), (132, 4, EARLY, True)),  # parts of one, by MPS
        (("a", "a"), (100, 100), (66, 4, NEVER, True)),  # MPS without parts, or time slices
        (("a", "a", "b"), (60, 50, 100), (66, 4, NEVER, False)),
        (("a",) * 8, (100,) * 8, (16, 1, NEVER, True)),  # too few for clusters that fill them
    ],
)
def test_the_plan_of_ranks_that_share_a_gpu(uuids, percentages, expected):
    facts = [
        replace(RANKS[0], uuid=uuid, thread_percentage=percentage)
        for uuid, percentage in zip(uuids, percentages, strict=True)
    ]
    rules = workspace._rules(facts)
    most_blocks = max(rule.blocks_a_team for rule in rules)
    early = max(rule.trigger for rule in rules)
    over_links = any("one-shot up to" in rule.evidence for rule in rules)
    assert (rules[0].multiprocessors, most_blocks, early, not over_links) == expected


def test_ranks_with_few_multiprocessors_have_small_clusters_where_half_is_free():
    """Also where each has a GPU of its own: MPS may give it to others too."""
    for multiprocessors, early_blocks, whole_blocks in ((63, 2, 1), (64, 8, 2)):
        facts = [replace(RANKS[0], uuid=uuid, multiprocessors=multiprocessors) for uuid in "ab"]
        rules = workspace._rules(facts)
        for trigger, most_blocks in ((EARLY, early_blocks), (NEVER, whole_blocks)):
            found = [rule.blocks_a_team for rule in rules if rule.trigger == trigger]
            assert max(found) == most_blocks


LESS = {
    "multiprocessors": ({"multiprocessors": 20}, "multiprocessors", 20),
    "a smaller share": ({"multiprocessors": 13, "thread_percentage": 10.0}, "multiprocessors", 13),
    "clusters": ({"max_cluster": 2}, "blocks_a_team", 2),
    "no clusters": ({"compute_capability": (8, 6), "max_cluster": 1}, "blocks_a_team", 1),
    "no early start": ({"compute_capability": (8, 0)}, "trigger", NEVER),
}


@pytest.mark.parametrize("name", LESS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("one_gpu", [False, True])
def test_the_least_of_any_rank_counts_for_all(ranks, one_gpu, name):
    """Whichever rank it is: all make the same plan, from the same facts."""
    changes, field, expected = LESS[name]
    facts = [
        replace(fact, uuid="gpu" if one_gpu else fact.uuid, thread_percentage=100 / ranks)
        for fact in RANKS[:ranks]
    ]
    before = workspace._rules(facts)
    assert max(getattr(rule, field) for rule in before) > expected
    found = []
    for rank in range(ranks):
        fewer = [replace(f, **changes) if r == rank else f for r, f in enumerate(facts)]
        # As it is sent, and read by every rank.
        found.append(workspace._rules([Facts.of(asdict(fact)) for fact in fewer]))
    assert found == [found[0]] * ranks
    assert max(getattr(rule, field) for rule in found[0]) == expected
    # With one rank, or more, that differs in everything there is still one plan: the least of all.
    several = [replace(facts[0], **changes), *facts[1:]]
    several[1] = replace(several[1], multiprocessors=7, max_cluster=1)
    rules = workspace._rules(several)
    assert workspace._rules(several[::-1]) == rules
    assert {rule.multiprocessors for rule in rules} == {7}
    assert {rule.blocks_a_team for rule in rules} == {1}


def test_processes_of_one_gpu_with_different_shares():
    """CUDA_MPS_ACTIVE_THREAD_PERCENTAGE of 25, 15, 20 and 10: all have the smallest."""
    shares = (25, 15, 20, 10)
    facts = [
        replace(
            RANKS[0], pid=share, thread_percentage=float(share), multiprocessors=132 * share // 100
        )
        for share in shares
    ]
    for rotated in range(4):
        rules = workspace._rules(facts[rotated:] + facts[:rotated])
        assert {rule.multiprocessors for rule in rules} == {13}
        shapes = {(rule.blocks_a_team, rule.trigger) for rule in rules}
        assert shapes == {(1, NEVER), (1, EARLY), (2, EARLY)}, "nobody shares a multiprocessor"


@pytest.mark.parametrize("max_rows", [1, 16, 256, 4096])
def test_the_inbox_that_is_asked_for(max_rows):
    """Enough for max_rows by two-shot, and for what the plan does by one-shot."""
    arguments = {
        "hidden_size": 8192,
        "max_rows": max_rows,
        "dtype": torch.bfloat16,
        "timeout_s": 1.5,
    }
    rules = workspace._rules(RANKS[:4])
    one_shot_rows = min(max_rows, plan.crossover_bytes(4, 9) // 16384)
    with fake_native() as native:
        made = workspace._make_native(0, 1, 4, rules, arguments, False)
        assert made.inbox_bytes == native.inbox_bytes(4, one_shot_rows, max_rows, 16384)
        assert (made.rank, made.timeout_ns) == (1, 1_500_000_000)
        assert made.rules == [rule.numbers for rule in rules]
        made.close()

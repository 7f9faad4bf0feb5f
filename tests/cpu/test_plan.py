"""The launch plan: the rules that plan.py makes, and the shapes that plan.h takes from them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_ar_norm import plan
from gemma_ar_norm.library import _C

RANKS = range(2, 9)
MULTIPROCESSORS = range(1, 161)
COMPUTE_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))

MAX_BLOCKS = 512  # kMaxBlocks: the copies of the call number
MAX_ROW_PACKS = 4096  # hidden 16384 in fp32
PACKS_A_SEGMENT = 32
# An SM runs 1024 threads of our 64 registers each.
THREADS_OF_A_MULTIPROCESSOR = 1024
BLOCKS_A_MULTIPROCESSOR = 4  # kBlocksAMultiprocessor


def rules_for(ranks, multiprocessors, capability, shared_device) -> list[plan.Rule]:
    return plan.make_rules(
        ranks=ranks,
        multiprocessors=multiprocessors,
        compute_capability=capability,
        max_cluster=8 if capability >= (9, 0) else 1,
        shared_device=shared_device,
    )


def pick(rules, rows, row_packs) -> plan.Rule:
    """What choose() of plan.h does: the first rule that takes the call; the last takes all."""
    fitting = [r for r in rules if rows <= r.max_rows and row_packs <= r.max_row_packs]
    return (fitting or rules[-1:])[0]


@pytest.mark.parametrize("shared_device", [False, True])
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
def test_every_workspace_has_rules_within_its_gpu(capability, shared_device):
    for ranks, multiprocessors in itertools.product(RANKS, MULTIPROCESSORS):
        rules = rules_for(ranks, multiprocessors, capability, shared_device)
        assert rules == rules_for(ranks, multiprocessors, capability, shared_device)
        last = rules[-1]
        assert (last.max_rows, last.max_row_packs) == (plan.NO_LIMIT, plan.NO_LIMIT)
        for rule in rules:
            assert 1 <= rule.blocks_a_team <= min(8, multiprocessors)
            assert rule.blocks_a_team == 1 or capability >= (9, 0), "no clusters there"
            assert rule.multiprocessors == multiprocessors
            assert rule.algorithm == plan.ONE_SHOT
            starts_early = capability >= (9, 0) and not shared_device
            assert (rule.trigger != plan.Trigger.NEVER) == starts_early
        # No rule that none of the calls reaches.
        for earlier, later in itertools.combinations(rules, 2):
            assert later.max_rows > earlier.max_rows or later.max_row_packs > earlier.max_row_packs


def test_clusters_are_no_larger_than_the_gpus_can_have():
    for ranks, max_cluster in itertools.product(RANKS, (1, 2, 4, 8)):
        rules = plan.make_rules(
            ranks=ranks,
            multiprocessors=132,
            compute_capability=(9, 0),
            max_cluster=max_cluster,
            shared_device=False,
        )
        assert all(rule.blocks_a_team <= max_cluster for rule in rules)


def assert_shape(rules, rows, row_packs) -> None:
    rule = pick(rules, rows, row_packs)
    shape = _C.choose(rules, rows, row_packs)
    case = f"{rows} rows of {row_packs} packs, {rule}: {shape}"
    team = shape["blocks_a_team"]
    blocks = shape["teams"] * team
    assert shape["algorithm"] == "one_shot"
    # Rules differ in these, so this is also that C++ picks the same rule.
    assert (team, shape["trigger"]) == (rule.blocks_a_team, rule.trigger), case
    assert shape["threads"] % 32 == 0, case
    assert 32 <= shape["threads"] <= rule.max_threads <= 1024, case
    assert 1 <= shape["teams"] <= rows, case
    assert blocks <= MAX_BLOCKS, case

    # Every pack has a thread, and no thread has packs that another could have taken in its place.
    per_pass = team * shape["threads"]
    assert shape["packs_a_thread"] * per_pass >= row_packs, case
    assert (shape["packs_a_thread"] - 1) * team * rule.max_threads < row_packs, case
    segments = shape["packs_a_thread"] * per_pass // PACKS_A_SEGMENT
    assert segments - row_packs / PACKS_A_SEGMENT < shape["packs_a_thread"] * team, case

    # All blocks are resident at once, twice over: this kernel's and the stream's next one's.
    share = rule.multiprocessors
    assert 2 * blocks * shape["threads"] <= share * THREADS_OF_A_MULTIPROCESSOR, case
    assert blocks <= share * BLOCKS_A_MULTIPROCESSOR, case
    # And no more than one team is left out where rows wait for blocks.
    if shape["teams"] < rows:
        a_multiprocessor = min(512 // shape["threads"], BLOCKS_A_MULTIPROCESSOR)
        assert blocks + team > min(share * a_multiprocessor, MAX_BLOCKS), case


@settings(max_examples=400, deadline=None)
@given(
    ranks=st.sampled_from(RANKS),
    multiprocessors=st.sampled_from(MULTIPROCESSORS),
    capability=st.sampled_from(COMPUTE_CAPABILITIES),
    shared_device=st.booleans(),
    calls=st.lists(
        st.tuples(st.integers(1, 1 << 27) | st.integers(1, 300), st.integers(1, MAX_ROW_PACKS)),
        min_size=1,
        max_size=30,
    ),
)
def test_the_shape_of_any_call(ranks, multiprocessors, capability, shared_device, calls):
    rules = rules_for(ranks, multiprocessors, capability, shared_device)
    for rows, row_packs in calls:
        assert_shape(rules, rows, row_packs)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_shape_at_each_rules_limits(ranks):
    for multiprocessors, capability in itertools.product((1, 3, 16, 66, 132), COMPUTE_CAPABILITIES):
        rules = rules_for(ranks, multiprocessors, capability, True)
        limits = {min(r.max_rows, 1 << 27) for r in rules}, {r.max_row_packs for r in rules}
        near = [sorted({max(1, x + d) for x in xs for d in (-1, 0, 1)}) for xs in limits]
        for rows, packs in itertools.product(*near):
            assert_shape(rules, rows, min(packs, MAX_ROW_PACKS))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rows=st.integers(1, 100), row_packs=st.integers(1, MAX_ROW_PACKS))
def test_cpp_picks_the_first_rule_that_takes_the_call(data, rows, row_packs):
    """With other rules than ours too: each is recognised by its number of multiprocessors."""
    limits = st.tuples(st.integers(0, 100), st.integers(0, MAX_ROW_PACKS))
    rules = [
        plan.Rule(max_rows, max_packs, plan.ONE_SHOT, 1, 32, i % 3, i + 1)
        for i, (max_rows, max_packs) in enumerate(
            data.draw(st.lists(limits, min_size=1, max_size=8))
        )
    ]
    # Of 32 threads a multiprocessor has 4 blocks. So many rows that all have one.
    expected = pick(rules, rows, row_packs)
    shape = _C.choose(rules, rows, row_packs)
    assert shape["teams"] == min(rows, expected.multiprocessors * BLOCKS_A_MULTIPROCESSOR)
    assert shape["trigger"] == expected.trigger


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match=r"rules: at least one is required; .*make_rules"):
        _C.choose([], 1, 1)
    good = rules_for(2, 132, (9, 0), False)[-1]
    for wrong in (
        {"algorithm": 1},
        {"blocks_a_team": 0},
        {"blocks_a_team": 9},
        {"max_threads": 0},
        {"max_threads": 48},
        {"max_threads": 1056},
        {"trigger": 3},
        {"multiprocessors": 0},
    ):
        with pytest.raises(ValueError, match=r"rules: what plan\.make_rules\(\) returns"):
            _C.choose([good._replace(**wrong)], 1, 1)

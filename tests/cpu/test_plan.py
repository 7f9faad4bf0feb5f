"""The launch plan: the rules that plan.py makes, and what plan.h makes of them for a call.

Everything of plan.h is here once more, in plain Python: the rule, the launches of a call, and how
many rows of an inbox each algorithm takes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma_ar_norm import plan
from gemma_ar_norm.library import _C

RANKS = range(2, 9)
MULTIPROCESSORS = range(1, 161)
SOME_MULTIPROCESSORS = (1, 2, 3, 4, 8, 14, 16, 18, 22, 26, 33, 44, 66, 132, 148)
COMPUTE_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
WANTED = ("auto", "one_shot", "two_shot")

MAX_BLOCKS = 512  # kMaxBlocks: the copies of the call number
MAX_ROW_PACKS = 4096  # hidden 16384 in fp32
MAX_ROWS = 1 << 27  # of a launch
HUGE = 1 << 56  # bytes of an inbox that takes every call in one launch
PACKS_A_SEGMENT = 32
BLOCKS_A_MULTIPROCESSOR = 4  # kBlocksAMultiprocessor
SHARED_BYTES_A_MULTIPROCESSOR = 90 * 1024  # kSharedBytesAMultiprocessor
SOME_ROW_PACKS = sorted(
    {max(1, p + d) for p in (1, 32, 80, 128, 256, 512, 1024, 4095) for d in (-1, 0, 1)}
)


def rules_for(ranks, multiprocessors, capability, shared_device, one_gpu) -> list[plan.Rule]:
    return plan.make_rules(
        ranks=ranks,
        multiprocessors=multiprocessors,
        compute_capability=capability,
        max_cluster=8 if capability >= (9, 0) else 1,
        shared_device=shared_device,
        one_gpu=one_gpu,
    )


def all_rules(multiprocessors: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[plan.Rule]]]:
    for values in itertools.product(
        RANKS, multiprocessors, COMPUTE_CAPABILITIES, (False, True), (False, True)
    ):
        names = ("ranks", "multiprocessors", "capability", "shared_device", "one_gpu")
        made_for = dict(zip(names, values, strict=True))
        yield made_for, rules_for(**made_for)


# ------------------------------------------------------------------------- what C++ does, in Python


def of_algorithm(rules: Sequence[plan.Rule], wanted: str) -> list[int]:
    """The rules that count where this algorithm is wanted."""
    return [
        i
        for i, rule in enumerate(rules)
        if wanted in ("auto", plan.FUSED_ALGORITHMS[rule.algorithm])
    ]


def pick(rules: Sequence[plan.Rule], rows: int, row_packs: int, wanted: str = "auto") -> int:
    """choose(): the first rule that takes the call; the last takes all. NO_LIMIT is none."""
    counting = of_algorithm(rules, wanted)
    for i in counting:
        rule = rules[i]
        if (
            min(rows, plan.NO_LIMIT) <= rule.max_rows
            and row_packs <= rule.max_row_packs
            and min(rows * row_packs, plan.NO_LIMIT) <= rule.max_packs
        ):
            return i
    return counting[-1]


def row_bytes_of_an_area(algorithm: int, ranks: int, row_packs: int) -> int:
    """One-shot: a row. Two-shot: the longest slice of it, to its owner and from there. Each in
    whole strips of 32 packs."""

    def strips(packs: int) -> int:
        return 512 * -(-packs // 32)

    return strips(row_packs) if algorithm == plan.ONE_SHOT else 2 * strips(-(-row_packs // ranks))


def gap_of(algorithm: int) -> int:
    """Between the two parts of a two-shot area: so that the places of the algorithms differ."""
    return 0 if algorithm == plan.ONE_SHOT else 512


def rows_of_a_launch(algorithm: int, ranks: int, inbox_bytes: int, row_packs: int) -> int:
    area = (inbox_bytes - 8192) // (2 * (ranks - 1)) // 512 * 512
    room = max(0, area - gap_of(algorithm))
    return min(MAX_ROWS, room // row_bytes_of_an_area(algorithm, ranks, row_packs))


def launches(
    rules: Sequence[plan.Rule],
    ranks: int,
    inbox_bytes: int,
    rows: int,
    row_packs: int,
    wanted: str = "auto",
) -> list[tuple[int, int]]:
    """(rows, rule) of each launch."""
    found = []
    while rows > 0:
        most = [min(rows, rows_of_a_launch(a, ranks, inbox_bytes, row_packs)) for a in range(2)]
        if wanted == "auto":
            part = max(most)
            algorithm = rules[pick(rules, part, row_packs)].algorithm
            if most[algorithm] <= 7 / 8 * part:
                algorithm = 1 - algorithm
        else:
            algorithm = plan.FUSED_ALGORITHMS.index(wanted)
        part = most[algorithm]
        found.append((part, pick(rules, part, row_packs, plan.FUSED_ALGORITHMS[algorithm])))
        rows -= part
    return found


def launches_of_cpp(rules: Sequence[plan.Rule], *arguments: Any) -> list[dict[str, int]]:
    return _C.launches([rule.numbers for rule in rules], *arguments)


# ------------------------------------------------------------------------------------ the rules


def test_every_workspace_has_rules_within_its_gpu():
    for made_for, rules in all_rules(SOME_MULTIPROCESSORS):
        assert rules == rules_for(**made_for), "not the same for the same arguments"
        starts_early = made_for["capability"] >= (9, 0) and not made_for["shared_device"]
        for rule in rules:
            case = f"{made_for}: {rule}"
            assert min(rule.max_rows, rule.max_row_packs, rule.max_packs) >= 1, case
            assert rule.algorithm in (plan.ONE_SHOT, plan.TWO_SHOT), case
            assert 1 <= rule.blocks_a_team <= min(8, made_for["multiprocessors"]), case
            assert rule.blocks_a_team == 1 or made_for["capability"] >= (9, 0), "no clusters there"
            # Clusters of ranks that are not kept apart on a GPU find places beside each other.
            share, clusters = made_for["multiprocessors"], rule.blocks_a_team > 1
            crowded = made_for["shared_device"] and clusters
            most = max(rule.blocks_a_team, share // 2) if crowded else share
            assert rule.multiprocessors == most, case
            assert rule.lead_rows >= 1, case
            assert rule.evidence, case
            # Where the next kernel starts early, both fit a multiprocessor; else one does.
            assert rule.trigger in (plan.Trigger.NEVER, plan.Trigger.AFTER_PUSH), case
            early = rule.trigger == plan.Trigger.AFTER_PUSH
            assert starts_early or not early, case
            assert rule.max_threads <= rule.threads_a_multiprocessor, case
            assert rule.threads_a_multiprocessor * (2 if early else 1) <= 1024, case
        if starts_early:
            assert any(rule.trigger == plan.Trigger.AFTER_PUSH for rule in rules)


def test_every_call_has_a_rule_of_each_algorithm():
    no_limit = (plan.NO_LIMIT,) * 3
    for made_for, rules in all_rules(SOME_MULTIPROCESSORS):
        for wanted in WANTED:
            limits = [rules[i][:3] for i in of_algorithm(rules, wanted)]
            assert no_limit in limits, f"{made_for}, {wanted}"


def reached(rules: Sequence[plan.Rule]) -> set[int]:
    """The rules that some call takes. For rows of one length a rule takes calls up to a number of
    rows; so it is reached if that is more than what those before it take."""
    found = set()
    for wanted, row_packs in itertools.product(WANTED, SOME_ROW_PACKS):
        most = 0
        for i in of_algorithm(rules, wanted):
            rule = rules[i]
            limit = min(rule.max_rows, rule.max_packs // row_packs)
            if row_packs <= rule.max_row_packs and limit > most:
                assert pick(rules, limit, row_packs, wanted) == i
                most = limit
                found.add(i)
    return found


def test_every_line_of_the_tables_is_reached():
    """By a call on some workspace: no line is there in vain."""
    not_yet = {shapes: {*shapes} for ranks in RANKS for shapes in plan.shapes_of(ranks)}
    for ranks, multiprocessors, one_gpu in itertools.product(RANKS, (16, 33, 132), (False, True)):
        rules = rules_for(ranks, multiprocessors, (9, 0), False, one_gpu)
        for rule in (rules[i] for i in reached(rules)):
            left = not_yet[plan.shapes_of(ranks)[rule.algorithm]]
            left -= {
                shape
                for shape in left
                if (rule.blocks_a_team, rule.lead_rows) == (shape.blocks, shape.lead_rows)
                and (rule.trigger == plan.Trigger.NEVER) == shape.full
                and all(map(operator.le, rule[:3], shape.size(multiprocessors)))
            }
    assert not any(not_yet.values()), not_yet


@pytest.mark.parametrize(("ranks", "leads"), [(8, [2, 1]), (7, [2, 2]), (4, [2, 2])])
def test_how_far_pushes_are_ahead_in_large_calls(ranks, leads):
    rules = rules_for(ranks, 16, (9, 0), False, True)
    rows = 20_000 * 16 // 512
    found = [launches_of_cpp(rules, ranks, HUGE, n, 512, "two_shot")[0] for n in (rows, rows + 1)]
    assert [one["lead_rows"] for one in found] == leads


def test_clusters_are_no_larger_than_the_gpus_can_have():
    for ranks, max_cluster in itertools.product(RANKS, (1, 2, 4, 8)):
        rules = plan.make_rules(
            ranks=ranks,
            multiprocessors=132,
            compute_capability=(9, 0),
            max_cluster=max_cluster,
            shared_device=False,
            one_gpu=False,
        )
        assert max(rule.blocks_a_team for rule in rules) == max_cluster


def test_wrong_numbers_of_ranks_are_refused():
    for ranks in (1, 9):
        with pytest.raises(ValueError, match=f"ranks: 2 to 8 are required; got {ranks}"):
            rules_for(ranks, 132, (9, 0), False, False)


# ---------------------------------------------------------------------------------- the crossover


def algorithm_of(rules: Sequence[plan.Rule], rows: int, row_packs: int) -> int:
    return rules[pick(rules, rows, row_packs)].algorithm


def test_where_two_shot_begins():
    """Over NVLink by the model: at the bytes of x that the documents say."""
    assert 74_000 <= plan.crossover_bytes(8, 9) <= 134_000
    assert 260_000 <= plan.crossover_bytes(4, 9) <= 470_000
    for ranks, capability in itertools.product(range(3, 9), COMPUTE_CAPABILITIES):
        most = plan.crossover_bytes(ranks, capability[0])
        # Both are equally fast there: one more hop, and the rest of the bytes.
        speed = plan.LINK_BYTES_A_SECOND[capability[0]]
        saved = ((ranks - 1) - 2 * (ranks - 1) / ranks) * most / speed
        assert saved == pytest.approx(plan.HOP_S, rel=1e-4)
        rules = rules_for(ranks, 132, capability, False, False)
        for row_packs in SOME_ROW_PACKS:
            rows = most // 16 // row_packs
            if rows > 0:
                assert algorithm_of(rules, rows, row_packs) == plan.ONE_SHOT
            assert algorithm_of(rules, rows + 1, row_packs) == plan.TWO_SHOT
    # More ranks, or slower links: two-shot is worth it earlier.
    for major in plan.LINK_BYTES_A_SECOND:
        bytes_of = [plan.crossover_bytes(ranks, major) for ranks in RANKS]
        assert bytes_of == sorted(bytes_of, reverse=True)
    assert plan.crossover_bytes(8, 8) < plan.crossover_bytes(8, 9) < plan.crossover_bytes(8, 10)
    assert plan.crossover_bytes(8, 13) == plan.crossover_bytes(8, 12), "a GPU not known yet"


def test_two_ranks_over_nvlink_take_two_shot_for_long_prefills_alone():
    """Measured between two GPUs: 4 MiB are faster by one-shot, 8 MiB no slower by two-shot."""
    for capability in COMPUTE_CAPABILITIES:
        rules = rules_for(2, 132, capability, False, False)
        for row_packs in SOME_ROW_PACKS:
            for rows in (1, (4 << 20) // 16 // row_packs):
                assert algorithm_of(rules, rows, row_packs) == plan.ONE_SHOT
            for rows in (-(-(8 << 20) // 16 // row_packs), 100_000_000 // row_packs):
                assert algorithm_of(rules, rows, row_packs) == plan.TWO_SHOT


def test_on_one_gpu_every_number_of_ranks_has_both():
    for ranks in RANKS:
        rules = rules_for(ranks, 132 // ranks, (9, 0), True, True)
        assert algorithm_of(rules, 1, 80) == plan.ONE_SHOT
        assert algorithm_of(rules, 4096, 1024) == plan.TWO_SHOT
        sizes = [plan.most_one_shot_rows(rules, 1 << 20, p) * p for p in (128, 256)]
        assert min(sizes) > 1000, sizes


def limits_of(rules: Sequence[plan.Rule], row_packs: int) -> list[int]:
    """Numbers of rows at which another rule may begin."""
    limits = {min(rule.max_rows, rule.max_packs // row_packs) for rule in rules}
    return sorted({max(1, rows + d) for rows in limits for d in (-1, 0, 1) if rows <= MAX_ROWS})


@pytest.mark.parametrize("one_gpu", [False, True])
def test_the_most_rows_by_one_shot(one_gpu):
    """Against every number of rows, one after the other."""
    for ranks, multiprocessors in itertools.product(RANKS, (16, 33, 132)):
        rules = rules_for(ranks, multiprocessors, (9, 0), one_gpu, one_gpu)
        for row_packs, max_rows in ((8, 400), (144, 300), (257, 600), (1024, 300), (4096, 100)):
            by_one_shot = [
                rows
                for rows in range(1, max_rows + 1)
                if algorithm_of(rules, rows, row_packs) == plan.ONE_SHOT
            ]
            most = plan.most_one_shot_rows(rules, max_rows, row_packs)
            assert most == max(by_one_shot, default=0), f"{ranks} ranks, {row_packs} packs"
            # And without a limit on rows.
            most = plan.most_one_shot_rows(rules, 1 << 40, row_packs)
            assert most == 0 or algorithm_of(rules, most, row_packs) == plan.ONE_SHOT
            if (most + 1) * row_packs <= plan.NO_LIMIT:
                assert algorithm_of(rules, most + 1, row_packs) == plan.TWO_SHOT


# --------------------------------------------------------------------------------------- an inbox


def test_the_size_of_an_inbox_is_enough_and_no_more():
    """It takes max_rows by two-shot, and what the plan does by one-shot, in one launch each."""
    for ranks, row_packs, max_rows in itertools.product(RANKS, (1, 127, 1024, 4096), (1, 48, 256)):
        rules = rules_for(ranks, 132, (9, 0), False, False)
        by_one_shot = plan.most_one_shot_rows(rules, max_rows, row_packs)
        size = _C.inbox_bytes(ranks, by_one_shot, max_rows, 16 * row_packs)
        assert rows_of_a_launch(plan.ONE_SHOT, ranks, size, row_packs) >= by_one_shot
        assert rows_of_a_launch(plan.TWO_SHOT, ranks, size, row_packs) >= max_rows
        assert size % (2 << 20) == 0
        smaller = size - (2 << 20)
        assert smaller <= 8192 or (
            rows_of_a_launch(plan.ONE_SHOT, ranks, smaller, row_packs) < by_one_shot
            or rows_of_a_launch(plan.TWO_SHOT, ranks, smaller, row_packs) < max_rows
        )
        for rows in range(1, max_rows + 1):
            assert len(launches(rules, ranks, size, rows, row_packs)) == 1


def test_an_inbox_is_not_larger_than_what_was_asked_for():
    """256 rows of hidden 8192 in bf16 with 8 ranks."""
    assert _C.inbox_bytes(8, 256, 256, 16384) <= 128_000_000
    assert _C.inbox_bytes(8, 64, 256, 16384) <= 64_000_000
    rules = rules_for(8, 132, (9, 0), False, False)
    by_one_shot = plan.most_one_shot_rows(rules, 256, 1024)
    assert 0 < by_one_shot <= 64
    assert _C.inbox_bytes(8, by_one_shot, 256, 16384) == 16 << 20


# -------------------------------------------------------------------------------------- the shapes


def assert_shape(rules: Sequence[plan.Rule], rows: int, row_packs: int, wanted: str) -> None:
    found = launches_of_cpp(rules, 2, HUGE, rows, row_packs, wanted)
    assert len(found) == 1
    shape, rule = found[0], rules[pick(rules, rows, row_packs, wanted)]
    case = f"{rows} rows of {row_packs} packs, {rule}: {shape}"
    assert rules[shape["rule"]] == rule, case
    assert shape["rows"] == rows, case
    for name in ("algorithm", "blocks_a_team", "trigger", "lead_rows"):
        assert shape[name] == getattr(rule, name), case
    assert shape["threads"] % 32 == 0, case
    assert 32 <= shape["threads"] <= rule.max_threads <= 1024, case
    assert 1 <= shape["teams"] <= rows, case
    team = shape["blocks_a_team"]
    blocks = shape["teams"] * team
    assert blocks <= MAX_BLOCKS, case

    # Every pack has a thread, and no thread has packs that another could have taken in its place.
    per_pass = team * shape["threads"]
    assert shape["packs_a_thread"] * per_pass >= row_packs, case
    assert (shape["packs_a_thread"] - 1) * team * rule.max_threads < row_packs, case
    segments = shape["packs_a_thread"] * per_pass // PACKS_A_SEGMENT
    assert segments - row_packs / PACKS_A_SEGMENT < shape["packs_a_thread"] * team, case

    # All blocks are resident at once, within what the rule takes of each multiprocessor.
    share = rule.multiprocessors
    assert blocks * shape["threads"] <= share * rule.threads_a_multiprocessor, case
    assert blocks <= share * BLOCKS_A_MULTIPROCESSOR, case
    kept = 0 if shape["packs_a_thread"] == 1 else shape["packs_a_thread"] * shape["threads"] * 16
    assert kept <= 64 * 1024, case
    assert blocks <= share or blocks * kept <= share * SHARED_BYTES_A_MULTIPROCESSOR, case
    # And no more than one team is left out where rows wait for blocks.
    if shape["teams"] < rows:
        fit = rule.threads_a_multiprocessor // shape["threads"]
        if kept:
            fit = max(1, min(fit, SHARED_BYTES_A_MULTIPROCESSOR // kept))
        a_multiprocessor = min(fit, BLOCKS_A_MULTIPROCESSOR)
        assert blocks + team > min(share * a_multiprocessor, MAX_BLOCKS), case


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.sampled_from(RANKS),
    multiprocessors=st.sampled_from(MULTIPROCESSORS),
    capability=st.sampled_from(COMPUTE_CAPABILITIES),
    shared_device=st.booleans(),
    one_gpu=st.booleans(),
    calls=st.lists(
        st.tuples(
            st.integers(1, MAX_ROWS) | st.integers(1, 300),
            st.integers(1, MAX_ROW_PACKS),
            st.sampled_from(WANTED),
        ),
        min_size=1,
        max_size=30,
    ),
)
def test_the_shape_of_any_call(ranks, multiprocessors, capability, shared_device, one_gpu, calls):
    rules = rules_for(ranks, multiprocessors, capability, shared_device, one_gpu)
    for call in calls:
        assert_shape(rules, *call)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_shape_at_each_rules_limits(ranks):
    for multiprocessors, capability in itertools.product((1, 16, 132), ((8, 0), (9, 0))):
        rules = rules_for(ranks, multiprocessors, capability, True, True)
        for row_packs in (1, 128, 129, 256, 257, 512, 513, 4096):
            for rows in limits_of(rules, row_packs):
                for wanted in WANTED:
                    assert_shape(rules, rows, row_packs, wanted)


# ------------------------------------------------------------------------ any rules, any inbox


@st.composite
def any_rules(draw) -> list[plan.Rule]:
    """Rules other than ours too, of both algorithms, the last two of which take every call."""
    limits = st.tuples(st.integers(0, 100), st.integers(0, MAX_ROW_PACKS), st.integers(0, 100_000))
    chosen = draw(st.lists(st.tuples(limits, st.sampled_from((0, 1))), max_size=8))
    last = draw(st.permutations([((plan.NO_LIMIT,) * 3, algorithm) for algorithm in (0, 1)]))
    return [
        plan.Rule(*size, algorithm, 1, 32, 128, i % 3, 1 + i % 4, i + 1, "")
        for i, (size, algorithm) in enumerate([*chosen, *last])
    ]


@settings(max_examples=400, deadline=None)
@given(
    rules=any_rules(),
    rows=st.integers(1, 110),
    row_packs=st.integers(1, MAX_ROW_PACKS) | st.integers(1, 1500),
    wanted=st.sampled_from(WANTED),
)
def test_cpp_picks_the_first_rule_that_takes_the_call(rules, rows, row_packs, wanted):
    (found,) = launches_of_cpp(rules, 2, HUGE, rows, row_packs, wanted)
    assert found["rule"] == pick(rules, rows, row_packs, wanted)
    # Of 32 threads a multiprocessor has 4 blocks. So many rows that all have one.
    expected = rules[found["rule"]]
    fit = BLOCKS_A_MULTIPROCESSOR
    if found["packs_a_thread"] > 1:
        kept = found["packs_a_thread"] * found["threads"] * 16
        fit = min(fit, SHARED_BYTES_A_MULTIPROCESSOR // kept)
    assert found["teams"] == min(rows, expected.multiprocessors * fit)
    assert found["trigger"] == expected.trigger


@settings(max_examples=400, deadline=None)
@given(
    made=st.none() | any_rules(),
    ranks=st.sampled_from(RANKS),
    one_gpu=st.booleans(),
    inbox_kib=st.integers(9, 20_000),
    rows=st.integers(1, 3000) | st.integers(1, 200),
    row_packs=st.integers(1, MAX_ROW_PACKS),
    wanted=st.sampled_from(WANTED),
)
def test_a_call_is_cut_into_launches(made, ranks, one_gpu, inbox_kib, rows, row_packs, wanted):
    rules = made or rules_for(ranks, 132, (9, 0), one_gpu, one_gpu)
    size = inbox_kib * 1024
    most = [rows_of_a_launch(a, ranks, size, row_packs) for a in range(2)]
    assume(min(most) > 0)
    assume(rows // min(most) < 500)
    found = launches_of_cpp(rules, ranks, size, rows, row_packs, wanted)
    expected = launches(rules, ranks, size, rows, row_packs, wanted)
    assert [(one["rows"], one["rule"]) for one in found] == expected

    area = (size - 8192) // (2 * (ranks - 1))
    left = rows
    for one in found:
        algorithm = one["algorithm"]
        assert algorithm == rules[one["rule"]].algorithm
        bytes_of_rows = one["rows"] * row_bytes_of_an_area(algorithm, ranks, row_packs)
        assert bytes_of_rows + gap_of(algorithm) <= area
        assert 1 <= one["teams"] <= one["rows"]
        part = min(left, max(most))
        planned = algorithm_of(rules, part, row_packs)
        if wanted != "auto":
            assert plan.FUSED_ALGORITHMS[algorithm] == wanted
        elif algorithm != planned:
            assert 8 * min(left, most[planned]) <= 7 * part, "the plan's takes nearly as many rows"
        left -= one["rows"]
    assert left == 0


@pytest.mark.parametrize("hidden", [2048, 4096, 5376, 6144, 8192])
@pytest.mark.parametrize("max_rows", [64, 256, 4096])
def test_a_part_has_the_algorithm_of_its_own_size(max_rows, hidden):
    """Of a long prefill on two GPUs: also where two-shot takes a row less than one-shot."""
    rules = rules_for(2, 132, (9, 0), False, False)
    row_packs, row_bytes = hidden * 2 // 16, hidden * 2
    one_shot_rows = plan.most_one_shot_rows(rules, max_rows, row_packs)
    size = _C.inbox_bytes(2, one_shot_rows, max_rows, row_bytes)
    found = launches_of_cpp(rules, 2, size, 20_000, row_packs)
    assert len(found) > 1
    for one in found:
        bytes_of_part = one["rows"] * row_bytes
        two_shot = bytes_of_part + row_bytes > plan.crossover_bytes(2, 9)
        assert one["algorithm"] == (plan.TWO_SHOT if two_shot else plan.ONE_SHOT), one


def test_no_room_for_a_row():
    rules = rules_for(8, 16, (9, 0), True, True)
    with pytest.raises(ValueError, match="inbox_bytes: room for a row is required"):
        launches_of_cpp(rules, 8, 8192 + 14 * 256, 1, 1024)
    # A slice of it, twice, is less: two-shot takes it.
    assert launches_of_cpp(rules, 8, 8192 + 14 * 4608, 1, 1024)[0]["algorithm"] == plan.TWO_SHOT
    assert launches_of_cpp(rules, 8, 8192, 0, 1024) == []


def test_wrong_rules_are_refused():
    good = rules_for(2, 132, (9, 0), False, False)
    with pytest.raises(ValueError, match=r"rules: at least one for the algorithm.*make_rules"):
        launches_of_cpp([], 2, HUGE, 1, 1)
    with pytest.raises(ValueError, match=r"rules: at least one for the algorithm.*make_rules"):
        launches_of_cpp(good[:1], 2, HUGE, 1, 1, "two_shot")
    for wrong in (
        {"algorithm": 2},
        {"blocks_a_team": 0},
        {"blocks_a_team": 9},
        {"max_threads": 0},
        {"max_threads": 48},
        {"max_threads": 1056},
        {"threads_a_multiprocessor": 1025},
        {"trigger": 3},
        {"lead_rows": 0},
        {"multiprocessors": 0},
    ):
        with pytest.raises(ValueError, match=r"rules: what plan\.make_rules\(\) returns"):
            launches_of_cpp([good[0]._replace(**wrong)], 2, HUGE, 1, 1)


# ------------------------------------------------------------------------------ the local kernels

EARLY, WHOLE = plan.Trigger.AT_START, plan.Trigger.NEVER


@pytest.mark.parametrize(
    ("rows", "row_packs", "shape"),
    [
        # (blocks a row, threads of each, packs of each thread, when the next kernel starts)
        (1, 512, (1, 512, 1, EARLY)),
        (3 * 132, 512, (1, 512, 1, EARLY)),
        (3 * 132 + 1, 512, (1, 512, 1, WHOLE)),
        (1, 672, (4, 192, 1, EARLY)),
        (66, 1024, (4, 256, 1, EARLY)),
        (67, 1024, (2, 512, 1, EARLY)),
        (132, 1024, (2, 512, 1, EARLY)),
        (133, 1024, (2, 512, 1, WHOLE)),
        (66, 2048, (4, 512, 1, EARLY)),
        (67, 2048, (4, 512, 1, WHOLE)),
        (1, 4096, (4, 512, 2, EARLY)),
    ],
)
def test_a_local_row_has_as_many_blocks_as_it_needs(rows, row_packs, shape):
    got = _C.local_launch(rows, row_packs, 132)
    names = ("blocks_a_team", "threads", "packs_a_thread", "trigger")
    assert tuple(got[name] for name in names) == shape
    assert got["teams"] <= rows
    blocks = got["teams"] * got["blocks_a_team"]
    resident = 1024 if got["trigger"] == WHOLE else 512
    assert blocks * got["threads"] <= max(132 * resident, got["blocks_a_team"] * got["threads"])


def test_local_rows_without_clusters():
    """On older GPUs; beside other ranks of the process; of a small share of a GPU under MPS."""
    for options in (
        {"max_cluster": 1},
        {"multiprocessors": 63},
        {"max_cluster": 1, "starts_early": False},
    ):
        for rows, row_packs in itertools.product((1, 50, 100, 10_000), (512, 1024, 4096)):
            got = _C.local_launch(rows, row_packs, **{"multiprocessors": 132, **options})
            assert got["blocks_a_team"] == 1, (options, rows, row_packs)
            if not options.get("starts_early", True):
                assert got["trigger"] == WHOLE
    for wrong in ((0, 512, 132), (1, 0, 132), (1, 4097, 132), (1, 512, 0), (1, 512, 132, 0)):
        with pytest.raises(ValueError, match="local_launch: a row of 1 to 4096 packs, "):
            _C.local_launch(*wrong)

"""Lost ranks on the CPU path, with real processes: a part of the cases of tests/gpu.

`python tests/gpu/faults.py --cpu` has all of them.
"""

from __future__ import annotations

import pytest
from gpu import faults
from gpu.fault_worker import CASES

RUNS = (
    faults.FaultRun(
        "killed",
        5,
        (
            "killed_between_calls[one_shot]",
            "killed_in_a_call[two_shot]",
            "killed_in_init[open]",
        ),
    ),
    faults.FaultRun(
        "stopped",
        3,
        (
            "a_short_stall_in_init",
            "a_long_stall_in_init",
            "other_arguments",
            "many_cycles",
        ),
    ),
)
NAMES = [(which, name) for which in RUNS for name in which.cases]


@pytest.mark.parametrize(("which", "name"), NAMES, ids=[name for _, name in NAMES])
def test_case(which, name):
    _, found = faults.run(which, gpus=0)
    one = next(one for one in found if one.case.name == name)
    assert not one.failures, "\n".join(one.failures[:10])


@pytest.mark.parametrize("which", RUNS, ids=lambda which: which.name)
def test_the_run_ended_well(which):
    result, _ = faults.run(which, gpus=0)
    assert result.exit_code == 0, f"{result.reason}\n{result.transcript()[-4000:]}"


def test_every_case_has_a_run_on_the_gpu():
    assert {name for which in faults.RUNS for name in which.cases} == set(CASES)


# ------------------------------------------------------------------------------------- the table

WHICH = faults.FaultRun("some", 3, ("killed_between_calls[graph]", "another_host"))


def said(*notes, failures=()):
    return {"failures": list(failures), "raised": False, "seconds": 1.5, "seen": list(notes)}


def outcomes_of(*ranks):
    """Of what each rank wrote of the two cases."""
    result = faults.launcher.Result(1, "why", [""] * 3, 2.0, faults.launcher.Placement(3, 0))
    found = [dict(zip(WHICH.cases, one, strict=False)) for one in ranks]
    return faults.outcomes(WHICH, result, found)


def test_the_table_says_what_was_seen_and_writes_it_in_its_place(tmp_path):
    first, second = outcomes_of(
        [said(["raised after", 1.234]), said(["unfused", None])],
        [{"killed": True}],
        [said(["raised after", 1.5]), said(["unfused", None])],
    )
    assert (first.failures, first.seen) == ([], "raised after 1.23 to 1.50 s")
    assert (second.failures, second.seen) == ([], "unfused")
    text = faults.table([first, second], 0)
    assert "2 cases, 0 failed" in text
    assert text.count("| raised after 1.23 to 1.50 s |") == 1
    file = tmp_path / "faults.md"
    file.write_text(f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n")
    faults.write(file, text)
    faults.write(file, text)
    written = file.read_text()
    assert written == f"before\n{faults.BEGIN}\n\n{text}\n\n{faults.END}\nafter\n"
    file.write_text("nothing")
    with pytest.raises(ValueError, match="are required"):
        faults.write(file, text)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (([said(failures=["bad"]), said()], [{"killed": True}], [said(), said()]), "rank 0: bad"),
        (([said(), said()], [{"killed": True}], [said()]), "ranks [2] did not end it"),
        (([said(), said()], [], [said(), said()]), "ranks [1] did not end it"),  # killed too early
        (([said(), said()], [said(), said()], [said(), said()]), "ranks [] were killed"),
    ],
)
def test_a_case_without_its_result_has_failed(ranks, words):
    found = outcomes_of(*ranks)
    assert any(words in failure for one in found for failure in one.failures)
    assert "**FAILED**" in faults.table(found, 0)

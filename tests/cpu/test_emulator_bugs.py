"""The emulator finds the bugs that are planted in the kernels, and executes all of their lines."""

from __future__ import annotations

from emulator_tools import IN_CI, TURN, make

import line_coverage  # isort: skip  # emulator_tools says where
import mutations  # isort: skip
from planted_bugs import BUGS  # isort: skip

EVERY_NTH_IN_CI = 8


def test_every_planted_bug_fits():
    assert len(BUGS) >= 20
    for bug in BUGS:
        mutations.mutated_sources(bug)  # raises DoesNotFit


def test_every_planted_bug_is_caught():
    """In CI every eighth one, in turn with the commits."""
    bugs = BUGS[TURN % EVERY_NTH_IN_CI :: EVERY_NTH_IN_CI] if IN_CI else BUGS
    for flavour in mutations.flavours_of(mutations.stages_of(bugs)):
        make(flavour)  # what mutants have in common
    wrong = mutations.survivors(bugs)
    assert wrong == [], "\n".join(wrong)


def test_all_lines_of_the_kernels_are_executed():
    total, _, wrong = line_coverage.measure()
    assert wrong == []
    assert total > 200

"""torch.compile finds the calls in a model: the cases of compile_cases.py, by two processes."""

from __future__ import annotations

import pytest

from gpu import compile_cases, processes

CASES = [case.__name__ for case in compile_cases.CASES]


@pytest.mark.parametrize("name", CASES)
def test_compiled(name):
    run = processes.run(2, *CASES)
    assert all(line.get("fused") for line in run.first_lines), run.first_lines
    run.expect_passed(name)

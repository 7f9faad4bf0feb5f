"""The kernels' own source on the CPU, under a scheduler that looks for trouble (tests/emulator).

Each stage runs random cases from a fresh seed. A failure prints the command that repeats its case;
GAN_EMULATOR_SEED repeats a whole run. docs/testing.md has more.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import checks
import pytest
import torch
from emulator_tools import BUILD, IN_CI, PROCESSES, ROOT, SEED, TURN, make

STAGES = ("fuzz", "weak", "strict", "tsan", "asan", "full", "faults", "debug", "mixed", "explore")
SANITIZERS = ("tsan", "asan")

# What must be among the launches and the cases of a stage, in hundredths.
SHARES = {
    "of several warps": 10,
    "of clusters": 45,
    "of clusters whose last block has packs": 15,
    "of clusters of several warps": 5,
    "of several packs a thread": 10,
    "of several packs a thread in sandwich form": 2,
    "alone": 20,
    "early at start": 15,
    "early after push": 15,
    "in plain form": 15,
    "in residual form": 20,
    "in sandwich form": 20,
    "of two_shot": 35,
    "of two_shot with more rows than its lead": 3,
    "of two_shot with less than a pack a rank": 5,
    "of two_shot with a part of the rows": 1,
    "cases that exchange": 100,
    "cases whose number wraps": 8,
    "cases that alternate between kernels": 10,
}
SHARES_OF_STAGE = {
    "fuzz": {**SHARES, "calls of several launches": 1, "cases of more than four ranks": 4},
    "weak": SHARES,
    "strict": SHARES,
    "tsan": SHARES,
    "asan": SHARES,
    "faults": {
        **SHARES,
        "cases of weak memory": 40,
        "cases where another rank is late": 2,
        "recoveries": 25,
    },
    "mixed": {"cases in which both ranks fail": 80},
    "debug": {
        **SHARES,
        "cases where a rank announces another call": 15,
        "cases where a rank never comes": 15,
        "cases where a rank begins a call within another": 15,
    },
}
LEAST_LARGE_GRIDS = 5  # of fuzz
# Of the cases with a fault, how many end in a failure.
FAILING = {
    "never comes": 60,
    "stops half-way": 50,
    "is late, too long": 50,
    "looks late": 30,
}


def stages() -> dict[str, tuple[str, int]]:
    """The build that a stage needs, and how many cases it has."""
    make("plain")
    listed = subprocess.check_output([str(BUILD / "plain/emulate"), "list"], text=True)
    lines = [line.split() for line in listed.splitlines()]
    return {name: (build, int(cases)) for name, build, cases in lines}


def run(stage: str, build: str, base: int, cases: int) -> subprocess.CompletedProcess[str]:
    program = BUILD / build / "emulate"
    command = [str(program), stage, "--base", str(base), "--cases", str(cases)]
    if stage == "tsan" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # it does not start where addresses are too random
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def statistics_of(output: str) -> Counter[str]:
    [line] = re.findall(r"^statistics: (.*)$", output, re.MULTILINE)
    return Counter({what: int(n) for what, n in re.findall(r"(\D+) (\d+)(?:, |$)", line)})


def assert_shares(stage: str, counts: Counter[str]) -> None:
    """What the stage is there for has been among its cases."""
    for what, least in SHARES_OF_STAGE.get(stage, {}).items():
        of = counts["cases" if what.startswith(("cases", "recoveries")) else "launches"]
        assert 100 * counts[what] >= least * of, f"{what}: {counts[what]} of {of}"
    if stage == "fuzz":
        assert counts["of large grids"] >= LEAST_LARGE_GRIDS
    if stage == "faults":
        for fault, least in FAILING.items():
            failures = counts[f"failures where a rank {fault}"]
            of = counts[f"cases where a rank {fault}"]
            assert 100 * failures >= least * of > 0, f"{fault}: {failures} of {of}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage):
    build, cases = stages()[stage]
    if IN_CI and stage == SANITIZERS[TURN % 2]:
        pytest.skip("CI leaves it to the commit before and the next")
    if IN_CI and stage in ("fuzz", "weak"):
        cases //= 2
    make(build)
    base = 0 if stage == "explore" else SEED  # explorations are not random
    share = -(-cases // PROCESSES)  # of the seeds, for each processor
    parts = [(base + i, min(share, cases - i)) for i in range(0, cases, share)]
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for ran in pool.map(lambda part: run(stage, build, *part), parts):
            print(ran.stdout)
            assert ran.returncode == 0, f"GAN_EMULATOR_SEED={SEED}\n{ran.stdout}{ran.stderr}"
            counts += statistics_of(ran.stdout)
    assert_shares(stage, counts)


def test_all_stages_are_run():
    assert set(STAGES) == set(stages())


def test_the_engine():
    """The emulator itself, with small kernels of its own (engine_test*.cpp)."""
    make("engine_test")
    for program, count in (("plain/engine_test", 40), ("tsan/engine_test", 5)):
        command = ["setarch", "-R"] if shutil.which("setarch") and "tsan" in program else []
        ran = subprocess.run([*command, str(BUILD / program)], capture_output=True, text=True)
        assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}"
        passed, failed = re.fullmatch(
            r"(\d+) passed, (\d+) failed", ran.stdout.splitlines()[-1]
        ).groups()
        assert int(passed) >= count, ran.stdout
        assert failed == "0"


def test_a_case_repeats():
    """By the command that a failure prints: the same case, described."""
    make("plain")
    command = ["make", "-s", "-C", str(ROOT), "emulate", "CASE=fuzz", "SEED=7"]
    ran = [subprocess.run(command, capture_output=True, text=True) for _ in range(2)]
    assert ran[0].returncode == 0, ran[0].stderr
    described = [r.stdout.splitlines()[:-1] for r in ran]  # the last line has the time
    assert described[0] == described[1]
    assert "buffers" in ran[0].stdout


def test_without_its_fences_the_strict_stage_fails():
    """The default order relies on more than the memory model says: docs/memory-model.md."""
    make("plain")
    command = [str(BUILD / "plain/emulate"), "strict", "--base", "0", "--cases", "20"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "a relaxed store that nothing orders" in ran.stdout


# ---- the contract in C++ against reference.py


@pytest.fixture(scope="module")
def contract():
    make("contract")
    function = ctypes.CDLL(str(BUILD / "libcontract.so")).gan_contract
    numbers = [ctypes.c_int32, *[ctypes.c_uint32] * 3]
    options = [ctypes.c_int32, ctypes.c_float, ctypes.c_float]
    function.argtypes = [*numbers, *[ctypes.c_void_p] * 4, *options, *[ctypes.c_void_p] * 2]
    function.restype = None

    def pointer(tensor):
        return None if tensor is None else tensor.data_ptr()

    def call(case: checks.Case) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.stack(case.xs)
        ranks, rows, hidden = x.shape
        outs = checks.poisoned_like(case.xs[0]), checks.poisoned_like(case.xs[0])
        inputs = [pointer(t) for t in (x, case.residual, case.weight, case.post_weight)]
        fp32_weights = case.weight.dtype == torch.float32 != x.dtype
        options = [int(fp32_weights), case.eps, case.weight_bias]
        dtype = checks.DTYPES.index(x.dtype)
        function(dtype, ranks, rows, hidden, *inputs, *options, *map(pointer, outs))
        return outs

    return call


@pytest.mark.parametrize("special", [None, *checks.SPECIALS])
@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
def test_the_contract_is_the_reference(contract, dtype, form, special):
    for hidden in (8, 264, 640, 5376, 16384):
        for weight_dtype in {dtype, torch.float32}:
            options = {"weight_dtype": weight_dtype, "special": special, "weight_bias": hidden % 3}
            case = checks.make_case(2 + hidden % 3, 4, hidden, dtype, form, **options)
            for got, want in zip(contract(case), case.expected(), strict=True):
                checks.assert_bit_equal(got, want, case)

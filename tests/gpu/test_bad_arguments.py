"""Bad arguments on a GPU: the table of tests/bad_arguments.py, random calls, and 2^31 elements.

The raw op is checked in C++ here. Whatever was refused, the CUDA context is usable afterwards and
the next good call has the right bits: of one rank, and of both ranks of a local group.
"""

from __future__ import annotations

from dataclasses import replace

import bad_arguments
import checks
import pytest
import torch
from bad_arguments import ENTRIES, HIDDEN, Given

import gemma_ar_norm
from gemma_ar_norm import reference
from gemma_ar_norm.library import _C

GIB = 1 << 30
USES = bad_arguments.uses()


@pytest.fixture(autouse=True)
def clean_device():
    """In the place of conftest.py's, which takes a tenth of a second: there are 600 tests here."""


@pytest.fixture(scope="module")
def given():
    return Given("cuda")


@pytest.fixture(scope="module")
def pair():
    """Two ranks, rank 0's arguments, and outputs for both: nothing is allocated while one waits."""
    given = Given("cuda", ranks=2)
    given.case.expected()
    outs = [(given.like(), given.like()) for _ in range(2)]
    torch.cuda.synchronize()
    with gemma_ar_norm.local_group(2, hidden_size=HIDDEN, max_rows=8, timeout_s=5.0) as ranks:
        yield given, ranks, outs


def assert_both_right(given, ranks, outs, what) -> None:
    for out in outs:
        for one in out:
            one.fill_(77.0)
    torch.cuda.synchronize()
    for rank, out in zip(ranks, outs, strict=True):
        arguments = {**given.good, "x": given.case.xs[rank.rank]}
        with torch.cuda.stream(rank.stream):
            bad_arguments.call(**arguments, group=rank, out=out)
    ranks.synchronize()
    for out in outs:
        bad_arguments.assert_right(out, given.case, what)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "entry"), bad_arguments.lines(*ENTRIES))
def test_bad_call_of_one_rank(given, name, entry):
    bad_arguments.assert_refused(given, name, entry)
    bad_arguments.assert_right(ENTRIES[entry](**given.good), given.case, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "entry"),
    [line for line in bad_arguments.lines("call", "op") if not line[0].startswith("group")],
)
def test_bad_call_of_a_rank_among_others(pair, name, entry):
    """It is refused on that rank alone, before anything is launched: no peer was waited for."""
    given, ranks, outs = pair
    rank = ranks[0]
    with torch.cuda.stream(rank.stream):
        bad_arguments.assert_refused(given, name, entry, group=rank)
    assert_both_right(given, ranks, outs, name)


@pytest.mark.parametrize("name", USES)
def test_bad_use(given, name):
    bad_arguments.assert_refuses(USES[name])
    bad_arguments.assert_right(bad_arguments.call(**given.good), given.case, name)


@pytest.mark.filterwarnings("ignore")
def test_random_calls():
    random_calls = pytest.importorskip("random_calls", reason="needs hypothesis")
    found = random_calls.run("cuda", 250)
    assert min(found[True], found[False]) >= 25, found
    torch.cuda.synchronize()


def test_more_bad_groups(pair):
    given, ranks, outs = pair
    for group in (ranks, ranks[:1]):
        with pytest.raises(TypeError, match=r"group: None, .*got (LocalGroup|tuple)") as caught:
            bad_arguments.call(**given.good, group=group)
        bad_arguments.assert_in_words(caught.value)
    for algorithm in gemma_ar_norm.plan.FUSED_ALGORITHMS:
        with pytest.raises(gemma_ar_norm.WorkspaceError, match="algorithm: 'auto' or") as caught:
            bad_arguments.call(**given.good, algorithm=algorithm)
        bad_arguments.assert_in_words(caught.value, *given.good.values())
    with pytest.raises(ValueError, match="x: a CUDA tensor is required by a local group") as caught:
        bad_arguments.call(**{k: v.cpu() for k, v in given.good.items()}, group=ranks[0])
    bad_arguments.assert_in_words(caught.value)
    with pytest.raises(ValueError, match=r"device: one of the .* got cuda:127") as caught:
        gemma_ar_norm.local_group(2, device=127)
    bad_arguments.assert_in_words(caught.value)
    assert_both_right(given, ranks, outs, "bad groups")


def test_a_workspace_on_another_gpu(pair):
    given, ranks, outs = pair
    other = {name: given.on_another_gpu(t) for name, t in given.good.items()}
    with pytest.raises(ValueError, match=r"x: a tensor on cuda:.*is required; got cuda") as caught:
        bad_arguments.call(**other, group=ranks[0])
    bad_arguments.assert_in_words(caught.value)
    assert_both_right(given, ranks, outs, "another GPU")


def test_outputs_without_elements_may_lie_anywhere(given):
    """A view of no rows at an odd address, as slicing makes it."""
    x, odd = given.x[:0], given.buffer[1:1].view(0, HIDDEN)
    for out in ((odd, odd), (odd, x)):
        got = bad_arguments.call(x=x, weight=given.weight, out=out)
        assert [one.shape for one in got] == [(0, HIDDEN)] * 2


# ----------------------------------------------------------------------- the native workspace


def natives(ranks: int = 2):
    rules = gemma_ar_norm.plan.make_rules(
        ranks=ranks,
        multiprocessors=16,
        compute_capability=(8, 0),
        max_cluster=1,
        shared_device=True,
        one_gpu=True,
    )
    numbers = [rule.numbers for rule in rules]
    device = torch.cuda.current_device()
    return [_C.Workspace(device, r, ranks, 2 << 20, 10**9, numbers) for r in range(ranks)]


def test_what_open_peers_refuses(given):
    """Wrong numbers and sizes of handles, and what is none: in words, and nothing is mapped."""
    first, second = natives()
    own, good = first.ipc_handle(), second.ipc_handle()
    assert len(good) == 64
    for handles, error, words in (
        ([], ValueError, "handles: one a rank is required; got 0"),
        ([own], ValueError, "handles: one a rank is required; got 1"),
        ([own, good, good], ValueError, "handles: one a rank is required; got 3"),
        ([own, b""], ValueError, "handles: 64 bytes each are required; got 0 from rank 1"),
        ([own, good[:-1]], ValueError, "handles: 64 bytes each .* got 63 from rank 1"),
        ([own, good + b"\0"], ValueError, "handles: 64 bytes each .* got 65 from rank 1"),
        ([own, bytes(64)], RuntimeError, "ipc: memory of rank 1 that this process can map"),
        ([own, bytes(range(64))], RuntimeError, "ipc: memory of rank 1 that this process can map"),
    ):
        with pytest.raises(error, match=words) as caught:
            first.open_peers(handles)
        bad_arguments.assert_no_pointers(str(caught.value))
    first.connect_local([first, second])  # it is still as it was
    second.connect_local([first, second])
    first.close()
    second.close()
    bad_arguments.assert_right(bad_arguments.call(**given.good), given.case)


def test_a_native_workspace_that_is_closed_or_connected(given):
    first, second = natives()
    with pytest.raises(ValueError, match="ranks: one workspace a rank is required; got 1"):
        first.connect_local([first])
    with pytest.raises(ValueError, match="ranks: open workspaces in rank order"):
        first.connect_local([second, first])
    with pytest.raises(ValueError, match="ranks: open workspaces in rank order"):
        first.connect_local([first, None])
    second.close()
    with pytest.raises(ValueError, match="ranks: open workspaces in rank order"):
        first.connect_local([first, second])
    for use in (second.ipc_handle, lambda: second.open_peers([b"", b""])):
        with pytest.raises(RuntimeError, match="workspace: an open one, not connected yet, is"):
            use()
    with pytest.raises(RuntimeError, match="workspace: an open one, not connected yet, is"):
        second.connect_local([first, second])
    first.close()
    first.close()
    bad_arguments.assert_right(bad_arguments.call(**given.good), given.case)


# ---------------------------------------------------------------- more than 2^31 elements


def large_case(ranks: int) -> checks.Case:
    """[2^31 / 4096 + 3, 4096] of bf16: 4 GiB each, made on the GPU."""
    rows, hidden = (1 << 31) // 4096 + 3, 4096

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()

    xs = [normal(rows, hidden) for _ in range(ranks)]
    assert xs[0].numel() > 1 << 31
    weight = normal(hidden)
    return checks.Case(xs, weight, normal(rows, hidden), None, 1e-6, 1.0, "2^31 elements")


def assert_large_right(case: checks.Case, outputs) -> None:
    """Every row, a part at a time."""
    rows, part = case.xs[0].shape[0], 1 << 13
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for first in range(0, rows, part):
        at = slice(first, first + part)
        some = replace(case, xs=[x[at] for x in case.xs], residual=case.residual[at])
        for got, want in zip(outputs, some.expected(), strict=True):
            wrong += (~checks.bit_equal(got[at], want)).sum()
    assert wrong.item() == 0, f"{wrong.item()} elements differ"


def needs_gib(gib: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory; {free / GIB:.1f} are")


def test_more_elements_than_32_bits_have_numbers_for():
    needs_gib(24)
    case = large_case(1)
    outputs = bad_arguments.call(x=case.xs[0], weight=case.weight, residual=case.residual)
    assert_large_right(case, outputs)
    del outputs
    out = (torch.empty_like(case.xs[0]), torch.empty_like(case.xs[0]))
    bad_arguments.add_rmsnorm(x=case.xs[0], weight=case.weight, residual=case.residual, out=out)
    assert_large_right(case, out)
    # The last row alone is what a call of it gives: no index came round.
    last = reference.add_rmsnorm(case.xs[0][-1:], case.weight, case.residual[-1:])
    checks.assert_bit_equal(out[0][-1:], last[0])
    del case, out
    torch.cuda.empty_cache()


def test_more_elements_than_32_bits_have_numbers_for_of_two_ranks():
    needs_gib(36)
    case = large_case(2)
    with gemma_ar_norm.local_group(2, hidden_size=4096, max_rows=8192, timeout_s=10.0) as ranks:
        rows = case.xs[0].shape[0]
        launches = gemma_ar_norm.explain(rows, 4096, group=ranks[0]).launches
        # More than one; and no more than a stream takes before its peer's have been queued.
        assert 1 < launches < 500
        outs = [tuple(torch.empty_like(case.xs[0]) for _ in range(2)) for _ in ranks]
        torch.cuda.synchronize()
        for rank, out in zip(ranks, outs, strict=True):
            with torch.cuda.stream(rank.stream):
                bad_arguments.call(
                    x=case.xs[rank.rank],
                    weight=case.weight,
                    residual=case.residual,
                    group=rank,
                    out=out,
                )
        ranks.synchronize()
        for out in outs:
            assert_large_right(case, out)
    del case, outs, out
    torch.cuda.empty_cache()

"""Bad arguments on the CPU: the table of tests/bad_arguments.py, and random calls.

(Both on a GPU: tests/gpu/test_bad_arguments.py.)
"""

from __future__ import annotations

import bad_arguments
import pytest
import random_calls
import torch
import torch.distributed as dist
from bad_arguments import BF16, ENTRIES, HIDDEN, Given

import gemma_ar_norm
from gemma_ar_norm import groups, ops, plan, workspace
from gemma_ar_norm.library import _C

USES = bad_arguments.uses()


@pytest.fixture(scope="module")
def given():
    return Given("cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "entry"),
    [line for line in bad_arguments.lines(*ENTRIES) if "another GPU" not in line[0]],
)
def test_bad_call(given, name, entry):
    bad_arguments.assert_refused(given, name, entry)
    bad_arguments.assert_right(ENTRIES[entry](**given.good), given.case, name)


@pytest.mark.parametrize("name", USES)
def test_bad_use(given, name):
    before = workspace.find("")
    bad_arguments.assert_refuses(USES[name])
    assert workspace.find("") is before
    bad_arguments.assert_right(bad_arguments.call(**given.good), given.case, name)


@pytest.mark.filterwarnings("ignore")
def test_random_calls():
    found = random_calls.run("cpu", 400)
    assert min(found[True], found[False]) >= 80, found


def test_a_group_that_was_freed(given, tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        group = dist.new_group([0])
        name = group.group_name
        made = gemma_ar_norm.init(group, hidden_size=HIDDEN, max_rows=8)
        assert not made.closed
        dist.destroy_process_group(group)
        assert made.closed
        for one, words in (
            (group, f"a live group is required; got one, named '{name}'"),
            (name, "the name of a live process group"),
        ):
            with pytest.raises(ValueError, match=words) as caught:
                bad_arguments.call(**given.good, group=one)
            bad_arguments.assert_in_words(caught.value)
            with pytest.raises(ValueError, match=words):
                gemma_ar_norm.init(one)
        bad_arguments.assert_right(bad_arguments.call(**given.good), given.case)
    finally:
        dist.destroy_process_group()  # fmt: skip


def test_a_closed_workspace(given):
    made = gemma_ar_norm.init()
    made.close()
    made.close()
    made.check()
    made.synchronize()
    bad_arguments.assert_right(bad_arguments.call(**given.good), given.case)


# ------------------------------------------------------------------ more than 2^31 elements


def test_more_elements_than_32_bits_have_numbers_for():
    """On meta tensors, and of a real one that has them all in 16 bytes: nothing overflows."""
    rows, hidden = (1 << 21) + 3, 16384
    x = torch.empty(rows, hidden, dtype=BF16, device="meta")
    weight = torch.empty(hidden, dtype=BF16, device="meta")
    outputs = bad_arguments.call(x=x, weight=weight, residual=x)
    assert [(out.shape, out.dtype) for out in outputs] == [(x.shape, BF16)] * 2
    out = (torch.empty_like(x), torch.empty_like(x))
    assert bad_arguments.call(x=x, weight=weight, residual=x, out=out) == out

    x = torch.zeros(8).expand(1 << 30, 8)
    ops.check_arguments(x, x[0], x, None, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"residual: the shape of x, \(1073741824, 8\)"):
        ops.check_arguments(x, x[0], x[1:], None, 0.0, 1.0)
    out = (torch.empty(1), torch.empty(1))
    with pytest.raises(ValueError, match=r"norm_out: the shape of x, \(1073741824, 8\)"):
        ops.check_arguments(x, x[0], x, None, 0.0, 1.0, "auto", out)


class Rank:
    rank, group_name = 0, groups.LOCAL_PREFIX + "absurd"

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("algorithm", ["auto", *plan.FUSED_ALGORITHMS])
def test_explain_of_more_rows_than_there_can_be(monkeypatch, algorithm):
    """It counts launches without making a list of them; and as many as the list would have."""
    rules = plan.make_rules(
        ranks=2,
        multiprocessors=66,
        compute_capability=(9, 0),
        max_cluster=8,
        shared_device=True,
        one_gpu=True,
    )

    class Native:
        inbox_bytes = 2 << 20

    rank = Rank()
    me = groups.resolve(rank)
    fused = workspace.Workspace(me, "as if", Native(), rules=rules)
    monkeypatch.setitem(workspace._records, me.name, fused)

    def explained(rows, hidden):
        return gemma_ar_norm.explain(
            rows, hidden, group=rank, device="cuda", algorithm=algorithm
        ).launches

    assert explained(1 << 46, 16384) > 1 << 40
    numbers = [rule.numbers for rule in rules]
    for hidden in (8, 640, 16384):
        for rows in (1, 15, 16, 17, 63, 64, 65, 129, 1000, 99_999):
            listed = _C.launches(numbers, 2, 2 << 20, rows, hidden * 2 // 16, algorithm)
            assert explained(rows, hidden) == len(listed), (rows, hidden)
            assert _C.launches(numbers, 2, 2 << 20, rows, hidden // 8, algorithm, 1) == listed[:1]
    with pytest.raises(ValueError, match="launches: 2 to 8 ranks, an inbox and a row"):
        _C.launches(numbers, 2, 2 << 20, 1, (1 << 32) - 1)
    fused._release.detach()

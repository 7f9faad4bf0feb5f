"""Debug mode: what it says of calls that differ. What the device does is for the emulator."""

from __future__ import annotations

import struct
from unittest import mock

import pytest
import torch
from fakes import fake_native

from gemma_ar_norm import PeerTimeoutError, WorkspaceError, debug, groups, ops, workspace
from gemma_ar_norm.groups import Group
from gemma_ar_norm.workspace import Facts, Workspace, verdict

CALL = [16, 4096, "bfloat16", "residual", "auto", "bfloat16", 1e-6, 1.0]


def changed(**fields):
    call = list(CALL)
    for name, value in fields.items():
        call[debug.FIELDS.index(name.replace("dtype", ".dtype"))] = value
    return call


def bits(number: float) -> int:
    return struct.unpack("I", struct.pack("f", number))[0]


def test_calls_that_are_alike():
    assert debug.difference([CALL, list(CALL), list(CALL)]) == ""


def test_the_ranks_and_all_fields_are_named():
    text = debug.difference([CALL, changed(rows=17, eps=1e-5), CALL, changed(rows=1)])
    assert "rows 16 on ranks 0, 2 and 17 on rank 1 and 1 on rank 3" in text
    assert "eps 1e-06 on ranks 0, 2, 3 and 1e-05 on rank 1" in text
    assert "hidden" not in text


@pytest.mark.parametrize("field", debug.FIELDS)
def test_each_field_counts(field):
    other = list(CALL)
    other[debug.FIELDS.index(field)] = "another"
    assert f"{field} " in debug.difference([CALL, other])


def test_numbers_that_are_the_same_float32_are_alike():
    """As on the device. And -0.0 is 0.0."""
    eps = 1e-6
    alike = struct.unpack("f", struct.pack("f", eps))[0]
    assert alike != eps
    assert debug.difference([changed(eps=eps), changed(eps=alike)]) == ""
    assert debug.difference([changed(weight_bias=0.0), changed(weight_bias=-0.0)]) == ""
    assert "eps 1e-06 on rank 0" in debug.difference([CALL, changed(eps=1.0000001e-6)])


def test_words_of_the_device():
    words = [16, 4096, 0, 1, 0, 0, bits(0.25), bits(1.0)]
    assert debug.summary_of_words(words) == [*CALL[:6], 0.25, 1.0]
    words = [3, 640, 1, 2, 2, 1, bits(0.5), bits(0.0)]
    expected = [3, 640, "float16", "sandwich", "two_shot", "float32", 0.5, 0.0]
    assert debug.summary_of_words(words) == expected
    words = [3, 640, 2, 0, 0xFFFFFFFF, 0, bits(0.5), bits(0.0)]
    expected = [3, 640, "float32", "plain", "unfused", "float32", 0.5, 0.0]
    assert debug.summary_of_words(words) == expected


def test_a_summary_of_arguments():
    x = torch.empty(2, 8, 4096, dtype=torch.bfloat16)
    weight = x[0, 0]
    assert debug.summary_of(x, weight, x, None, 1e-6, 1.0, "auto") == CALL
    found = debug.summary_of(x, weight.float(), x, weight.float(), 1e-6, 0.0, "two_shot")
    assert found == [*CALL[:3], "sandwich", "two_shot", "float32", 1e-6, 0.0]
    assert debug.summary_of(x, weight, None, None, 1e-6, 1.0, "auto")[3] == "plain"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_variable(monkeypatch, value, on):
    monkeypatch.delenv(debug.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(debug.VARIABLE, value)
    assert debug.is_on() is on


def test_all_ranks_or_none():
    facts = [Facts(debug=rank == 1, host="h", pid=rank) for rank in range(3)]
    error = verdict(facts).error
    assert isinstance(error, WorkspaceError)
    assert str(error).startswith("GEMMA_AR_NORM_DEBUG: the same on all ranks is required")
    assert "[1] of 3" in str(error)
    assert verdict([Facts(debug=True, host="h", pid=rank) for rank in range(3)]).error is None


@pytest.mark.parametrize("on", [False, True])
def test_the_workspace_is_what_the_ranks_have_agreed_on(monkeypatch, on):
    """Also where the variable is changed after the facts, which are what is compared."""
    monkeypatch.setenv(debug.VARIABLE, "1" if on else "0")

    def gather(group, message, *_):
        monkeypatch.setenv(debug.VARIABLE, "0" if on else "1")
        theirs = {"pid": 1, "uuid": "gpu1"} if "phase" not in message else {"rank": 1}
        return [message, {**message, **theirs}]

    monkeypatch.setattr(groups, "all_gather_json", gather)
    monkeypatch.setattr(groups, "resolve", lambda _: Group("made for this test", 0, 2, object()))
    with fake_native() as native, workspace.init() as made:
        assert made.fused
        assert made.debug is on
        assert native.made[0].debug is on


def unfused_call(monkeypatch, comparison: Exception) -> tuple[bool, BaseException | None]:
    """Whether a group's first unfused call on a GPU compares, which raises this, and what it keeps
    for api.py."""
    x = torch.ones(2, 640)
    monkeypatch.setattr(groups, "resolve", lambda _: Group("made for this test", 0, 2, object()))
    monkeypatch.setattr(ops, "_all_reduce", lambda x, _: x)
    monkeypatch.setattr(ops, "add_rmsnorm_out", mock.Mock())
    compared = mock.Mock(side_effect=comparison)
    monkeypatch.setattr(debug, "compare", compared)
    monkeypatch.setattr(ops, "_C", mock.Mock())
    rest = (x[0], None, None, 1e-6, 1.0, "made for this test", "unfused")
    ops.slow_path(x, *rest, torch.empty_like(x), torch.empty_like(x))
    return compared.called, ops._take_stored()


@pytest.mark.parametrize("on", [False, True])
def test_a_first_unfused_call_is_compared(monkeypatch, on):
    """It makes no workspace, and so nothing has been agreed on."""
    monkeypatch.setenv(debug.VARIABLE, "1" if on else "0")
    differ = WorkspaceError("they differ")
    assert unfused_call(monkeypatch, differ) == (on, differ if on else None)


def test_a_rank_that_is_lost_in_the_comparison_is_missed_in_a_call(monkeypatch):
    monkeypatch.setenv(debug.VARIABLE, "1")
    _, error = unfused_call(monkeypatch, groups.RanksLost([1]))
    assert isinstance(error, PeerTimeoutError)
    assert error.peer == 1
    assert str(error).startswith("rank 1: to take part in a call on group 'made for this test'")


def test_check_says_what_differs():
    with fake_native():
        arguments = {"hidden_size": 640, "max_rows": 8, "dtype": torch.bfloat16, "timeout_s": 1.0}
        native = workspace._make_native(0, 0, 2, [], arguments, True)
        made = Workspace(Group("made for this test", 0, 2), "because", native)
        made.check()
        native.calls = [[rows, 640, 0, 1, 0, 0, bits(0.25), bits(1.0)] for rows in (4, 5)]
        with pytest.raises(WorkspaceError, match="got rows 4 on rank 0 and 5 on rank 1; make the"):
            made.check()
        made.close()

"""What docs/security.md says of init: how handles travel, and what is never opened or used."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict
from unittest import mock

import bad_arguments
import pytest
from fakes import fake_native

from gemma_ar_norm import WorkspaceError, groups, workspace
from gemma_ar_norm.groups import Group

ME = Group("theirs", 0, 2, object())
HANDLE = b"\x00handle of 0\xff".hex()


class Wire:
    """all_gather_json of two ranks, of which this process is rank 0: rank 1 says what rank 0 does,
    with its own rank and GPU, but for `change(phase, message)`."""

    def __init__(self, change=lambda phase, message: message) -> None:
        self.change = change
        self.sent: list[tuple[Group, dict]] = []

    def __call__(self, group, message, *_):
        message = json.loads(json.dumps(message))
        self.sent.append((group, message))
        if "phase" not in message:
            phase, theirs = "facts", {**message, "pid": 1, "uuid": "gpu1", "token": "f" * 16}
        else:
            phase, theirs = message["phase"], {**message, "rank": 1}
            if phase == "allocate":
                handle = b"\x00handle of 1\xff".hex()
                theirs["said"] = {**message["said"], "handle": handle}
        return [message, self.change(phase, json.loads(json.dumps(theirs)))]

    def phases(self) -> list[str]:
        return [message.get("phase", "facts") for _, message in self.sent]


@contextmanager
def two_ranks(wire: Wire):
    with (
        fake_native() as native,
        mock.patch.object(groups, "all_gather_json", wire),
        mock.patch.object(groups, "resolve", return_value=ME),
    ):
        yield native
        found = workspace.find(ME.name)
        if found is not None:
            found.close()
        assert not native.open


def test_handles_travel_through_the_group_and_nowhere_else():
    wire = Wire()
    with two_ranks(wire) as native:
        made = workspace.init()
        assert (made.fused, native.made[0].peers) == (
            True,
            [b"\x00handle of %d\xff" % rank for rank in range(2)],
        )
    assert wire.phases() == ["facts", "access", "allocate", "open"]
    assert all(group is ME for group, _ in wire.sent)
    assert [HANDLE in json.dumps(message) for _, message in wire.sent] == [
        False,
        False,
        True,
        False,
    ]
    assert HANDLE not in repr(made)


events: list[str] = []
is_listening = False


def listen(event: str, arguments: tuple) -> None:
    """An audit hook cannot be taken away, only be told to do nothing."""
    if not is_listening:
        return
    if event.startswith(
        ("socket.", "subprocess.", "pickle.", "os.exec", "os.posix_spawn", "ctypes.dl")
    ):
        events.append(event)
    if event in ("exec", "compile", "os.system", "os.fork"):
        events.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append(f"open {arguments[0]}")


def test_init_opens_no_socket_writes_no_file_and_runs_no_code():
    global is_listening
    with two_ranks(Wire()):
        workspace.init()  # whatever is imported at first
    sys.addaudithook(listen)
    with two_ranks(Wire()):
        is_listening = True
        try:
            workspace.init()
        finally:
            is_listening = False
    assert set(events) <= {"socket.gethostname"}, events
    is_listening = True  # it would have heard
    try:
        compile("1", "here", "eval")
    finally:
        is_listening = False
    assert "compile" in events


def changed(at: str, **news):
    return lambda phase, message: {**message, **news} if phase == at else message


def without(at: str, name: str):
    def change(phase, message):
        if phase == at:
            del message[name]
        return message

    return change


OTHERS = {
    "another init": lambda at: changed(at, init="0" * 32),
    "another phase": lambda at: changed(at, phase="facts"),
    "another rank": lambda at: changed(at, rank=0),
    "a rank that is not": lambda at: changed(at, rank=2),
    "something more": lambda at: changed(at, news=1),
    "no init": lambda at: without(at, "init"),
    "nothing said": lambda at: without(at, "said"),
    "no message": lambda at: lambda phase, message: [] if phase == at else message,
    "a number": lambda at: lambda phase, message: 7 if phase == at else message,
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("at", ["access", "allocate", "open"])
def test_what_is_not_of_this_init_is_not_taken(at, name):
    with two_ranks(Wire(OTHERS[name](at))) as native:
        with pytest.raises(
            WorkspaceError, match=f"group: what rank 1 says in this init .{at}"
        ) as caught:
            workspace.init()
        bad_arguments.assert_in_words(caught.value)
        assert workspace.find(ME.name) is None
        assert native.registered == {}
        for made in native.open:
            assert (at == "open") == bool(made.peers), "a handle of another init was opened"
            made.close()  # the real one closes when nobody has it any more


def test_each_init_has_a_name_of_its_own():
    wire = Wire()
    with two_ranks(wire):
        for _ in range(3):
            workspace.init()
    names = [message["init"] for _, message in wire.sent if "init" in message]
    assert len(set(names)) == 3
    assert all(len(name) == 32 for name in names)


@pytest.mark.parametrize("handle", ["", "xyz", "0", 5, None])
def test_what_is_no_handle_makes_all_ranks_unfused(handle):
    """It is not opened; and the others are told, not left waiting."""

    def change(phase, message):
        if phase == "allocate":
            message["said"]["handle"] = handle
        return message

    wire = Wire(change)
    with two_ranks(wire) as native:

        def refuses_other_sizes(handles):  # as csrc/host/workspace.cpp does
            if any(len(one) != len(HANDLE) // 2 for one in handles):
                raise ValueError("handles: 13 bytes each are required")

        original = native.Workspace

        def made(*arguments):
            inner = original(*arguments)
            inner.open_peers = refuses_other_sizes
            return inner

        native.Workspace = made
        found = workspace.init()
        assert not found.fused
        assert found.reason.startswith("rank 0: ")
        assert [one.disconnected for one in native.made] == [True]
    assert wire.phases() == ["facts", "access", "allocate", "open", "disconnect"]


@pytest.mark.parametrize("message", [[], 7, None, "facts", {}])
def test_facts_that_are_none(message):
    wire = Wire(lambda phase, theirs: message if phase == "facts" else theirs)
    with two_ranks(wire), pytest.raises(WorkspaceError, match="version: the same on all ranks"):
        workspace.init()
    assert wire.phases() == ["facts"]


def test_what_a_rank_tells_of_its_arguments_has_no_address():
    """Whatever they are: the message goes to the other ranks, and into their errors."""
    wire = Wire()
    with two_ranks(wire):
        for wrong in (object(), lambda: None, 10**5000, float("nan")):
            with pytest.raises((TypeError, ValueError)) as caught:
                workspace.init(hidden_size=wrong, timeout_s=wrong)
            bad_arguments.assert_in_words(caught.value)
    for _, message in wire.sent:
        bad_arguments.assert_no_pointers(json.dumps(message))
        assert workspace.Facts.of(message) == workspace.Facts.of(
            asdict(workspace.Facts.of(message))
        )

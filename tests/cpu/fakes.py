"""A stand-in for the module _C that needs no GPU, so that the agreement of `init` can be tested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from gemma_ar_norm import workspace

MULTIPROCESSORS = 132


class FakeNative:
    """What _C does for workspace.py, and a record of it. Attributes make a step fail."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.version = "1.2.3"
        self.allocate_error = self.open_error = ""
        self.no_access: dict[str, str] = {}  # uuid -> reason
        self.registered: dict[str, FakeWorkspace] = {}
        self.made: list[FakeWorkspace] = []

    def build_info(self) -> dict[str, Any]:
        return {"version": self.version, "protocol": 1, "cuda_runtime": "13.0"}

    def driver_status(self) -> str:
        return "a fake driver"

    def gpu_facts(self) -> dict[str, Any]:
        return {
            "device": 0,
            "uuid": f"gpu{self.rank}",
            "compute_capability": (9, 0),
            "multiprocessors": MULTIPROCESSORS - self.rank,
            "max_cluster": 8,
        }

    def peer_access(self, device: int, uuid: str) -> str:
        return self.no_access.get(uuid, "")

    def inbox_bytes(
        self, ranks: int, one_shot_rows: int, two_shot_rows: int, row_bytes: int
    ) -> int:
        return ranks * (1000 * one_shot_rows + two_shot_rows) * row_bytes

    def reclaim(self) -> int:
        return 0

    def unregister(self, name: str) -> None:
        self.registered.pop(name, None)

    def Workspace(self, *arguments: Any) -> FakeWorkspace:
        if self.allocate_error:
            raise RuntimeError(self.allocate_error)
        self.made.append(FakeWorkspace(self, *arguments))
        return self.made[-1]

    @property
    def open(self) -> list[FakeWorkspace]:
        return [one for one in self.made if not one.closed]


class FakeWorkspace:
    def __init__(self, native, device, rank, ranks, inbox_bytes, timeout_ns, rules, debug=False):
        self.native, self.rank, self.inbox_bytes = native, rank, inbox_bytes
        self.timeout_ns, self.rules, self.debug = timeout_ns, rules, debug
        self.closed = False
        self.peers: list[bytes] = []
        self.failed: tuple[int, int, int] | None = None
        self.reported: tuple[int, int, int] | None = None  # by a peer
        self.overlapped = False
        self.calls: list[list[int]] | None = None  # of all ranks, where they differ
        self.disconnected = False

    def ipc_handle(self) -> bytes:
        return b"\x00handle of %d\xff" % self.rank

    def open_peers(self, handles: list[bytes]) -> None:
        if self.native.open_error:
            raise RuntimeError(self.native.open_error)
        self.peers = handles

    def register(self, name: str) -> None:
        assert not self.closed
        self.native.registered[name] = self

    def disconnect(self) -> None:
        assert not self.closed
        self.disconnected = True

    def failure(self) -> tuple[int, int, int] | None:
        return self.failed

    def take_reports(self) -> None:
        assert not self.closed
        self.failed = self.failed or self.reported

    def has_overlapped(self) -> bool:
        return self.overlapped

    def disagreement(self) -> list[list[int]] | None:
        return self.calls

    def close(self) -> bool:
        assert not self.closed, "closed twice"
        self.closed = True
        return True


@contextlib.contextmanager
def fake_native(rank: int = 0, **attributes: Any) -> Iterator[FakeNative]:
    """A process that has a GPU, as far as workspace.py can see."""
    native = FakeNative(rank)
    for name, value in attributes.items():
        assert hasattr(native, name)
        setattr(native, name, value)
    with (
        mock.patch.object(workspace, "_C", native),
        mock.patch.object(workspace, "_gpu_facts", native.gpu_facts),
    ):
        yield native

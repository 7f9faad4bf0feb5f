"""Types of the pybind11 module (csrc/binding/module.cpp)."""

from collections.abc import Sequence
from typing import TypedDict

_Rule = tuple[int, ...]  # plan.Rule.numbers

class _BuildInfo(TypedDict):
    version: str
    cuda_runtime: str
    protocol: int

class _DeviceInfo(TypedDict):
    name: str
    uuid: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    max_cluster: int
    total_bytes: int

class _Shape(TypedDict):
    algorithm: int
    teams: int
    blocks_a_team: int
    threads: int
    packs_a_thread: int
    trigger: int
    lead_rows: int

class _Launch(_Shape):
    rows: int
    rule: int  # which of the rules

MAX_RANKS: int
MAX_HIDDEN: int
MIN_MULTIPROCESSORS_OF_CLUSTERS: int

def build_info() -> _BuildInfo: ...
def driver_status() -> str: ...
def device_info(device: int) -> _DeviceInfo: ...
def peer_access(device: int, peer_uuid: str) -> str: ...
def inbox_bytes(ranks: int, one_shot_rows: int, two_shot_rows: int, row_bytes: int) -> int: ...
def launches(
    rules: Sequence[_Rule],
    ranks: int,
    inbox_bytes: int,
    rows: int,
    row_packs: int,
    algorithm: str = "auto",
    limit: int = ...,  # of launches in the list; 2^64 - 1 unless given
) -> list[_Launch]: ...
def local_launch(
    rows: int,
    row_packs: int,
    multiprocessors: int,
    max_cluster: int = 8,
    starts_early: bool = True,
) -> _Shape: ...
def unregister(group_name: str) -> None: ...
def reclaim() -> int: ...
def set_slow_path_error(text: str) -> None: ...

class Workspace:
    def __init__(
        self,
        device: int,
        rank: int,
        ranks: int,
        inbox_bytes: int,
        timeout_ns: int,
        rules: Sequence[_Rule],
        debug: bool = False,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def inbox_bytes(self) -> int: ...
    def ipc_handle(self) -> bytes: ...
    def open_peers(self, handles: Sequence[bytes], /) -> None: ...
    def connect_local(self, ranks: Sequence[Workspace], /) -> None: ...
    def register(self, group_name: str, /) -> None: ...
    def disconnect(self) -> None: ...
    def failure(self) -> tuple[int, int, int] | None: ...
    def take_reports(self) -> None: ...
    def has_overlapped(self) -> bool: ...
    def disagreement(self) -> list[list[int]] | None: ...
    def close(self) -> bool: ...

"""Process groups: which one is meant, whether it still exists, and small exchanges through it.

A group's name stands for it in the ops, as in torch's functional collectives. torch gives a name
again after its group was destroyed, so the name alone does not tell that the group has changed:
this file notices, and tells workspace.py (`on_gone`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import WorkspaceError


class _NoDistributed:
    """A torch that was built without torch.distributed has no default group."""

    WORLD = None


GroupMember: Any = dist.distributed_c10d.GroupMember if dist.is_available() else _NoDistributed

NO_GROUP = ""  # the name that stands for one rank without a group
LOCAL_PREFIX = "gemma_ar_norm.local."  # names of ranks of a local_group
CHUNK_BYTES = 4096  # of a message in one all-gather
TAG = 0x67616E  # of our messages: not that of a user's
TAG_OF_NOTHING, TAG_OF_ROWS = TAG + 1, TAG + 2


@dataclass(frozen=True)
class Group:
    """A group as this rank sees it. process_group: None for one rank and for a local group."""

    name: str
    rank: int
    size: int
    process_group: Any = None

    @property
    def is_local(self) -> bool:
        return self.name.startswith(LOCAL_PREFIX)


# ------------------------------------------------------------------------------------ which group


def name_of(group: Any = None) -> str:
    """The name of `group`, None being the default group; what a call needs, in under 1 us."""
    if group is None:
        group = GroupMember.WORLD
        if group is None:
            return NO_GROUP
    known = _known.get(id(group))
    if known is not None:
        return known
    return group if isinstance(group, str) else _learn(group)


def name_for_call(group: Any = None) -> str:
    """`name_of`, but NO_GROUP for a group of one rank: the op needs no Python for that."""
    name = name_of(group)
    return NO_GROUP if name in _of_one_rank else name


def name_for_compile(group: Any = None) -> str:
    """`name_of` in a form that torch.compile traces; it guards on the group, not on its name."""
    if group is None:
        group = GroupMember.WORLD
    if group is None:
        return NO_GROUP
    name: str = group if isinstance(group, str) else group.group_name
    return name


def resolve(group: Any = None) -> Group:
    """The group that `group` means.

    group: None (the default group when torch.distributed is initialised, else one rank), a
        ProcessGroup, a LocalRank, or a name.
    Raises TypeError for anything else, ValueError for a group that this process is not in.
    """
    name = name_of(group)
    if name == NO_GROUP:
        return Group(NO_GROUP, 0, 1)
    if group is None:
        group = GroupMember.WORLD
    elif isinstance(group, str):
        group = named(name)
    if name.startswith(LOCAL_PREFIX):
        return Group(name, group.rank, group.size())
    return Group(name, group.rank(), group.size(), group)


def named(name: str) -> Any:
    """The live ProcessGroup or LocalRank of this name. Raises ValueError where there is none."""
    local = _local_ranks.get(name)
    if local is not None:
        return local
    group = _registered(name)
    if group is None:
        raise ValueError(
            f"group: the name of a live process group or local group is required; got {name!r}; "
            "make the group first, and call on its own ranks only"
        )
    name_of(group)  # from now on its end is noticed
    return group


def register_local(rank: Any) -> None:
    """Makes a LocalRank findable by its name, as long as it lives."""
    _local_ranks[rank.group_name] = rank


def on_gone(callback: Callable[[str], None]) -> None:
    """Has `callback(name)` called when the group of this name has been destroyed or replaced."""
    _gone_callbacks.append(callback)


_known: dict[int, str] = {}  # id of a group -> its name, until the group's end
_of_one_rank: set[str] = set()  # names of such groups, until their end
_owners: dict[str, tuple[str, int, int]] = {}  # name -> itself, a number for its group, its id
_tokens = itertools.count()
_lost: dict[str, list[int]] = {}  # name -> ranks that an exchange through gloo has missed
_gone_callbacks: list[Callable[[str], None]] = []
_local_ranks: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _learn(group: Any) -> str:
    """Names a group that is seen for the first time, and watches for its end."""
    if isinstance(group, int) and group == -100:  # torch's GroupMember.NON_GROUP_MEMBER
        raise ValueError(
            "group: this process must be a member of the group; got GroupMember.NON_GROUP_MEMBER; "
            "call on the group's own ranks only"
        )
    name = getattr(group, "group_name", None)
    if not isinstance(name, str) or not callable(getattr(group, "size", None)):
        raise TypeError(
            "group: None, a ProcessGroup, a rank of a local_group or a group's name is required; "
            f"got {type(group).__name__}; pass the ProcessGroup (of a DeviceMesh: mesh.get_group())"
        )
    if not name.startswith(LOCAL_PREFIX) and _registered(name) is not group:
        raise ValueError(
            f"group: a live group is required; got one, named {name!r}, that was destroyed; pass "
            "the group that took its place"
        )
    if name in _owners:
        _forget(*_owners[name])
    owner = (name, next(_tokens), id(group))
    _owners[name] = owner
    _known[id(group)] = name
    if group.size() == 1:
        _of_one_rank.add(name)
    for witness in (group, _destroy_witness(group)):
        if witness is not None:
            weakref.finalize(witness, _forget, *owner).atexit = False
    return name


def _destroy_witness(group: Any) -> Any:
    """An object that torch drops in destroy_process_group, or None.

    The group itself outlives that when somebody holds it, and torch.compile's guards do. Its
    entry in torch's table of groups holds the store, which nobody else does.
    """
    try:
        return dist.distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError, IndexError, TypeError):
        return None


def _forget(name: str, token: int, key: int) -> None:
    """Ends what was kept for a group and its name, unless the name is another group's by now."""
    if _owners.get(name) == (name, token, key):
        del _owners[name], _known[key]
        _of_one_rank.discard(name)
        _lost.pop(name, None)
        for callback in _gone_callbacks:
            callback(name)


def _registered(name: str) -> Any:
    """The process group that torch has under this name, or None."""
    try:
        c10d: Any = torch._C._distributed_c10d
        return c10d._resolve_process_group(name)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # TypeError: not UTF-8
        return None


# -------------------------------------------------------------------------------------- exchanges


def devices_of(process_group: Any) -> dict[str, str]:
    """{"cpu": "gloo", "cuda": "nccl"}: the backend of a process group for each device type."""
    config = str(dist.get_backend_config(process_group)).lower()
    if ":" not in config:
        return {"cuda" if config == "nccl" else "cpu": config}
    return dict(part.split(":", 1) for part in config.split(","))


def exchange_device(process_group: Any) -> torch.device:
    """Where tensors have to be for an exchange through this group; the CPU where it can be."""
    if "cpu" in devices_of(process_group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def all_gather_json(
    group: Group,
    message: Any,
    doing: str = "another exchange",
    timeout_s: float | None = None,
) -> list[Any]:
    """Every rank's message, in rank order. Collective.

    It needs nothing but tensors of uint8: no numpy, no pickle. A message of any length goes in
    chunks of CHUNK_BYTES, the first of which says how long it is. All messages of this package
    begin so; what has another size follows where all ranks have been found to do the same.
    doing: what this is for. Where that differs between ranks all raise WorkspaceError, which says
        what each is doing. timeout_s: of each chunk; see `_gather`, also for RanksLost.
    """
    if group.size == 1:
        return [json.loads(json.dumps(message))]
    device = exchange_device(group.process_group)
    data = json.dumps([doing, message], separators=(",", ":")).encode()
    data = len(data).to_bytes(8, "little") + data

    received = [b""] * group.size
    offset, longest = 0, CHUNK_BYTES
    while offset < longest:
        chunk = data[offset : offset + CHUNK_BYTES].ljust(CHUNK_BYTES, b"\0")
        sent = torch.tensor(list(chunk), dtype=torch.uint8, device=device)
        parts = _gather(group, sent, TAG, timeout_s)
        received = [old + bytes(part.tolist()) for old, part in zip(received, parts, strict=True)]
        offset += CHUNK_BYTES
        longest = max(8 + int.from_bytes(r[:8], "little") for r in received)
    all_said = [json.loads(r[8 : 8 + int.from_bytes(r[:8], "little")]) for r in received]
    differ = who_has([said[0] for said in all_said])
    if differ:
        raise WorkspaceError(
            f"group: the same on all ranks is required; got {differ}, on group {group.name!r}; "
            "make all calls of the group in the same order on all ranks, from one thread"
        )
    return [said[1] for said in all_said]


def all_gather_rows(group: Group, x: Tensor, timeout_s: float | None = None) -> list[Tensor]:
    """Every rank's contiguous CPU tensor `x`, in rank order. Collective. Of any dtype.

    The same number of bytes on all ranks: they have compared their calls (debug.py). gloo does not
    check that, and ends the process or leaves garbage. For timeout_s and RanksLost see `_gather`.
    """
    if group.size == 1 or x.numel() == 0:
        return [x] * group.size
    parts = _gather(group, x.view(-1).view(torch.uint8), TAG_OF_ROWS, timeout_s)
    return [part.view(x.dtype).view(x.shape) for part in parts]


def refuse_cpu_tensors(group: Group) -> None:
    """Raises ValueError where CPU tensors have no way to the group's other ranks."""
    if group.is_local:
        raise ValueError(
            "x: a CUDA tensor is required by a local group, whose ranks are streams of one GPU; "
            "got a CPU tensor; pass a CUDA tensor, or group=None for one rank"
        )
    if group.size > 1 and "cpu" not in devices_of(group.process_group):
        backends = dist.get_backend_config(group.process_group)
        raise ValueError(
            "x: a CPU tensor needs a group with a CPU backend; "
            f"got a group with the backends {backends!r}; move x to the GPU, or make the group "
            'with backend="cpu:gloo,cuda:nccl"'
        )


def who_has(values: Sequence[Any], key: Callable[[Any], Any] = lambda value: value) -> str:
    """Of all ranks' values: "4 on ranks 0, 2 and 5 on rank 1"; "" where their keys are alike."""
    ranks_of: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_of.setdefault(key(value), []).append(rank)
    if len(ranks_of) == 1:
        return ""
    return " and ".join(f"{values[ranks[0]]} on {_ranks(ranks)}" for ranks in ranks_of.values())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


AFTER_A_LOSS = (
    "see what became of it, then make a new process group of the ranks that are left, and call "
    "init() with that"
)


class RanksLost(RuntimeError):
    """ranks: from which nothing came; [] where the backend does not tell, but in its own words."""

    def __init__(self, ranks: list[int], words: str = "") -> None:
        super().__init__(_ranks(ranks) if ranks else f"some rank ({words})")
        self.ranks = ranks


def _gather(group: Group, sent: Tensor, tag: int, timeout_s: float | None) -> list[Tensor]:
    """Every rank's `sent`, flat and of one size on all ranks, in rank order. Collective.

    timeout_s: through gloo; None, and elsewhere: the group's own.
    Raises RanksLost: of a process that has ended at once, through gloo; else after that time.
    The group is of no use after that, and it is remembered who was lost. gloo's all_gather
    would not do: it hands parts on from rank to rank, and those that are no neighbours of the lost
    one were seen to wait for the timeout. So with gloo every rank hears from every other one, and
    knows whom it did not hear from.
    """
    parts = [torch.empty_like(sent) for _ in range(group.size)]
    if sent.device.type != "cpu" or devices_of(group.process_group).get("cpu") != "gloo":
        try:
            dist.all_gather(parts, sent, group=group.process_group)
        except RuntimeError as error:
            raise RanksLost([], str(error)) from error
        return parts

    if group.name in _lost:
        raise RanksLost(_lost[group.name])
    errors: dict[int, RuntimeError] = {}
    works: list[tuple[int, Any]] = []
    options = {"group": group.process_group, "tag": tag}
    parts[group.rank].copy_(sent)
    for peer in (r for r in range(group.size) if r != group.rank):
        # All are begun, also where one fails: the others wait for ours.
        for begin in (
            partial(dist.irecv, parts[peer], group_src=peer),
            partial(dist.isend, sent, group_dst=peer),
        ):
            try:
                works.append((peer, begin(**options)))
            except RuntimeError as error:
                errors.setdefault(peer, error)
    end = None if timeout_s is None else time.monotonic() + timeout_s
    for peer, work in works:
        try:
            if end is None:
                work.wait()
            else:  # gloo takes 0 for its own timeout
                work.wait(timedelta(seconds=max(end - time.monotonic(), 1e-3)))
        except RuntimeError as error:
            errors.setdefault(peer, error)
    if errors:
        _lost[group.name] = sorted(errors)
        hang_up(group)
        raise RanksLost(sorted(errors)) from next(iter(errors.values()))
    return parts


def hang_up(group: Group) -> None:
    """Closes this rank's connections, as gloo does when an operation's time is over.

    Some may have heard from the lost rank, in this exchange. In the next they find this one closed,
    instead of waiting for it: then they name it, too. One wait closes all; but a peer that has hung
    up before leaves nothing to wait for, so all are tried.
    """
    for peer in range(group.size):
        if peer != group.rank and peer not in _lost.get(group.name, ()):
            with contextlib.suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                options = {"group": group.process_group, "group_src": peer, "tag": TAG_OF_NOTHING}
                work = dist.irecv(nothing, **options)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))

"""Workspaces: the memory through which the ranks of a group reach each other, made by agreement.

`init` is collective and proceeds in phases. In each, every rank does its part, puts whatever goes
wrong into words, and gathers what all ranks say; then all draw the same conclusion from the same
facts. So nobody waits for a rank that has given up: a rank gives up only where all do.

    1  facts       what each rank is and was asked for            -> verdict()
    2  access      which peers each rank's GPU reaches            -> verdict()
    3  allocate    the inbox of each rank, and its IPC handle     -> all release it, WorkspaceError
    4  open        the inboxes of the peers                       -> all release, the unfused path

The exchanges go through the group, on the CPU where it has a CPU backend: through gloo from every
rank to every other one (groups.py), else by the group's all_gather.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import secrets
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from . import debug, groups, plan
from .errors import PeerTimeoutError, WorkspaceError, shown
from .groups import Group
from .library import _C
from .plan import MAX_RANKS, PACK_BYTES

MAX_HIDDEN = 16384
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_COMPUTE_CAPABILITY = (8, 0)
MAX_SHARED_CLUSTER = 4
"""Blocks of a cluster where ranks share a GPU. Larger ones were not tried beside kernels that are
not ours."""
SMALL_SHARE = _C.MIN_MULTIPROCESSORS_OF_CLUSTERS
MAX_SMALL_CLUSTER = 2
"""With fewer multiprocessors a rank, perhaps a share of a GPU under MPS, clusters have two blocks,
and launches that fill them have none. With 14 and 43 of 132 kernels of larger clusters were seen
never to start, and clusters of four did not always fit into 32 at once; pairs that leave half of
the places free have always started so far (docs/design.md)."""

DEFAULT_HIDDEN_SIZE = 8192
DEFAULT_MAX_ROWS = 256
DEFAULT_DTYPE = torch.bfloat16
DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 86400.0
MAX_MAX_ROWS = 1 << 27  # the rows of a launch are counted in as many bits

NANOSECONDS = 1_000_000_000

IN_CAPTURE = (
    "workspace: one made before the graph capture is required; got none, in a capture; call "
    "init() before the capture"
)

Result = TypeVar("Result")


# ---------------------------------------------------------------------------------- the agreement


@dataclass(frozen=True)
class Facts:
    """What one rank brings to the agreement. The fields have defaults, so that the facts of another
    build can be read at least as far as to say that it is another one."""

    version: str = "unknown"
    protocol: int = 0
    hidden_size: Any = None
    max_rows: Any = None
    dtype: Any = None
    timeout_s: Any = None
    debug: bool = False
    token: str = ""  # random: all ranks' together name this init
    error: str = ""  # why this rank cannot take part
    error_type: str = "WorkspaceError"
    no_gpu: str = ""  # why this rank has no GPU to offer
    host: str = ""
    pid: int = 0
    device: int = -1
    uuid: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0  # that this process may use; under MPS its share
    max_cluster: int = 1
    thread_percentage: float = 100.0  # of the GPU, by MPS

    @staticmethod
    def of(message: Any) -> Facts:
        known = {f.name for f in fields(Facts)}
        if not isinstance(message, dict):
            return Facts()
        facts = {name: value for name, value in message.items() if name in known}
        if "compute_capability" in facts:
            facts["compute_capability"] = tuple(facts["compute_capability"])
        return Facts(**facts)


@dataclass(frozen=True)
class Verdict:
    """What all ranks conclude: an error that all raise, or fused or not, with the reason."""

    fused: bool
    reason: str
    error: Exception | None = None


def verdict(facts: Sequence[Facts], access: Sequence[Sequence[str]] | None = None) -> Verdict:
    """The conclusion from all ranks' facts, in rank order. Pure: the same on every rank.

    access: what came of phase 2, when there was one: access[r][p] is "" when rank r reaches the GPU
        of rank p, else why it does not.
    """
    for differ, error_type in (("version", WorkspaceError), ("protocol", WorkspaceError)):
        text = _difference(facts, differ, "install one build of gemma_ar_norm for all ranks")
        if text:
            return Verdict(False, "", error_type(text))
    for rank, fact in enumerate(facts):
        if fact.error:
            kinds = {"TypeError": TypeError, "ValueError": ValueError}
            text = f"rank {rank}: {fact.error}"
            return Verdict(False, "", kinds.get(fact.error_type, WorkspaceError)(text))
    for name in ("hidden_size", "max_rows", "dtype", "timeout_s"):
        text = _difference(facts, name, "call init() with the same arguments on all ranks")
        if text:
            return Verdict(False, "", ValueError(text))
    if len({fact.debug for fact in facts}) > 1:
        on = [rank for rank, fact in enumerate(facts) if fact.debug]
        text = (
            f"{debug.VARIABLE}: the same on all ranks is required; got it set on ranks {on} of "
            f"{len(facts)}; set it on all ranks or on none"
        )
        return Verdict(False, "", WorkspaceError(text))
    reason = _why_not_fused(facts, access)
    if reason:
        return Verdict(False, reason)
    return Verdict(True, f"{len(facts)} ranks of one host reach each other's memory")


def _difference(facts: Sequence[Facts], name: str, remedy: str) -> str:
    values = [getattr(fact, name) for fact in facts]
    for rank, value in enumerate(values):
        if value != values[0]:
            return (
                f"{name}: the same on all ranks is required; got {values[0]!r} on rank 0 and "
                f"{value!r} on rank {rank}; {remedy}"
            )
    return ""


def _why_not_fused(facts: Sequence[Facts], access: Sequence[Sequence[str]] | None) -> str:
    if len(facts) == 1:
        return "one rank: there is nothing to reduce"
    if len(facts) > MAX_RANKS:
        return f"{len(facts)} ranks: the fused kernels take {MAX_RANKS} at most"
    processes: dict[tuple[str, int], int] = {}
    for rank, fact in enumerate(facts):
        if fact.no_gpu:
            return f"rank {rank} has no GPU: {fact.no_gpu}"
        if fact.host != facts[0].host:
            return "ranks 0 and {} are on different hosts ({} and {})".format(
                rank, facts[0].host.split("/")[0], fact.host.split("/")[0]
            )
        if tuple(fact.compute_capability) < MIN_COMPUTE_CAPABILITY:
            have, need = (".".join(map(str, c)) for c in (fact.compute_capability, (8, 0)))
            return f"the GPU of rank {rank} has compute capability {have}; {need} is required"
        first = processes.setdefault((fact.host, fact.pid), rank)
        if first != rank:
            return f"ranks {first} and {rank} are one process; local_group() is for that"
    for rank, reasons in enumerate(access or ()):
        for peer, reason in enumerate(reasons):
            if reason:
                return f"the GPU of rank {rank} does not reach that of rank {peer}: {reason}"
    return ""


def _argument_error(
    hidden_size: Any, max_rows: Any, dtype: Any, timeout_s: Any
) -> TypeError | ValueError | None:
    for name, value in (("hidden_size", hidden_size), ("max_rows", max_rows)):
        if not isinstance(value, int) or isinstance(value, bool):
            unit = "elements" if name == "hidden_size" else "rows"
            return TypeError(
                f"{name}: an int is required; got {type(value).__name__}; pass a number of {unit}"
            )
    wrong = dtype_error(dtype)
    if wrong is not None:
        return wrong
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool):
        return TypeError(
            f"timeout_s: a number is required; got {type(timeout_s).__name__}; pass seconds"
        )
    multiple = PACK_BYTES // dtype.itemsize
    if not 0 < hidden_size <= MAX_HIDDEN or hidden_size % multiple:
        return ValueError(
            f"hidden_size: a multiple of {multiple} from {multiple} to {MAX_HIDDEN} is required "
            f"for {_name(dtype)}; got {shown(hidden_size)}; pad the rows"
        )
    if not 0 < max_rows <= MAX_MAX_ROWS:
        return ValueError(
            f"max_rows: from 1 to {MAX_MAX_ROWS} is required; got {shown(max_rows)}; "
            "pass the rows of the largest call that should be one launch"
        )
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        return ValueError(
            f"timeout_s: more than 0 and at most {MAX_TIMEOUT_S:.0f} is required; "
            f"got {shown(timeout_s)}; pass how long a call may wait for a peer, in seconds"
        )
    return None


def dtype_error(dtype: Any) -> TypeError | None:
    """What is wrong with it as the dtype of x; None: nothing."""
    if not isinstance(dtype, torch.dtype):
        return TypeError(
            f"dtype: a torch.dtype is required; got {type(dtype).__name__}; pass torch.bfloat16"
        )
    if dtype not in DTYPES:
        return TypeError(
            f"dtype: bfloat16, float16 or float32 is required; got {_name(dtype)}; "
            "pass the dtype of the activations"
        )
    return None


def device_of(device: Any) -> torch.device:
    """torch.device(device), a CUDA device or the CPU. Raises ValueError in our words."""
    try:
        if isinstance(device, int) and not 0 <= device < 128:
            raise ValueError
        found = torch.device(device)
        if found.type in ("cpu", "cuda"):
            return found
    except (RuntimeError, TypeError, ValueError, OverflowError):
        pass
    got = repr(device) if isinstance(device, str) else shown(device)
    if not isinstance(device, str | int | torch.device):
        got = type(device).__name__
    raise ValueError(f"device: a CUDA device or the CPU is required; got {got}; pass 'cuda'")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _own_facts(me: Group, arguments: dict[str, Any]) -> Facts:
    build = _C.build_info()
    facts: dict[str, Any] = {
        "version": build["version"],
        "protocol": build["protocol"],
        "debug": debug.is_on(),
        "token": secrets.token_hex(8),
    }
    facts |= {name: _said(value) for name, value in arguments.items()}
    wrong = _argument_error(**arguments)
    if wrong is not None:
        return Facts(**facts, error=str(wrong), error_type=type(wrong).__name__)
    if me.size > 1 and is_capturing():
        return Facts(**facts, error=IN_CAPTURE)
    facts.update(host=_host(), pid=os.getpid())
    gpu, why_none = _attempt(_gpu_facts)
    return Facts(**facts, **(gpu or {}), no_gpu=why_none)


def _said(value: Any) -> Any:
    """An argument for the other ranks, to be compared. What it can be is only known afterwards."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, int):
        return value if value.bit_length() < 64 else shown(value)
    return value if isinstance(value, float) else type(value).__name__


def _gpu_facts() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees none ({_C.driver_status()})")
    device = torch.cuda.current_device()
    info = _C.device_info(device)
    share = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return {
        "device": device,
        "uuid": info["uuid"],
        "compute_capability": tuple(info["compute_capability"]),
        "multiprocessors": min(share, info["multiprocessors"]),
        "max_cluster": info["max_cluster"],
        "thread_percentage": float(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") or 100),
    }


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured. False in a torch without CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _host() -> str:
    """Tells hosts apart: names repeat, and the boot of a machine has an id of its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _attempt(action: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result of an action, or why it has none: the others are told, not left waiting."""
    try:
        return action(), ""
    except Exception as error:
        return None, _words(error)


# -------------------------------------------------------------------------------------- workspace


class Workspace:
    """A group's workspace on this rank, from `init`. Also says so where the group has none.

    fused: calls take the fused path. reason: why they do, or do not, in words.
    group_name, rank, ranks: the group. generation: how many workspaces the group's name has had,
    this one included. inbox_bytes: of device memory, 0 when not fused.

    The package keeps it until `close()`, until the group is destroyed, until `init` makes another
    for the group, or until the process ends; so it need not be kept. A context manager closes it.
    After `close()` the group has no workspace: a call makes one with the defaults.
    """

    def __init__(
        self,
        group: Group,
        reason: str,
        native: Any = None,
        *,
        device: int = -1,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        rules: Sequence[plan.Rule] = (),
        debug: bool = False,
    ) -> None:
        self.group_name = group.name
        self.rank = group.rank
        self.ranks = group.size
        self.reason = reason
        self.fused = native is not None
        self.inbox_bytes: int = native.inbox_bytes if native is not None else 0
        self.generation = 0
        self.timeout_s = timeout_s
        self.debug = debug  # on all ranks or on none: verdict()
        self.device = device  # of the inbox, or that calls run on; -1: none
        self.rules = tuple(rules)  # the launch plan, for explain()
        self._native = native
        # Runs once: at close(), when collected, or when the interpreter exits.
        self._release = weakref.finalize(self, _release, native, os.getpid())

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def close(self) -> None:
        """Gives everything back; calls that are queued are waited for, peers are not.

        To be called on all ranks, in the same place of their calls. The second time does nothing.
        Graphs that were captured with this workspace must not be replayed any more. Within a graph
        capture the memory is kept, until the next `init` or `local_group`, or the end of the
        process. While another thread captures it is kept too, and that capture fails: closing, and
        the collection of a workspace, wait for the device.
        """
        with _lock:
            if _records.get(self.group_name) is self:
                del _records[self.group_name]
                if self.fused:
                    _C.unregister(self.group_name)
        self._release()

    def check(self) -> None:
        """Raises PeerTimeoutError when a call has failed. Does not wait for queued calls.

        Where GEMMA_AR_NORM_DEBUG=1 was set when the workspace was made, also WorkspaceError when
        two calls of it ran at the same time, which streams and graphs must not let happen, or when
        the ranks' calls were not alike: it says which rank's differ in what.
        """
        if self.closed or self._native is None:
            return
        if self._native.has_overlapped():
            raise WorkspaceError(
                f"workspace: calls of group {self.group_name!r} one after the other are required; "
                "got two that ran at the same time; order the replays of graphs that were captured "
                "with it"
            )
        calls = self._native.disagreement()
        if calls is not None:
            raise WorkspaceError(debug.difference([debug.summary_of_words(c) for c in calls]))
        failure = self._native.failure()
        if failure is not None:
            peer, call, row = failure
            raise PeerTimeoutError(
                f"rank {peer}: its rows of call {call} on group {self.group_name!r} are required "
                f"within {self.timeout_s:g} s; got none for row {row}, and NaN in the outputs; see "
                "what became of that rank, then call init() on all ranks",
                peer,
                call,
                row,
            )

    def synchronize(self) -> None:
        """Waits for all work queued on the device, then `check()`.

        Also raises PeerTimeoutError where this rank's calls were right but peers have given up on
        it: who is late may still find in its call all that it needs.
        """
        if self.device >= 0:
            torch.cuda.synchronize(self.device)
        if self._native is not None and not self.closed:
            self._native.take_reports()
        self.check()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "fused" if self.fused else "unfused"
        return (
            f"<Workspace of group {self.group_name!r}, rank {self.rank} of {self.ranks}, "
            f"generation {self.generation}, {state}: {self.reason}>"
        )


_lock = threading.RLock()  # never held across an exchange
_records: dict[str, Workspace] = {}  # group name -> its workspace
_generations: dict[str, int] = {}  # group name -> workspaces it has had
_postponed: list[Any] = []  # native workspaces that were given up while a graph was captured


def find(group_name: str) -> Workspace | None:
    """The workspace of the group of this name, fused or not; None when there is none yet."""
    return _records.get(group_name)


def _register(workspace: Workspace) -> None:
    name = workspace.group_name
    with _lock:
        workspace.generation = _generations[name] = _generations.get(name, 0) + 1
        if workspace.fused:
            workspace._native.register(name)
        _records[name] = workspace


def _release(native: Any, pid: int) -> None:
    """Closes a native workspace, wherever this comes from: close(), a collection, the exit."""
    if native is None or os.getpid() != pid:  # after a fork, CUDA is the parent's
        return
    # Closing waits for the device, which no capture allows, of whatever thread.
    if is_capturing() or not _close(native):
        _postponed.append(native)


def _close(native: Any) -> bool:
    """False: a graph is being captured somewhere, and it is to be tried again."""
    try:
        return bool(native.close())
    except Exception:
        return True  # CUDA may be gone, and nothing is left to be done


def _release_postponed() -> None:
    if not _postponed or is_capturing():
        return
    pending = []
    with contextlib.suppress(IndexError):  # another thread may be here too
        while True:
            pending.append(_postponed.pop())
    _postponed.extend(native for native in pending if not _close(native))


def _group_gone(group_name: str) -> None:
    workspace = _records.get(group_name)
    if workspace is not None:
        workspace.close()


groups.on_gone(_group_gone)
atexit.register(_release_postponed)


# ------------------------------------------------------------------------------------------- init


def init(
    group: Any = None,
    *,
    hidden_size: int = DEFAULT_HIDDEN_SIZE,
    max_rows: int = DEFAULT_MAX_ROWS,
    dtype: torch.dtype = DEFAULT_DTYPE,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Workspace:
    """Makes the group's workspace, a new one where it has one. Collective: all ranks call it.

    Where it was not called, the first call of the group makes one with max_rows and timeout_s as
    here and the hidden size and dtype of that call; but not inside a graph capture. The workspace
    is a number of bytes on the current CUDA device: with row = hidden_size dtype.itemsize,

        2 max( (ranks - 1) one_shot_rows row, 2 (ranks - 1) / ranks max_rows row ),

    one-shot's row and two-shot's slice of it rounded up to 512 bytes, the whole to 2 MiB, where
    one_shot_rows, at most max_rows, is the largest call that the plan does by one-shot. It serves
    any hidden size and dtype, and a call with more rows than fit in it takes several launches.

    group: a ProcessGroup of any backend, or None for the default group. Where the ranks have no
        way to each other's memory, and where there is one rank, the result is a Workspace with
        fused=False that says why, and calls take the unfused path.
    hidden_size: elements of a row, max_rows: rows of a launch.
    timeout_s: how long a call may wait for a peer before it fails with PeerTimeoutError.

    Raises the same on all ranks: TypeError, ValueError for arguments that are wrong or differ
    between ranks; WorkspaceError when a rank cannot take part, as for want of memory, or is lost:
    at once where gloo sees that its process has ended, else after the group's own timeout. An old
    workspace stays where the first exchange shows what is wrong, and is closed where a later one
    does. Waits for the device; not within a capture.
    Graphs that were captured with the group's old workspace must not be replayed any more. Calls of
    several groups with ranks on one GPU must come one after the other there, in the same order on
    all of these GPUs: on one stream, or ordered by events (docs/guide.md).

    >>> workspace = gemma_ar_norm.init(hidden_size=5376, max_rows=128)
    >>> print(workspace.fused, workspace.reason)
    >>> norm_out, residual = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, weight, residual)
    """
    me = groups.resolve(group)
    if me.is_local:
        raise ValueError(
            f"group: a process group is required; got {me.name!r}, a rank of a local group, which "
            "has its workspace; call local_group() again for another"
        )
    if me.size > 1 and is_capturing():
        _refuse_to_be_captured(me)
    arguments = {
        "hidden_size": hidden_size,
        "max_rows": max_rows,
        "dtype": dtype,
        "timeout_s": timeout_s,
    }

    # 1. Facts.
    own = _own_facts(me, arguments)
    facts = [Facts.of(message) for message in _all_say(me, "facts", asdict(own))]
    exchange = Exchange(me, "".join(fact.token for fact in facts))
    conclusion = verdict(facts)
    if conclusion.error is not None:
        raise conclusion.error
    old = find(me.name)
    if old is not None:
        old.close()
    _release_postponed()

    # 2. Access. (After it every rank has closed its old workspace, whose memory can go.)
    if conclusion.fused:
        access = exchange.gather("access", _access(me.rank, facts))
        conclusion = verdict(facts, access)
    if not conclusion.fused:
        device = own.device if not own.no_gpu else -1
        workspace = Workspace(
            me, conclusion.reason, device=device, timeout_s=timeout_s, debug=own.debug
        )
        _register(workspace)
        return workspace

    rules = _rules(facts)
    native, handles = _allocate(exchange, own, rules, arguments)
    with _given_back_where_it_fails(native):
        reason = _open_peers(exchange, native, handles)
        if reason:
            # Nobody frees an inbox before all have unmapped it.
            _, error = _attempt(native.disconnect)
            exchange.gather("disconnect", {"error": error})
    if reason:
        native.close()
        native, rules = None, ()
    workspace = Workspace(
        me,
        reason or conclusion.reason,
        native,
        device=own.device,
        timeout_s=timeout_s,
        rules=rules,
        debug=own.debug,
    )
    _register(workspace)
    return workspace


def _all_say(me: Group, phase: str, message: Any) -> list[Any]:
    """What each rank says in this phase of init, in rank order. Collective."""
    try:
        return groups.all_gather_json(me, message, f"init() ({phase})")
    except groups.RanksLost as lost:
        raise WorkspaceError(
            f"group: every rank's part in the exchange of init() is required on {me.name!r}; got "
            f"none from {lost}; {groups.AFTER_A_LOSS}"
        ) from lost


@dataclass(frozen=True)
class Exchange:
    """What the ranks of a group tell each other after the facts of one init.

    The group carries it, so nobody outside can speak. But a rank that is elsewhere in its calls of
    the group can: two inits at once, or a gathering of the user's. No handle, and nothing else, is
    taken from a message but that of this init, this phase and the rank whose place it has.
    """

    me: Group
    token: str  # of the init

    def gather(self, phase: str, said: Any) -> list[Any]:
        """What each rank says, in rank order. Collective."""
        message = {"init": self.token, "phase": phase, "rank": self.me.rank, "said": said}
        messages = _all_say(self.me, phase, message)
        for rank, got in enumerate(messages):
            wanted = {**message, "rank": rank}
            if not isinstance(got, dict) or {**got, "said": said} != wanted or "said" not in got:
                raise WorkspaceError(
                    f"group: what rank {rank} says in this init ({phase}) is required; got "
                    f"something else on group {self.me.name!r}; make all calls of the group in the "
                    "same order on all ranks, from one thread"
                )
        return [got["said"] for got in messages]


def _refuse_to_be_captured(me: Group) -> None:
    """Raises where the exchange itself would be captured. Elsewhere it tells the other ranks."""
    if groups.exchange_device(me.process_group).type != "cpu":
        raise WorkspaceError(IN_CAPTURE)


def _access(rank: int, facts: Sequence[Facts]) -> list[str]:
    """For each peer: "" or why this rank's GPU does not reach the peer's."""
    reasons = []
    for peer, fact in enumerate(facts):
        if peer == rank:
            reasons.append("")
        else:
            reason, error = _attempt(partial(_C.peer_access, facts[rank].device, fact.uuid))
            reasons.append(error or str(reason))
    return reasons


def _rules(facts: Sequence[Facts]) -> Sequence[plan.Rule]:
    """The launch plan, from what is equal on all ranks: the least that any of them has."""
    multiprocessors = min(fact.multiprocessors for fact in facts)
    neighbours = max(Counter(fact.uuid for fact in facts).values())
    # Ranks that share a GPU have their parts of it from MPS, or else none can count on more than
    # an equal part.
    shared = any(
        sum(other.thread_percentage for other in facts if other.uuid == fact.uuid) > 100
        for fact in facts
        if neighbours > 1
    )
    if shared:
        multiprocessors = max(1, multiprocessors // neighbours)
    max_cluster = min(fact.max_cluster for fact in facts)
    is_small = multiprocessors < SMALL_SHARE
    if is_small:
        max_cluster = min(max_cluster, MAX_SMALL_CLUSTER)
    elif neighbours > 1:
        max_cluster = min(max_cluster, MAX_SHARED_CLUSTER)
    return plan.make_rules(
        ranks=len(facts),
        multiprocessors=multiprocessors,
        compute_capability=min(fact.compute_capability for fact in facts),
        max_cluster=max_cluster,
        shared_device=shared,
        one_gpu=neighbours == len(facts),
        clusters_fill=not is_small,
    )


def _make_native(
    device: int,
    rank: int,
    ranks: int,
    rules: Sequence[plan.Rule],
    arguments: dict[str, Any],
    debug: bool,
) -> Any:
    """A native workspace, not connected yet, for what init() was asked for."""
    max_rows = arguments["max_rows"]
    row_bytes = arguments["hidden_size"] * arguments["dtype"].itemsize
    one_shot_rows = plan.most_one_shot_rows(rules, max_rows, row_bytes // PACK_BYTES)
    inbox_bytes = _C.inbox_bytes(ranks, one_shot_rows, max_rows, row_bytes)
    timeout_ns = max(1, int(arguments["timeout_s"] * NANOSECONDS))
    numbers = [rule.numbers for rule in rules]
    return _C.Workspace(device, rank, ranks, inbox_bytes, timeout_ns, numbers, debug)


def _allocate(
    exchange: Exchange, own: Facts, rules: Sequence[plan.Rule], arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Phase 3: the native workspace, and all ranks' IPC handles. Raises on all ranks or on none."""
    me = exchange.me

    def allocate() -> tuple[Any, str]:
        _C.reclaim()
        native = _make_native(own.device, me.rank, me.size, rules, arguments, own.debug)
        return native, native.ipc_handle().hex()

    made, error = _attempt(allocate)
    native, handle = made or (None, "")
    said = {"handle": handle, "rules": repr(rules), "error": error}
    with _given_back_where_it_fails(native):
        answers = exchange.gather("allocate", said)
    problem = _first_error(answers)
    if not problem and len({answer["rules"] for answer in answers}) > 1:
        problem = (
            "rules: the same launch plan on all ranks is required; got different ones; install one "
            "build on all, or report it"
        )
    if problem:
        if native is not None:
            native.close()
        raise WorkspaceError(problem)
    return native, [answer["handle"] for answer in answers]


def _open_peers(exchange: Exchange, native: Any, handles: list[str]) -> str:
    """Phase 4: maps the peers' inboxes. "" or why not all ranks could, the same on all."""
    _, error = _attempt(lambda: native.open_peers([bytes.fromhex(handle) for handle in handles]))
    return _first_error(exchange.gather("open", {"error": error}))


@contextlib.contextmanager
def _given_back_where_it_fails(native: Any) -> Iterator[None]:
    """An exchange in which a rank was lost raises. Whoever handles that makes another workspace,
    while the exception still holds this frame and what is in it."""
    try:
        yield
    except BaseException:
        if native is not None:
            native.close()
        raise


def _first_error(answers: Sequence[dict[str, Any]]) -> str:
    for rank, answer in enumerate(answers):
        if answer["error"]:
            return f"rank {rank}: {answer['error']}"
    return ""


# ------------------------------------------------------------------------------------ local groups


@dataclass(frozen=True, eq=False)
class LocalRank:
    """A rank of a local group: pass it as `group`, within `torch.cuda.stream(rank.stream)`."""

    rank: int
    ranks: int
    group_name: str
    stream: torch.cuda.Stream
    workspace: Workspace = field(repr=False)

    def size(self) -> int:
        return self.ranks


class LocalGroup(Sequence[LocalRank]):
    """The ranks of `local_group`, in order. A context manager closes it."""

    def __init__(self, ranks: Sequence[LocalRank]) -> None:
        self._ranks = tuple(ranks)

    @overload
    def __getitem__(self, index: int) -> LocalRank: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LocalRank, ...]: ...
    def __getitem__(self, index: int | slice) -> LocalRank | tuple[LocalRank, ...]:
        return self._ranks[index]

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[LocalRank]:
        return iter(self._ranks)

    def synchronize(self) -> None:
        """Waits for the device, then `check()` of each rank's workspace."""
        for rank in self._ranks:
            rank.workspace.synchronize()

    def close(self) -> None:
        """Gives everything back. The second time does nothing."""
        for rank in self._ranks:
            rank.workspace.close()

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_local_count = itertools.count()


def local_group(
    n: int,
    *,
    hidden_size: int = DEFAULT_HIDDEN_SIZE,
    max_rows: int = DEFAULT_MAX_ROWS,
    dtype: torch.dtype = DEFAULT_DTYPE,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    device: torch.device | int | str | None = None,
) -> LocalGroup:
    """n ranks on streams of this process and one GPU, for tests and benchmarks.

    The peers reach each other by pointer; the kernels and the protocol are those of n processes.
    Each rank has 1/n of the GPU's multiprocessors. The kernels of all ranks must be able to run at
    the same time: queue the call of every rank before waiting for any, each on its own stream. That
    goes for whatever else is on these streams: a kernel that finds no room beside waiting ones, one
    that needs much shared memory, say, waits until they run into their deadline.

    n: 2 to 8. device: the current CUDA device unless given. The others: see `init`.
    Raises TypeError, ValueError for wrong arguments, WorkspaceError without a GPU or memory.

    >>> with gemma_ar_norm.local_group(2) as ranks:
    ...     for rank, x in zip(ranks, xs):
    ...         with torch.cuda.stream(rank.stream):
    ...             outs.append(gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, w, group=rank))
    """
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n: an int is required; got {type(n).__name__}; pass a number of ranks")
    if not 2 <= n <= MAX_RANKS:
        raise ValueError(
            f"n: from 2 to {MAX_RANKS} is required; got {shown(n)}; pass a number of ranks"
        )
    wrong = _argument_error(hidden_size, max_rows, dtype, timeout_s)
    if wrong is not None:
        raise wrong
    wanted = None if device is None else _cuda_device(device)
    if not torch.cuda.is_available():
        raise WorkspaceError(
            "local_group: a CUDA GPU is required; "
            f"got torch {torch.__version__}, {_C.driver_status()}; use processes and gloo on a CPU"
        )
    index = torch.cuda.current_device() if wanted is None else _existing(wanted)
    info = _C.device_info(index)
    rules = plan.make_rules(
        ranks=n,
        multiprocessors=max(1, info["multiprocessors"] // n),
        compute_capability=info["compute_capability"],
        max_cluster=min(info["max_cluster"], MAX_SHARED_CLUSTER),
        shared_device=True,
        one_gpu=True,
    )
    arguments = {
        "hidden_size": hidden_size,
        "max_rows": max_rows,
        "dtype": dtype,
        "timeout_s": timeout_s,
    }
    return _local_group(n, index, rules, arguments)


def _local_group(
    n: int, index: int, rules: Sequence[plan.Rule], arguments: dict[str, Any]
) -> LocalGroup:
    """`local_group` with this launch plan, on the GPU of this index."""
    _release_postponed()
    natives: list[Any] = []
    debug_mode = debug.is_on()
    try:
        for rank in range(n):
            natives.append(_make_native(index, rank, n, rules, arguments, debug_mode))
        for native in natives:
            native.connect_local(natives)
    except Exception as error:
        for native in natives:
            native.close()
        raise WorkspaceError(f"local_group: {_words(error)}") from error

    count = next(_local_count)
    ranks = []
    for rank, native in enumerate(natives):
        name = f"{groups.LOCAL_PREFIX}{count}.{rank}"
        workspace = Workspace(
            Group(name, rank, n),
            f"{n} ranks are streams of one process",
            native,
            device=index,
            timeout_s=arguments["timeout_s"],
            rules=rules,
            debug=debug_mode,
        )
        stream = torch.cuda.Stream(index)
        local = LocalRank(rank, n, name, stream, workspace)
        groups.register_local(local)
        _register(workspace)
        weakref.finalize(local, _group_gone, name).atexit = False
        ranks.append(local)
    return LocalGroup(ranks)


def _cuda_device(device: Any) -> torch.device:
    is_number = isinstance(device, int) and not isinstance(device, bool)
    found = torch.device("cuda", device) if is_number and 0 <= device < 128 else device_of(device)
    if found.type != "cuda" or isinstance(device, bool):
        raise ValueError(f"device: a CUDA device is required; got {found}; pass 'cuda'")
    return found


def _existing(device: torch.device) -> int:
    index: int | None = device.index
    count = torch.cuda.device_count()
    if index is None:
        return torch.cuda.current_device()
    if index >= count:
        raise ValueError(
            f"device: one of the {count} CUDA devices that torch sees is required; got {device}; "
            "see CUDA_VISIBLE_DEVICES"
        )
    return index


# ------------------------------------------------------------------------------- by group, for all


def check(group: Any = None) -> None:
    """`Workspace.check()` of the group's workspace; nothing where it has none."""
    workspace = find(groups.name_of(group))
    if workspace is not None:
        workspace.check()


def synchronize(group: Any = None) -> None:
    """`Workspace.synchronize()` of the group's workspace; nothing where it has none."""
    workspace = find(groups.name_of(group))
    if workspace is not None:
        workspace.synchronize()


def close(group: Any = None) -> None:
    """`Workspace.close()` of the group's workspace; nothing where it has none."""
    workspace = find(groups.name_of(group))
    if workspace is not None:
        workspace.close()

"""One rank of the fault tests: ranks that are killed, stopped, or cannot take part.

    python tests/gpu/fault_worker.py DIRECTORY CASE ...     (started by faults.py)

Cases run one after the other. Where one kills a rank, the others make a new group of those that are
left and go on with it, so the ranks become fewer. Each rank writes DIRECTORY/rank<r>.jsonl, r being
its first number: a line a case, with what went wrong and what it saw. Ranks meet by files, for a
group with a dead rank is of no use. Every wait ends.

Without a GPU the same cases run on the CPU path: there a call raises what gloo raises, and `init`
talks to the stand-in of tests/cpu/fakes.py, so that it has all its phases.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import checks
import torch
import torch.distributed as dist
from cpu import fakes
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import PeerTimeoutError, WorkspaceError, groups, launcher, plan, workspace
from gpu import worker

FUSED = plan.FUSED_ALGORITHMS
HIDDEN = 2048
ROWS = 16
TIMEOUT_S = 1.5  # of calls whose peer does not come
IN_CALL_TIMEOUT_S = 4.0  # another rank comes late, once the killed one has left the GPU
LONG_TIMEOUT_S = 20.0
GROUP_TIMEOUT_S = 30.0
SHORT_GROUP_TIMEOUT_S = 3.0  # where a stopped rank lets the group's own time run out
LATE_S = 2.0  # after the timeout, until all have raised
AT_ONCE_S = 1.0
SOON_S = 10.0  # where nobody is to wait for a timeout; on a busy machine
MEET_LIMIT_S = 60.0
CYCLES = 200


# ------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class FaultCase:
    """What a line of the table says of a case, and the case. kills: whether it ends a rank."""

    name: str
    title: str
    expected: str
    run: Callable[[Me], None]
    kills: bool = False


CASES: dict[str, FaultCase] = {}


def case(title: str, expected: str, *, kills: bool = False, each: tuple[str, ...] = ()):
    """Registers a case; with `each` one for each of these, which is its second argument."""

    def register(function):
        for one in each or ("",):
            name = f"{function.__name__}[{one}]" if one else function.__name__
            run = functools.partial(function, mode=one) if one else function
            told = f"{title}, {one}" if one else title
            CASES[name] = FaultCase(name, told, expected, run, kills)
        return function

    return register


@dataclass
class Me(worker.Ranks):
    """This rank. rank, world: in the group that there is now. first: its number at the start."""

    first: int = 0
    members: list[int] = field(default_factory=list)  # of the group: their first numbers
    pids: list[int] = field(default_factory=list)  # by first number
    directory: Path = Path()
    results: TextIO = sys.stdout
    case_name: str = ""
    seen: list[tuple[str, float | None]] = field(default_factory=list)
    kills: int = 0
    meetings: int = 0

    # ---- what is seen

    def note(self, what: str, seconds: float | None = None) -> None:
        self.seen.append((what, seconds))

    def note_within(self, limit_s: float, what: str, seconds: float) -> None:
        self.expect(seconds <= limit_s, f"{what}: {seconds:.2f} s; {limit_s} s are allowed")
        self.note(what, seconds)

    # ---- other ranks, without the group

    def meet(self) -> None:
        """Waits until all of the group are here. By files: a rank may be killed right after it."""
        self.meetings += 1
        here = [self.directory / f"meeting{self.meetings}.{one}" for one in self.members]
        here[self.rank].touch()
        wait_until(lambda: all(one.exists() for one in here), "all ranks here")

    def state_of(self, rank: int) -> str:
        """R, S and D: it runs. T: it is stopped. Z: it has ended. "": it is gone."""
        try:
            stat = Path(f"/proc/{self.pids[self.members[rank]]}/stat").read_text()
        except OSError:
            return ""
        return stat.rsplit(")", 1)[1].split()[0]

    def await_death(self, rank: int) -> None:
        wait_until(lambda: self.state_of(rank) in ("Z", "X", ""), f"the end of rank {rank}")
        if self.gpu:
            time.sleep(0.3)  # a process's last thread gives back what it has of the GPU

    def die(self) -> None:
        self.results.write(json.dumps({"case": self.case_name, "killed": True}) + "\n")
        self.results.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in(self, seconds: float) -> None:
        """Another process kills this one, in the middle of what it does then."""
        self.results.write(json.dumps({"case": self.case_name, "killed": True}) + "\n")
        self.results.flush()
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -KILL {os.getpid()}"])

    def stall(self, seconds: float) -> None:
        """Is stopped now, and goes on after so long."""
        pid = os.getpid()
        script = f"kill -STOP {pid}; sleep {seconds}; kill -CONT {pid}"
        subprocess.Popen(["sh", "-c", script]).wait(timeout=seconds + MEET_LIMIT_S)

    def await_stall(self, rank: int) -> None:
        wait_until(lambda: self.state_of(rank) == "T", f"rank {rank} to be stopped")

    def choose_victim(self) -> int:
        """The last, the first and the second rank of the group in turn."""
        return (self.world - 1, 0, 1)[self.kills % 3]

    # ---- workspaces

    def make(self, group: Any = None, timeout_s: float = LONG_TIMEOUT_S, max_rows: int = 64):
        return gemma_ar_norm.init(group, hidden_size=HIDDEN, max_rows=max_rows, timeout_s=timeout_s)

    def expect_works(self, what: str, group: Any = None) -> None:
        for algorithm in FUSED:
            made = self.case(ROWS, HIDDEN, seed=100 + self.kills)
            outputs = self.call(made, group=group, algorithm=algorithm)
            self.expect_bits(made, outputs, f"{what}, {algorithm}")
        gemma_ar_norm.synchronize(group)

    def expect_context(self) -> None:
        total = torch.ones(1000, device=self.device).sum().item()
        self.expect(total == 1000, f"the context does not work: {total}")

    def go_on_without(self, victim: int) -> None:
        """What survivors do: a new group of those that are left, and init on it."""
        self.expect_context()
        start = time.monotonic()
        gemma_ar_norm.close()
        dist.destroy_process_group()
        del self.members[victim]
        self.kills += 1
        self.rank, self.world = self.members.index(self.first), len(self.members)
        dist.init_process_group(
            "gloo",
            init_method=f"{os.environ[launcher.RENDEZVOUS]}_{self.kills}",
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        made = self.make()
        self.note("a new group and init of those that are left took", time.monotonic() - start)
        self.expect(made.fused == self.gpu, made.reason)
        self.expect_works("after a new init")

    def expect_same_text(self, errors: list[Exception], group: Any = None) -> None:
        text = str(errors[0]) if errors else ""
        found = groups.all_gather_json(groups.resolve(group), text)
        self.expect(len(set(found)) == 1, f"different errors: {found}")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + MEET_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {MEET_LIMIT_S:.0f} s for {what}")
        time.sleep(0.01)


# ------------------------------------------------------------------------------- ways of calling


class Eager:
    """A call into memory that is poisoned before."""

    def __init__(self, me: Me, made: checks.Case, algorithm: str, group: Any = None) -> None:
        self.me, self.made = me, made
        self.options = {"algorithm": algorithm, "group": group}
        self.out = (torch.empty_like(made.residual), torch.empty_like(made.residual))

    def queue(self) -> None:
        for output in self.out:
            output.fill_(77.0)
        self.me.call(self.made, out=self.out, **self.options)

    def calls(self) -> list[tuple[checks.Case, tuple[Tensor, ...]]]:
        """Of each call of the last `queue`: the case and the outputs."""
        return [(self.made, self.out)]

    def expect_fails_at_once(self, victim: int) -> None:
        with self.me.expect_raises(PeerTimeoutError, f"rank {victim}") as caught:
            self.me.call(self.made, **self.options)
        self.me.expect(all(e.peer == victim for e in caught), f"{caught} names another rank")


class Replay:
    """Four calls in a graph, each with the residual of the one before, both algorithms in turn."""

    def __init__(self, me: Me, made: checks.Case, group: Any = None) -> None:
        self.me, self.made, self.group = me, made, group
        me.call(made, group=group)

        def calls() -> list[Tensor]:
            outputs, residual = [], made.residual
            for i in range(4):
                algorithm = FUSED[i % 2]
                pair = me.call(made, residual=residual, algorithm=algorithm, group=group)
                outputs += pair
                residual = pair[1]
            return outputs

        self.graph = worker.Graph(me, calls)

    def queue(self) -> None:
        self.graph.replay()

    def calls(self) -> list[tuple[checks.Case, tuple[Tensor, ...]]]:
        found, residual = [], self.made.residual
        for i in range(4):
            pair = tuple(self.graph.outputs[2 * i : 2 * i + 2])
            found.append((replace(self.made, residual=residual), pair))
            residual = pair[1]
        return found

    def expect_fails_at_once(self, victim: int) -> None:
        """A replay does not raise. It ends, with NaN, and check() raises."""
        self.queue()
        self.me.synchronize()
        for output in self.graph.outputs:
            self.me.expect(bool(output.isnan().all()), "a later replay's output is not NaN")
        with self.me.expect_raises(PeerTimeoutError, f"rank {victim}"):
            gemma_ar_norm.check(self.group)


class Compiled:
    """The call in a function that torch.compile compiled."""

    def __init__(self, me: Me, made: checks.Case, group: Any = None) -> None:
        self.me, self.made, self.outputs = me, made, ()

        def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
                x * 1, made.weight, residual, group=group
            )

        torch._dynamo.reset()
        self.layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
        # Compiling takes longer on one rank than on another.
        self.queue()

    def queue(self) -> None:
        self.outputs = self.layer(self.made.xs[self.me.rank], self.made.residual)

    def calls(self) -> list[tuple[checks.Case, tuple[Tensor, ...]]]:
        return [(self.made, self.outputs)]

    def expect_fails_at_once(self, victim: int) -> None:
        with self.me.expect_raises(RuntimeError, "PeerTimeoutError", f"rank {victim}"):
            self.queue()


MODES = (*FUSED, "graph", "compiled")
Way = Eager | Replay | Compiled


def prepare(me: Me, mode: str, timeout_s: float, *, rows: int = ROWS, group: Any = None) -> Way:
    """A workspace with this timeout, and a way of calling that has been tried."""
    made = me.case(rows, HIDDEN, seed=me.kills)
    if mode == "compiled":
        me.make(group, LONG_TIMEOUT_S)
        way: Way = Compiled(me, made, group)
    me.make(group, timeout_s, max_rows=max(rows, 64))
    if mode == "graph":
        way = Replay(me, made, group)  # captured with the workspace that there is now
    elif mode != "compiled":
        way = Eager(me, made, mode, group)
    dist.barrier()  # capturing takes longer on one rank than on another
    way.queue()
    for made, outputs in way.calls():
        me.expect_bits(made, outputs, f"{mode}, before the fault")
    gemma_ar_norm.synchronize(group)
    return way


def count_rows(me: Me, made: checks.Case, outputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """(rows that are right, NaN) in both outputs; any other row is a failure."""
    right = nan = None
    for got, want in zip(outputs, made.expected(), strict=True):
        bits = checks.BITS[got.dtype]
        is_right = (got.view(bits) == want.view(bits)).all(-1)
        is_nan = got.isnan().all(-1)
        right = is_right if right is None else right & is_right
        nan = is_nan if nan is None else nan & is_nan
    neither = int((~(right | nan)).sum())
    me.expect(neither == 0, f"{neither} rows are neither right nor NaN in both outputs")
    return int(right.sum()), int(nan.sum())


def expect_rows(me: Me, way: Way, *, may_be_right: bool, must_fail: bool = True) -> None:
    """Calls are right up to one, where one must fail; in that rows are right or NaN; in those after
    it NaN."""
    right_rows, nan_rows, failed = 0, 0, False
    for made, outputs in way.calls():
        right, nan = count_rows(me, made, outputs)
        me.expect(right == 0 or not failed, "a call after the failed one has rows without NaN")
        failed = failed or nan > 0
        right_rows, nan_rows = right_rows + right, nan_rows + nan
    me.expect(may_be_right or right_rows == 0, f"{right_rows} rows are not NaN")
    me.expect(failed or not must_fail, "no row is NaN")
    me.note(f"{right_rows} rows right, {nan_rows} NaN" if right_rows else "all rows NaN")


def expect_lost(
    me: Me, way: Way, victim: int, timeout_s: float, *, may_be_right: bool = False
) -> None:
    """The call fails in time and names the victim; so do later ones, at once."""
    start = time.monotonic()
    if not me.gpu:  # the call itself raises; a process that has ended is noticed at once
        if may_be_right:
            # What the lost rank had sent before its end suffices for the call, or it does not.
            with contextlib.suppress(PeerTimeoutError):
                way.queue()
                for made, outputs in way.calls():
                    me.expect_bits(made, outputs, "of the call in which a rank was lost")
        for what in ("PeerTimeoutError naming the lost rank, after", "later calls fail after"):
            with me.expect_raises(PeerTimeoutError) as caught:
                way.queue()
            me.note_within(SHORT_GROUP_TIMEOUT_S + SOON_S, what, time.monotonic() - start)
            for error in caught:
                # A rank that had all it needed for that call names those that gave it up, too.
                named = str(error).split(":")[0].removeprefix("ranks").removeprefix("rank")
                known = str(victim) in named if may_be_right else error.peer == victim
                me.expect(known, f"{error} does not name rank {victim}")
            start = time.monotonic()
        return
    way.queue()
    with me.expect_raises(PeerTimeoutError, f"rank {victim}") as caught:
        gemma_ar_norm.synchronize(getattr(way, "group", None))
    took = time.monotonic() - start
    me.note_within(timeout_s + LATE_S, "PeerTimeoutError naming the lost rank, after", took)
    me.expect(all(e.peer == victim for e in caught), f"{caught} names another rank")
    expect_rows(me, way, may_be_right=may_be_right)
    for _ in range(2):
        start = time.monotonic()
        way.expect_fails_at_once(victim)
        me.note_within(AT_ONCE_S, "later calls fail after", time.monotonic() - start)
    me.expect_context()


# --------------------------------------------------------------------------------- killed ranks

LOST = (
    f"all others raise PeerTimeoutError naming it within timeout ({{}} s) + {LATE_S:g} s; rows "
    "right or NaN; later calls fail at once; the context works, and so does a new init"
)


@case("a rank is killed between calls", LOST.format(TIMEOUT_S), kills=True, each=MODES)
def killed_between_calls(me: Me, mode: str) -> None:
    victim = me.choose_victim()
    way = prepare(me, mode, TIMEOUT_S)
    me.meet()
    if me.rank == victim:
        me.die()
    me.await_death(victim)
    expect_lost(me, way, victim, TIMEOUT_S)
    del way
    me.go_on_without(victim)
    if mode == "compiled":
        prepare(me, mode, LONG_TIMEOUT_S)


@case(
    "a rank is killed in a call, another comes after that",
    LOST.format(IN_CALL_TIMEOUT_S),
    kills=True,
    each=MODES,
)
def killed_in_a_call(me: Me, mode: str) -> None:
    victim = me.choose_victim()
    late = 1 if victim == 0 else 0
    # Many rows: those that the victim pushed before it died may be finished, others cannot be.
    rows = 512 if me.gpu and mode != "graph" else ROWS
    way = prepare(me, mode, IN_CALL_TIMEOUT_S, rows=rows)
    me.meet()
    if me.rank == victim:
        if not me.gpu:
            me.die_in(0.5)
            way.queue()  # blocks
        way.queue()
        event = torch.cuda.Event()
        event.record()
        time.sleep(0.5)
        if event.query():
            print("the call of the rank to be killed has ended", flush=True)
            sys.exit(3)
        me.die()
    if me.rank == late:
        me.await_death(victim)
    expect_lost(me, way, victim, IN_CALL_TIMEOUT_S, may_be_right=True)
    del way
    me.go_on_without(victim)


PHASES = ("facts", "access", "allocate", "open")


@case(
    "a rank is killed in init",
    f"all others raise the same WorkspaceError naming it within {SOON_S:g} s; a new group "
    "and init work",
    kills=True,
    each=PHASES,
)
def killed_in_init(me: Me, mode: str) -> None:
    victim, phase = me.choose_victim(), PHASES.index(mode)
    me.meet()
    with native(me) as made_here:
        if me.rank == victim:
            with before_exchange(phase, me.die):
                me.make()
        start = time.monotonic()
        with me.expect_raises(WorkspaceError, f"got none from rank {victim};") as caught:
            me.make()
        took = time.monotonic() - start
        if made_here is not None:
            me.expect(not made_here.open, "inboxes stay open")
    me.note_within(SOON_S, "WorkspaceError naming the lost rank, after", took)
    me.go_on_without(victim)
    me.expect_same_text(caught)


@case(
    "a rank is killed in close, which waits for its last call",
    f"close of the others returns within timeout ({IN_CALL_TIMEOUT_S:g} s) + {LATE_S:g} s; rows "
    "right or NaN; a new init works",
    kills=True,
)
def killed_in_close(me: Me) -> None:
    victim = me.choose_victim()
    late = 1 if victim == 0 else 0
    way = prepare(me, FUSED[0], IN_CALL_TIMEOUT_S)
    me.meet()
    if me.rank == victim:
        if not me.gpu:
            me.die()  # on the CPU nothing is queued, and close has nothing to wait for
        way.queue()
        me.die_in(0.7)
        gemma_ar_norm.close()
        time.sleep(MEET_LIMIT_S)
    if me.rank == late:
        me.await_death(victim)
    start = time.monotonic()
    if me.gpu:
        way.queue()
    gemma_ar_norm.close()
    me.note_within(IN_CALL_TIMEOUT_S + LATE_S, "close returned after", time.monotonic() - start)
    if me.gpu:
        right, nan = count_rows(me, way.made, way.out)
        me.note(f"{right} rows right, {nan} NaN")
    me.await_death(victim)
    me.go_on_without(victim)


# -------------------------------------------------------------------------------- stopped ranks


@contextlib.contextmanager
def a_group(me: Me) -> Iterator[Any]:
    """The default group; on the CPU, where calls have the group's own timeout, a short one."""
    if me.gpu:
        yield None
        return
    group = dist.new_group(timeout=timedelta(seconds=SHORT_GROUP_TIMEOUT_S))
    yield group
    dist.destroy_process_group(group)


@case(
    "a rank is stopped for less than the timeout",
    "the call's results are right; no error",
    each=MODES,
)
def a_short_stall(me: Me, mode: str) -> None:
    stalled = me.world - 1
    way = prepare(me, mode, LONG_TIMEOUT_S)
    me.meet()
    start = time.monotonic()
    if me.rank == stalled:
        me.stall(1.5)
    else:
        me.await_stall(stalled)
    way.queue()
    gemma_ar_norm.synchronize()
    for made, outputs in way.calls():
        me.expect_bits(made, outputs, "after a short stall")
    me.note("right results, after", time.monotonic() - start)
    me.expect(time.monotonic() - start >= 1.0, "nobody was stopped")


@case(
    "a rank is stopped for longer than the timeout",
    LOST.format(TIMEOUT_S)
    + "; the stopped rank fails too, in its next call (with synchronize()) or the one after it",
    each=MODES,
)
def a_long_stall(me: Me, mode: str) -> None:
    stalled = me.world - 1
    with a_group(me) as group:
        way = prepare(me, mode, TIMEOUT_S, group=group)
        me.meet()
        if me.rank == stalled:
            me.stall(SHORT_GROUP_TIMEOUT_S + TIMEOUT_S)
            expect_stalled_fails(me, way, stalled)
        else:
            me.await_stall(stalled)
            expect_lost(me, way, stalled, TIMEOUT_S)
            me.note(
                f"meanwhile it was {'' if me.state_of(stalled) == 'T' else 'no longer '}stopped"
            )
        del way
        me.meet()
        gemma_ar_norm.close(group)
    start = time.monotonic()
    me.make()
    me.note("a new init of all took", time.monotonic() - start)
    me.expect_works("after a new init")


def expect_stalled_fails(me: Me, way: Way, stalled: int) -> None:
    """Its peers have given the call up. It may have all it needs for that one."""
    start = time.monotonic()
    if not me.gpu:
        with me.expect_raises(RuntimeError):
            way.queue()
        me.note("the stopped rank raised after", time.monotonic() - start)
        return
    # synchronize() knows of it at once; check(), which does not wait, after the next call.
    synchronizes = isinstance(way, Replay | Compiled)
    with me.expect_raises(PeerTimeoutError) as caught:
        for _ in range(1 if synchronizes else 2):
            way.queue()
            me.synchronize()
            gemma_ar_norm.check()
        if synchronizes:
            gemma_ar_norm.synchronize()
    took = time.monotonic() - start
    for error in caught:
        me.expect(error.peer == stalled, f"{error} names another rank")
    by = "synchronize() after its call" if synchronizes else "its next call but one at the latest"
    me.note_within(TIMEOUT_S + LATE_S, f"the stopped rank failed in {by}, within", took)
    expect_rows(me, way, may_be_right=True, must_fail=not synchronizes)
    way.expect_fails_at_once(stalled)
    me.expect_context()


@case("a rank is stopped in init for less than the group's timeout", "init works")
def a_short_stall_in_init(me: Me) -> None:
    stalled = me.world - 1
    me.meet()
    start = time.monotonic()
    with before_exchange(0, lambda: me.stall(1.5)) if me.rank == stalled else nothing():
        me.make()
    me.note("init returned after", time.monotonic() - start)
    me.expect_works("after a stall in init")


@case(
    "a rank is stopped in init for longer than the group's timeout",
    f"the others raise WorkspaceError naming it within that timeout ({SHORT_GROUP_TIMEOUT_S:g} s) "
    f"+ {SOON_S:g} s, and the stopped rank one naming them; a new group and init work",
)
def a_long_stall_in_init(me: Me) -> None:
    stalled = me.world - 1
    seconds = SHORT_GROUP_TIMEOUT_S + 3.0
    group = dist.new_group(timeout=timedelta(seconds=SHORT_GROUP_TIMEOUT_S))
    me.meet()
    start = time.monotonic()
    if me.rank == stalled:
        # The others have closed their connections: those are what it misses.
        with (
            before_exchange(0, lambda: me.stall(seconds)),
            me.expect_raises(WorkspaceError, "got none from ranks 0, 1"),
        ):
            me.make(group)
    else:
        with me.expect_raises(WorkspaceError, f"got none from rank {stalled};"):
            me.make(group)
        what, limit_s = "WorkspaceError naming the stopped rank, after", SHORT_GROUP_TIMEOUT_S
        me.note_within(limit_s + SOON_S, what, time.monotonic() - start)
    dist.destroy_process_group(group)
    group = dist.new_group()
    me.make(group)
    me.expect_works("in a new group", group)
    dist.destroy_process_group(group)


# ----------------------------------------------------------------------- ranks that cannot


class Instead:
    """A module with some of its names replaced."""

    def __init__(self, real: Any, **others: Any) -> None:
        self._real = real
        self.__dict__.update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


@contextlib.contextmanager
def native(me: Me, **attributes: Any) -> Iterator[fakes.FakeNative | None]:
    """Without a GPU a stand-in for the native part, with these attributes."""
    if me.gpu:
        yield None
        return
    with fakes.fake_native(me.rank, **attributes) as fake:
        yield fake
        gemma_ar_norm.close()


def c_with(**others: Any) -> Any:
    """Replaces functions of the native part, as workspace.py sees it."""
    return mock.patch.object(workspace, "_C", Instead(workspace._C, **others))


@contextlib.contextmanager
def before_exchange(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Does this right before the rank's part in its exchange of this number, counted from 0."""
    real, count = groups.all_gather_json, 0

    def exchange(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == number + 1:
            action()
        return real(*arguments)

    with mock.patch.object(groups, "all_gather_json", exchange):
        yield


ALL_RAISE = f"all raise the same {{}} naming it and the reason, within {SOON_S:g} s"
ALL_UNFUSED = f"all take the unfused path, and say why, within {SOON_S:g} s"


def expect_refused(
    me: Me, fault: Any, kind: type[Exception], *words: str, **arguments: Any
) -> None:
    """init raises this on every rank; afterwards it works."""
    start = time.monotonic()
    with fault, me.expect_raises(kind, *words) as caught:
        gemma_ar_norm.init(**{"hidden_size": HIDDEN, "timeout_s": LONG_TIMEOUT_S, **arguments})
    took = time.monotonic() - start
    me.note_within(SOON_S, f"{kind.__name__}, after", took)
    me.expect_same_text(caught)


def expect_unfused(me: Me, fault: Any, *words: str) -> None:
    start = time.monotonic()
    with fault:
        made = me.make()
        took = time.monotonic() - start
    me.expect(not made.fused, "fused all the same")
    for word in words:
        me.expect(word in made.reason, f"{word!r} is not in {made.reason!r}")
    me.note_within(SOON_S, "unfused, after", took)
    data = me.case(ROWS, HIDDEN, seed=1)
    me.expect_close(data, me.call(data), 3e-2, "unfused")


def and_then_it_works(me: Me) -> None:
    made = me.make()
    me.expect(made.fused == me.gpu, made.reason)
    me.expect_works("after the fault")


@case("one rank's inbox does not fit its GPU (1 PiB)", ALL_RAISE.format("WorkspaceError"))
def no_memory_on_one_rank(me: Me) -> None:
    bad = me.world - 1
    is_bad = me.rank == bad
    with native(me, allocate_error="inbox: device memory" if is_bad else ""):
        # A real failure of cudaMalloc: that rank asks for what no GPU has.
        too_much = c_with(inbox_bytes=lambda *_: 1 << 50) if is_bad and me.gpu else nothing()
        expect_refused(me, too_much, WorkspaceError, f"rank {bad}: inbox: ", "device memory")
    and_then_it_works(me)


@case("no rank's inbox fits its GPU", ALL_RAISE.format("WorkspaceError"))
def no_memory_on_any_rank(me: Me) -> None:
    with native(me, allocate_error="inbox: device memory"):
        expect_refused(
            me,
            nothing(),
            WorkspaceError,
            "rank 0: inbox: ",
            "device memory",
            hidden_size=16384,
            dtype=torch.float32,
            max_rows=workspace.MAX_MAX_ROWS,
        )
    and_then_it_works(me)


@case("one GPU does not reach another", ALL_UNFUSED)
def no_peer_access(me: Me) -> None:
    bad = me.world - 1
    with native(me):
        why = "no peer access to that GPU"
        fault = c_with(peer_access=lambda *_: why) if me.rank == bad else nothing()
        expect_unfused(me, fault, f"the GPU of rank {bad} does not reach that of rank 0: {why}")
    and_then_it_works(me)


@case("one rank cannot map its peers' memory (it gets handles of none)", ALL_UNFUSED)
def no_ipc(me: Me) -> None:
    bad = me.world - 1
    real = workspace._open_peers

    def with_bad_handles(exchange: Any, made: Any, handles: list[str]) -> str:
        return real(exchange, made, ["0" * len(handle) for handle in handles])

    with native(me, open_error="ipc: a fake" if me.rank == bad else ""):
        fault = nothing()
        if me.gpu and me.rank == bad:
            fault = mock.patch.object(workspace, "_open_peers", with_bad_handles)
        expect_unfused(me, fault, f"rank {bad}: ipc: ")
    and_then_it_works(me)


@case("one rank is on another host, by its name", ALL_UNFUSED)
def another_host(me: Me) -> None:
    bad = me.world - 1
    host = mock.patch.object(workspace, "_host", return_value="elsewhere/0")
    with native(me):
        words = (f"ranks 0 and {bad} are on different hosts", "elsewhere")
        expect_unfused(me, host if me.rank == bad else nothing(), *words)
    and_then_it_works(me)


@case("one rank has another build", ALL_RAISE.format("WorkspaceError"))
def another_build(me: Me) -> None:
    bad = me.world - 1
    other = {**workspace._C.build_info(), "version": "9.9.9"}
    fault = c_with(build_info=lambda: other) if me.rank == bad else nothing()
    expect_refused(me, fault, WorkspaceError, "version: ", f"'9.9.9' on rank {bad}")
    and_then_it_works(me)


OTHER_ARGUMENTS = {
    "hidden_size": 1024,
    "max_rows": 7,
    "dtype": torch.float16,
    "timeout_s": 5.0,
}


@case(
    "one rank has another hidden_size, max_rows, dtype, timeout_s",
    ALL_RAISE.format("ValueError"),
)
def other_arguments(me: Me) -> None:
    bad = me.world - 1
    for name, value in OTHER_ARGUMENTS.items():
        other = {name: value} if me.rank == bad else {}
        expect_refused(me, nothing(), ValueError, f"{name}: ", f"on rank {bad}", **other)
    and_then_it_works(me)


@case("one rank's hidden_size is wrong", ALL_RAISE.format("ValueError"))
def a_wrong_argument(me: Me) -> None:
    bad = me.world - 1
    other = {"hidden_size": 7} if me.rank == bad else {}
    expect_refused(me, nothing(), ValueError, f"rank {bad}: hidden_size: ", **other)
    and_then_it_works(me)


# ---------------------------------------------------------------------------------------- memory

MIB = 1 << 20


def in_use(me: Me) -> dict[str, float]:
    """What this process holds; of the GPU what all its users hold."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "host MiB": pages * os.sysconf("SC_PAGE_SIZE") / MIB,
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "Python objects": len(gc.get_objects()),
    }
    if me.gpu:
        found["inboxes held"] = workspace._C.reclaim()
        torch.cuda.empty_cache()
        me.meet()
        free, total = torch.cuda.mem_get_info()
        found["device MiB"] = (total - free) / MIB
        me.meet()
    return found


# What a part of the cycles may add. An inbox has 2 MiB: one lost in ten cycles is seen.
MAY_GROW = {
    "host MiB": 6,
    "file descriptors": 0,
    "mappings": 10,
    "Python objects": 200,
    "inboxes held": 0,
    "device MiB": 8,
}


@case(
    f"{CYCLES} times init, a call and close",
    "neither device memory, host memory, file descriptors nor mappings grow",
)
def many_cycles(me: Me) -> None:
    made = me.case(2, HIDDEN, seed=1)

    def cycle(number: int) -> None:
        group = None
        if number % 8 == 7:  # a group of its own, whose end closes the workspace
            group = dist.new_group()
        one = me.make(group, max_rows=256)
        me.expect(one.fused == me.gpu, one.reason)
        outputs = me.call(made, group=group, algorithm=FUSED[number % 2])
        if number % 50 == 0:
            me.expect_bits(made, outputs, f"cycle {number}")
        if group is not None:
            dist.destroy_process_group(group)
        elif number % 4:  # else the next init replaces it
            one.close()
        dist.barrier()  # all have closed

    start, first = time.monotonic(), {}
    for number in range(CYCLES):
        if number == CYCLES // 4:  # by then all is loaded, and the caches are full
            first = in_use(me)
        cycle(number)
    last = in_use(me)
    me.note(f"{CYCLES} cycles took", time.monotonic() - start)
    me.expect(last.get("inboxes held", 0) == 0, f"inboxes are held: {last}")
    for name, value in first.items():
        grown = last[name] - value
        me.expect(grown <= MAY_GROW[name], f"{name}: from {value:.1f} to {last[name]:.1f}")
        me.note(f"{name} {value:.0f} to {last[name]:.0f}" if me.rank == 0 else "")


WITH_EXPANDABLE_SEGMENTS = (
    "strided_and_misaligned_inputs",
    "out_may_alias",
    "rows_that_change_every_call",
    "graph_of_dependent_calls",
    "graph_with_inputs_overwritten",
    "larger_than_the_workspace",
    "inboxes_are_given_back",
)


@case(
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: views, outputs that alias, graphs, parts",
    "every bit is right",
)
def expandable_segments(me: Me) -> None:
    if me.gpu:
        kept = torch.empty(32 * MIB, dtype=torch.uint8, device=me.device)
        segments = torch.cuda.memory_snapshot()
        me.expect(any(one["is_expandable"] for one in segments), "no segment is expandable")
        del kept
    gemma_ar_norm.init(hidden_size=8192, max_rows=256, timeout_s=LONG_TIMEOUT_S)
    start = time.monotonic()
    for name in WITH_EXPANDABLE_SEGMENTS:
        worker.CASES[name](me)
    me.note(f"{len(WITH_EXPANDABLE_SEGMENTS)} cases of worker.py, in", time.monotonic() - start)


# ------------------------------------------------------------------------------------------ main


def run_case(me: Me, one: FaultCase) -> dict[str, Any]:
    me.failures, me.seen, me.case_name = [], [], one.name
    start, raised = time.monotonic(), False
    try:
        one.run(me)
        me.synchronize()
    except Exception:
        raised = True
        me.failures.append(traceback.format_exc()[-4000:])
    return {
        "case": one.name,
        "failures": me.failures,
        "raised": raised,
        "seconds": time.monotonic() - start,
        "seen": [note for note in me.seen if note[0]],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()

    rank, world, device = launcher.init_from_env(timeout_s=GROUP_TIMEOUT_S)
    pids = groups.all_gather_json(groups.resolve(), os.getpid())
    with open(options.directory / f"rank{rank}.jsonl", "w", buffering=1) as results:
        me = Me(rank, world, device, [], rank, list(range(world)), pids, options.directory, results)
        me.make()
        failed = worker.run_all(options.cases, lambda name: run_case(me, CASES[name]), results)
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

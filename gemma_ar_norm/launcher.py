"""Starts the ranks of a program as processes of this machine, on whatever it has.

    several GPUs   a rank a GPU; more ranks than GPUs share them, as below
    one GPU        all ranks on it: side by side under CUDA MPS where one runs or can be started as
                   this user, each with its share of the multiprocessors; else time-sliced (slow)
    no GPU         CPU processes with one thread each

    result = run([sys.executable, "worker.py"], ranks=4, timeout_s=60)   # here
    rank, world, device = init_from_env()                                # in worker.py

Every process gets RANK, WORLD_SIZE, LOCAL_RANK (its GPU) and LOCAL_WORLD_SIZE as torchrun gives
them. The ranks meet in a file, so no port is taken. A rank that fails stops the others, a time
limit stops all, and nothing is left running: no child of a rank, no MPS that was started, also
after an exception or Ctrl-C. Clocks, MIG and compute mode are never touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

RENDEZVOUS = "GEMMA_AR_NORM_RENDEZVOUS"  # file:// URL where the ranks of one run meet
PLACEMENT = "GEMMA_AR_NORM_PLACEMENT"  # Placement.__str__, for a program that reports where it ran

EXIT_TIMEOUT = 124  # as timeout(1)
MPS_CONTROL = "nvidia-cuda-mps-control"
MPS_COMMAND_LIMIT_S = 20.0
MPS_ANSWER_LIMIT_S = 5.0  # from the daemon's start to its first answer
POLL_S = 0.02
TERM_GRACE_S = 2.0


# --------------------------------------------------------------------------------------- placement


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a run are: rank r is on GPU r % gpus, or on the CPU where gpus is 0."""

    ranks: int
    gpus: int
    # Whether ranks that share a GPU run side by side, and why not where they do not.
    mps: bool = False
    mps_note: str = ""
    mps_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks_per_gpu(self) -> int:
        """Ranks on the fullest GPU; 0 on the CPU."""
        return -(-self.ranks // self.gpus) if self.gpus else 0

    def __str__(self) -> str:
        if self.gpus == 0:
            return f"{self.ranks} CPU processes"
        if self.ranks_per_gpu == 1:
            return f"{self.ranks} GPU{'s' if self.ranks > 1 else ''}, one rank each"
        gpus = "one GPU" if self.gpus == 1 else f"{self.gpus} GPUs"
        how = "side by side under CUDA MPS" if self.mps else "time-sliced, so slow: no CUDA MPS"
        note = f" ({self.mps_note})" if self.mps_note else ""
        return f"{self.ranks} processes on {gpus}, {how}{note}"

    def env(self, rank: int, percentage: int | None = None) -> dict[str, str]:
        """What the process of this rank has in its environment beyond the parent's.

        percentage: of its GPU's multiprocessors, under MPS; an equal share unless given.
        """
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(rank % self.gpus if self.gpus else rank),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            PLACEMENT: str(self),
        }
        if self.gpus == 0:
            env["CUDA_VISIBLE_DEVICES"] = ""
        if self.mps:
            env |= self.mps_env
            share = 100 // self.ranks_per_gpu if percentage is None else percentage
            env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(share)
            # CUDA's default. All clients share the GPU's queues: with 32 each, which streams of one
            # process may need, the fourth client got no context ("out of memory").
            env["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
        return env


def gpu_count() -> int:
    """The GPUs this process may use. Asks NVML where it can, so no CUDA context is made."""
    return torch.cuda.device_count()


@contextlib.contextmanager
def placed(ranks: int, gpus: int | None = None, *, mps: bool = True) -> Iterator[Placement]:
    """The placement of so many ranks, with an MPS for as long as the block lasts if one is needed.

    gpus: 0 for the CPU; all that there are unless given. mps: False to time-slice.
    """
    if ranks < 1:
        raise ValueError(f"ranks: 1 or more is required; got {ranks}; ask for one process or more")
    gpus = gpu_count() if gpus is None else gpus
    gpus = min(gpus, ranks)
    if gpus == 0 or ranks <= gpus:
        yield Placement(ranks, gpus)
    elif not mps:
        yield Placement(ranks, gpus, mps_note="not asked for")
    else:
        with _mps(gpus) as (env, note):
            yield Placement(ranks, gpus, env is not None, note, env or {})


@contextlib.contextmanager
def _mps(gpus: int) -> Iterator[tuple[dict[str, str] | None, str]]:
    """(what its clients need in their environment, a note); None where there can be no MPS.

    One that already runs is used as it is and left running.
    """
    if shutil.which(MPS_CONTROL) is None:
        yield None, f"no {MPS_CONTROL} on PATH"
        return
    if _tell_mps("get_server_list", os.environ) is None:
        yield {}, "already running"
        return

    with contextlib.ExitStack() as stack:
        # Short names: a socket is made in the first one, and its path may have 107 characters.
        base = "/tmp" if os.access("/tmp", os.W_OK) else None
        env = {}
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            env[name] = tempfile.mkdtemp(prefix="gan_mps_", dir=base)
            stack.callback(shutil.rmtree, env[name], ignore_errors=True)
        stack.callback(_stop_mps, env)
        problem = _start_mps(env)
        if problem is None:
            if "CUDA_VISIBLE_DEVICES" in os.environ:
                # The daemon offers what is visible to it, numbered from 0.
                env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
            problem = _cuda_problem({**os.environ, **env})
        if problem is None:
            yield env, ""
            return
    # By now it has been stopped again.
    yield None, problem


def _start_mps(env: Mapping[str, str]) -> str | None:
    """Starts the daemon; None, or in words why it did not start."""
    try:
        started = subprocess.run(
            [MPS_CONTROL, "-d"],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            # A file, not a pipe: the daemon would keep a pipe open.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MPS_COMMAND_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{MPS_CONTROL} -d: {error}"
    if started.returncode != 0:
        return f"{MPS_CONTROL} -d ended with {started.returncode}"
    deadline = time.monotonic() + MPS_ANSWER_LIMIT_S
    while problem := _tell_mps("get_server_list", {**os.environ, **env}):
        if time.monotonic() >= deadline:
            return problem
        time.sleep(0.1)
    return None


def _stop_mps(env: Mapping[str, str]) -> None:
    """Ends the daemon of these directories, if it was started, and with it its servers; waits until
    they are gone, because clients of the next daemon fail while a server of this one is there."""
    pid_file = Path(env["CUDA_MPS_PIPE_DIRECTORY"]) / f"{MPS_CONTROL}.pid"
    try:
        daemon = int(pid_file.read_text())
    except (OSError, ValueError):
        daemon = 0
    everywhere = {**os.environ, **env}
    servers, _ = _ask_mps("get_server_list", everywhere)
    if _tell_mps("quit", everywhere) is not None and daemon > 1:
        # It does not answer. It is ours: the file lay in the directory made for it.
        with contextlib.suppress(OSError):
            os.kill(daemon, signal.SIGTERM)
    there = [daemon, *(int(word) for word in servers.split() if word.isdigit())]
    deadline = time.monotonic() + MPS_ANSWER_LIMIT_S
    while any(pid > 1 and Path(f"/proc/{pid}").exists() for pid in there):
        if time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def _tell_mps(command: str, env: Mapping[str, str]) -> str | None:
    """Sends a command to the MPS daemon that env names; None, or in words why it did not answer."""
    return _ask_mps(command, env)[1]


def _ask_mps(command: str, env: Mapping[str, str]) -> tuple[str, str | None]:
    """What the MPS daemon that env names says to a command, and None or why it did not answer."""
    try:
        answer = subprocess.run(
            [MPS_CONTROL],
            env=dict(env),
            input=command + "\n",
            capture_output=True,
            text=True,
            timeout=MPS_COMMAND_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{MPS_CONTROL}: {error}"
    said = " ".join((answer.stderr + answer.stdout).split())
    if answer.returncode == 0 and "cannot find" not in said.lower():
        return answer.stdout, None
    return "", f"{MPS_CONTROL} answered {answer.returncode} to {command}: {said[:200]}"


# Makes a context on GPU 0 with the driver alone: a daemon may run and yet serve nobody.
_CUDA_PROBE = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context = ctypes.c_int(), ctypes.c_void_p()
error = (cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0)
         or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
sys.exit(f"CUDA error {error}" if error else 0)
"""


def _cuda_problem(env: Mapping[str, str]) -> str | None:
    """Why a process with this environment cannot use its GPU; None where it can."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _CUDA_PROBE],
            env=dict(env),
            capture_output=True,
            text=True,
            timeout=2 * MPS_COMMAND_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "MPS was started, but CUDA did not answer under it"
    if probe.returncode == 0:
        return None
    return f"MPS was started, but CUDA fails under it: {probe.stderr.strip()[-200:]}"


# --------------------------------------------------------------------------------------------- run


@dataclass
class Result:
    """How a run ended. exit_code: 0, that of the first rank to fail, or EXIT_TIMEOUT."""

    exit_code: int
    reason: str  # in words; empty where all is well
    outputs: list[str]  # of each rank, stdout and stderr together
    seconds: float
    placement: Placement

    def transcript(self) -> str:
        """All outputs, each line with its rank."""
        lines = (
            f"[rank {rank}] {line}"
            for rank, output in enumerate(self.outputs)
            for line in output.splitlines()
        )
        return "\n".join(lines)


def run(
    command: Sequence[str],
    ranks: int,
    *,
    timeout_s: float,
    gpus: int | None = None,
    mps: bool = True,
    percentages: Sequence[int] | None = None,
    env: Mapping[str, str] | None = None,
    show: str = "prefixed",
    grace_s: float = 5.0,
    may_be_killed: Collection[int] = (),
) -> Result:
    """Runs the command as `ranks` processes and waits for them. Never raises for what they do.

    command: arguments of one process, the same for every rank.
    timeout_s: for all of it from the first process on. gpus, mps: see `placed`.
    percentages: of each rank under MPS; equal shares unless given.
    env: added to the environment of every rank, over what the launcher sets.
    show: "prefixed" prints every line with its rank, "rank0" those of rank 0 as they are and the
        others' with their rank, "nothing" only collects. The Result has all of it in any case.
    grace_s: what the other ranks have to end by themselves once one has failed.
    may_be_killed: ranks whose end by SIGKILL is no failure: the others go on, as in tests of it.

    >>> run([sys.executable, "-c", "print('hello')"], ranks=2, timeout_s=30, gpus=0)
    [rank 0] hello
    [rank 1] hello
    """
    if show not in ("prefixed", "rank0", "nothing"):
        raise ValueError(
            f"show: 'prefixed', 'rank0' or 'nothing' is required; got {show!r}; pass 'prefixed'"
        )
    with (
        _ended_by_signals(),
        placed(ranks, gpus, mps=mps) as placement,
        tempfile.TemporaryDirectory(prefix="gan_run_") as directory,
    ):
        shared = {
            RENDEZVOUS: f"file://{directory}/rendezvous",
            # All ranks are on this machine, which may have no other network.
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        started, processes = time.monotonic(), []
        try:
            for rank in range(ranks):
                percentage = None if percentages is None else percentages[rank]
                set_for_it = placement.env(rank, percentage)
                own = {**os.environ, **shared, **set_for_it, **(env or {})}
                processes.append(_RankProcess(rank, command, own, show))
            exit_code, reason = _wait(processes, started + timeout_s, grace_s, may_be_killed)
            if exit_code == EXIT_TIMEOUT and not reason:
                still = ", ".join(str(p.rank) for p in processes if not p.has_ended())
                reason = f"stopped after {timeout_s:g} s; still running: ranks {still}"
        finally:
            _stop(processes)
        outputs = ["".join(process.lines) for process in processes]
        return Result(exit_code, reason, outputs, time.monotonic() - started, placement)


class _RankProcess:
    """One rank's process, leader of a process group of its own, and the reader of its output."""

    def __init__(self, rank: int, command: Sequence[str], env: Mapping[str, str], show: str):
        self.rank = rank
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        prefix = "" if show == "rank0" and rank == 0 else f"[rank {rank}] "
        self._reader = threading.Thread(
            target=self._read, args=(None if show == "nothing" else prefix,), daemon=True
        )
        self._reader.start()

    def _read(self, prefix: str | None) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if prefix is not None:
                sys.stdout.write(prefix + line)
                sys.stdout.flush()

    def has_ended(self) -> bool:
        return self.exit_code() is not None

    def exit_code(self) -> int | None:
        """None while it runs; 128 + the signal that ended it, as a shell has it.

        This looks without reaping it: its process group stays its own until `reap`.
        """
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        status = os.waitid(os.P_PID, self._process.pid, how)
        if status is None:
            return None
        by_itself = status.si_code == os.CLD_EXITED
        return status.si_status if by_itself else 128 + status.si_status

    def kill_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def reap(self) -> None:
        self._process.wait()
        # A child that left the process group may still hold the pipe: do not wait for it.
        self._reader.join(timeout=1.0)


def _wait(
    processes: Sequence[_RankProcess],
    deadline: float,
    grace_s: float,
    may_be_killed: Collection[int] = (),
) -> tuple[int, str]:
    """(exit code, reason) once all have ended, the grace after a failure is over, or time is up."""
    killed = 128 + signal.SIGKILL
    exit_code, reason = 0, ""
    while True:
        codes = [process.exit_code() for process in processes]
        failed = [
            (p.rank, code)
            for p, code in zip(processes, codes, strict=True)
            if code and not (code == killed and p.rank in may_be_killed)
        ]
        if failed and not reason:
            rank, exit_code = failed[0]
            how = f"by signal {exit_code - 128}" if exit_code > 128 else f"with {exit_code}"
            reason = f"rank {rank} ended {how}"
            deadline = min(deadline, time.monotonic() + grace_s)
        if None not in codes:
            return exit_code, reason
        if time.monotonic() >= deadline:
            return exit_code or EXIT_TIMEOUT, reason
        time.sleep(POLL_S)


def _stop(processes: Sequence[_RankProcess]) -> None:
    """Ends every process group, politely first, and reaps the leaders."""
    if not all(process.has_ended() for process in processes):
        for process in processes:
            if not process.has_ended():
                process.kill_group(signal.SIGTERM)
        deadline = time.monotonic() + TERM_GRACE_S
        while time.monotonic() < deadline and not all(p.has_ended() for p in processes):
            time.sleep(POLL_S)
    for process in processes:
        process.kill_group(signal.SIGKILL)  # those of its children that are left, too
    for process in processes:
        process.reap()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit meanwhile, so that `finally` clauses run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGHUP)
    # None: a handler that Python did not set and could not put back.
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not None}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------- in each process


def init_from_env(timeout_s: float = 60.0) -> tuple[int, int, torch.device]:
    """Sets this process's GPU and makes the default group; returns (rank, world, device).

    For processes started by `run` or by torchrun. The group's backend is gloo, and NCCL beside it
    for CUDA tensors where every rank has a GPU of its own.
    Call `dist.destroy_process_group()` before the process ends: a thread of gloo that still holds a
    tensor while the interpreter ends aborts the process (seen in torch 2.13).
    timeout_s: of the group's own operations; the fused call has its own limit.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % gpus)
        torch.cuda.set_device(device)
        if int(os.environ.get("LOCAL_WORLD_SIZE", world)) <= gpus and dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        init_method=os.environ.get(RENDEZVOUS, "env://"),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    return rank, world, device

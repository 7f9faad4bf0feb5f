"""The launcher: ranks start with what they need, and nothing outlives a failure or a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import gemma_ar_norm
from gemma_ar_norm import launcher

ROOT = Path(gemma_ar_norm.__file__).parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(code: str, ranks: int = 2, *, timeout_s: float = 30, **options) -> launcher.Result:
    options = {"gpus": 0, "show": "nothing", **options}
    return launcher.run(python(code), ranks, timeout_s=timeout_s, **options)


def is_alive(pid: int) -> bool:
    """Zombies do not count: their parent, init perhaps, is slow to reap them."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def assert_ends(pid: int, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------- run


def test_each_rank_gets_its_environment():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    names += ("GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", launcher.RENDEZVOUS, "EXTRA")
    result = run(
        f"import json, os; print(json.dumps({{n: os.environ.get(n) for n in {names}}}))",
        ranks=3,
        env={"EXTRA": "7"},
    )
    assert (result.exit_code, result.reason) == (0, "")
    seen = [json.loads(output) for output in result.outputs]
    rendezvous = seen[0][launcher.RENDEZVOUS]
    assert rendezvous.startswith("file:///")
    for rank in range(3):
        assert seen[rank] == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            launcher.RENDEZVOUS: rendezvous,
            "EXTRA": "7",
        }
    assert not Path(rendezvous.removeprefix("file://")).parent.exists()


def test_ranks_meet_and_talk():
    result = run(
        """
        import torch, torch.distributed as dist
        from gemma_ar_norm import launcher
        rank, world, device = launcher.init_from_env()
        value = torch.tensor([float(rank + 1)], device=device)
        dist.all_reduce(value)
        print("sum", value.item(), "of", world, "on", device, dist.get_rank() == rank)
        dist.destroy_process_group()
        """,
        ranks=3,
        timeout_s=60,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.exit_code == 0, result.transcript()
    for output in result.outputs:
        assert "sum 6.0 of 3 on cpu True" in output


def test_a_failing_rank_stops_the_others():
    result = run(
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit("no such thing")
        time.sleep(60)
        """,
        ranks=3,
        grace_s=0.3,
    )
    assert (result.exit_code, result.reason) == (1, "rank 1 ended with 1")
    assert result.outputs[1] == "no such thing\n"
    assert result.seconds < 15


def test_the_others_have_a_grace_to_say_what_they_saw():
    result = run(
        """
        import os, sys, time
        if os.environ["RANK"] == "0":
            sys.exit(7)
        time.sleep(1)
        print("peer 0 is gone")
        sys.exit(3)
        """,
        grace_s=20,
    )
    assert (result.exit_code, result.reason) == (7, "rank 0 ended with 7")
    assert result.outputs[1] == "peer 0 is gone\n"


def test_a_rank_that_dies_by_a_signal():
    result = run("import os; os.kill(os.getpid(), 9)", ranks=1)
    assert (result.exit_code, result.reason) == (137, "rank 0 ended by signal 9")


def test_a_rank_that_may_be_killed_stops_nobody():
    code = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        time.sleep(1)
        print("still here")
        sys.exit(int(os.environ["CODE"]))
        """
    options = {"grace_s": 0.0, "ranks": 3}
    result = run(code, may_be_killed=(1,), env={"CODE": "0"}, **options)
    assert (result.exit_code, result.reason) == (0, "")
    assert result.outputs == ["still here\n", "", "still here\n"]
    # Another rank is not excused by it, and neither is another end.
    result = run(code, may_be_killed=(0, 2), env={"CODE": "0"}, **options)
    assert (result.exit_code, result.reason) == (137, "rank 1 ended by signal 9")
    result = run("import sys; sys.exit(3)", may_be_killed=(0, 1))
    assert result.exit_code == 3


def test_the_time_limit_kills_whole_process_groups(monkeypatch):
    monkeypatch.setattr(launcher, "TERM_GRACE_S", 0.5)
    result = run(
        """
        import os, signal, subprocess, sys, time
        if os.environ["RANK"] == "0":
            sys.exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SIGKILL is needed
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(os.getpid(), child.pid, flush=True)
        time.sleep(60)
        """,
        timeout_s=2.0,
    )
    assert result.exit_code == launcher.EXIT_TIMEOUT
    assert result.reason == "stopped after 2 s; still running: ranks 1"
    for pid in map(int, result.outputs[1].split()):
        assert_ends(pid)
    assert result.seconds < 15


def test_children_that_a_finished_rank_left_are_ended():
    result = run(
        """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
        """,
        ranks=1,
    )
    assert (result.exit_code, result.reason) == (0, "")
    assert_ends(int(result.outputs[0]))
    assert result.seconds < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_ranks(number, tmp_path):
    program = python(
        """
        import sys
        from gemma_ar_norm import launcher
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        launcher.run([sys.executable, "-c", code], 2, timeout_s=50, gpus=0)
        """
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        program, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pids = [int(process.stdout.readline().split("]")[1]) for _ in range(2)]
        assert all(map(is_alive, pids))
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
        process.stdout.close()
    for pid in pids:
        assert_ends(pid)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("show", "lines"),
    [
        ("prefixed", {"[rank 0] hello", "[rank 1] hello"}),
        ("rank0", {"hello", "[rank 1] hello"}),
        ("nothing", set()),
    ],
)
def test_what_is_shown(show, lines, capsys):
    result = run("print('hello')", show=show)
    assert set(capsys.readouterr().out.splitlines()) == lines
    assert result.transcript() == "[rank 0] hello\n[rank 1] hello"


def test_arguments():
    with pytest.raises(ValueError, match="ranks: 1 or more is required; got 0"):
        run("", ranks=0)
    with pytest.raises(ValueError, match="show: 'prefixed', 'rank0' or 'nothing' is required"):
        run("", show="all")


# --------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("ranks", "gpus", "local_ranks", "per_gpu", "words"),
    [
        (2, 0, "01", 0, "2 CPU processes"),
        (1, 1, "0", 1, "1 GPU, one rank each"),
        (4, 8, "0123", 1, "4 GPUs, one rank each"),
        (4, 4, "0123", 1, "4 GPUs, one rank each"),
        (3, 1, "000", 3, "3 processes on one GPU, time-sliced, so slow: no CUDA MPS (not asked"),
        (5, 2, "01010", 3, "5 processes on 2 GPUs, time-sliced"),
    ],
)
def test_placement(ranks, gpus, local_ranks, per_gpu, words):
    with launcher.placed(ranks, gpus, mps=False) as placement:
        envs = [placement.env(rank) for rank in range(ranks)]
    assert "".join(env["LOCAL_RANK"] for env in envs) == local_ranks
    assert placement.ranks_per_gpu == per_gpu
    assert str(placement).startswith(words)
    for env in envs:
        assert ("CUDA_VISIBLE_DEVICES" in env) == (gpus == 0)
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in env


FAKE_MPS = """\
#!{python}
import json, os, pathlib, sys
args, command = sys.argv[1:], "" if "-d" in sys.argv else sys.stdin.read().strip()
pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
log = os.environ.get("CUDA_MPS_LOG_DIRECTORY")
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([args, command, pipe, log, visible, os.path.isdir(pipe)]) + "\\n")
mode, running = {mode!r}, pathlib.Path(pipe) / "running"
if mode == "cannot start":
    sys.exit(3)
if mode == "already running":
    sys.exit(0)
if args == ["-d"]:
    running.touch()
elif not running.exists():
    print("Cannot find MPS control daemon process")
    sys.exit({not_found})
elif command == "quit":
    running.unlink()
"""


@pytest.fixture
def fake_mps(tmp_path, monkeypatch):
    """Puts an nvidia-cuda-mps-control on PATH; returns a function that reads its calls."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    calls = tmp_path / "calls"
    calls.touch()

    def install(mode: str, cuda_problem: str | None = None, not_found: int = 1):
        script = tmp_path / "bin" / launcher.MPS_CONTROL
        script.parent.mkdir()
        script.write_text(
            FAKE_MPS.format(python=sys.executable, calls=str(calls), mode=mode, not_found=not_found)
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(launcher, "_cuda_problem", lambda env: cuda_problem)
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return install


MPS_NAMES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
MPS_NAMES += ("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
PRINT_MPS = f"import json, os; print(json.dumps([os.environ.get(n) for n in {MPS_NAMES}]))"


@pytest.mark.parametrize("not_found", [0, 1])  # exit code of a command without a daemon
def test_mps_is_started_used_and_stopped(not_found, fake_mps):
    calls = fake_mps("", not_found=not_found)
    result = run(PRINT_MPS, ranks=3, gpus=1)
    assert result.exit_code == 0
    assert str(result.placement) == "3 processes on one GPU, side by side under CUDA MPS"

    pipe, log, percentage, local_rank, visible = json.loads(result.outputs[0])
    assert (percentage, local_rank, visible) == ("33", "0", None)
    assert all(output == result.outputs[0] for output in result.outputs)
    assert pipe != log
    assert len(pipe) < 60  # a socket's path has 107 characters
    look, start, ask, list_servers, stop = calls()
    assert look[:3] == [[], "get_server_list", "/tmp/nvidia-mps"]
    assert start == [["-d"], "", pipe, log, None, True]
    assert ask == list_servers == [[], "get_server_list", pipe, log, None, True]
    assert stop == [[], "quit", pipe, log, None, True]
    assert not Path(pipe).exists()
    assert not Path(log).exists()


def test_mps_numbers_its_gpus_from_0(fake_mps, monkeypatch):
    calls = fake_mps("")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    result = run(PRINT_MPS, ranks=4, gpus=2)
    seen = [json.loads(output)[2:] for output in result.outputs]
    assert seen == [["50", str(r % 2), "0,1"] for r in range(4)]
    assert calls()[1][4] == "5,3"  # the daemon sees what this process may use


def test_mps_clients_share_the_queues(fake_mps, monkeypatch):
    fake_mps("")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    code = "import os; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'])"
    assert run(code, ranks=2, gpus=1).outputs == ["8\n", "8\n"]


def test_stopping_mps_waits_for_its_servers(tmp_path, monkeypatch):
    """A client of the next daemon fails while a server of the last one is there."""
    with subprocess.Popen(["sleep", "1"]) as server:
        reaper = threading.Thread(target=server.wait)
        reaper.start()
        monkeypatch.setattr(launcher, "_ask_mps", lambda command, env: (f"{server.pid}\n", None))
        launcher._stop_mps({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
        assert not Path(f"/proc/{server.pid}").exists()
        reaper.join()


def test_mps_is_stopped_after_an_exception(fake_mps):
    calls = fake_mps("")

    def interrupted():
        with launcher.placed(2, 1) as placement:
            assert placement.mps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    stop = calls()[-1]
    assert stop[1] == "quit"
    assert not Path(stop[2]).exists()


def test_a_running_mps_is_used_and_left_alone(fake_mps, monkeypatch):
    calls = fake_mps("already running")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    result = run(PRINT_MPS, ranks=4, gpus=1)
    assert json.loads(result.outputs[3])[:3] == ["/somewhere", None, "25"]
    assert "side by side under CUDA MPS (already running)" in str(result.placement)
    assert [(args, command) for args, command, *_ in calls()] == [([], "get_server_list")]


def test_ranks_may_have_different_shares(fake_mps):
    fake_mps("already running")
    result = run(PRINT_MPS, ranks=3, gpus=1, percentages=(50, 30, 20))
    assert [json.loads(output)[2] for output in result.outputs] == ["50", "30", "20"]


def test_without_mps_the_ranks_are_time_sliced(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in MPS_NAMES:
        monkeypatch.delenv(name, raising=False)
    result = run(PRINT_MPS, ranks=2, gpus=1)
    assert result.exit_code == 0
    assert json.loads(result.outputs[1]) == [None, None, None, "0", None]
    words = "2 processes on one GPU, time-sliced, so slow: no CUDA MPS (no nvidia-cuda-mps-control"
    assert str(result.placement).startswith(words)


@pytest.mark.parametrize(
    ("mode", "cuda_problem", "why"),
    [
        ("cannot start", None, "nvidia-cuda-mps-control -d ended with 3"),
        ("", "CUDA error 805", "CUDA error 805"),
    ],
)
def test_an_mps_that_does_not_work_is_not_used(mode, cuda_problem, why, fake_mps):
    calls = fake_mps(mode, cuda_problem)
    with launcher.placed(2, 1) as placement:
        assert calls()[-1][1] == "quit"  # already stopped
        assert not placement.mps
        assert why in str(placement)
        assert "CUDA_MPS_PIPE_DIRECTORY" not in placement.env(0)


def test_mps_is_not_touched_where_every_rank_has_a_gpu(fake_mps):
    calls = fake_mps("")
    for ranks, gpus in ((2, 2), (1, 1), (4, 0)):
        with launcher.placed(ranks, gpus) as placement:
            assert not placement.mps
    assert calls() == []

"""What can be said without a GPU of the run under compute-sanitizer: its matrix leaves out no
kernel, and its driver takes nothing for clean that is not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = ROOT / "tests" / "sanitizer"


@pytest.fixture
def run(tmp_path):
    spec = importlib.util.spec_from_file_location("sanitizer_run", SANITIZER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    module.BUILD = tmp_path
    yield module
    del sys.modules[spec.name]


def test_no_kernel_of_the_table_is_left_out(tmp_path):
    program = tmp_path / "no_kernels"
    command = [
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DGAN_EMULATOR"),
        *(f"-I{SANITIZER / 'no_kernels'}", f"-I{SANITIZER}", f"-I{ROOT / 'csrc'}"),
        *(f"-I{ROOT / 'csrc/device'}", f"-I{ROOT / 'tests/emulator'}"),
        *(str(SANITIZER / "no_kernels/main.cpp"), str(SANITIZER / "matrix.cpp")),
        *("-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [line[0] for line in lines] == ["quick", "usual", "full"]
    for name, *numbers in lines:
        cases, run_kernels, all_kernels, blocks = map(int, numbers)
        assert run_kernels == all_kernels, f"{name}: {run_kernels} of {all_kernels} kernels"
        # Two algorithms for 2 to 8 ranks, with one pack a thread and with several, of each dtype.
        assert all_kernels >= 2 * 7 * 2 * 3
        assert cases >= all_kernels
        assert blocks <= 4 * 8  # four a rank


def test_every_source_is_there(run):
    for sources in run.sources_of(ROOT / "csrc").values():
        for source in sources:
            assert source.is_file()
    names = {source.name for source in run.sources_of(ROOT / "csrc")["one_launch"]}
    assert {"launch_bf16.cu", "launch_fp16.cu", "launch_fp32.cu", "one_launch.cu"} <= names


CLEAN = "========= ERROR SUMMARY: 0 errors"
RIGHT = "right: 2 cases"


@pytest.mark.parametrize(
    ("output", "exit_code", "wrong"),
    [
        (f"{RIGHT}\n{CLEAN}", 0, ""),
        (
            f"{RIGHT}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            0,
            "",
        ),
        (f"{RIGHT}\n========= ERROR SUMMARY: 1 error", 99, "1 findings"),
        (
            f"{RIGHT}\n========= RACECHECK SUMMARY: 12 hazards displayed (0 errors)",
            0,
            "12 findings",
        ),
        (RIGHT, 0, "the tool has not come to its end"),
        (f"wrong: this\n{CLEAN}", 1, "exit code 1: wrong: this"),
        (f"{RIGHT}\n{CLEAN}", 99, f"exit code 99: {RIGHT}"),
        (f"half\n{CLEAN}", 0, "the program has not come to its end: half"),
        (f"{RIGHT}\n{CLEAN}", None, "not done after 3 s"),
        (
            "========= Warning: Detected overflow of tracked cuda::barrier structures.\n"
            f"{RIGHT}\n{CLEAN}",
            0,
            "the tool lost track of the barriers",
        ),
    ],
)
def test_only_clean_runs_are_clean(run, output, exit_code, wrong):
    assert run.what_is_wrong(run.Run(output, exit_code, 3.0), has_tool=True) == wrong


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def check(run, tmp_path, finds_planted: int, finds: int, limit_s: float = 30.0) -> bool:
    """run.check with programs in the place of compute-sanitizer and its two programs."""
    programs = {
        "planted": program(tmp_path / "planted", "echo has run"),
        "one_launch": program(tmp_path / "one_launch", "echo right: all"),
    }
    tool = program(
        tmp_path / "compute-sanitizer",
        f"""case "$*" in
  *planted*) found={finds_planted} ;;
  *) found={finds}; echo right: all ;;
esac
if [ $found -lt 0 ]; then sleep 60; fi
echo "========= ERROR SUMMARY: $found errors" """,
    )
    return run.check("memcheck", tool, programs, ["quick", "1"], limit_s)


def test_a_tool_must_find_the_planted_bug_and_nothing_else(run, tmp_path, capsys):
    assert check(run, tmp_path, finds_planted=3, finds=0)
    assert "memcheck: right: all" in capsys.readouterr().out
    assert not check(run, tmp_path, finds_planted=0, finds=0)
    assert "it does not find the planted bug" in capsys.readouterr().out
    assert not check(run, tmp_path, finds_planted=3, finds=2)
    assert "memcheck: 2 findings" in capsys.readouterr().out
    assert not check(run, tmp_path, finds_planted=3, finds=-1, limit_s=1.0)
    assert "memcheck: not done after" in capsys.readouterr().out


def test_unknown_tools_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run.parse(["--tools", "memcheck,grindcheck"])
    assert "got grindcheck" in capsys.readouterr().err
    assert run.parse(["--arch", "90", "--tools", "racecheck"]).arch == "sm_90"


def test_a_run_is_the_program_alone_and_then_under_every_tool(run, tmp_path, monkeypatch, capsys):
    """With programs in the place of nvcc's and CUDA's, which say how they were called."""
    tool = program(
        tmp_path / "compute-sanitizer",
        'echo "called $*"\n'
        'case "$*" in *planted*) n=1 ;; *) n=0; echo right: all ;; esac\n'
        'echo "========= ERROR SUMMARY: $n errors"',
    )
    programs = {
        "planted": program(tmp_path / "planted", "echo has run"),
        "one_launch": program(tmp_path / "one_launch", "echo right: all"),
    }
    nvcc = run.toolchain.Nvcc(tmp_path / "nvcc", (13, 0))
    monkeypatch.setattr(run, "find_nvcc", lambda: nvcc)
    monkeypatch.setattr(run, "find_sanitizer", lambda path: tool)
    monkeypatch.setattr(run, "build", lambda *arguments: programs)
    assert run.main(["--quick", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    for name in ("no_tool", *run.CHECKS):
        assert f"{name}: right: all" in out
    log = (tmp_path / "racecheck_clusters.log").read_text()
    assert "--tool racecheck" in log
    assert "one_launch quick 5 clusters" in log
    # Where it is wrong without a tool, no tool is asked.
    program(tmp_path / "one_launch", "echo wrong: that; exit 1")
    assert run.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "no_tool: exit code 1: wrong: that" in out
    assert "memcheck" not in out

"""Every kernel under each of compute-sanitizer's tools; exits with 1 where one finds something.

    python tests/sanitizer/run.py [--quick | --full] [--tools memcheck,racecheck] [--arch 90]

Needs a GPU, nvcc, g++ and compute-sanitizer, neither torch nor the installed package. Before a
tool counts it must find the bug that planted.cu has for it. docs/testing.md says what each tool
can see here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "sanitizer"
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "sanitizer"
sys.path.insert(0, str(ROOT / "buildtools"))

import gan_toolchain as toolchain  # noqa: E402


@dataclass(frozen=True)
class Check:
    """A tool, and the teams of which it sees launches: any, alone or clusters (one_launch.cu)."""

    tool: str
    options: tuple[str, ...] = ()
    teams: str = "any"
    env: Mapping[str, str] = field(default_factory=dict)


# A block has two; the tools count those that they are told of.
BARRIERS = ("--num-cuda-barriers", "4")
CHECKS = {
    # Allocations are small and lie next to each other: what is beyond one is to be nobody's.
    "memcheck": Check("memcheck", ("--padding", "65536")),
    "initcheck": Check("initcheck"),
    "synccheck": Check("synccheck", BARRIERS),
    "racecheck": Check("racecheck", BARRIERS, teams="alone"),
    # Racecheck asks for a barrier of the cluster before a block ends that others have written to.
    # Ours ends when all has come that is sent to it, and has none; so that one question is left
    # out. The emulator (tests/emulator/grids.cpp) sees where a block ends too early.
    "racecheck_clusters": Check(
        "racecheck",
        BARRIERS,
        teams="clusters",
        env={"NV_COMPUTE_SANITIZER_MAX_RACECHECK_CLUSTER_RECORDS": "0"},
    ),
}
# Of compute-sanitizer, where its tool has found something and the program has ended with 0.
FOUND_SOMETHING = 99
PRINT_LIMIT = 20
PLANTED_LIMIT_S = 120
SHOWN_LINES = 60  # of a log that is not clean


class Failed(Exception):
    """In words."""


# ---- build ---------------------------------------------------------------------------------------


def find_nvcc() -> toolchain.Nvcc:
    choice = toolchain.choose_nvcc(
        None, named=os.environ.get("CUDACXX"), candidates=toolchain.nvcc_candidates()
    )
    return toolchain.require_nvcc(choice)


def find_sanitizer(nvcc: Path) -> Path | None:
    candidates = [nvcc.parent / "compute-sanitizer"]
    candidates += [nvcc.resolve().parent / "compute-sanitizer"]
    if on_path := shutil.which("compute-sanitizer"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/compute-sanitizer"))
    return next((path for path in candidates if path.is_file()), None)


def sources_of(csrc: Path) -> dict[str, list[Path]]:
    """Of each program. The kernels are in launch_<dtype>.cu, which compile side by side."""
    return {
        "one_launch": [
            *sorted((csrc / "host").glob("launch_*.cu")),
            HERE / "one_launch.cu",
            HERE / "matrix.cpp",
            HERE / "runner.cpp",
            ROOT / "tests" / "emulator" / "contract.cpp",
        ],
        "planted": [HERE / "planted.cu"],
    }


def flags_of(arch: str, csrc: Path) -> list[str]:
    # As CMakeLists.txt has it for a release; the contract is not to be contracted to FMAs.
    return [
        *("-std=c++17", "-O3", f"-arch={arch}", "-lineinfo", "-DGAN_ONE_LAUNCH"),
        *(f"-I{csrc}", f"-I{HERE}", "-Xcompiler=-Wall,-Wextra,-ffp-contract=off"),
    ]


def run_quietly(command: list[str], env: dict[str, str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    if ran.returncode != 0:
        raise Failed(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")


def build(nvcc: toolchain.Nvcc, arch: str, csrc: Path) -> dict[str, Path]:
    """The programs, by name. Anew every time: it takes less than a minute."""
    env = toolchain.toolkit_environment(nvcc, os.environ)
    objects = BUILD / "objects"
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir(parents=True)
    programs, links, compilations = {}, [], []
    for name, sources in sources_of(csrc).items():
        programs[name] = BUILD / name
        link = [str(nvcc.path), f"-arch={arch}", "-o", str(programs[name])]
        for source in sources:
            made = objects / f"{name}_{source.stem}.o"
            compile_one = [str(nvcc.path), *flags_of(arch, csrc), "-c", str(source)]
            compilations.append([*compile_one, "-o", str(made)])
            link.append(str(made))
        links.append(link)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for commands in (compilations, links):
            for _ in pool.map(lambda command: run_quietly(command, env), commands):
                pass
    return programs


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    output: str
    exit_code: int | None  # None: ended by the limit
    seconds: float


def run_limited(command: list[str], limit_s: float, env: Mapping[str, str] = os.environ) -> Run:
    """With all that it starts: the tool's program is a process of its own."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        exit_code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        exit_code = None
    return Run(output, exit_code, time.monotonic() - start)


def findings(output: str) -> int | None:
    """What a tool counts at its end; None where it says nothing."""
    match = re.search(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return int(match[1] or match[2]) if match else None


def last_line(output: str) -> str:
    """Of the program, between those of the tool."""
    lines = [line for line in output.splitlines() if line and not line.startswith("=====")]
    return lines[-1] if lines else "it printed nothing"


def what_is_wrong(run: Run, has_tool: bool) -> str:
    """Empty where the program was right and the tool, if there is one, found nothing."""
    if run.exit_code is None:
        return f"not done after {run.seconds:.0f} s"
    if "overflow of tracked" in run.output:
        return "the tool lost track of the barriers"
    if has_tool and (count := findings(run.output)) != 0:
        return "the tool has not come to its end" if count is None else f"{count} findings"
    if run.exit_code != 0:
        return f"exit code {run.exit_code}: {last_line(run.output)}"
    if not last_line(run.output).startswith("right:"):
        return f"the program has not come to its end: {last_line(run.output)}"
    return ""


def report(name: str, run: Run, wrong: str) -> bool:
    log = BUILD / f"{name}.log"
    log.write_text(run.output)
    print(f"{name}: {wrong or last_line(run.output)} ({run.seconds:.0f} s)", flush=True)
    if wrong:
        print("\n".join(run.output.splitlines()[:SHOWN_LINES]), f"\n... all of it: {log}")
    return not wrong


def check(
    name: str, sanitizer: Path, programs: dict[str, Path], arguments: list[str], limit_s: float
) -> bool:
    it = CHECKS[name]
    with_tool = [str(sanitizer), "--tool", it.tool, *it.options]
    with_tool += ["--print-limit", str(PRINT_LIMIT), "--error-exitcode", str(FOUND_SOMETHING)]
    env = {**it.env, **os.environ}
    planted = run_limited(
        [*with_tool, str(programs["planted"]), it.tool], min(limit_s, PLANTED_LIMIT_S), env
    )
    if not findings(planted.output):
        return report(f"{name}_planted", planted, "it does not find the planted bug")
    command = [*with_tool, str(programs["one_launch"]), *arguments, it.teams]
    run = run_limited(command, limit_s, env)
    return report(name, run, what_is_wrong(run, has_tool=True))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one case for each kernel")
    extent.add_argument("--full", action="store_true", help="each case with 1, 2 and 4 blocks")
    parser.add_argument("--tools", default=",".join(CHECKS), help="default: %(default)s")
    parser.add_argument("--arch", default="native", help="sm_90, say; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds for each tool")
    parser.add_argument(
        "--csrc",
        type=Path,
        default=CSRC,
        help="a copy with a bug, to see what a tool says of it; default: csrc",
    )
    parser.add_argument("--build-only", action="store_true")
    options = parser.parse_args(arguments)
    options.tools = options.tools.split(",")
    for tool in options.tools:
        if tool not in CHECKS:
            parser.error(f"--tools: {', '.join(CHECKS)} are known; got {tool}")
    if options.arch.isdigit():
        options.arch = f"sm_{options.arch}"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        nvcc = find_nvcc()
        sanitizer = find_sanitizer(nvcc.path)
        if sanitizer is None and not options.build_only:
            raise Failed("compute-sanitizer: required; got none; install CUDA's sanitizer package")
        start = time.monotonic()
        programs = build(nvcc, options.arch, options.csrc.resolve())
    except (Failed, toolchain.BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"built with CUDA {nvcc.release} ({time.monotonic() - start:.0f} s)", flush=True)
    if options.build_only:
        return 0
    extent = "quick" if options.quick else "full" if options.full else "usual"
    arguments = [extent, str(options.seed)]
    alone = run_limited([str(programs["one_launch"]), *arguments], options.limit)
    clean = [report("no_tool", alone, what_is_wrong(alone, has_tool=False))]
    if not clean[0] and options.csrc == CSRC:
        return 1
    assert sanitizer is not None
    for name in options.tools:
        clean.append(check(name, sanitizer, programs, arguments, options.limit))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Builds the kernels with planted bugs (planted_bugs.py) and asks the stages to catch them.

mutations.py [NAME ...]           each bug, by the stages that must catch it; fails if one does not,
                                  or if a stage finds something where there is no bug
mutations.py --table [NAME ...]   by all stages, as a table
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from planted_bugs import BUGS, CONTROL, Bug

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIRECTORY = ROOT / "build/emulator/mutants"

# Cases a stage may take, unless the bug says otherwise. Fixed seeds: whether a bug is caught is no
# matter of chance.
CASES = {
    "fuzz": 300,
    "weak": 40,
    "strict": 40,
    "faults": 300,
    "debug": 60,
    "mixed": 20,
    "explore": 3,  # of two ranks, without early start
    "tsan": 90,
    "asan": 60,
    "full": 18,
}
FLAVOUR = {"strict": "strict", "tsan": "tsan", "asan": "asan"}  # else plain
MAX_RANKS = 3  # of the kernels that are built
TIMEOUT_S = 120
TOO_LONG = "not explored completely in time"  # exploration.cpp


class DoesNotFit(Exception):
    """An edit's text is not in its file exactly once."""


class NoVerdict(Exception):
    """A stage ended otherwise than by finding something or nothing: in no time, by a wrong call."""


def mutated_sources(bug: Bug) -> Path:
    """A copy of csrc with the bug, and with the kernels of few ranks and of any form only, for the
    sake of time."""
    target = DIRECTORY / re.sub(r"\W+", "_", bug.name)
    texts = {
        path.relative_to(ROOT): path.read_text()
        for folder in ("csrc/device", "csrc/host")
        for path in sorted((ROOT / folder).glob("*.*h"))
    }

    def replace(file: str, old: str, new: str) -> None:
        path = Path("csrc") / file
        found = texts[path].count(old)
        if found != 1:
            raise DoesNotFit(f"{bug.name}: once in {path} is required; found {found} times:\n{old}")
        texts[path] = texts[path].replace(old, new)

    for edit in bug.edits:
        replace(f"device/{edit.file}", edit.old, edit.new)
    table = "host/kernel_table.cuh"
    text = texts[Path("csrc") / table]
    # Of each kernel that is there for so many ranks.
    text, kernels = re.subn(
        rf"\w+_of<kType, {MAX_RANKS + 1}>,.*?(?=\n  \}};)", "", text, flags=re.DOTALL
    )
    text, limits = re.subn("ranks > kMaxRanks", f"ranks > {MAX_RANKS}", text)
    text, forms = re.subn("kHasForms = kType == DType::kBFloat16;", "kHasForms = false;", text)
    assert kernels == limits == forms > 0, f"{table}: the kernels' table has another form"
    texts[Path("csrc") / table] = text
    for path, text in texts.items():
        file = target / path
        if not file.is_file() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return target


def build(bug: Bug, flavour: str) -> Path:
    target = mutated_sources(bug)
    command = ["make", "-s", "-C", str(HERE), "mutant", f"MUTANT={target}", f"DTYPE={bug.dtype}"]
    built = subprocess.run([*command, f"FLAVOUR={flavour}"], capture_output=True, text=True)
    assert built.returncode == 0, f"{bug.name}:\n{built.stderr[-4000:]}"
    return target / flavour / "emulate"


def run_stage(program: Path, stage: str, bug: Bug) -> str:
    """Empty where the stage finds nothing, or what it finds, in a line."""
    base, cases = (0, CASES[stage]) if stage == "explore" else (bug.base, CASES[stage] * bug.times)
    command = [program, stage, "--base", base, "--cases", cases]
    command += ["--max-ranks", MAX_RANKS, "--dtype", bug.dtype]
    words = [*(["setarch", "-R"] if stage == "tsan" and shutil.which("setarch") else []), *command]
    try:
        ran = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
        )
    except subprocess.TimeoutExpired:
        raise NoVerdict(f"{stage} takes longer than {TIMEOUT_S} s") from None
    if ran.returncode == 0:
        return ""
    output = ran.stdout + ran.stderr
    found = re.search(r"FAILED: .*|\w+Sanitizer: [^(\n]*|runtime error: .*", output)
    if found and TOO_LONG not in found[0]:
        return found[0]
    if found is None and ran.returncode < 0:
        return f"ends by signal {-ran.returncode}"
    raise NoVerdict(f"{stage} ends with {ran.returncode}:\n{output[-2000:]}")


def catch(bug: Bug, stage: str) -> str:
    return run_stage(build(bug, FLAVOUR.get(stage, "plain")), stage, bug)


def flavours_of(stages: Iterable[str]) -> list[str]:
    return sorted({FLAVOUR.get(stage, "plain") for stage in stages})


def make_flavours_of(stages: Iterable[str]) -> None:
    """What mutants have in common."""
    for flavour in flavours_of(stages):
        subprocess.run(["make", "-s", "-C", str(HERE), flavour], check=True)


def stages_of(bugs: tuple[Bug, ...]) -> set[str]:
    return {stage for bug in bugs for stage in bug.caught_by}


def survivors(bugs: tuple[Bug, ...], report=print) -> list[str]:
    """What is wrong with the list: bugs that a stage does not catch, edits that do not fit, and
    what the bugs' stages find in the kernels without a bug."""
    needed = stages_of(bugs)
    control = replace(CONTROL, caught_by=tuple(s for s in CONTROL.caught_by if s in needed))

    def check(bug: Bug) -> list[str]:
        wrong = []
        for stage in bug.caught_by:
            try:
                caught = catch(bug, stage)
            except (DoesNotFit, NoVerdict, AssertionError) as error:
                return [f"{bug.name}: {error}"]
            if bool(caught) == (bug is control):
                wrong.append(f"{bug.name}: {stage}: {caught or 'survives'}")
            report(f"{bug.name}: {stage}: {caught or 'SURVIVES'}")
        return wrong

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for lines in pool.map(check, (control, *bugs)) for line in lines]


def table(bugs: tuple[Bug, ...]) -> str:
    stages = list(CASES)
    lines = ["| planted bug | " + " | ".join(stages) + " |", "|---" * (len(stages) + 1) + "|"]

    def row(bug: Bug) -> str:
        return " | ".join("yes" if catch(bug, stage) else "" for stage in stages)

    make_flavours_of(CASES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, cells in zip(bugs, pool.map(row, bugs), strict=True):
            lines.append(f"| {bug.name} | {cells} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    names = [word for word in words if word != "--table"]
    unknown = set(names) - {bug.name for bug in BUGS}
    if unknown:
        print(f"no such planted bug: {', '.join(unknown)}")
        return 2
    bugs = tuple(bug for bug in BUGS if not names or bug.name in names)
    if "--table" in words:
        print(table(bugs))
        return 0
    make_flavours_of(stages_of(bugs))
    wrong = survivors(bugs)
    print("\n".join(wrong) if wrong else f"{len(bugs)} planted bugs, all caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

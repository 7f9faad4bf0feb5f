"""Which lines of csrc/device the emulator's stages execute, by gcov.

line_coverage.py    builds, runs fuzz, faults, full and debug, prints the lines not executed; fails
                    when one is not in UNCOVERED
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/emulator/coverage"

STAGES = {"fuzz": 200, "faults": 200, "full": 2, "debug": 60}

# Lines that no stage executes, by a part of their text, and why.
UNCOVERED = {
    "return kRanks;": "in missing_rank: the last pack came between a vain poll and the look at the "
    "clock that found the deadline over; a few accesses that no seed tried has met",
}


def executed_lines() -> dict[str, dict[int, int]]:
    """File in csrc/device -> line -> how often it was executed, over all kernels."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted(BUILD.glob("kernels_*.gcda")):
        command = ["gcov", "--json-format", "--stdout", data.name]
        ran = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, check=True)
        for document in ran.stdout.splitlines():
            for file in json.loads(document)["files"]:
                path = (HERE / file["file"]).resolve()
                if path.parent != ROOT / "csrc/device":
                    continue
                for line in file["lines"]:
                    counts[path.name][line["line_number"]] += line["count"]
    return counts


def measure() -> tuple[int, list[str], list[str]]:
    """The number of lines that have code, those not executed, and those of them not explained."""
    subprocess.run(["make", "-s", "-j2", "-C", str(HERE), "coverage"], check=True)
    for old in BUILD.glob("*.gcda"):
        old.unlink()
    for stage, cases in STAGES.items():
        command = [str(BUILD / "emulate"), stage, "--base", "0", "--cases", str(cases)]
        command += ["--max-ranks", "3"]  # its build has no more
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    total, missed, wrong = 0, [], []
    for file, lines in sorted(executed_lines().items()):
        text = (ROOT / "csrc/device" / file).read_text().splitlines()
        total += len(lines)
        for number, count in sorted(lines.items()):
            if count != 0:
                continue
            line = text[number - 1]
            missed.append(f"{file}:{number}: {line.strip()}")
            if not any(part in line for part in UNCOVERED):
                wrong.append(f"not executed, and not explained: {missed[-1]}")
    return total, missed, wrong


def main() -> int:
    total, missed, wrong = measure()
    print(f"{total - len(missed)} of {total} lines of csrc/device are executed")
    print("\n".join(missed))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

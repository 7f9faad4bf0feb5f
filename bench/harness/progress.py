"""How far a run is: tqdm's bar in a terminal where it is installed, else lines. No torch.

A rank that the launcher started has no terminal: rank 0 writes its progress into a file, and the
process in the terminal follows that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "GAN_BENCH_PROGRESS"  # where to write it, instead of showing it
LINE_EVERY_S = 5.0
FOLLOW_EVERY_S = 0.2


class Progress:
    """show(label) after each step; total 0: not known."""

    def __init__(self, total: int):
        self.total, self.done = total, 0

    def show(self, label: str) -> None:
        self.done += 1

    def close(self) -> None:
        pass


class Bar(Progress):
    def __init__(self, total: int):
        super().__init__(total)
        self._last = 0.0
        self._bar: Any = None
        if not sys.stderr.isatty():
            return
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            self._bar = tqdm(total=total or None, file=sys.stderr, unit="cell", leave=False)

    def show(self, label: str) -> None:
        super().show(label)
        if self._bar is not None:
            self._bar.set_postfix_str(label, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last > LINE_EVERY_S or self.done == self.total:
            self._last = time.monotonic()
            of = f" of {self.total}" if self.total else ""
            print(f"{self.done}{of}: {label}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Written(Progress):
    def __init__(self, total: int, path: Path):
        super().__init__(total)
        self._path = path
        path.write_text(f"{total}\n")

    def show(self, label: str) -> None:
        super().show(label)
        with self._path.open("a") as file:
            print(label, file=file)


def of_a_rank(rank: int, total: int) -> Progress:
    if rank != 0:
        return Progress(total)
    path = os.environ.get(FILE)
    return Written(total, Path(path)) if path else Bar(total)


@contextlib.contextmanager
def followed(path: Path) -> Iterator[None]:
    """Shows here what another process writes there, as long as the block lasts."""
    over = threading.Event()

    def follow() -> None:
        bar: Bar | None = None
        shown = 0
        while True:
            last_look = over.is_set()
            text = path.read_text() if path.exists() else ""
            # Up to the last newline: a line may be half written.
            lines = text[: text.rfind("\n") + 1].splitlines()
            if lines and bar is None:
                bar = Bar(int(lines[0]))
            for label in lines[1 + shown :]:
                assert bar is not None
                bar.show(label)
                shown += 1
            if last_look:
                break
            over.wait(FOLLOW_EVERY_S)
        if bar is not None:
            bar.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

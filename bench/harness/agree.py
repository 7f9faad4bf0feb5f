"""How ranks stay together when something fails on one of them: all say how it went, and all draw
the same conclusion. Every function here is collective, through the default group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gemma_ar_norm import groups

Result = TypeVar("Result")


def gather(message: object) -> list[Any]:
    return groups.all_gather_json(groups.resolve(None), message)


def first(reason: str | None) -> str:
    """The reason of the first rank that has one, or "": the same on all ranks."""
    said = gather(reason or "")
    rank = next((rank for rank, words in enumerate(said) if words), None)
    if rank is None:
        return ""
    return str(said[rank]) if len(set(said)) == 1 else f"rank {rank}: {said[rank]}"


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str]:
    """What it returns, and "" or why it failed on some rank.

    `work` may be collective as long as no rank can fail alone between two of its collectives.
    """
    result, error = None, ""
    try:
        result = work()
    except Together as problem:
        error = str(problem)
    except Exception as problem:
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"
    error = first(error)
    return (None if error else result), error


class Together(RuntimeError):
    """What all ranks raise where one has failed."""


def agreed(work: Callable[[], Result]) -> Result:
    """What it returns; raises on all ranks where it fails on any."""
    result, error = attempt(work)
    if error:
        raise Together(error)
    return result  # type: ignore[return-value]

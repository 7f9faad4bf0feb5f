"""The errors that have names of their own. Wrong arguments are TypeError and ValueError."""

from __future__ import annotations


def shown(value: object) -> str:
    """An argument in an error's text. Not the digits of an absurd int: there is a limit to them."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return str(value)


class WorkspaceError(RuntimeError):
    """A workspace cannot be made or used, or the ranks do not make the same calls: found on the CPU
    path always, elsewhere in debug mode. Every rank of the group raises it with the same text; but
    where a rank is lost in `init`, each names those from which it did not hear."""


class PeerTimeoutError(RuntimeError):
    """A peer did not arrive in a call before the call's deadline.

    The outputs of that call hold NaN where rows were missing, those of later calls hold NaN only.
    The GPU context stays usable. `init(group)` on all ranks makes a new workspace.

    peer: the rank that was missing, in the group. call: the number of the call, counted from 0 by
    each workspace, modulo 2^32; a call that is larger than the workspace counts as several. row:
    one that was missed, counted from the first of that part. A rank that waits when another's
    report comes names what that one names; two that run out at the same moment can name different
    ones. On the CPU path call and row are -1; and who learns of a lost rank only from the others,
    who have given up, may name one of those.
    """

    def __init__(self, message: str, peer: int, call: int, row: int) -> None:
        super().__init__(message)
        self.peer = peer
        self.call = call
        self.row = row

    def __reduce__(self) -> tuple[type[PeerTimeoutError], tuple[str, int, int, int]]:
        return type(self), (str(self), self.peer, self.call, self.row)

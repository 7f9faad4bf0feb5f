"""torch.compile finds all-reduce, residual add and Gemma RMSNorm in a model: how to switch it on,
and what it did.

    model = torch.compile(model, options=gemma_ar_norm.inductor_options())

Importing this file is cheap: Inductor is imported by `inductor_options` alone. Below it, downwards:
fusion_pass.py rewrites the graph, fusion_match.py decides what may be rewritten, fusion_norms.py
knows a norm when it sees one. docs/fusion.md says what is matched and what is not, and why.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PASS_OPTION = "post_grad_custom_pre_pass"
MAX_RECORDS = 10_000

log = logging.getLogger(__name__)


def inductor_options(existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options with which torch.compile fuses all-reduce, residual add and Gemma RMSNorm.

    existing: the options that you already have; they are kept. A pass that they have at
        "post_grad_custom_pre_pass", or that Inductor's configuration has there, runs before ours.
        torch.compile takes either options or a mode: {"triton.cudagraphs": True} is what
        mode="reduce-overhead" switches on.
    Returns a new dictionary. Where nothing in a model matches, nothing changes.
    Raises TypeError for options that are not a mapping, or a pass that cannot be called.

    All ranks must compile the same model: the op is collective, as the all-reduce was. The group's
    workspace is made by the first call; make it with `init` to choose its size and timeout.
    Compiled code that comes from Inductor's cache has been through the same pass.

    >>> options = gemma_ar_norm.inductor_options({"triton.cudagraphs": True})
    >>> model = torch.compile(model, options=options)
    >>> model(x)
    >>> print(*gemma_ar_norm.fusion_report(), sep="\\n")
    """
    if existing is not None and not isinstance(existing, Mapping):
        raise TypeError(
            f"existing: a dict of Inductor's options is required; got {type(existing).__name__}; "
            "pass what torch.compile(options=...) takes"
        )
    from torch._inductor import config

    from . import fusion_pass

    options = dict(existing or {})
    users = options.get(PASS_OPTION, getattr(config, PASS_OPTION))
    options[PASS_OPTION] = fusion_pass.after(users)
    return options


@dataclass(frozen=True)
class FusionRecord:
    """What became of one all-reduce in one compiled graph.

    graph: the graph's number in this process, from 0, of those that have an all-reduce.
    all_reduce: the name of its node.
    form: "plain", "residual" or "sandwich" where it was fused, else "".
    reason: why it was left as it was, or, of the plain form, why it is not the sandwich.
    where: the line of the model that it comes from, where the graph knows it.
    """

    graph: int
    all_reduce: str
    form: str
    reason: str
    where: str = ""

    def __str__(self) -> str:
        what = f"fused ({self.form})" if self.form else "left"
        reason = f": {self.reason}" if self.reason else ""
        where = f" [{self.where}]" if self.where else ""
        return f"graph {self.graph}, {self.all_reduce}: {what}{reason}{where}"


_records: deque[FusionRecord] = deque(maxlen=MAX_RECORDS)


def fusion_report(*, clear: bool = False) -> list[FusionRecord]:
    """Every all-reduce that the pass has seen in this process, oldest first; the last 10,000.

    clear: forget them afterwards.
    A graph from Inductor's cache is not seen again, and is not in the report. What was fused in it
    is counted all the same, in torch._dynamo.utils.counters["inductor"], as "gemma_ar_norm_plain",
    "..._residual", "..._sandwich" and "..._left".

    >>> [record.form for record in gemma_ar_norm.fusion_report()]
    ['residual', 'residual']
    """
    found = list(_records)
    if clear:
        _records.clear()
    return found


def note(record: FusionRecord) -> None:
    """Takes a record into the report, the counters and the log (for fusion_pass.py)."""
    from torch._dynamo.utils import counters

    _records.append(record)
    counters["inductor"][f"gemma_ar_norm_{record.form or 'left'}"] += 1
    log.info("%s", record)

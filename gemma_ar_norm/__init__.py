"""All-reduce, residual add and Gemma RMSNorm in one CUDA kernel, for tensor-parallel inference.

    norm_out, residual_out = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, weight, residual)

See `fused_allreduce_gemma_rmsnorm` for what it computes, `init` for the workspace of a group,
`explain` for the path that a call takes, `local_group` for ranks without processes,
`FusedAllReduceGemmaRMSNorm` for the module, `fuse` for models of Hugging Face transformers, and
`inductor_options` for torch.compile to find such calls in a model.
"""

from typing import TYPE_CHECKING, Any

from .api import Explanation, explain, fused_allreduce_gemma_rmsnorm
from .errors import PeerTimeoutError, WorkspaceError
from .fusion import FusionRecord, fusion_report, inductor_options
from .library import _C  # first: the others need the ops it loads
from .modules import FusedAllReduceGemmaRMSNorm
from .workspace import (
    LocalGroup,
    LocalRank,
    Workspace,
    check,
    close,
    init,
    local_group,
    synchronize,
)

if TYPE_CHECKING:
    from .huggingface import FusedSite, Fusion, fuse, unfuse

__version__: str = _C.build_info()["version"]

__all__ = [
    "Explanation",
    "FusedAllReduceGemmaRMSNorm",
    "FusedSite",
    "Fusion",
    "FusionRecord",
    "LocalGroup",
    "LocalRank",
    "PeerTimeoutError",
    "Workspace",
    "WorkspaceError",
    "__version__",
    "check",
    "close",
    "explain",
    "fuse",
    "fused_allreduce_gemma_rmsnorm",
    "fusion_report",
    "inductor_options",
    "init",
    "local_group",
    "synchronize",
    "unfuse",
]

# At their first use: they need torch.distributed.tensor, which is slow to import.
_LAZY = ("FusedSite", "Fusion", "fuse", "unfuse")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

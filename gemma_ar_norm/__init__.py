"""All-reduce, residual add and Gemma RMSNorm in one CUDA kernel, for tensor-parallel inference.

    norm_out, residual_out = gemma_ar_norm.fused_allreduce_gemma_rmsnorm(x, weight, residual)

See `fused_allreduce_gemma_rmsnorm` for what it computes, `init` for the workspace of a group,
`explain` for the path that a call takes, `local_group` for ranks without processes.
"""

from .api import Explanation, explain, fused_allreduce_gemma_rmsnorm
from .errors import PeerTimeoutError, WorkspaceError
from .library import _C  # first: the others need the ops it loads
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

__version__: str = _C.build_info()["version"]

__all__ = [
    "Explanation",
    "LocalGroup",
    "LocalRank",
    "PeerTimeoutError",
    "Workspace",
    "WorkspaceError",
    "__version__",
    "check",
    "close",
    "explain",
    "fused_allreduce_gemma_rmsnorm",
    "init",
    "local_group",
    "synchronize",
]

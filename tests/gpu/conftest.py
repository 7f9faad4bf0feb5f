"""What the GPU tests share. All of them are skipped where torch sees no GPU."""

from __future__ import annotations

import gc
import os

# Each rank of a local group has a stream of its own. With the default of 8 queues two of 8 ranks
# could share one, and a waiting kernel would hold up the one that it waits for. Before CUDA starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import pytest
import torch


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    why = f"no CUDA GPU: torch {torch.__version__} sees none"
    for item in items:
        if str(item.path).startswith(here + os.sep):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def clean_device():
    """Leaves no workspace, stream or error of one test to the next."""
    yield
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

"""For all tests. pythonpath (pyproject.toml) has this directory: `import checks`."""

from __future__ import annotations

import os

# One machine, and perhaps no other network: gloo looks for none. Before torch.distributed starts.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

# Threads of torch that wait for each other spin. Where something else runs beside the tests, two of
# them took five times as long as one; and on an idle machine the tests' tensors gain nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

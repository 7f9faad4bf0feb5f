"""For all tests. pythonpath (pyproject.toml) has this directory: `import checks`."""

from __future__ import annotations

import os

# One machine, and perhaps no other network: gloo looks for none. Before torch.distributed starts.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

"""Every kernel under each of compute-sanitizer's tools, in few cases. By hand, with more of them:
`make sanitize`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "sanitizer" / "run.py"


def load_run():
    spec = importlib.util.spec_from_file_location("sanitizer_run", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_tool_finds_anything():
    run = load_run()
    try:
        nvcc = run.find_nvcc()
    except run.toolchain.BuildError as error:
        pytest.skip(str(error))
    if run.find_sanitizer(nvcc.path) is None:
        pytest.skip("no compute-sanitizer")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    ran = subprocess.run(
        [sys.executable, str(RUN), "--quick", "--limit", "240"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(ran.stdout)
    if "Device not supported" in ran.stdout:  # as in some virtual machines
        pytest.skip("compute-sanitizer: it does not support this GPU here")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for tool in ("no_tool", *run.CHECKS):
        assert f"{tool}: right: " in ran.stdout, ran.stdout

"""Makes the virtual environment that the Makefile works in; does nothing that is done already.

    python3 tools/setup_venv.py .venv build    torch, and what building the package needs
    python3 tools/setup_venv.py .venv test     the same, and pytest, of any version that is there
    python3 tools/setup_venv.py .venv dev      the same, and the pinned tools of `make test`

A machine whose python3 has a torch we can build against (a GPU image, usually) keeps using that
one: it suits the driver, and a second one would be a download of 3 GB. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
BUILDTOOLS = ROOT / "buildtools"
sys.path.insert(0, str(BUILDTOOLS))

import gan_toolchain as toolchain  # noqa: E402

# The torch that the project is developed and tested with on machines that have none.
PINNED_TORCH = "torch==2.13.0"
SHARED_PACKAGES_FILE = "packages_of_base_python.pth"

CHECK_BUILD_TOOLS = """
import sys
import gan_toolchain as toolchain
import importlib.metadata
toolchain.require_cmake()
toolchain.require_program("ninja", "data/bin")
toolchain.require_pybind11()
version = importlib.metadata.version("setuptools")
if toolchain.version_numbers(version) < (77,):
    sys.exit(f"setuptools {version} is too old")
"""


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def make_venv(directory: Path) -> None:
    say(f"making {directory}")
    venv.create(directory, with_pip=True, symlinks=True)
    try:
        torch = toolchain.find_torch()
    except toolchain.BuildError:
        return
    say(f"using torch {torch.version} of {sys.executable}")
    # Not --system-site-packages: where python3 is itself of a venv, that would show the packages of
    # the python below it.
    site_packages = next((directory / "lib").glob("python3*/site-packages"))
    shared = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        str(torch.directory.parent),
    }
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sorted(shared)]
    (site_packages / SHARED_PACKAGES_FILE).write_text("".join(lines))


def run_python(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(BUILDTOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def install(python: Path, *arguments: str) -> None:
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-qq", *arguments], check=True)


def ensure_torch(python: Path) -> None:
    code = "import gan_toolchain as toolchain; toolchain.find_torch()"
    if run_python(python, "-c", code).returncode:
        say(f"installing {PINNED_TORCH}")
        install(python, PINNED_TORCH)


def ensure_build_tools(python: Path) -> None:
    if run_python(python, "-c", CHECK_BUILD_TOOLS).returncode:
        say("installing requirements-build.txt")
        install(python, "-r", str(ROOT / "requirements-build.txt"))


def ensure_test_tools(python: Path) -> None:
    if run_python(python, "-c", "import hypothesis, pytest").returncode:
        install_dev_tools(python)


def install_dev_tools(python: Path) -> None:
    say("installing requirements-dev.txt")
    install(python, "-r", str(ROOT / "requirements-dev.txt"))


def ensure_nvcc(python: Path) -> None:
    answer = run_python(python, str(BUILDTOOLS / "gan_toolchain.py"))
    if answer.returncode:
        sys.exit(answer.stderr)
    print(answer.stderr, end="", file=sys.stderr)
    if requirements := answer.stdout.split():
        say("no nvcc found: installing pip's CUDA compiler (100 MB)")
        install(python, *requirements)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("tools", choices=("build", "test", "dev"))
    arguments = parser.parse_args()
    python = arguments.directory / "bin" / "python"
    try:
        if not python.exists():
            make_venv(arguments.directory)
        ensure_torch(python)
        if arguments.tools == "dev":
            install_dev_tools(python)
        else:
            ensure_build_tools(python)
            if arguments.tools == "test":
                ensure_test_tools(python)
        ensure_nvcc(python)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

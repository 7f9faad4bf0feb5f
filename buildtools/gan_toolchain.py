"""What a build of gemma_ar_norm needs from the machine, and the words when it is not there.

Standard library only, and nothing here imports torch: the code runs inside pip's isolated builds,
where torch cannot be imported and must not be installed a second time. ``setup.py``, the PEP 517
backend and the Makefile use it; ``tests/cpu/test_packaging.py`` tests it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 10)  # The stable ABI that csrc/binding/ops.cpp targets.
MINIMUM_CUDA = (12, 8)  # The first nvcc that knows sm_100 and sm_120.
MINIMUM_CMAKE = (3, 24)
# 120 without a suffix is machine code and PTX, which later GPUs compile when first loaded.
DEFAULT_CUDA_ARCHS = "80-real;90-real;100-real;120"
MINIMUM_ARCH = 80

# pip's CUDA 13 compiler is complete. The -cu12 wheels are not: nvidia-cuda-nvcc-cu12 holds ptxas
# and libnvvm, but neither nvcc nor cudafe++, so there is no CUDA 12 compiler to ask pip for.
PIP_CUDA_MAJOR = 13
PIP_CUDA_REQUIREMENTS = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-nvvm==13.0.*",
)


class BuildError(RuntimeError):
    """The machine lacks something; the text says what is required, what was got, what to do."""


# ---- torch ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    directory: Path
    version: str
    cuda: str | None  # torch.version.cuda; None for a CPU-only torch.

    @property
    def cuda_major(self) -> int | None:
        return int(self.cuda.split(".")[0]) if self.cuda else None


def torch_candidates() -> list[Path]:
    """Directories that may be the torch package of the environment we build for, most likely first.

    pip's build isolation hides that environment from ``sys.path`` but changes neither ``sysconfig``
    nor ``sys.prefix``.
    """
    if named := os.environ.get("GAN_TORCH_DIR"):
        return [Path(named)]
    candidates = []
    spec = importlib.util.find_spec("torch")  # Finds a top-level package without running it.
    if spec and spec.submodule_search_locations:
        candidates += [Path(location) for location in spec.submodule_search_locations]
    parents = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sees_base_packages(Path(sys.prefix)):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for scheme in sysconfig.get_scheme_names():
            if scheme.startswith(("posix_prefix", "posix_local", "deb_system")):
                parents.append(sysconfig.get_path("purelib", scheme, base))
        parents.append(site.getusersitepackages())
    return [*candidates, *(Path(parent) / "torch" for parent in dict.fromkeys(parents) if parent)]


def sees_base_packages(prefix: Path) -> bool:
    """Whether the environment at ``prefix`` is no venv, or one made with --system-site-packages."""
    settings = prefix / "pyvenv.cfg"
    if not settings.is_file():
        return True
    pattern = r"^include-system-site-packages\s*=\s*true\s*$"
    return bool(re.search(pattern, settings.read_text(), re.MULTILINE | re.IGNORECASE))


def version_numbers(version: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` -> ``(2, 13, 0)``, ``"2.10.0a0+git"`` -> ``(2, 10, 0)``."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match.group().split(".")) if match else ()


def read_torch(directory: Path) -> Torch:
    """The torch in ``directory``, from its files; BuildError when it cannot be built against."""

    def assigned(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return match.group(1) if match else None

    text = (directory / "version.py").read_text()
    version = assigned("__version__")
    needs = f"torch: version {dotted(MINIMUM_TORCH)} or newer with its C++ headers is required"
    if version is None:
        raise BuildError(
            f"{needs}; got {directory}/version.py without a version in it; reinstall torch"
        )
    if version_numbers(version)[:2] < MINIMUM_TORCH:
        raise BuildError(
            f"{needs}; got torch {version} in {directory}; "
            f"pip install 'torch>={dotted(MINIMUM_TORCH)}'"
        )
    if assigned("hip"):
        raise BuildError(
            f"{needs}; got torch {version} in {directory}, a ROCm build; "
            "install a CUDA build or a CPU-only build of torch"
        )
    for part in ("include/torch/csrc/stable/library.h", "lib/libtorch.so"):
        if not (directory / part).is_file():
            raise BuildError(
                f"{needs}; got torch {version} in {directory}, which has no {part}; reinstall torch"
            )
    return Torch(directory=directory, version=version, cuda=assigned("cuda"))


def find_torch(candidates: Iterable[Path] | None = None) -> Torch:
    looked = list(torch_candidates() if candidates is None else candidates)
    for directory in looked:
        if (directory / "version.py").is_file():
            return read_torch(directory)
    raise BuildError(
        f"torch: version {dotted(MINIMUM_TORCH)} or newer is required in the environment that "
        f"gemma_ar_norm is built for; got none (looked at {listed(looked)}); install torch first "
        "('pip install torch'), then this package, or, if your installer hides that environment "
        "(uv, python -m build), name torch's directory: "
        "GAN_TORCH_DIR=$(python -c 'import torch; print(torch.__path__[0])')"
    )


# ---- CUDA compiler -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: tuple[int, int]

    @property
    def release(self) -> str:
        return dotted(self.version)


@dataclass(frozen=True)
class NvccChoice:
    nvcc: Nvcc | None
    warning: str = ""
    rejected: tuple[str, ...] = ()  # Each candidate that was passed over, with the reason.


def nvcc_candidates() -> list[Path]:
    """Paths that may be an nvcc, in order of preference. They need not exist."""
    candidates = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            candidates.append(Path(home) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    toolkits = Path("/usr/local").glob("cuda-*")
    newest_first = sorted(
        toolkits, key=lambda toolkit: version_numbers(toolkit.name[5:]), reverse=True
    )
    candidates += [toolkit / "bin" / "nvcc" for toolkit in newest_first]
    for packages in (*sys.path, sysconfig.get_path("purelib")):  # pip's toolkit
        candidates.append(Path(packages) / "nvidia" / f"cu{PIP_CUDA_MAJOR}" / "bin" / "nvcc")
    return list(dict.fromkeys(candidates))


def nvcc_version(path: Path) -> tuple[int, int] | None:
    """What ``nvcc --version`` says, or None when it is no working nvcc."""
    try:
        answer = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(match.group(1)), int(match.group(2))) if match else None


def choose_nvcc(
    torch_cuda: str | None,
    *,
    named: str | None = None,
    candidates: Iterable[Path] = (),
    version_of: Callable[[Path], tuple[int, int] | None] = nvcc_version,
) -> NvccChoice:
    """The compiler for a torch built with CUDA ``torch_cuda`` (None: CPU-only, any will do).

    ``named`` (the variable CUDACXX) is taken as it is. Otherwise the first candidate of torch's
    CUDA major version wins, and without one the first that is new enough, with a warning: the CUDA
    runtime is linked statically, so another major version works too, where the driver is new enough
    for it.
    """
    if named:
        named_path = Path(shutil.which(named) or named)
        version = version_of(named_path)
        if version is None or version < MINIMUM_CUDA:
            got = "no working nvcc" if version is None else f"CUDA {dotted(version)}"
            raise BuildError(
                f"CUDACXX: an nvcc of CUDA {dotted(MINIMUM_CUDA)} or newer is required; "
                f"got {named} ({got}); unset CUDACXX or point it at a newer nvcc"
            )
        nvcc = Nvcc(named_path, version)
        return NvccChoice(nvcc, mismatch_warning(nvcc, torch_cuda))

    usable, rejected = [], []
    for path in candidates:
        if not path.is_file():
            continue
        version = version_of(path)
        if version is None:
            rejected.append(f"{path}: does not answer --version")
        elif version < MINIMUM_CUDA:
            rejected.append(f"{path}: CUDA {dotted(version)}")
        else:
            usable.append(Nvcc(path, version))
    for nvcc in usable:
        if not mismatch_warning(nvcc, torch_cuda):
            return NvccChoice(nvcc, rejected=tuple(rejected))
    if usable:
        return NvccChoice(usable[0], mismatch_warning(usable[0], torch_cuda), tuple(rejected))
    return NvccChoice(None, rejected=tuple(rejected))


def mismatch_warning(nvcc: Nvcc, torch_cuda: str | None) -> str:
    """Empty when the compiler suits torch."""
    if torch_cuda is None or nvcc.version[0] == int(torch_cuda.split(".")[0]):
        return ""
    warning = (
        f"torch is built for CUDA {torch_cuda}, but gemma_ar_norm is compiled with CUDA "
        f"{nvcc.release} ({nvcc.path}). "
    )
    if nvcc.version[0] == 13:
        warning += "It needs a driver of R580 or newer: older ones cannot run a CUDA 13 runtime. "
    return warning + (
        f"To match, install the CUDA {torch_cuda} toolkit or point CUDACXX at its nvcc."
    )


def find_nvcc(torch: Torch) -> NvccChoice:
    """``choose_nvcc`` on this machine. Its ``nvcc`` may be None."""
    return choose_nvcc(torch.cuda, named=os.environ.get("CUDACXX"), candidates=nvcc_candidates())


def require_nvcc(choice: NvccChoice) -> Nvcc:
    if choice.nvcc is None:
        got = listed(choice.rejected) if choice.rejected else "none"
        packages = " ".join(f"'{requirement}'" for requirement in PIP_CUDA_REQUIREMENTS)
        raise BuildError(
            f"nvcc: CUDA {dotted(MINIMUM_CUDA)} or newer is required to compile the kernels; "
            f"got {got}; install the CUDA toolkit and set CUDACXX=/path/to/nvcc, or build without "
            "--no-build-isolation (pip then fetches a compiler), or "
            f"pip install {packages}"
        )
    return choice.nvcc


def toolkit_environment(nvcc: Nvcc, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` for a compilation with ``nvcc``.

    pip's toolkit keeps its libraries in lib/, while its nvcc.profile says lib64/: the host linker
    is told by LIBRARY_PATH.
    """
    changed = dict(environment)
    toolkit = nvcc.path.resolve().parent.parent
    if (toolkit / "lib" / "libcudart_static.a").is_file() and not (toolkit / "lib64").exists():
        paths = [str(toolkit / "lib"), environment.get("LIBRARY_PATH", "")]
        changed["LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return changed


# ---- the other tools -----------------------------------------------------------------------------


def require_host_compiler() -> str:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "c++"]:
        if path := shutil.which(candidate):
            return path
    got = f"CXX={named}, which is not there" if named else "none"
    raise BuildError(
        f"g++: a C++17 host compiler is required (nvcc calls it too); got {got}; "
        "install g++ ('apt install g++') or set CXX"
    )


def require_python_headers() -> None:
    directory = Path(sysconfig.get_path("include"))
    if not (directory / "Python.h").is_file():
        python = f"python{dotted(sys.version_info[:2])}"
        raise BuildError(
            f"Python.h: the headers of {python} are required for the extension module; "
            f"got none in {directory}; install them ('apt install {python}-dev')"
        )


def require_program(name: str, package_directory: str) -> str:
    """``cmake`` or ``ninja``, from pip's package of that name first.

    The scripts of these packages may belong to another environment than the one pip builds in.
    """
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        packaged = Path(next(iter(spec.submodule_search_locations))) / package_directory / name
        if packaged.is_file():
            return str(packaged)
    beside_python = sysconfig.get_path("scripts")
    if path := shutil.which(name) or shutil.which(name, path=beside_python):
        return path
    raise BuildError(
        f"{name}: required to build; got none (looked for a Python package, at PATH and in "
        f"{beside_python}); pip install {name}"
    )


def require_cmake() -> str:
    cmake = require_program("cmake", "data/bin")
    answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"version (\S+)", answer)
    version = version_numbers(match.group(1)) if match else ()
    if version[:2] < MINIMUM_CMAKE:
        raise BuildError(
            f"cmake: version {dotted(MINIMUM_CMAKE)} or newer is required; got {dotted(version)} "
            f"({cmake}); pip install cmake"
        )
    return cmake


def require_pybind11() -> str:
    """The directory of pybind11's CMake files."""
    spec = importlib.util.find_spec("pybind11")
    if spec and spec.submodule_search_locations:
        directory = (
            Path(next(iter(spec.submodule_search_locations))) / "share" / "cmake" / "pybind11"
        )
        if directory.is_dir():
            return str(directory)
    raise BuildError(
        "pybind11: version 2.13 or newer is required to build; got none; pip install pybind11"
    )


# ---- settings ------------------------------------------------------------------------------------


def parse_cuda_archs(text: str | None) -> str:
    """GAN_CUDA_ARCHS as CMake writes it: ``"90, 120"`` -> ``"90;120"``; nothing -> the default."""
    archs = [arch for arch in re.split(r"[\s,;]+", text or "") if arch]
    for arch in archs:
        match = re.fullmatch(r"(\d{2,3})[af]?(-real|-virtual)?", arch)
        if arch != "native" and (match is None or int(match.group(1)) < MINIMUM_ARCH):
            raise BuildError(
                f"GAN_CUDA_ARCHS: compute capabilities of {MINIMUM_ARCH} or more are required, "
                f"such as '90', '80-real;90' or 'native'; got {text!r} ({arch!r} is not one); "
                "write them as in CMake's CUDA_ARCHITECTURES, or unset it for "
                f"{DEFAULT_CUDA_ARCHS!r}"
            )
    return ";".join(archs) or DEFAULT_CUDA_ARCHS


def parse_switch(name: str, environment: Mapping[str, str]) -> str:
    """A variable that turns an option on, as CMake writes it: ``"1"`` -> ``"ON"``; nothing, ``"0"``
    -> ``"OFF"``."""
    text = environment.get(name, "")
    if text not in ("", "0", "1"):
        raise BuildError(f"{name}: 0 or 1 is required; got {text!r}; unset it for 0")
    return "ON" if text == "1" else "OFF"


def build_requirements(choice: NvccChoice) -> list[str]:
    """What a build needs beside pyproject.toml's build requirements: a compiler, without one."""
    return [] if choice.nvcc else list(PIP_CUDA_REQUIREMENTS)


def dotted(numbers: Iterable[int]) -> str:
    return ".".join(str(number) for number in numbers)


def listed(things: Iterable[object]) -> str:
    return ", ".join(str(thing) for thing in things) or "nothing"


def main() -> int:
    """Prints what pip must install before a build without isolation, one requirement a line."""
    try:
        choice = find_nvcc(find_torch())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if choice.warning:
        print(f"warning: {choice.warning}", file=sys.stderr)
    print(*build_requirements(choice), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

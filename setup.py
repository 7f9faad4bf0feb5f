"""Builds libgemma_ar_norm.so and the _C module with CMake and Ninja. Everything else is in "
"pyproject.toml."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "buildtools"))

import gan_toolchain as toolchain  # noqa: E402

PACKAGE = "gemma_ar_norm"


class CMakeBuild(build_ext):
    """The one extension, ``_C``, stands for both shared libraries: CMake builds them together."""

    def run(self) -> None:
        try:
            self.build_with_cmake()
        except toolchain.BuildError as error:
            sys.exit(f"\nerror: {error}\n")
        except subprocess.CalledProcessError as error:
            # The tool has said why above; a Python traceback would hide it.
            sys.exit(
                f"\nerror: {shlex.join(error.cmd)} failed with exit status {error.returncode}\n"
            )

    def build_with_cmake(self) -> None:
        if sys.platform != "linux":
            raise toolchain.BuildError(f"platform: Linux is required; got {sys.platform}")
        torch = toolchain.find_torch()
        choice = toolchain.find_nvcc(torch)
        nvcc = toolchain.require_nvcc(choice)
        toolchain.require_python_headers()
        cmake = toolchain.require_cmake()
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": toolchain.require_program("ninja", "data/bin"),
            "CMAKE_CXX_COMPILER": toolchain.require_host_compiler(),
            "CMAKE_CUDA_COMPILER": str(nvcc.path),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": toolchain.require_pybind11(),
            "GAN_TORCH_DIR": str(torch.directory),
            "GAN_CUDA_ARCHS": toolchain.parse_cuda_archs(os.environ.get("GAN_CUDA_ARCHS")),
            "GAN_STRICT_ORDER": toolchain.parse_switch("GAN_STRICT_ORDER", os.environ),
        }
        print(f"gemma_ar_norm: torch {torch.version} in {torch.directory}")
        print(f"gemma_ar_norm: nvcc {nvcc.release} ({nvcc.path}), for {settings['GAN_CUDA_ARCHS']}")
        if choice.warning:
            print(f"gemma_ar_norm: warning: {choice.warning}", file=sys.stderr)
        sys.stdout.flush()

        in_place = self.is_in_place()
        build = ROOT / "build" / "cmake" if in_place else Path(self.build_temp).resolve()
        destination = ROOT / PACKAGE if in_place else Path(self.build_lib).resolve() / PACKAGE
        forget_other_tools(build, {**settings, "cmake": cmake})
        environment = toolchain.toolkit_environment(nvcc, os.environ)
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        for command in (
            [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *definitions],
            [cmake, "--build", str(build)],
            [cmake, "--install", str(build), "--prefix", str(destination)],
        ):
            subprocess.run(command, check=True, env=environment)

    def is_in_place(self) -> bool:
        """Editable installs import the source directory, so that is where the libraries go."""
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def get_outputs(self) -> list[str]:
        libraries = (Path(self.build_lib) / PACKAGE).glob("*.so")
        return [] if self.is_in_place() else [str(library) for library in libraries]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def forget_other_tools(build: Path, tools: dict[str, str]) -> None:
    """Empties ``build`` when it was configured with other tools: CMake's cache breaks then.

    Each isolated build of pip has its own copies, in a directory that vanishes afterwards. Other
    archs are no other tool, nor is another order.
    """
    record = build / "tools.json"
    options = ("GAN_CUDA_ARCHS", "GAN_STRICT_ORDER")
    now = {name: value for name, value in tools.items() if name not in options}
    if build.is_dir() and (not record.is_file() or json.loads(record.read_text()) != now):
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(now, indent=2) + "\n")


setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

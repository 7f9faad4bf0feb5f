"""The build's own logic: what it looks for, what it says when that is missing, what the packages "
"hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "buildtools"))

import gan_toolchain as toolchain  # noqa: E402
from gan_toolchain import BuildError  # noqa: E402

# ---- torch ---------------------------------------------------------------------------------------


def make_torch(directory, version="2.13.0+cpu", cuda=None, hip=None, files=True):
    """A directory that looks like an installed torch, version.py written as torch writes it."""
    directory.mkdir(parents=True)
    (directory / "version.py").write_text(
        "from typing import Optional\n\n"
        "__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']\n"
        f"__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
        f"git_version = 'cf30153c'\nhip: Optional[str] = {hip!r}\n"
    )
    if files:
        for part in ("include/torch/csrc/stable/library.h", "lib/libtorch.so"):
            (directory / part).parent.mkdir(parents=True, exist_ok=True)
            (directory / part).touch()
    return directory


@pytest.mark.parametrize(
    ("version", "cuda", "major"),
    [("2.13.0+cpu", None, None), ("2.11.0+cu130", "13.0", 13), ("2.10.0", "12.8", 12)],
)
def test_torch_is_read_without_importing_it(tmp_path, version, cuda, major):
    found = toolchain.find_torch(
        [tmp_path / "absent", make_torch(tmp_path / "torch", version, cuda)]
    )
    assert found == toolchain.Torch(tmp_path / "torch", version, cuda)
    assert found.cuda_major == major


def test_torch_of_this_environment_is_found():
    import torch

    found = toolchain.find_torch()
    assert found.directory == Path(torch.__path__[0])
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)


def test_missing_torch_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(BuildError) as error:
        toolchain.find_torch([tmp_path / "torch"])
    for part in (
        "2.10 or newer is required",
        f"looked at {tmp_path}",
        "pip install torch",
        "GAN_TORCH_DIR",
    ):
        assert part in str(error.value)


def test_gan_torch_dir_alone_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("GAN_TORCH_DIR", str(tmp_path / "mine"))
    assert toolchain.torch_candidates() == [tmp_path / "mine"]
    with pytest.raises(BuildError, match="got none"):
        toolchain.find_torch()


def test_isolated_build_looks_in_the_target_environment(monkeypatch):
    import sysconfig

    # pip's isolation leaves sysconfig alone and hides the site-packages from sys.path.
    monkeypatch.delenv("GAN_TORCH_DIR", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.torch_candidates()[0] == Path(sysconfig.get_path("purelib")) / "torch"


@pytest.mark.parametrize(
    ("settings", "sees"),
    [
        (None, True),
        ("home = /usr/bin\ninclude-system-site-packages = true\n", True),
        ("home = /usr/bin\ninclude-system-site-packages = false\n", False),
    ],
)
def test_base_packages_are_searched_only_where_the_venv_shows_them(tmp_path, settings, sees):
    if settings is not None:
        (tmp_path / "pyvenv.cfg").write_text(settings)
    assert toolchain.sees_base_packages(tmp_path) is sees


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        ({"version": "2.9.1+cu128", "cuda": "12.8"}, "got torch 2.9.1+cu128"),
        ({"version": "1.13.0"}, "got torch 1.13.0"),
        ({"version": "2.11.0+rocm7", "hip": "7.0"}, "a ROCm build"),
        ({"files": False}, "has no include/torch/csrc/stable/library.h"),
        ({"version": ""}, "without a version"),
    ],
)
def test_unusable_torch_is_refused_in_words(tmp_path, torch, words):
    with pytest.raises(
        BuildError, match=r"2\.10 or newer with its C\+\+ headers is required"
    ) as error:
        toolchain.find_torch([make_torch(tmp_path / "torch", **torch)])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.10.0a0+git12", (2, 10, 0)), ("2.10", (2, 10)), ("x", ())],
)
def test_version_numbers(version, numbers):
    assert toolchain.version_numbers(version) == numbers


# ---- CUDA compiler -------------------------------------------------------------------------------


def make_nvcc(directory, version):
    """A program that answers --version as nvcc does; version None: one that fails."""
    path = directory / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    answer = (
        f"echo 'Cuda compilation tools, release {version}, V{version}.61'" if version else "exit 1"
    )
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("torch_cuda", "toolkits", "chosen", "warns"),
    [
        ("13.0", ["12.8", "13.1"], "13.1", False),  # torch's major, though it is not the first
        ("12.8", ["13.1", "12.9", "12.8"], "12.9", False),  # the first of torch's major
        (None, ["12.9", "13.1"], "12.9", False),  # CPU-only torch: the first
        ("12.8", ["13.0"], "13.0", True),  # another major is better than none
        ("13.0", ["12.8"], "12.8", True),
        ("12.6", ["12.4", "13.0"], "13.0", True),  # 12.4 does not know sm_120
        ("13.0", ["broken", "13.0"], "13.0", False),
        ("13.0", ["12.4", "broken"], None, False),
        ("13.0", [], None, False),
    ],
)
def test_toolkit_matches_torch(tmp_path, torch_cuda, toolkits, chosen, warns):
    candidates = [
        make_nvcc(tmp_path / toolkit, None if toolkit == "broken" else toolkit)
        for toolkit in toolkits
    ]
    choice = toolchain.choose_nvcc(torch_cuda, candidates=[tmp_path / "absent", *candidates])
    assert (choice.nvcc.release if choice.nvcc else None) == chosen
    assert bool(choice.warning) is warns
    if warns:
        assert f"torch is built for CUDA {torch_cuda}" in choice.warning
        assert ("R580" in choice.warning) is chosen.startswith("13")


def test_cudacxx_wins_but_must_work(tmp_path):
    old, new = make_nvcc(tmp_path / "old", "12.4"), make_nvcc(tmp_path / "new", "12.8")
    other = make_nvcc(tmp_path / "other", "13.0")
    choice = toolchain.choose_nvcc("13.0", named=str(new), candidates=[other])
    assert choice.nvcc == toolchain.Nvcc(new, (12, 8))
    assert "CUDA 12.8" in choice.warning
    with pytest.raises(BuildError, match=r"12\.8 or newer is required; got .* \(CUDA 12\.4\)"):
        toolchain.choose_nvcc("13.0", named=str(old), candidates=[other])
    with pytest.raises(BuildError, match="no working nvcc"):
        toolchain.choose_nvcc("13.0", named=str(tmp_path / "absent"), candidates=[other])


def test_order_of_the_candidates(tmp_path, monkeypatch):
    on_path = make_nvcc(tmp_path / "path", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home2"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    found = toolchain.nvcc_candidates()
    expected = [
        tmp_path / "home/bin/nvcc",
        tmp_path / "home2/bin/nvcc",
        on_path,
        Path("/usr/local/cuda/bin/nvcc"),
        tmp_path / "site/nvidia/cu13/bin/nvcc",
    ]
    assert [path for path in found if path in expected] == expected


def test_missing_nvcc_says_what_was_found_and_what_to_do(tmp_path):
    none = toolchain.choose_nvcc("13.0", candidates=[])
    with pytest.raises(
        BuildError, match=r"12\.8 or newer is required .*; got none; install"
    ) as error:
        toolchain.require_nvcc(none)
    assert "CUDACXX" in str(error.value)
    assert "pip install 'nvidia-cuda-nvcc==13.0.*'" in str(error.value)
    old = toolchain.choose_nvcc("13.0", candidates=[make_nvcc(tmp_path, "11.8")])
    with pytest.raises(BuildError, match=r"got .*/nvcc: CUDA 11\.8;"):
        toolchain.require_nvcc(old)


def test_pip_toolkit_gets_a_library_path(tmp_path):
    nvcc = toolchain.Nvcc(make_nvcc(tmp_path / "cu13", "13.0"), (13, 0))
    assert toolchain.toolkit_environment(nvcc, {"A": "1"}) == {"A": "1"}
    library = tmp_path / "cu13/lib/libcudart_static.a"
    library.parent.mkdir()
    library.touch()
    changed = toolchain.toolkit_environment(nvcc, {"LIBRARY_PATH": "/mine"})
    assert changed == {"LIBRARY_PATH": f"{library.parent}:/mine"}
    (tmp_path / "cu13/lib64").mkdir()
    assert toolchain.toolkit_environment(nvcc, {}) == {}


# ---- other tools and settings --------------------------------------------------------------------


def test_missing_host_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BuildError, match=r"g\+\+: .* required .*; got CXX=no-such-compiler.*; install"
    ):
        toolchain.require_host_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BuildError, match="got none; install"):
        toolchain.require_host_compiler()


def test_missing_programs(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    with pytest.raises(BuildError, match=r"cmake: required .*; got none .*; pip install cmake"):
        toolchain.require_cmake()
    with pytest.raises(BuildError, match=r"pybind11: .*; got none; pip install pybind11"):
        toolchain.require_pybind11()


def test_old_cmake_is_refused(tmp_path, monkeypatch):
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho 'cmake version 3.22.1'\n")
    cmake.chmod(0o755)
    monkeypatch.setattr(toolchain, "require_program", lambda name, directory: str(cmake))
    with pytest.raises(BuildError, match=r"3\.24 or newer is required; got 3\.22\.1"):
        toolchain.require_cmake()


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        (None, toolchain.DEFAULT_CUDA_ARCHS),
        (" ", toolchain.DEFAULT_CUDA_ARCHS),
        ("90", "90"),
        ("80-real, 90", "80-real;90"),
        ("90a 100f-real;120-virtual", "90a;100f-real;120-virtual"),
        ("native", "native"),
    ],
)
def test_cuda_archs_are_parsed(text, archs):
    assert toolchain.parse_cuda_archs(text) == archs


@pytest.mark.parametrize("text", ["75", "sm_90", "9.0", "90-fast", "all", "90;x"])
def test_wrong_cuda_archs_are_refused(text):
    with pytest.raises(BuildError, match=f"GAN_CUDA_ARCHS: .* got {text!r}"):
        toolchain.parse_cuda_archs(text)


def test_a_switch_is_on_or_off():
    switches = [toolchain.parse_switch("GAN_X", {"GAN_X": text}) for text in ("", "0", "1")]
    assert switches == ["OFF", "OFF", "ON"]
    assert toolchain.parse_switch("GAN_X", {}) == "OFF"
    with pytest.raises(BuildError, match="GAN_X: 0 or 1 is required; got 'yes'"):
        toolchain.parse_switch("GAN_X", {"GAN_X": "yes"})


def test_cmake_has_the_same_defaults():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert f'set(GAN_CUDA_ARCHS "{toolchain.DEFAULT_CUDA_ARCHS}")' in text
    assert f"cmake_minimum_required(VERSION {toolchain.dotted(toolchain.MINIMUM_CMAKE)})" in text
    assert f"VERSION_LESS {toolchain.dotted(toolchain.MINIMUM_CUDA)})" in text
    major, minor = toolchain.MINIMUM_TORCH
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in text


# ---- the backend ---------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    import gan_backend

    monkeypatch.chdir(ROOT)
    # setuptools would run all of setup.py to answer.
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(gan_backend._setuptools, hook, lambda settings: ["from-setuptools"])
    return gan_backend


@pytest.mark.parametrize(
    "hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"]
)
@pytest.mark.parametrize("cuda", [None, "13.0", "12.8"])
def test_backend_asks_for_a_compiler_only_without_one(backend, monkeypatch, tmp_path, hook, cuda):
    monkeypatch.setenv("GAN_TORCH_DIR", str(make_torch(tmp_path / "torch", cuda=cuda)))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(
        toolchain, "nvcc_candidates", lambda: [make_nvcc(tmp_path / "cuda", "13.0")]
    )
    assert getattr(backend, hook)() == ["from-setuptools"]
    monkeypatch.setattr(toolchain, "nvcc_candidates", list)
    assert getattr(backend, hook)() == ["from-setuptools", *toolchain.PIP_CUDA_REQUIREMENTS]


def test_backend_stops_at_once_without_torch(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("GAN_TORCH_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"error: torch: version 2\.10 or newer is required"):
        backend.get_requires_for_build_wheel()


def test_torch_is_no_build_requirement_and_nccl_no_hard_one():
    text = (ROOT / "pyproject.toml").read_text()
    build_requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE).group(1)
    assert "torch" not in build_requires
    assert re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE).group(1) == '"torch>=2.10"'
    assert re.search(r'^cu12 = \["nvidia-nccl-cu12"\]$', text, re.MULTILINE)


# ---- what the packages hold ----------------------------------------------------------------------

SHIPPED_DIRECTORIES = (
    "csrc",
    "gemma_ar_norm",
    "tests",
    "bench",
    "buildtools",
    "tools",
    "docs",
    "examples",
)
SHIPPED_FILES = (
    ".ci/run",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements-build.txt",
    "requirements-dev.txt",
    "setup.py",
)


def is_source(path):
    made = {"__pycache__", ".mypy_cache", ".ruff_cache", ".hypothesis"}
    return (
        path.is_file() and not made & set(path.parts) and path.suffix not in (".so", ".o", ".pyc")
    )


def test_sdist_holds_every_source_file(tmp_path):
    # In a copy: setuptools leaves an egg-info directory behind.
    import shutil

    copy = tmp_path / "copy"
    for name in SHIPPED_DIRECTORIES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*SHIPPED_FILES, ".clang-format", ".gitignore"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "gemma_ar_norm/left_by_a_build.so").touch()
    code = "import gan_backend; print(gan_backend.build_sdist('..'))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy / "buildtools")},
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"gemma_ar_norm-{project_version()}.tar.gz"
    with tarfile.open(archive) as sdist:
        held = {str(Path(*Path(member).parts[1:])) for member in sdist.getnames()}
    wanted = set(SHIPPED_FILES) | {
        str(path.relative_to(ROOT))
        for name in SHIPPED_DIRECTORIES
        for path in (ROOT / name).rglob("*")
        if is_source(path)
    }
    assert wanted - held == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def project_version():
    return re.search(
        r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).group(1)


def test_installed_metadata():
    import importlib.metadata

    metadata = importlib.metadata.metadata("gemma_ar_norm")
    assert metadata["Version"] == project_version()
    assert metadata["License-Expression"] == "Apache-2.0"
    requires = importlib.metadata.requires("gemma_ar_norm")
    assert [line for line in requires if "extra ==" not in line] == ["torch>=2.10"]
    assert 'nvidia-nccl-cu12; extra == "cu12"' in requires


def test_version_is_the_one_in_the_library():
    import gemma_ar_norm._C as extension

    assert extension.build_info()["version"] == project_version()


def test_setup_py_lists_what_cmake_built_for_the_wheel(tmp_path):
    """get_outputs is what setuptools puts into the wheel's record; a stale or missing .so shows "
    "here."""
    code = f"""
import sys
sys.argv = ["setup.py", "--quiet", "build_ext"]
import distutils.core
distribution = distutils.core.run_setup("setup.py", stop_after="commandline")
command = distribution.get_command_obj("build_ext")
command.ensure_finalized()
command.build_lib = {str(tmp_path)!r}
print(*command.get_outputs())
command.inplace = 1
print(*command.get_outputs())
"""
    package = tmp_path / "gemma_ar_norm"
    package.mkdir()
    for name in ("libgemma_ar_norm.so", "_C.so", "api.py"):
        (package / name).touch()
    printed = subprocess.run(
        [sys.executable, "-c", "import setuptools\n" + code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    assert set(printed[0].split()) == {str(package / "libgemma_ar_norm.so"), str(package / "_C.so")}
    assert printed[1] == ""

"""What the build has made, looked at without a GPU: the library's symbols and needs, the PTX, and
the registers and memory of every kernel on every arch."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from gemma_ar_norm import library, plan

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "buildtools"))

import gan_toolchain as toolchain  # noqa: E402

LIBRARY = library.LIBRARY
C_MODULE = Path(library._C.__file__)

# Two blocks of 512 threads, this kernel's and the stream's next one's, fit the 65536 registers of
# a multiprocessor.
MAX_REGISTERS = 64

DTYPES = 3
RANKS = range(2, 9)


def output_of(*command: object) -> str:
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


# ---- the libraries -------------------------------------------------------------------------------


def needed(file: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", file)))


def symbols(file: Path, kind: str) -> dict[str, str]:
    """Name -> nm's letter, of the dynamic symbols that are `defined` or `undefined`."""
    lines = output_of("nm", "-D", "-C", f"--{kind}-only", file).splitlines()
    found = (re.fullmatch(r"[0-9a-f ]*([A-Za-z]) (.+)", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


def test_the_library_loads_into_torch_alone():
    """Without the package, CUDA, or anything else that could have loaded what it needs."""
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        "op = torch.ops.gemma_ar_norm.fused_allreduce_rmsnorm\n"
        "print(*sorted(op.overloads()), torch.ops.gemma_ar_norm.add_rmsnorm.out is not None)"
    )
    assert output_of(sys.executable, "-W", "ignore", "-c", code).split() == [
        "default",
        "out",
        "True",
    ]


def test_it_needs_torch_and_no_cuda():
    assert "libtorch.so" in needed(LIBRARY), "without it the loader does not find the CUDA stream"
    allowed = r"libtorch(_cpu)?\.so|lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux.*"
    wrong = {name for name in needed(LIBRARY) if not re.fullmatch(allowed, name)}
    assert not wrong, "needed at run time"
    assert "libgemma_ar_norm.so" in needed(C_MODULE)
    assert not {name for name in needed(C_MODULE) if re.search("torch|cud|python", name)}


def test_no_path_of_the_build_machine_is_in_it():
    assert not re.search(r"R(UN)?PATH", output_of("readelf", "-d", LIBRARY))
    assert re.findall(r"RUNPATH.*\[(.+)\]", output_of("readelf", "-d", C_MODULE)) == ["$ORIGIN"]


def test_of_torch_it_uses_the_stable_abi_only():
    from_torch = {
        name: letter
        for name, letter in symbols(LIBRARY, "undefined").items()
        if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))
    }
    wrong = {name for name in from_torch if not re.fullmatch(r"(aoti_)?torch_\w+", name)}
    assert not wrong, "not functions of torch's C interface (CUDA's should be in the library)"
    # Only a torch with CUDA has it.
    assert from_torch["aoti_torch_get_current_cuda_stream"] == "w"


def declared_api() -> set[str]:
    """What the headers mark to be exported: functions, and classes with all their members."""
    names = set()
    for header in (ROOT / "csrc").glob("**/*.h"):
        text = re.sub(r"//.*", "", header.read_text())
        for marked in re.findall(r"^(?:class )?GAN(?:_BINDING)?_API ([^;{(]+)", text, re.MULTILINE):
            names.add(marked.split()[-1])
    return names


def test_it_exports_its_own_interface_only():
    api = declared_api()
    assert {"Workspace", "run_local", "driver_status", "set_slow_path_error"} <= api
    exported = symbols(LIBRARY, "defined")
    own = {
        match[1]
        for name in exported
        if (match := re.fullmatch(r"gan::(\w+)(?:::~?\w+)?(?:\[abi:cxx11\])?\(.*", name))
    }
    assert own == api
    # g++ exports instances of the standard library's templates, weak ones, and the linker its ends.
    rest = {
        name
        for name, letter in exported.items()
        if not name.startswith("gan::")
        and not (
            letter in "VWu" and re.match(r"((typeinfo|typeinfo name|vtable) for )?std::", name)
        )
        and name not in ("__bss_start", "_edata", "_end", "_init", "_fini")
    }
    assert not rest


# ---- _C.pyi --------------------------------------------------------------------------------------


def stub_of(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    """Public name -> its parameters, or None for a value or property."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args
            names = [a.arg for a in arguments if a.arg != "self"]
            is_property = bool(node.decorator_list)
            found[node.name] = None if is_property else names
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
    return found


def module_of(thing: object, names: set[str]) -> dict[str, list[str] | None]:
    """The same of the compiled module. pybind11 writes the signature into the docstring."""
    found: dict[str, list[str] | None] = {}
    for name in names:
        value = getattr(thing, name)
        if callable(value):
            signature = (value.__doc__ or "").split(" -> ")[0]
            parameters = re.findall(r"[(,] ?(\w+):", signature)
            found[name] = [p for p in parameters if p != "self"]
        else:
            found[name] = None
    return found


def unnamed(parameters: list[str] | None) -> list[str] | int | None:
    """Parameters without py::arg are arg0, arg1, ...: their number counts."""
    if parameters and parameters[0].startswith("arg"):
        return len(parameters)
    return parameters


def test_the_stub_is_that_of_the_module():
    tree = ast.parse((ROOT / "gemma_ar_norm/_C.pyi").read_text())
    (workspace,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Workspace")
    for body, thing in ((tree.body, library._C), (workspace.body, library._C.Workspace)):
        public = {name for name in dir(thing) if not name.startswith("_")} - {"Workspace"}
        if thing is library._C.Workspace:
            public.add("__init__")
        stub, real = stub_of(body), module_of(thing, public)
        assert set(stub) == set(real)
        for name, parameters in real.items():
            expected = stub[name]
            if isinstance(unnamed(parameters), int):
                assert expected is not None, name
                assert len(expected) == len(parameters or ()), name
            else:
                assert expected == parameters, name


# ---- the kernels ---------------------------------------------------------------------------------


def find_cuobjdump() -> Path | None:
    """pip's (requirements-dev.txt), or that of an installed toolkit."""
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}:
        for found in Path(site).glob("nvidia/*/bin/cuobjdump"):
            return found
    installed = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    return Path(installed) if installed else None


@dataclass(frozen=True)
class Section:
    """A part of the library for one arch: machine code ("elf") or PTX."""

    kind: str
    arch: str  # "sm_90"
    text: str


def cuobjdump(option: str) -> list[Section]:
    tool = find_cuobjdump()
    if tool is None:
        # .ci/run sets it: there nothing may be left out.
        assert not os.environ.get("GAN_CI"), "cuobjdump is required; got none; install it with pip"
        pytest.skip("needs cuobjdump: pip install nvidia-cuda-cuobjdump, or a CUDA toolkit")
    parts = re.split(r"^Fatbin (ptx|elf) code:\n", output_of(tool, option, LIBRARY), flags=re.M)[1:]
    return [
        Section(kind, re.search(r"^arch = (sm_\w+)$", text, re.M)[1], text)
        for kind, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def requested_archs() -> str:
    """GAN_CUDA_ARCHS of the build."""
    cache = ROOT / "build/cmake/CMakeCache.txt"  # of an editable install
    if LIBRARY.parent.parent == ROOT and cache.is_file():
        return re.search(r"^GAN_CUDA_ARCHS:\w+=(.*)$", cache.read_text(), re.M)[1]
    return toolchain.parse_cuda_archs(os.environ.get("GAN_CUDA_ARCHS"))


def test_it_has_code_for_all_archs():
    requested = requested_archs()
    wanted = {"elf": set(), "ptx": set()}
    for arch in requested.split(";"):
        if arch == "native":
            pytest.skip("built for this machine's own GPU (GAN_CUDA_ARCHS=native)")
        number, _, only = arch.partition("-")
        for kind, name in (("elf", "real"), ("ptx", "virtual")):
            if only in ("", name):
                wanted[kind].add(f"sm_{number}")
    sections = cuobjdump("--dump-resource-usage")
    for kind, archs in wanted.items():
        assert {s.arch for s in sections if s.kind == kind} == archs, f"built for {requested}"


def test_all_archs_are_the_default():
    default = toolchain.parse_cuda_archs(None)
    assert default == "80-real;90-real;100-real;120"
    assert f'"{default}"' in (ROOT / "CMakeLists.txt").read_text()


def assert_all_kernels(names: set[str]) -> None:
    """Fused kernels for every algorithm, dtype and number of ranks, local ones for every dtype."""
    for algorithm in plan.FUSED_ALGORITHMS:
        found = {
            (int(m[1]), int(m[2]))
            for n in names
            if (m := re.search(rf"{algorithm}ILNS_5DTypeE(\d)ELj(\d)E", n))
        }
        assert found == {(dtype, ranks) for dtype in range(DTYPES) for ranks in RANKS}, algorithm
    local = {int(m[1]) for n in names if (m := re.search(r"local_normILNS_5DTypeE(\d)E", n))}
    assert local == set(range(DTYPES))


def test_no_kernel_spills_and_two_blocks_fit_a_multiprocessor():
    usage: dict[str, dict[str, dict[str, int]]] = {}  # arch -> kernel -> resource -> amount
    for section in cuobjdump("--dump-resource-usage"):
        if section.kind == "elf":
            for name, resources in re.findall(r"Function (\S+):\n\s*(.+)", section.text):
                amounts = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", resources)}
                usage.setdefault(section.arch, {})[name] = amounts
    assert usage
    for arch, kernels in usage.items():
        assert_all_kernels(set(kernels))
        for name, amounts in kernels.items():
            used = f"{name} on {arch}: {amounts}"
            assert amounts["STACK"] == 0, used
            assert amounts["LOCAL"] == 0, used
            assert 0 < amounts["REG"] <= MAX_REGISTERS, used


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """The PTX of each kernel that has rows, by its name. (Not of debug mode's, a thread each.)"""
    sections = [section for section in cuobjdump("--dump-ptx") if section.kind == "ptx"]
    if not sections:
        pytest.skip(f"built without PTX (GAN_CUDA_ARCHS={requested_archs()})")
    text = "".join(section.text for section in sections)
    assert ".func" not in text, "everything is inlined"
    parts = re.split(r"\.entry (\w+)\(", text)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    assert_all_kernels(set(found))
    return {name: ptx for name, ptx in found.items() if "_call" not in name}


def instructions(ptx: str) -> list[str]:
    """The instructions' names, with all their suffixes, in order."""
    body = re.sub(r"//.*", "", ptx[ptx.index("{") :])
    return re.findall(r"(?:^|[;{}:])\s*(?:@!?%?\w+\s+)?([a-z][\w.:]*)(?=[\s;])", body, re.M)


def test_peers_are_reached_by_relaxed_16_byte_accesses(kernels):
    for name, ptx in kernels.items():
        used = instructions(ptx)
        exchanges = any(algorithm in name for algorithm in plan.FUSED_ALGORITHMS)
        for access in ("ld.relaxed.sys.global.v4.u32", "st.relaxed.sys.global.v4.u32"):
            assert (access in used) == exchanges, f"{access} in {name}"


def test_no_access_is_stronger_or_through_the_read_only_path(kernels):
    """The protocol needs no barrier and no fence of the system; outputs may alias inputs."""
    allowed = {"fence.acq_rel.gpu", "fence.mbarrier_init.release.cluster"}  # failure, team's start
    stronger = re.compile(
        r"(fence|membar)\b.*|(ld|st|atom|red)\..*\b(acquire|release|acq_rel|volatile|nc)\b.*"
    )
    for name, ptx in kernels.items():
        assert not {u for u in instructions(ptx) if stronger.fullmatch(u)} - allowed, name


def test_no_kernel_has_local_memory(kernels):
    for name, ptx in kernels.items():
        assert ".local" not in ptx, name


def test_kernels_of_a_stream_overlap(kernels):
    for name, ptx in kernels.items():
        used = instructions(ptx)
        assert used.count("griddepcontrol.wait") == 1, name
        assert "griddepcontrol.launch_dependents" in used, name


def test_nothing_is_read_or_written_before_the_earlier_kernels_have_ended(kernels):
    for name, ptx in kernels.items():
        used = instructions(ptx)
        before = used[: used.index("griddepcontrol.wait")]
        assert not [u for u in before if "global" in u], name
        assert [u for u in used if "global" in u], name


# In rstd.cuh: divide_by_hidden has two, rstd_of eight more and the one rsqrt.approx.
FMAS_AN_RSTD = 10
ARITHMETIC = re.compile(
    r"(add|sub|mul|mad|fma|div|sqrt|rsqrt|rcp|neg|abs|min|max|sin|cos|lg2|ex2|tanh|cvt)\..*"
    r"(\bf16|\bf32|\bf64|bf16|f16x2|tf32)"
)
ALLOWED = re.compile(
    # Each rounded once, as written: the assembler leaves those with .rn as they are. Without it,
    # it may contract a product and a sum.
    r"(add|mul|fma|div|sqrt|rcp)\.rn\.f32|rsqrt\.approx\.ftz\.f32|neg\.f32"
    # T(a + b) of two at once.
    r"|add\.rn\.b?f16x2"
    # To T and back.
    r"|cvt\.rn\.(b?f16x2|b?f16)\.f32|cvt\.f32\.b?f16"
)


def test_every_operation_is_rounded_once(kernels):
    """No contraction to FMA, no fast division, no flushing of subnormals: the contract."""
    for name, ptx in kernels.items():
        used = instructions(ptx)
        assert "add.rn.f32" in used, name
        wrong = {u for u in used if ARITHMETIC.match(u) and not ALLOWED.fullmatch(u)}
        assert not wrong, name
        rstds = used.count("rsqrt.approx.ftz.f32")
        assert rstds > 0, name
        assert used.count("fma.rn.f32") == FMAS_AN_RSTD * rstds, f"{name}: {rstds} rstd"

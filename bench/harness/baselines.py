"""What is timed, one class each: the floor, the fused call, and what it is compared with.

A new baseline: a class with a name, `why_not` (why it cannot run here, or None), and `make`, which
returns a function of (x, weight, residual, post_weight) to (norm_out, residual_out); an instance of
it in `all_baselines`. The function must leave its arguments alone. `prepare` is for memory that all
ranks share. All of these are called on every rank; an exception of one rank skips the baseline on
all.

"+ norm" is the package's own add-and-norm kernel, the one that the floor is. No NVLink multicast
anywhere: bench_fused.py sets NCCL_NVLS_ENABLE=0 and TORCH_SYMM_MEM_DISABLE_MULTICAST=1, and
FlashInfer gets its memory from CUDA IPC.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gemma_ar_norm
from gemma_ar_norm import groups

from .cases import EPS, WEIGHT_BIAS, Call, Case, Outputs

MIB = 1 << 20
ONE_RANK = "one rank: there is nothing to reduce"


@dataclass(frozen=True)
class World:
    """What a rank knows of the run, equal on all ranks but for `rank` and `device`."""

    rank: int
    ranks: int
    device: torch.device
    nccl: bool  # the default group has NCCL for CUDA tensors
    shared_gpu: bool  # several ranks are on one GPU
    not_fused: str  # why the fused kernels cannot run; "" where they can

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


class Baseline:
    name: str
    about: str  # for the lines under the table
    reduces = True  # False: no sum over ranks; reference.py is asked for that, too

    def why_not(self, world: World) -> str | None:
        """Why it cannot run here at all."""
        return None

    def why_not_for(self, case: Case, world: World) -> str | None:
        """Why it does not take this case."""
        return None

    def prepare(self, world: World, cases: Sequence[Case]) -> None:
        """Before its first case: all that it takes. Collective."""

    def make(self, case: Case, world: World) -> Call:
        raise NotImplementedError

    def exact(self, world: World) -> bool:
        """Whether it must have the bits of reference.py; else it must be near it."""
        return False

    def can_be_captured(self, world: World) -> bool:
        """Whether its calls can be part of a CUDA graph."""
        return world.gpu

    def capturing(self) -> AbstractContextManager[Any]:
        """Around the capture."""
        return contextlib.nullcontext()

    def path(self, case: Case, world: World) -> str:
        """Which of its ways it takes, where it has several."""
        return ""


def norm(x: Tensor, weight: Tensor, residual: Tensor | None, post_weight: Tensor | None) -> Outputs:
    """Residual add and norm of a sum, without the sum: one rank's kernel."""
    return ours(x, weight, residual, post_weight, group=groups.NO_GROUP)


def ours(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    post_weight: Tensor | None,
    group: Any = None,
    algorithm: str = "auto",
) -> Outputs:
    return gemma_ar_norm.fused_allreduce_gemma_rmsnorm(
        x,
        weight,
        residual,
        post_weight=post_weight,
        eps=EPS,
        weight_bias=WEIGHT_BIAS,
        group=group,
        algorithm=algorithm,
    )


def missing(module: str, package: str) -> str | None:
    """Why a module cannot be had."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        return f"not installed: pip install {package}"
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None


# --------------------------------------------------------------------------------- ours, the floor


class Floor(Baseline):
    name = "floor"
    about = "residual add and norm alone, our kernel: what any all-reduce comes on top of"
    reduces = False

    def exact(self, world: World) -> bool:
        return True

    def make(self, case: Case, world: World) -> Call:
        return norm


class Ours(Baseline):
    def __init__(self, algorithm: str, about: str):
        self.name, self.about, self.algorithm = f"ours/{algorithm}", about, algorithm

    def why_not(self, world: World) -> str | None:
        if self.algorithm == "auto":
            return None
        if world.ranks == 1:
            return ONE_RANK
        return world.not_fused or None

    def make(self, case: Case, world: World) -> Call:
        return partial(ours, algorithm=self.algorithm)

    def exact(self, world: World) -> bool:
        # On the unfused path sums have the order of the group's all-reduce.
        return not world.gpu or world.ranks == 1 or not world.not_fused

    def can_be_captured(self, world: World) -> bool:
        return world.gpu and (world.nccl or world.ranks == 1 or not world.not_fused)

    def path(self, case: Case, world: World) -> str:
        found = gemma_ar_norm.explain(
            case.rows,
            case.hidden,
            case.torch_dtype,
            device=world.device,
            algorithm=self.algorithm,
        )
        return found.path if found.launches <= 1 else f"{found.path} x{found.launches}"


# --------------------------------------------------------------------------- the unfused sequences


class Eager(Baseline):
    """As a model in eager mode has it: the collective, the add, the norm's steps."""

    name = "unfused/eager"
    about = "torch.distributed's all-reduce, then add and norm in plain torch"

    def make(self, case: Case, world: World) -> Call:
        return self.with_steps(steps)

    def with_steps(self, the_steps: Any) -> Call:
        def call(
            x: Tensor, weight: Tensor, residual: Tensor | None, post_weight: Tensor | None
        ) -> Outputs:
            a = x.clone()  # all_reduce writes over its argument
            dist.all_reduce(a)
            return the_steps(a, weight, residual, post_weight)

        return call

    def can_be_captured(self, world: World) -> bool:
        return world.gpu and world.nccl  # gloo goes through the host


def steps(
    a: Tensor, weight: Tensor, residual: Tensor | None, post_weight: Tensor | None
) -> Outputs:
    """Add and norm as transformers' Gemma3RMSNorm writes it."""

    def rmsnorm(v: Tensor, by: Tensor) -> Tensor:
        v32 = v.float()
        v32 = v32 * torch.rsqrt(v32.pow(2).mean(-1, keepdim=True) + EPS)
        return (v32 * (WEIGHT_BIAS + by.float())).to(v.dtype)

    if post_weight is not None:
        a = rmsnorm(a, post_weight)
    h = a if residual is None else residual + a
    return rmsnorm(h, weight), h


class Compiled(Eager):
    name = "unfused/compiled"
    about = "the same, add and norm compiled by torch.compile"

    def make(self, case: Case, world: World) -> Call:
        # A shape each: or else the limit of recompilations would make it eager without a word.
        torch.compiler.reset()
        return self.with_steps(torch.compile(steps, dynamic=False, fullgraph=True))


class Nccl(Baseline):
    name = "nccl + norm"
    about = "NCCL's all-reduce (the op's algorithm='unfused'), then our norm kernel"

    def why_not(self, world: World) -> str | None:
        if not world.gpu:
            return "needs GPUs"
        if world.ranks == 1:
            return ONE_RANK
        if not world.nccl:
            return "NCCL takes one rank a GPU; here ranks share one, or torch has no NCCL"
        return None

    def make(self, case: Case, world: World) -> Call:
        return partial(ours, algorithm="unfused")


# ------------------------------------------------------------------------- torch symmetric memory


class SymmetricMemory(Baseline):
    """x comes from ordinary memory, as everywhere here: one-shot copies it in its kernel, two-shot
    before it."""

    def __init__(self, shots: str):
        self.name, self.shots = f"symm_mem/{shots} + norm", shots
        how = "one_shot_all_reduce_copy" if shots == "one_shot" else "copy, two_shot_all_reduce_"
        self.about = f"torch.ops.symm_mem: {how}, then our norm kernel"
        self._buffers: dict[torch.dtype, Tensor] = {}

    def why_not(self, world: World) -> str | None:
        if not world.gpu:
            return "needs GPUs"
        if world.ranks == 1:
            return ONE_RANK
        why = missing("torch.distributed._symmetric_memory", "torch")
        op = "one_shot_all_reduce_copy" if self.shots == "one_shot" else "two_shot_all_reduce_"
        if why is None and not hasattr(torch.ops.symm_mem, op):
            why = f"torch {torch.__version__} has no symm_mem::{op}"
        return why

    def why_not_for(self, case: Case, world: World) -> str | None:
        return "takes bf16 and fp32" if case.dtype == "fp16" else None

    def prepare(self, world: World, cases: Sequence[Case]) -> None:
        if world.shared_gpu:
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        symm_mem: Any = importlib.import_module("torch.distributed._symmetric_memory")
        for dtype in sorted({case.torch_dtype for case in cases}, key=str):
            numbers = max(case.rows * case.hidden for case in cases if case.torch_dtype == dtype)
            buffer = symm_mem.empty(numbers, dtype=dtype, device=world.device)
            symm_mem.rendezvous(buffer, group=groups.name_of())
            self._buffers[dtype] = buffer

    def make(self, case: Case, world: World) -> Call:
        whole = self._buffers[case.torch_dtype]
        shared = whole[: case.rows * case.hidden].view(case.rows, case.hidden)
        group = groups.name_of()

        def one_shot(x: Tensor, *rest: Any) -> Outputs:
            a = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", group)
            return norm(a, *rest)

        def two_shot(x: Tensor, *rest: Any) -> Outputs:
            shared.copy_(x)
            return norm(torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", group), *rest)

        return one_shot if self.shots == "one_shot" else two_shot


# -------------------------------------------------------------------------------------- FlashInfer


class FlashInfer(Baseline):
    """flashinfer.comm.trtllm_allreduce_fusion, with early start (PDL) and fp32 sums.

    Its workspace is made here, of memory that the ranks reach by CUDA IPC: its own constructors
    use torch's symmetric memory, which refuses ranks that share a GPU.
    """

    MODULES = ("flashinfer.comm.trtllm_ar", "flashinfer.comm.cuda_ipc")
    FLAGS = 256  # blocks whose flags a rank has: BarrierFlagCount
    MOST_BYTES = 1 << 30  # of a stage

    def __init__(self, shots: str):
        self.name, self.shots = f"flashinfer/{shots}", shots
        self.about = f"FlashInfer's fused {shots.replace('_', '-')} kernel, weight_bias=1, PDL"
        self._workspaces: dict[bool, Tensor] = {}
        self._kept: list[Any] = []

    def why_not(self, world: World) -> str | None:
        if not world.gpu:
            return "needs GPUs"
        for module in self.MODULES:
            why = missing(module, "flashinfer-python")
            if why is not None:
                return why
        if world.ranks not in (2, 4, 8):
            return f"takes 2, 4 or 8 ranks; here are {world.ranks}"
        kernels: Any = importlib.import_module(self.MODULES[0])
        if "weight_bias" not in inspect.signature(kernels.trtllm_allreduce_fusion).parameters:
            return "this version has no weight_bias; 0.7.2 has"
        return None

    def why_not_for(self, case: Case, world: World) -> str | None:
        if case.form != "residual":
            return "fuses the residual form alone"
        if self.shots == "two_shot" and case.rows <= world.ranks:
            return "two-shot takes more rows than ranks"
        if self.stage_bytes(case, world) >= self.MOST_BYTES:
            return "its 32-bit offsets overflow from 1 GiB a stage on"
        return None

    @staticmethod
    def stage_bytes(case: Case, world: World) -> int:
        return world.ranks * case.x_bytes

    def prepare(self, world: World, cases: Sequence[Case]) -> None:
        kernels, ipc = (importlib.import_module(module) for module in self.MODULES)
        for fp32 in sorted({case.dtype == "fp32" for case in cases}):
            stage = max(self.stage_bytes(c, world) for c in cases if (c.dtype == "fp32") == fp32)
            flags = world.ranks * self.FLAGS * 4
            # Whole 2 MiB: of a smaller allocation CUDA IPC would share the neighbours, too.
            sizes = [math.ceil(size / (2 * MIB)) * 2 * MIB for size in (stage, flags, 3 * stage)]
            shared = [ipc.create_shared_buffer(size) for size in sizes]
            ipc.cudart.cudaMemset(_pointer(shared[1][world.rank]), 0, sizes[1])
            empty = torch.float32 if fp32 else torch.float16
            kernels.trtllm_lamport_initialize(
                shared[2][world.rank], sizes[2] // empty.itemsize, empty
            )
            # Counter, flag, flag, bytes of a stage, bytes to clear; as its own constructor has it.
            control = torch.tensor([0, 0, 0, stage, 0], dtype=torch.int32, device=world.device)
            pointers = [pointer for ranks in shared for pointer in ranks]
            self._workspaces[fp32] = torch.tensor(
                [*pointers, control.data_ptr()], dtype=torch.int64, device=world.device
            )
            self._kept += [shared, control]
        torch.cuda.synchronize()
        dist.barrier()  # nobody pushes into a buffer that is not empty yet

    def make(self, case: Case, world: World) -> Call:
        kernels: Any = importlib.import_module(self.MODULES[0])
        workspace = self._workspaces[case.dtype == "fp32"]

        def call(
            x: Tensor, weight: Tensor, residual: Tensor | None, post_weight: Tensor | None
        ) -> Outputs:
            norm_out, residual_out = torch.empty_like(x), torch.empty_like(x)
            kernels.trtllm_allreduce_fusion(
                allreduce_in=x,
                world_size=world.ranks,
                world_rank=world.rank,
                token_num=case.rows,
                hidden_dim=case.hidden,
                workspace_ptrs=workspace,
                launch_with_pdl=True,
                trigger_completion_at_end=True,  # earlier, small calls were seen to give NaN
                fp32_acc=True,
                pattern_code=kernels.AllReduceFusionPattern.kARResidualRMSNorm,
                use_oneshot=self.shots == "one_shot",
                allreduce_out=None,
                residual_in=residual,
                residual_out=residual_out,
                norm_out=norm_out,
                quant_out=None,
                scale_out=None,
                rms_gamma=weight,
                rms_eps=EPS,
                scale_factor=None,
                layout_code=None,
                weight_bias=WEIGHT_BIAS,
            )
            return norm_out, residual_out

        return call


def _pointer(address: int) -> Any:
    return ctypes.c_void_p(address)


# -------------------------------------------------------------------------------------------- vLLM


class Vllm(Baseline):
    name = "vllm + norm"
    about = "vLLM's CustomAllreduce, then our norm kernel"
    MODULE = "vllm.distributed.device_communicators.custom_all_reduce"
    communicator: Any = None

    def why_not(self, world: World) -> str | None:
        if not world.gpu:
            return "needs GPUs"
        if world.shared_gpu:
            return "takes one rank a GPU: it asks for peer access between GPUs"
        why = missing(self.MODULE, "vllm")
        if why is None and world.ranks not in (2, 4, 6, 8):
            why = f"takes 2, 4, 6 or 8 ranks; here are {world.ranks}"
        return why

    def why_not_for(self, case: Case, world: World) -> str | None:
        if self.communicator is not None and case.x_bytes >= self.communicator.max_size:
            return f"takes less than {self.communicator.max_size / MIB:g} MiB"
        return None

    def prepare(self, world: World, cases: Sequence[Case]) -> None:
        module: Any = importlib.import_module(self.MODULE)
        # It wants a group without NCCL.
        communicator = module.CustomAllreduce(dist.new_group(backend="gloo"), world.device)
        if hasattr(communicator, "finalize_p2p"):  # newer versions look at peer access later
            communicator.finalize_p2p()
        if communicator.disabled:
            raise RuntimeError("it has disabled itself; its log says why")
        self.communicator = communicator

    def make(self, case: Case, world: World) -> Call:
        def call(x: Tensor, *rest: Any) -> Outputs:
            a = self.communicator.custom_all_reduce(x)
            if a is None:
                raise RuntimeError("CustomAllreduce did not take the call")
            return norm(a, *rest)

        return call

    def capturing(self) -> AbstractContextManager[Any]:
        return self.communicator.capture()  # it registers the graph's addresses with the peers


# ---------------------------------------------------------------------------------------- all


def all_baselines() -> list[Baseline]:
    """In the order of the table."""
    return [
        Floor(),
        Ours("auto", "the fused call, with the algorithm that its plan takes"),
        Ours("one_shot", "the fused call, one-shot"),
        Ours("two_shot", "the fused call, two-shot"),
        FlashInfer("one_shot"),
        FlashInfer("two_shot"),
        SymmetricMemory("one_shot"),
        SymmetricMemory("two_shot"),
        Vllm(),
        Nccl(),
        Eager(),
        Compiled(),
    ]

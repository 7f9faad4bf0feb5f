"""The benchmarks' own code: what they report, refuse, check and compare. No time is looked at."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gemma_ar_norm import launcher, plan, reference

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import bench_fused  # noqa: E402
import compare  # noqa: E402
from harness import agree, baselines, cases, measure, plots, progress, worker  # noqa: E402
from harness import report as reports  # noqa: E402

ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
ENV["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
HAS_MATPLOTLIB = plots.problem() is None


# --------------------------------------------------------------------------------- a run on the CPU


def test_two_cpu_ranks(tmp_path):
    file = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "bench_fused.py"), "--ranks", "2", "--rows", "1", "3"]
    command += ["--hidden", "72", "--form", "sandwich", "--calls", "3", "--json", str(file)]
    command += ["--algorithms", "floor", "ours", "unfused/eager", "nccl", "vllm"]
    if HAS_MATPLOTLIB:
        command += ["--plot", str(tmp_path / "plot")]
    run = subprocess.run(
        command,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "unfused/eager, 3 x 72 bf16 sandwich" in run.stderr  # progress

    report = reports.load(file)
    documented = (BENCH / "README.md").read_text()
    for name in report:
        assert f"`{name}`" in documented
    for name in report["cells"][0]:
        assert f"`{name}`" in documented
    assert (report["harness"], report["gpu"], report["gpus"]) == ("bench_fused", "CPU", 0)
    assert (report["complete"], report["calls"], report["l2"]) == (True, 3, "cold")
    assert report["versions"]["torch"] == torch.__version__
    assert [(c["algorithm"], c["rows"]) for c in report["cells"]] == [
        (name, rows) for rows in (1, 3) for name in ("floor", "ours/auto", "unfused/eager")
    ]
    for cell in report["cells"]:
        assert cell["wrong"] == ""
        assert 0 < cell["p10"] <= cell["us"] <= cell["p90"]
        assert cell["copy_gb_s"] > 0
        assert not cell["captured"]
    assert {c["path"] for c in report["cells"] if c["algorithm"] == "ours/auto"} == {"cpu"}
    reasons = {skipped["algorithm"]: skipped["reason"] for skipped in report["skipped"]}
    assert reasons == {
        "ours/one_shot": "the CPU has one path, which ours/auto takes",
        "ours/two_shot": "the CPU has one path, which ours/auto takes",
        "vllm + norm": "needs GPUs",
        "nccl + norm": "needs GPUs",
    }

    assert "THESE TIMES MEAN NOTHING" in run.stdout
    assert run.stdout.startswith(reports.table(report))
    assert sum(line.endswith("  ok") for line in run.stdout.splitlines()) == 6
    if HAS_MATPLOTLIB:
        for name in ("latency", "roofline"):
            assert (tmp_path / f"plot_{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "4", "0"], "--rows: 1 or more is required; got 0"),
        (["--ranks", "0"], "--ranks: 1 or more is required; got 0"),
        (["--timeout", "-1"], "--timeout: more than 0 seconds are required; got -1"),
        (["--json", "/nowhere/a"], "--json: a file in a directory that exists is required; got /"),
        (["--json", "/"], "--json: a file in a directory that exists is required; got /"),
        (["--plot", "nowhere/"], "--plot: a file in a directory that exists is required; got no"),
        (["--hidden", "12"], "--hidden: a multiple of 8 up to 16384"),
        (["--algorithms", "ncll"], "--algorithms: the start of one of floor, ours/auto"),
        (["--replays", "0"], "--replays: 1 or more is required; got 0"),
        (["--calls", "-2"], "--calls: 1 or more is required; got -2"),
    ],
)
def test_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench_fused.main(arguments)
    assert said in capsys.readouterr().err


def test_torchrun_says_how_many_ranks_there_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        bench_fused.main(["--ranks", "4"])
    assert "--ranks: 2, as torchrun has started (RANK and" in capsys.readouterr().err


def test_a_rank_alone_is_not_torchruns(monkeypatch):
    """Some batch systems set it."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []

    def run(command, ranks, **options):
        started.append(ranks)
        return types.SimpleNamespace(exit_code=0, transcript=str, placement="p", reason="")

    monkeypatch.setattr(launcher, "run", run)
    assert bench_fused.main(["--ranks", "4"]) == 0
    assert started == [4]


def test_a_case_that_is_named_twice_is_measured_once():
    found = worker.grid([1, 8, 1], [64], ["bf16", "bf16"], ["plain"])
    assert [case.rows for case in found] == [1, 8]


def test_a_run_without_a_report_leaves_the_last_one(monkeypatch, tmp_path, capsys):
    """And does not show it as its own."""
    file = tmp_path / "report.json"
    reports.save(made_report([made_cell("floor", 2.0)]), file)
    before = file.read_text()

    def run(command, ranks, **options):
        assert command[command.index("--worker") + 1] == str(file)
        return types.SimpleNamespace(
            exit_code=3, transcript=lambda: "out of memory", placement="2 GPUs", reason="it died"
        )

    monkeypatch.setattr(launcher, "run", run)
    assert bench_fused.main(["--ranks", "2", "--json", str(file)]) == 3
    said = capsys.readouterr()
    assert file.read_text() == before
    assert said.out == ""
    assert "it died" in said.err


def test_a_run_that_dies_says_so(monkeypatch, capsys):
    def run(command, ranks, **options):
        report = {**made_report([made_cell("floor", 2.0)]), "complete": False}
        reports.save(report, Path(command[command.index("--worker") + 1]))
        outputs = types.SimpleNamespace(transcript=lambda: "[rank 1] out of memory")
        return types.SimpleNamespace(
            exit_code=9, reason="rank 1 ended with 9", placement="p", **vars(outputs)
        )

    monkeypatch.setattr(bench_fused.launcher, "run", run)
    monkeypatch.delenv("RANK", raising=False)
    assert bench_fused.main(["--ranks", "2", "--rows", "1"]) == 9
    printed = capsys.readouterr()
    assert "NOT COMPLETE" in printed.out
    assert "out of memory" in printed.err
    assert "rank 1 ended with 9" in printed.err


# ------------------------------------------------------------- in this process, a group of one rank


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield world()
    dist.destroy_process_group()


def world(ranks: int = 1, kind: str = "cpu", **changes) -> baselines.World:
    given = {"nccl": False, "shared_gpu": False, "not_fused": "the CPU has one path", **changes}
    return baselines.World(0, ranks, torch.device(kind), **given)


CASE = cases.Case(3, 64, "bf16", "residual")


def run_of(monkeypatch, the_world, *those, case=CASE, warm=False):
    """The report of these baselines."""
    monkeypatch.setattr(worker, "all_baselines", lambda: list(those))
    monkeypatch.setattr(measure, "EAGER_ROUND_S", 1e-3)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1 << 16)
    options = worker.Options([case], [], calls=3, replays=5, warm_l2=warm)
    return worker._Run(options, the_world, {}, None).report()


class Planted(baselines.Floor):
    """The floor with something wrong."""

    name = "planted"

    def __init__(self, plant, after: int = 0, exact: bool = False):
        self.plant, self.after, self._exact, self.calls = plant, after, exact, 0

    def exact(self, world):
        return self._exact

    def make(self, case, world):
        def call(*arguments):
            outputs = baselines.norm(*arguments)
            self.calls += 1
            if self.calls > self.after:
                self.plant(*outputs)
            return outputs

        return call


def test_what_is_wrong_is_not_timed(one_rank, monkeypatch):
    plants = [
        (Planted(lambda norm, h: norm[-1].mul_(2)), "a row is 1.0e+00 off after 1 call,"),
        (Planted(lambda norm, h: h[1].fill_(float("nan"))), "a row is nan off after 1 call,"),
        (Planted(lambda norm, h: norm[0, :1].mul_(1.01), exact=True), "other bits than reference"),
        (Planted(lambda norm, h: h.mul_(3), after=1), "off after 3 calls, allowed is 1e-01"),
    ]
    for baseline, said in plants:
        report = run_of(monkeypatch, one_rank, baseline)
        (cell,) = report["cells"]
        assert cell["us"] is None
        assert said in cell["wrong"], cell["wrong"]
        assert f"WRONG: planted, 1 ranks, 3 x 64 bf16 residual: {cell['wrong']}" in reports.table(
            report
        )
        assert not worker.is_wrong(report)  # not ours
        cell["algorithm"] = "ours/auto"
        assert worker.is_wrong(report)


def test_what_fails_is_skipped_with_its_reason(one_rank, monkeypatch):
    class Unprepared(baselines.Floor):
        name = "unprepared"

        def prepare(self, world, cases):
            raise OSError("no\n  memory")

    class Partial(baselines.Floor):
        name = "partial"

        def why_not_for(self, case, world):
            return "takes more rows"

    def fail(norm, h):
        raise RuntimeError("broke")

    report = run_of(
        monkeypatch, one_rank, Unprepared(), Partial(), Planted(fail), baselines.Floor()
    )
    assert [cell["algorithm"] for cell in report["cells"]] == ["floor"]
    shape = "3 x 64 bf16 residual"
    assert [(s["algorithm"], s["reason"], s["cases"]) for s in report["skipped"]] == [
        ("unprepared", "OSError: no memory", [shape]),
        ("partial", "takes more rows", [shape]),
        ("planted", "RuntimeError: broke", [shape]),
    ]


def test_a_case_without_memory_for_its_inputs_is_skipped(one_rank, monkeypatch):
    def random(case, *_):
        raise MemoryError(f"none for {case.rows} rows")

    monkeypatch.setattr(cases.Inputs, "random", random)
    report = run_of(monkeypatch, one_rank, baselines.Floor(), baselines.Ours("auto", ""))
    assert report["complete"]
    assert report["cells"] == []
    reasons = [(skipped["algorithm"], skipped["reason"]) for skipped in report["skipped"]]
    why = "MemoryError: none for 3 rows"
    assert reasons == [("floor", why), ("ours/auto", why)]


def test_a_cell_says_of_how_many_replays_and_calls_it_is(one_rank, monkeypatch):
    """Where those are not the report's: here 7 rounds, of fewer calls where a call is slow."""
    report = run_of(monkeypatch, one_rank, baselines.Floor())
    assert (report["replays"], report["cells"][0]["replays"]) == (5, measure.EAGER_ROUNDS)
    monkeypatch.setattr(measure, "EAGER_ROUNDS", 5)
    monkeypatch.setattr(measure, "EAGER_ROUND_S", 0.0)
    monkeypatch.setattr(worker, "all_baselines", lambda: [baselines.Floor()])
    options = worker.Options([CASE], [], calls=3, replays=5, warm_l2=True)
    (cell,) = worker._Run(options, one_rank, {}, None).report()["cells"]
    assert (cell["replays"], cell["calls"]) == (None, 1)


def test_ranks_stay_together_when_one_fails(monkeypatch):
    """Rank 1 of two fails, rank 0 does not: rank 0 hears of it, once."""
    monkeypatch.setattr(agree, "gather", lambda message: [message, "OSError: no memory"])
    assert agree.attempt(lambda: 5) == (None, "rank 1: OSError: no memory")
    with pytest.raises(agree.Together, match=r"^rank 1: OSError: no memory$"):
        agree.agreed(lambda: 5)
    monkeypatch.setattr(agree, "gather", lambda message: [message, message])

    def fail() -> None:
        agree.agreed(lambda: 1 / 0)

    assert agree.attempt(fail) == (None, "ZeroDivisionError: division by zero")
    assert agree.attempt(lambda: 5) == (5, "")


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("warm", [True, False])
def test_all_that_run_on_a_cpu_are_right(one_rank, monkeypatch, form, dtype, warm):
    case = cases.Case(2, 72, dtype, form)
    those = [baselines.Floor(), baselines.Ours("auto", ""), baselines.Eager()]
    report = run_of(monkeypatch, one_rank, *those, case=case, warm=warm)
    assert [cell["wrong"] for cell in report["cells"]] == ["", "", ""]
    assert report["l2"] == ("warm" if warm else "cold")


def test_inputs_rotate_and_depend():
    """Call i takes copy i of x and of the weights, and the residual_out of call i - 1."""
    given = cases.Inputs.random(CASE, 2, 1, 5, torch.device("cpu"), copies=3)
    assert len({x.data_ptr() for x in given.xs}) == 3
    assert all(torch.equal(x, given.all_xs[1]) for x in given.xs)
    seen = []

    def call(x, weight, residual, post_weight):
        seen.append((x.data_ptr(), weight.data_ptr(), residual))
        return x + 1, residual + 1

    given.chain(call, 4)
    assert [s[0] for s in seen] == [given.xs[i].data_ptr() for i in (0, 1, 2, 0)]
    assert [s[1] for s in seen] == [given.weights[i].data_ptr() for i in (0, 1, 2, 0)]
    assert all(torch.equal(s[2], given.residual + i) for i, s in enumerate(seen[:2]))

    given, seen[:] = cases.Inputs.random(CASE, 2, 1, 5, torch.device("cpu"), copies=1), []
    xs = []
    given.chain(lambda x, *rest: (xs.append(x), call(x, *rest))[1], 3)
    assert all(torch.equal(x, given.xs[0] + i) for i, x in enumerate(xs[:2]))


def test_expected_is_that_of_all_ranks():
    given = cases.Inputs.random(CASE, 2, 0, 5, torch.device("cpu"), copies=1)
    step = reference.fused_allreduce_gemma_rmsnorm(given.all_xs, given.weights[0], given.residual)
    step = reference.fused_allreduce_gemma_rmsnorm([step[0]] * 2, given.weights[0], step[1])
    assert cases.same_bits(given.expected(2, reduces=True), step)
    alone = reference.fused_allreduce_gemma_rmsnorm(given.xs, given.weights[0], given.residual)
    assert cases.same_bits(given.expected(1, reduces=False), alone)


@pytest.mark.parametrize(
    ("rows", "form", "copies"), [(1, "residual", 20), (1024, "residual", 13), (65536, "plain", 2)]
)
def test_copies_are_twice_the_l2(rows, form, copies):
    case = cases.Case(rows, 4096, "bf16", form)
    assert cases.copies_needed(case, 20, 50_000_000) == copies


# -------------------------------------------------------------------- the path of a GPU, with fakes


class FakeCuda:
    """torch.cuda as far as measure.py needs it; the time is the number of what was queued."""

    def __init__(self, monkeypatch):
        self.queued: list[str] = []
        self.captures = 0
        self.queue_takes = 1000  # works; with more the GPU wakes up before all are queued
        fake = self

        def sleep(cycles):
            fake.queued.append("sleep")

        class Graph:
            def replay(self):
                fake.queued.append("replay")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = len(fake.queued)
                fake.queued.append("event")

            def query(self):  # asked when all is queued
                since = len(fake.queued) - fake.queued[::-1].index("sleep")
                return fake.queued[since:].count("work") > fake.queue_takes

            def elapsed_time(self, other):
                return float(other.at - self.at)

        @contextlib.contextmanager
        def graph(the_graph, capture_error_mode):
            fake.captures += 1
            yield

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "synchronize": lambda: fake.queued.append("synchronize"),
            "_sleep": sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class FakeGpu(baselines.World):
    gpu = property(lambda self: True)


def test_replays_begin_together_and_with_a_flushed_l2(one_rank, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    gpu = FakeGpu(0, 1, torch.device("cpu"), nccl=False, shared_gpu=False, not_fused="")
    start, flush = measure.Start(gpu), measure.Flush(gpu, 100)
    assert flush._buffer.numel() == 200
    monkeypatch.setattr(start, "_go", lambda: cuda.queued.append("start"))
    monkeypatch.setattr(measure.Flush, "__call__", lambda self: cuda.queued.append("flush"))
    counts = []

    def calls(count):
        counts.append(count)
        return torch.ones(2), torch.zeros(2)

    timed = measure.measure(baselines.Floor(), calls, gpu, start, flush, 4, 2)
    assert (counts, cuda.captures, timed.calls) == ([2, 4], 1, 4)
    assert cases.same_bits(timed.outputs, (torch.ones(2), torch.zeros(2)))
    # From the event before a replay to that after it are 2 of the fake's units, ms each.
    assert timed.us == [500.0, 500.0]
    one = ["flush", "start", "event", "replay", "event"]
    first = ["synchronize", "start", "replay", "synchronize", "sleep"]
    assert cuda.queued == [*first, *one * (measure.WARM_UPS + 2), "synchronize", "synchronize"]


@pytest.mark.parametrize(
    ("takes", "sleeps"),
    [(20, 1), (8, 1 + 3), (7, 1 + 1 + 20), (0, 1 + 1 + 1)],
)
def test_a_queue_that_takes_fewer_replays_gets_fewer_at_a_time(
    one_rank, monkeypatch, takes, sleeps
):
    """20 are asked for: all at once, then eight at a time, then one."""
    cuda = FakeCuda(monkeypatch)
    cuda.queue_takes = takes
    gpu = FakeGpu(0, 1, torch.device("cpu"), nccl=False, shared_gpu=False, not_fused="")
    start, flush = measure.Start(gpu), measure.Flush(gpu, 0)

    def timed():
        return measure.timed([lambda: cuda.queued.append("work")] * 20, start, flush)

    if takes > 0:
        assert timed() == [2000.0] * 20
    else:
        with pytest.raises(RuntimeError, match="queues a replay while the GPU sleeps"):
            timed()
    assert cuda.queued.count("sleep") == sleeps
    # Ranks that meet on the host have no such limit.
    start.on_the_host = True
    assert timed() == [2000.0] * 20
    assert cuda.queued.count("sleep") == sleeps + 1


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"not_fused": ""}, "on the device: a fused call of one row"),
        ({"nccl": True}, "on the device: NCCL's all-reduce of one row"),
        ({}, "on the host: a barrier"),
    ],
)
def test_how_ranks_start_together(changes, how):
    given = {"nccl": False, "shared_gpu": False, "not_fused": "no way", **changes}
    assert measure.Start(FakeGpu(0, 2, torch.device("cpu"), **given)).how == how


def test_flashinfer_gets_its_workspace_in_ipc_memory(one_rank, monkeypatch):
    """Pointers of all ranks: of the buffers, the flags, the Lamport buffers; then the control."""
    made, done, calls = [], [], []

    def create_shared_buffer(size):
        made.append(size)
        return [1000 * len(made) + rank for rank in range(4)]

    kernels = types.SimpleNamespace(
        trtllm_lamport_initialize=lambda *arguments: done.append(arguments),
        trtllm_allreduce_fusion=lambda **arguments: calls.append(arguments),
        AllReduceFusionPattern=types.SimpleNamespace(kARResidualRMSNorm=1),
    )
    ipc = types.SimpleNamespace(
        create_shared_buffer=create_shared_buffer,
        cudart=types.SimpleNamespace(cudaMemset=lambda p, *rest: done.append((p.value, *rest))),
    )
    modules = {"flashinfer.comm.trtllm_ar": kernels, "flashinfer.comm.cuda_ipc": ipc}
    monkeypatch.setattr(baselines.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cpu = world(4)
    baseline = baselines.FlashInfer("one_shot")
    large = cases.Case(1000, 4096, "bf16", "residual")
    baseline.prepare(cpu, [CASE, large])

    stage, mib = 4 * 1000 * 4096 * 2, 1 << 20
    assert made == [32 * mib, 2 * mib, 94 * mib]
    assert made[2] >= 3 * stage > made[2] - 2 * mib
    assert done == [(2000, 0, 2 * mib), (3000, 47 * mib, torch.float16)]
    (pointers,) = baseline._workspaces.values()
    control = baseline._kept[1]
    expected = [1000, 1001, 1002, 1003, 2000, 2001, 2002, 2003, 3000, 3001, 3002, 3003]
    assert pointers.tolist() == [*expected, control.data_ptr()]
    assert control.tolist() == [0, 0, 0, stage, 0]

    x = torch.ones(3, 64, dtype=torch.bfloat16)
    baseline.make(CASE, cpu)(x, x[0], x, None)
    assert calls[0]["workspace_ptrs"] is pointers
    assert (calls[0]["token_num"], calls[0]["hidden_dim"]) == (3, 64)
    assert (calls[0]["use_oneshot"], calls[0]["weight_bias"]) == (True, 1.0)


def test_symmetric_memory_goes_through_its_ops(one_rank, monkeypatch):
    """With the ops' own schemas, and one rank, whose sum is its x."""
    seen = []

    def one_shot(symm_buffer, local_input, reduce_op, group_name):
        seen.append((symm_buffer.data_ptr(), symm_buffer.shape, reduce_op, group_name))
        return local_input.clone()

    def two_shot(buffer, reduce_op, group_name):
        seen.append((buffer.data_ptr(), buffer.shape, reduce_op, group_name))
        return buffer

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("one_shot_all_reduce_copy", one_shot, "CPU")
    library.impl("two_shot_all_reduce_", two_shot, "CPU")
    met = []
    fake = types.SimpleNamespace(
        empty=torch.empty, rendezvous=lambda tensor, group: met.append((tensor.data_ptr(), group))
    )
    monkeypatch.setattr(baselines.importlib, "import_module", lambda name: fake)
    monkeypatch.setattr(baselines.SymmetricMemory, "why_not", lambda self, world: None)
    those = [baselines.SymmetricMemory(shots) for shots in ("one_shot", "two_shot")]
    report = run_of(monkeypatch, one_rank, *those)
    assert [(c["algorithm"], c["wrong"]) for c in report["cells"]] == [
        ("symm_mem/one_shot + norm", ""),
        ("symm_mem/two_shot + norm", ""),
    ]
    name = dist.group.WORLD.group_name
    assert [group for _, group in met] == [name, name]
    calls = [(address, torch.Size([3, 64]), "sum", name) for address, _ in met]
    assert set(seen) == set(calls)


def test_vllm_captures_within_its_own_context(one_rank, monkeypatch):
    class Communicator:
        disabled, max_size, entered = False, 100, 0

        def __init__(self, group, device):
            assert dist.get_backend(group) == "gloo"

        def custom_all_reduce(self, x):
            return x.clone()

        @contextlib.contextmanager
        def capture(self):
            self.entered += 1
            yield

    module = types.SimpleNamespace(CustomAllreduce=Communicator)
    monkeypatch.setattr(baselines.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(baselines.Vllm, "why_not", lambda self, world: None)
    vllm = baselines.Vllm()
    report = run_of(monkeypatch, one_rank, vllm)  # x has 384 bytes
    assert [s["reason"] for s in report["skipped"]] == ["takes less than 9.53674e-05 MiB"]
    Communicator.max_size = 8 << 20
    vllm = baselines.Vllm()
    assert [c["wrong"] for c in run_of(monkeypatch, one_rank, vllm)["cells"]] == [""]
    with vllm.capturing():
        assert vllm.communicator.entered == 1
    Communicator.disabled = True
    report = run_of(monkeypatch, one_rank, baselines.Vllm())
    assert report["skipped"][0]["reason"].endswith("it has disabled itself; its log says why")


# ------------------------------------------------------------------------------ why they do not run


def test_every_baseline_says_why_it_does_not_run_without_a_gpu():
    reasons = {b.name: b.why_not(world(2)) for b in baselines.all_baselines()}
    assert len(reasons) == len(baselines.all_baselines())  # names are not given twice
    assert all(b.about for b in baselines.all_baselines())
    runs = {"floor", "ours/auto", "unfused/eager", "unfused/compiled"}
    assert {name for name, reason in reasons.items() if reason is None} == runs
    assert reasons["nccl + norm"] == "needs GPUs"
    assert reasons["ours/one_shot"] == "the CPU has one path"


def test_what_baselines_need_of_a_gpu(monkeypatch):
    def why(name, case=CASE, **changes):
        (baseline,) = (b for b in baselines.all_baselines() if b.name == name)
        there = world(**{"ranks": 2, "kind": "cuda", "not_fused": "", **changes})
        return baseline.why_not(there) or baseline.why_not_for(case, there)

    def found(module, package=None):
        return None

    assert why("ours/two_shot") is None
    assert why("ours/two_shot", not_fused="no peer access") == "no peer access"
    assert why("nccl + norm", shared_gpu=True).startswith("NCCL takes one rank a GPU")
    assert why("nccl + norm", nccl=True) is None
    assert why("vllm + norm", shared_gpu=True).startswith("takes one rank a GPU")
    if importlib.util.find_spec("vllm") is None:
        assert why("vllm + norm") == "not installed: pip install vllm"
    monkeypatch.setattr(baselines, "missing", found)
    assert why("vllm + norm") is None
    assert why("vllm + norm", ranks=3) == "takes 2, 4, 6 or 8 ranks; here are 3"
    assert why("flashinfer/one_shot", ranks=3) == "takes 2, 4 or 8 ranks; here are 3"
    assert why("symm_mem/one_shot + norm", ranks=8) is None
    fp16 = cases.Case(3, 64, "fp16", "residual")
    assert why("symm_mem/two_shot + norm", case=fp16) == "takes bf16 and fp32"

    old = types.SimpleNamespace(trtllm_allreduce_fusion=lambda x: None)
    new = types.SimpleNamespace(trtllm_allreduce_fusion=lambda x, weight_bias=None: None)
    monkeypatch.setattr(baselines.importlib, "import_module", lambda name: old)
    assert why("flashinfer/one_shot") == "this version has no weight_bias; 0.7.2 has"
    monkeypatch.setattr(baselines.importlib, "import_module", lambda name: new)
    assert why("flashinfer/one_shot") is None
    two = cases.Case(2, 64, "bf16", "residual")
    assert why("flashinfer/one_shot", case=two) is None
    assert why("flashinfer/two_shot", case=two) == "two-shot takes more rows than ranks"
    plain = cases.Case(3, 64, "bf16", "plain")
    assert why("flashinfer/two_shot", case=plain) == "fuses the residual form alone"
    huge = cases.Case(1 << 15, 8192, "bf16", "residual")
    assert why("flashinfer/one_shot", case=huge).startswith("its 32-bit offsets overflow")


def test_multicast_is_off_unless_it_is_set(monkeypatch):
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "2")
    was = {"NCCL_NVLS_ENABLE": "2", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    assert worker.without_multicast() == was
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST")


# --------------------------------------------------------------------------------------- the report


def made_cell(algorithm: str, us: float | None, rows: int = 8, **changes) -> dict:
    cell = reports.Cell(2, 4096, rows, "bf16", "residual", algorithm, us=us, p10=us, p90=us)
    return {**reports.as_cell(cell), "copy_gb_s": 1000.0, "multiprocessors": 66, **changes}


def made_report(cells: list[dict], **changes) -> dict:
    return {
        "schema": 1,
        "harness": "bench_fused",
        "complete": True,
        "date": "2026-01-02 03:04 UTC",
        "gpu": "NVIDIA H100 80GB HBM3",
        "gpus": 1,
        "driver": "580.1",
        "versions": {"torch": "2.11.0"},
        "placement": "2 processes on one GPU, side by side under CUDA MPS",
        "backend": "gloo",
        "start": "on the device: a fused call of one row",
        "l2": "warm",
        "calls": 20,
        "replays": 50,
        "seed": 1,
        "environment": {"NCCL_NVLS_ENABLE": "0"},
        "cells": cells,
        "skipped": [{"algorithm": "vllm + norm", "reason": "why", "about": "", "cases": []}],
        **changes,
    }


def test_the_slowest_rank_counts_replay_by_replay():
    assert reports.summary([[1.0, 9.0, 1.0], [5.0, 2.0, 6.0]])["us"] == 6.0
    of_ten = reports.summary([[float(i) for i in range(11)]])
    assert of_ten == {"us": 5.0, "p10": 1.0, "p90": 9.0}
    assert reports.summary([[3.0]]) == {"us": 3.0, "p10": 3.0, "p90": 3.0}


def test_ratios():
    cells = [
        made_cell("floor", 2.0),
        made_cell("ours/auto", 3.0),
        made_cell("nccl + norm", 6.0),
        made_cell("flashinfer/one_shot", None, wrong="NaN"),
        made_cell("ours/auto", 4.0, rows=9),
        made_cell("ours/auto", 30.1, rows=1024),
        made_cell("ours/auto", 3.0, dtype="fp16"),
    ]
    got = reports.ratios(made_report(cells))
    assert [r["floor"] for r in got] == [1.0, 1.5, 3.0, None, None, None, None]
    assert [r["best"] for r in got] == [None, 1.0, 2.0, None, 1.0, 1.0, 1.0]
    # published.json: 5.5 us of one-shot at 8 rows, 60.2 of two-shot at 1024; none at 9 rows.
    assert [r["flashinfer"] for r in got] == [None, 3 / 5.5, 6 / 5.5, None, None, 0.5, None]
    streams = {"harness": "streams", "placement": "ranks as streams of one process, 132/N SMs each"}
    assert reports.ratios(made_report(cells, **streams))[1]["flashinfer"] == 3 / 4.4
    for changes in (
        {"l2": "cold"},
        {"calls": 5},
        {"gpu": "NVIDIA H200"},
        {"gpu": "NVIDIA H100 PCIe"},
        {"gpus": 2},
        {**streams, "gpus": 2},
        {**streams, "gpus": 2, "placement": "2 GPUs, one rank each"},
        {"placement": "2 processes on one GPU, time-sliced, so slow: no CUDA MPS"},
    ):
        assert reports.ratios(made_report(cells, **changes))[1]["flashinfer"] is None


def test_published_has_21_cells_a_table():
    for table in json.loads((BENCH / "published.json").read_text())["tables"]:
        assert list(table["us"]) == ["2", "4", "8"]
        for by_rows in table["us"].values():
            assert list(by_rows) == ["1", "8", "16", "64", "128", "256", "1024"]


def test_bytes_of():
    row = 4096 * 2
    assert reports.bytes_of(made_cell("floor", 1.0)) == (4 * 8 + 1) * row
    # 2 ranks: as many bytes as x has, written and read.
    assert reports.bytes_of(made_cell("ours/auto", 1.0)) == (4 * 8 + 1 + 2 * 8) * row
    sandwich = made_cell("ours/auto", 1.0, form="sandwich", ranks=8)
    assert reports.bytes_of(sandwich) == (4 * 8 + 2 + 2 * 14) * row
    assert reports.bytes_of(made_cell("floor", 1.0, form="plain", dtype="fp32")) == 25 * 2 * row


def test_a_table_of_a_gpu():
    cells = [made_cell("floor", 2.0), made_cell("ours/auto", 3.0, path="one_shot")]
    text = reports.table(made_report([*cells, made_cell("unfused/eager", 9.0, captured=False)]))
    lines = [line.split() for line in text.splitlines()]
    numbers = ["3.00", "3.00", "3.00", "1.50", "1.00", "0.55", "134", "13%", "ok"]
    assert ["2", "4096", "8", "bf16", "residual", "ours/auto", "one_shot", *numbers] in lines
    assert any("9.00*" in line for line in lines)
    assert "66 multiprocessors a rank" in text
    assert "1 x NVIDIA H100 80GB HBM3, driver 580.1; torch 2.11.0" in text
    assert "not run: vllm + norm: why" in text
    assert "NVLink multicast: NCCL_NVLS_ENABLE=0" in text
    assert "slow ones" not in text
    few = reports.table(made_report([made_cell("ours/auto", 3.0, replays=3)]))
    assert "slow ones are of 3 replays" in few
    assert "MEAN NOTHING" not in text
    assert "NOT COMPLETE" in reports.table(made_report(cells, complete=False))


def run_py_of(directory: str) -> types.ModuleType:
    file = BENCH / directory / "run.py"
    spec = importlib.util.spec_from_file_location(f"{directory}_run", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def streams_run():
    return run_py_of("streams")


def test_streams_uses_no_torch(tmp_path):
    """run.py makes table and plots of what streams wrote."""
    placement = "ranks as streams of one process, 132/N SMs each"
    cells = [made_cell("floor", 2.0), made_cell("plan", 3.0, path="one_shot")]
    file = tmp_path / "streams.json"
    reports.save(made_report(cells, harness="streams", placement=placement, driver=None), file)
    code = f"""
import sys
sys.path.insert(0, {str(BENCH / "streams")!r})
import run
from pathlib import Path
run.report(Path({str(file)!r}), {str(tmp_path / "plot")!r} if {HAS_MATPLOTLIB} else None)
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "plan       one_shot  3.00" in done.stdout
    assert "all shapes of a size gave the same bits" in done.stdout


def streams_source(name: str) -> str:
    """There may be no compiler for it here."""
    return (BENCH / "streams" / name).read_text()


def test_streams_writes_the_schema():
    source = streams_source("report.h")
    assert f'\\"{reports.OPTIONS}\\": ' in source
    assert f"`{reports.OPTIONS}`" in (BENCH / "README.md").read_text()
    keys = set(reports.as_cell(reports.Cell(2, 8, 1, "bf16", "plain", "floor")))
    for name in (set(made_report([])) | keys) - {"cells"}:
        assert f'\\"{name}\\": ' in source, name
    assert f'\\"schema\\": {reports.SCHEMA}' in source
    assert "ranks as streams of one process, " in streams_source("placement.h")
    # Of one rank a GPU, the words of the other benchmark, so that they can be laid side by side.
    words = str(launcher.Placement(4, 4))
    assert words.removeprefix("4") in streams_source("placement.h")
    assert "on the device: a fused call of one row" in source


PARSE = r"""
#include <cstdio>

#include "streams/options.h"

int main(int argc, char** argv) {
  try {
    if (argc == 2 && argv[1][0] == '/') {
      const auto rules = gan::streams::read_rules(argv[1]);
      std::printf("%zu of 2, %zu of 8", rules.count(2) ? rules.at(2).size() : 0,
                  rules.count(8) ? rules.at(8).size() : 0);
      return 0;
    }
    const gan::streams::Options o = gan::streams::parse(argc, argv);
    std::printf("%zu %u %s", o.ranks.size(), o.hidden, o.form.c_str());
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
    return 1;
  }
}
"""


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """streams' command line alone: what it says of one, and its exit code."""
    directory = tmp_path_factory.mktemp("parse")
    (directory / "parse.cpp").write_text(PARSE)
    command = [
        os.environ.get("CXX", "g++"),
        *("-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror"),
        *(f"-I{ROOT / name}" for name in ("bench", "csrc")),
        *(str(directory / "parse.cpp"), "-o", str(directory / "parse")),
    ]
    subprocess.run(command, check=True, timeout=120)

    def run(text: str) -> tuple[int, str]:
        command = [str(directory / "parse"), *text.split(" ")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ranks 2,9", "--ranks: a whole number from 2 to 8 is required; got 9"),
        ("--ranks 1", "--ranks: a whole number from 2 to 8 is required; got 1"),
        ("--rows abc", "--rows: a whole number from 1 to 1048576 is required; got abc"),
        ("--rows 8x", "got 8x"),
        ("--rows -1", "got -1"),
        ("--rows 1,,2", "is required; got "),
        ("--rows 99999999999", "got 99999999999"),
        ("--teams 0", "--teams: a whole number from 1 to 8 is required; got 0"),
        ("--teams 2,3", "--teams: powers of two are required; got 3"),
        ("--leads 0", "--leads: a whole number from 1 "),
        ("--resident 3", "--resident: a whole number from 1 to 2 is required; got 3"),
        ("--trigger 3", "--trigger: a whole number from 0 to 2 is required; got 3"),
        ("--rounds 0", "--rounds: a whole number from 1 "),
        ("--gpus 0", "--gpus: a whole number from 1 "),
        ("--hidden 100", "--hidden: a multiple of 8 from 8 to 16384 is required; got 100"),
        ("--hidden 16392", "got 16392"),
        ("--threads 100", "--threads: a multiple of 32 from 32 to 512 is required; got 100"),
        ("--algorithms one-shot", "--algorithms: one of one_shot, two_shot is required; got one-"),
        ("--form full", "--form: one of plain, residual, sandwich is required; got full"),
        ("--round 1", "--round: an option of streams.cu, see its top, is required"),
        ("--rows", "--rows: a value is required; got none"),
    ],
)
def test_streams_refuses_options(parse, options, said):
    code, text = parse(options)
    assert code == 1
    assert said in text


def test_streams_takes_options(parse):
    wanted = "--ranks 2,4,8 --hidden 5376 --form sandwich --teams 1,8 --rows 1,1024 --rounds 3"
    assert parse(wanted) == (0, "3 5376 sandwich")
    assert parse("--device -")[0] == 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["ranks 2", "1 2 3 0 4 5 6 2 7 8", "1 2 3 1 4 5 6 0 7 8"], "2 of 2, 0 of 8"),
        (["ranks 2", "ranks 8", "1 2 3 0 4 5 6 2 7 8"], "0 of 2, 1 of 8"),
        (["1 2 3 0 4 5 6 2 7 8"], '--rules: a line "ranks N" is required first; got 1 2'),
        (["ranks"], '--rules: a line "ranks N" is required first; got ranks'),
        (["ranks two"], "--rules: ranks: a whole number from 2 to 8 is required; got two"),
        (["ranks 9"], "--rules: ranks: a whole number from 2 to 8 is required; got 9"),
        (["ranks 2", "1 2 3 0 4 5"], "--rules: ten numbers a line are required"),
        (["ranks 2", "1 2 3 2 4 5 6 2 7 8"], "the fourth an algorithm and the eighth a trigger"),
        (["ranks 2", "1 2 3 1 4 5 6 3 7 8"], "got 1 2 3 1 4 5 6 3 7 8"),
    ],
)
def test_streams_reads_rules(parse, tmp_path, lines, said):
    file = tmp_path / "rules.txt"
    file.write_text("\n".join([*lines, ""]))
    assert said in parse(str(file))[1]


def test_programs_that_cannot_be_built_say_why(streams_run, monkeypatch, capsys):
    def missing(*_, **__):
        raise FileNotFoundError("cmake")

    monkeypatch.setattr(subprocess, "run", missing)
    for program in (streams_run, run_py_of("links")):
        assert program.main([]) == 2
        assert "CMake and Ninja are required; got none" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            program.main(["--json", "/nowhere/a.json"])
        assert "--json: a file in a directory that exists is req" in capsys.readouterr().err

    def failing(command, **_):
        raise subprocess.CalledProcessError(4, command)

    monkeypatch.setattr(subprocess, "run", failing)
    assert streams_run.main([]) == 2
    assert "streams: a build that works is required; got exit code 4" in capsys.readouterr().err
    monkeypatch.setattr(streams_run.cmake, "build", lambda target: target)
    assert streams_run.main([]) == 2  # of the program itself, which says why


@pytest.mark.parametrize(
    ("ranks", "gpus", "multiprocessors", "one_gpu"),
    [
        (2, 1, 66, True),
        (8, 1, 16, True),
        (2, 2, 132, False),
        (2, 4, 132, False),
        (4, 2, 66, False),
        (5, 4, 66, False),
        (8, 8, 132, False),
    ],
)
def test_streams_plans_for_its_placement(streams_run, ranks, gpus, multiprocessors, one_gpu):
    got = streams_run.rules_of(ranks, gpus, 132, (9, 0))
    wanted = plan.make_rules(
        ranks=ranks,
        multiprocessors=multiprocessors,
        compute_capability=(9, 0),
        max_cluster=8,
        shared_device=False,
        one_gpu=one_gpu,
    )
    assert [rule.numbers for rule in got] == [rule.numbers for rule in wanted]
    assert all(rule.multiprocessors == multiprocessors for rule in got)


def test_streams_is_given_the_number_of_gpus(streams_run, monkeypatch, tmp_path, capsys):
    def streams(command, **_):
        assert command[1:] == ["--device", "-"]
        return types.SimpleNamespace(stdout=b"132 9 0\n")

    asked: list[tuple[list[str], str]] = []

    def measure_(streams, rules, file, options):
        asked.append((list(options), rules.read_text()))
        return 3

    monkeypatch.setattr(streams_run.cmake, "build", lambda target: tmp_path / target)
    monkeypatch.setattr(streams_run.subprocess, "run", streams)
    monkeypatch.setattr(streams_run, "measure", measure_)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert streams_run.main(["--ranks", "4", "--gpus", "4"]) == 3
    assert streams_run.main([]) == 3
    (of_four, rules_of_four), (of_one, rules_of_one) = asked
    assert of_four == ["--gpus", "4", "--ranks", "4"]
    assert of_one == ["--gpus", "1"]
    # The last number is the multiprocessors of a rank.
    shares = [
        [
            line.split()[-1]
            for line in rules.partition("ranks 4\n")[2].partition("ranks")[0].split("\n")[:-1]
        ]
        for rules in (rules_of_four, rules_of_one)
    ]
    assert [set(of_a_run) for of_a_run in shares] == [{"132"}, {"33"}]
    with pytest.raises(SystemExit):
        streams_run.main(["--gpus", "0"])
    assert "--gpus: 1 or more are required; got 0" in capsys.readouterr().err


LINKS = [
    {"gpu": "NVIDIA H100", "gpus": 2, "round_trips": 300, "versions": {"cuda": "13.0"}},
    {"peer": {"from": 0, "to": 1, "access": 1, "native_atomics": 1, "performance_rank": 0}},
    {"latency_ns": {"from": 0, "to": 0, "packs": 1, "ns": 650.04, "p10": 601.0, "p90": 702.5}},
    {"latency_ns": {"from": 0, "to": 1, "packs": 32, "ns": 1250.0, "p10": 1200.0, "p90": 1300.0}},
    *(
        {"bandwidth": {**of, "bytes": size, "blocks": 32, "gb_s": gb_s}}
        for of in (
            {"pattern": "pair", "from": 0, "to": 1},
            {"pattern": "ring", "from": None, "to": None},
        )
        for size, gb_s in ((4096, 1.96), (1 << 20, 301.26))
        if (of["pattern"], size) != ("ring", 4096)
    ),
]


def test_links_reports_without_torch(tmp_path):
    """run.py makes report and tables of the lines that links prints, also where it fails."""
    links = tmp_path / "links"
    printed = "\n".join(map(json.dumps, LINKS))
    links.write_text(f"#!/bin/sh\ncat <<'EOF'\n{printed}\nEOF\n[ \"$*\" = '--sizes 16' ]\n")
    links.chmod(0o755)
    code = f"""
import sys
sys.path.insert(0, {str(BENCH / "links")!r})
import run
from pathlib import Path
run.cmake.build = lambda target: Path({str(links)!r})
code = run.main(["--json", *sys.argv[1:]])
assert "torch" not in sys.modules
sys.exit(code)
"""
    file = tmp_path / "links.json"

    def run(*options):
        command = [sys.executable, "-c", code, str(file), *options]
        return subprocess.run(
            command, env=ENV, capture_output=True, text=True, timeout=60, check=False
        )

    done = run("--sizes", "16")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for row in (
        ["from", "to", "access", "native_atomics", "performance_rank"],
        ["0", "1", "1", "1", "0"],
        ["from", "to", "packs", "ns", "p10", "p90"],
        ["0", "0", "1", "650.0", "601.0", "702.5"],
        ["0", "1", "32", "1250.0", "1200.0", "1300.0"],
        ["pattern", "from", "to", "4096", "1048576"],
        ["pair", "0", "1", "2.0", "301.3"],
        ["ring", "-", "-", "-", "301.3"],
    ):
        assert row in lines
    assert "2 x NVIDIA H100, driver" in done.stdout
    assert "NOT COMPLETE" not in done.stdout

    report = reports.load(file)
    documented = (BENCH / "README.md").read_text()
    for name in report:
        assert f"`{name}`" in documented, name
    assert (report["harness"], report["complete"], report["gpus"]) == ("links", True, 2)
    for name, count in (("peer", 1), ("latency_ns", 2), ("bandwidth", 3)):
        assert report[name] == [line[name] for line in LINKS if name in line]
        assert len(report[name]) == count
        for key in report[name][0]:
            assert f"`{key}`" in documented, key

    failed = run()
    assert failed.returncode == 1
    assert "NOT COMPLETE" in failed.stdout
    assert reports.load(file)["complete"] is False


def test_links_prints_the_schema():
    """Its keys, in the source: there may be no compiler for it here. And it takes what the product
    takes: plain memory of GPUs, no multicast."""
    source = (BENCH / "links" / "links.cu").read_text()
    for line in LINKS:
        for name, value in line.items():
            for key in (name, *(value if isinstance(value, dict) and name != "versions" else ())):
                assert f'\\"{key}\\": ' in source, key
    everything = [
        path.read_text().lower() for path in (BENCH / "links").iterdir() if path.is_file()
    ]
    for word in ("multicast", "multimem", "managed"):
        assert not any(word in text for text in everything)
    assert any("store_relaxed_sys(" in text for text in everything)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="needs matplotlib")
def test_plots(tmp_path):
    cells = [
        made_cell(name, us * rows, rows=rows, form=form)
        for name, us in (("floor", 1.0), ("ours/auto", 2.0))
        for rows in (1, 8)
        for form in ("plain", "residual", "sandwich")
    ]
    drawn = plots.draw(made_report(cells), str(tmp_path / "a"))
    assert [path.name for path in drawn] == ["a_latency.png", "a_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    shapes = [f"two-shot/{blocks}/{lead}" for blocks in (1, 2, 4, 8) for lead in (1, 2, 3)]
    of_streams = made_report([made_cell(name, 2.0) for name in shapes], harness="streams")
    assert len(plots.draw(of_streams, str(tmp_path / "c"))) == 2
    with pytest.raises(ValueError, match="a measured cell is required"):
        plots.draw(made_report([made_cell("floor", None)]), str(tmp_path / "b"))


def test_of_many_shapes_the_best_are_drawn():
    cells = [made_cell("plan", 3.0), made_cell("floor", 1.0)]
    cells += [made_cell("one-shot/1", 5.0), made_cell("one-shot/2/full", 4.0)]
    cells += [made_cell("one-shot/1", 6.0, rows=9), made_cell("one-shot/2/full", 7.0, rows=9)]
    drawn = [(cell["algorithm"], cell["rows"], cell["us"]) for cell in plots.best_shapes(cells)]
    assert drawn == [
        ("plan", 8, 3.0),
        ("floor", 8, 1.0),
        ("one-shot, best shape", 8, 4.0),
        ("one-shot, best shape", 9, 6.0),
    ]


def test_plots_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is required" in plots.problem()
    with pytest.raises(SystemExit):
        bench_fused.main(["--plot", "x"])
    assert "pip install '.[bench]'" in capsys.readouterr().err


def test_progress_is_followed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "progress"
    monkeypatch.setenv(progress.FILE, str(file))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    shown, show = threading.Event(), progress.Bar.show
    monkeypatch.setattr(progress.Bar, "show", lambda *of: (show(*of), shown.set()))
    with progress.followed(file):
        written = progress.of_a_rank(0, 2)
        written.show("one")
        assert shown.wait(60)
        written.show("two")
        progress.of_a_rank(1, 2).show("of another rank")
    assert capsys.readouterr().err == "1 of 2: one\n2 of 2: two\n"


# ------------------------------------------------------------------------------------------ compare


def compared(tmp_path, before: dict, after: dict, *options: str) -> int:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, report in zip(files, (before, after), strict=True):
        reports.save(report, file)
    return compare.main([*map(str, files), *options])


BEFORE = [made_cell("floor", 2.0), made_cell("ours/auto", 3.0), made_cell("vllm + norm", 9.0)]


def test_compare_says_what_is_slower_and_missing(tmp_path, capsys):
    after = [made_cell("floor", 1.0), made_cell("ours/auto", 3.3), made_cell("new", 1.0)]
    assert compared(tmp_path, made_report(BEFORE), made_report(after)) == 1
    said = capsys.readouterr().out
    assert "missing: vllm + norm, 2 ranks, 8 x 4096 bf16 residual" in said
    assert "new: new, 2 ranks" in said
    assert "ours/auto" in said.splitlines()[3]
    assert "+10.0%" in said.splitlines()[3]
    said = said.splitlines()[-1]
    assert said.startswith("2 cells: 1 slower by more than 5%, 1 faster, 0 wrong now, 0 of ours")
    assert compared(tmp_path, made_report(BEFORE), made_report(after), "--percent", "11") == 0


def test_compare_finds_nothing(tmp_path, capsys):
    after = [made_cell("floor", 2.09), made_cell("ours/auto", 2.9), made_cell("vllm + norm", 9.0)]
    assert compared(tmp_path, made_report(BEFORE), made_report(after)) == 0
    assert capsys.readouterr().out == (
        "3 cells: 0 slower by more than 5%, 0 faster, 0 wrong now, 0 of ours without a time now\n"
    )


def test_compare_finds_that_ours_has_no_time_any_more(tmp_path, capsys):
    """At a size that others have one at; a size that nothing has was not asked for."""
    before, gone = made_report(BEFORE), "1 of ours without a time now"
    for after in (BEFORE[:1], BEFORE[1:], [*BEFORE[:1], made_cell("ours/auto", None)]):
        assert compared(tmp_path, before, made_report(after)) == 1
        assert gone in capsys.readouterr().out
    more = made_report([*BEFORE, made_cell("ours/auto", 5.0, rows=9)])
    assert compared(tmp_path, more, before) == 0
    wrong = made_cell("vllm + norm", None, rows=9, wrong="NaN")
    assert compared(tmp_path, more, made_report([*BEFORE, wrong])) == 0
    streams = {"harness": "streams"}
    before, after = [made_cell("floor", 2.0), made_cell("plan", 3.0)], [made_cell("floor", 2.0)]
    assert compared(tmp_path, made_report(before, **streams), made_report(after, **streams)) == 1


def test_compare_what_came_to_be_wrong(tmp_path, capsys):
    after = [made_cell("floor", 2.0), made_cell("ours/auto", None, wrong="other bits")]
    assert compared(tmp_path, made_report(BEFORE), made_report(after)) == 1
    assert "wrong now: ours/auto, 2 ranks, 8 x 4096 bf16 residual: other bits" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu", "NVIDIA H200"),
        ("l2", "cold"),
        ("harness", "streams"),
        ("placement", "2 GPUs"),
        ("start", "on the host: a barrier"),
        ("environment", {}),
    ],
)
def test_compare_refuses_other_conditions(tmp_path, capsys, name, value):
    before, after = made_report(BEFORE), made_report(BEFORE, **{name: value})
    assert compared(tmp_path, before, after) == 2
    assert f"{name}: {before[name]} before, {value} after" in capsys.readouterr().err
    assert compared(tmp_path, before, after, "--force") == 0


def test_compare_refuses_other_options_of_streams(tmp_path, capsys):
    """Where both reports have them."""
    one, other = (made_report(BEFORE, options={"threads": n, "trigger": 2}) for n in (512, 256))
    assert compared(tmp_path, one, other) == 2
    assert "options: {'threads': 512" in capsys.readouterr().err
    assert compared(tmp_path, one, one) == 0
    assert compared(tmp_path, one, made_report(BEFORE)) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cells": None}, "cells that are no list of objects"),
        ({"cells": [None]}, "cells that are no list of objects"),
        ({"placement": None}, "the placement None"),
        ({"cells": [made_cell("floor", "2")]}, "a cell with us '2'"),
        ({"cells": [made_cell("floor", 2.0, copy_gb_s=[])]}, "a cell with copy_gb_s []"),
        ({"cells": [made_cell(["floor"], 2.0)]}, "a cell with algorithm ['floor']"),
        ({"cells": [made_cell("floor", 2.0, rows="8")]}, "a cell with rows '8'"),
    ],
)
def test_compare_refuses_values_of_another_kind(tmp_path, capsys, changes, said):
    assert compared(tmp_path, made_report(BEFORE), {**made_report(BEFORE), **changes}) == 2
    assert f"got {said}; run the benchmark again" in capsys.readouterr().err


def test_compare_refuses_what_is_not_complete(tmp_path, capsys):
    before, after = made_report(BEFORE), made_report(BEFORE[:2], complete=False)
    assert compared(tmp_path, before, after) == 2
    assert "complete: the run after ended before all" in capsys.readouterr().err
    assert compared(tmp_path, after, before) == 2
    assert "complete: the run before ended before all" in capsys.readouterr().err


def test_compare_refuses_another_share_of_the_gpu(tmp_path, capsys):
    before, after = (made_report([made_cell("floor", 2.0, multiprocessors=n)]) for n in (66, 33))
    assert compared(tmp_path, before, after) == 2
    assert "multiprocessors a rank: 66 before, 33 after, floor, 2 ranks" in capsys.readouterr().err


def test_compare_refuses_what_lacks_something(tmp_path, capsys):
    """Such as a report of links/run.py."""
    cell = {name: value for name, value in BEFORE[0].items() if name != "p90"}
    for report, missing in (
        ({"schema": 1}, "complete, cells, harness, gpu, gpus, placement, l2, calls, start, env"),
        (made_report([BEFORE[0], cell]), "p90"),
    ):
        assert compared(tmp_path, made_report(BEFORE), report) == 2
        said = capsys.readouterr().err
        assert "after.json: a report of bench_fused.py or streams/run.py is required; got" in said
        assert f" without {missing}" in said
    with pytest.raises(SystemExit):
        compared(tmp_path, made_report(BEFORE), made_report(BEFORE), "--percent", "-1")
    assert "--percent: 0 or more is required; got -1" in capsys.readouterr().err


def test_compare_refuses_what_is_no_report_and_what_has_nothing_in_common(tmp_path, capsys):
    (tmp_path / "text").write_text("{}")
    assert compare.main([str(tmp_path / "text"), str(tmp_path / "none")]) == 2
    assert "a report of schema 1 is required; got None" in capsys.readouterr().err
    other = made_report([made_cell("ours/auto", 3.0, rows=16)])
    assert compared(tmp_path, made_report(BEFORE), other) == 2
    cpu = made_report(BEFORE, gpu="CPU")
    assert compared(tmp_path, cpu, cpu) == 2
    # How MPS came to be does not matter.
    noted = made_report(BEFORE)
    noted["placement"] += " (already running)"
    assert compared(tmp_path, made_report(BEFORE), noted) == 0

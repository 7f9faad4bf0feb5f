"""The soak: that it calls everything, sees what is wrong, and can be made to do it again."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import checks
import pytest
import torch

import gemma_ar_norm
from gemma_ar_norm import __main__ as command_line
from gemma_ar_norm import launcher, reference, soak, soak_calls
from gemma_ar_norm.soak_calls import Call, Data, Kind, Setting

CPU = torch.device("cpu")
ON_CPU = Setting(2, gpu=False, streams=False)
AS_STREAMS = Setting(3, gpu=True, streams=True)
AS_PROCESSES = Setting(4, gpu=True, streams=False)
SETTINGS = (ON_CPU, AS_STREAMS, AS_PROCESSES)

KIND = Kind(
    rows=4,
    hidden=64,
    dtype=torch.bfloat16,
    form="sandwich",
    algorithm="auto",
    weight_dtype=torch.float32,
    eps=1e-6,
    weight_bias=1.0,
    out="none",
    shape_of="rows",
    x_layout="wide rows",
    residual_layout="every second",
    weight_layout="misaligned",
    differ=True,
    between=False,
    alone=False,
)
DATA = Data(key=1 << 60 | 12345, values="ordinary", exponent=0, weight_values="ordinary",
            weight_exponent=-3)  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where there are GPUs."""
    monkeypatch.setattr(launcher, "gpu_count", lambda: 0)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # what the soak may set is undone


# ---------------------------------------------------------------------------------- what is called


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_seed_determines_the_calls(setting):
    def calls(seed):
        return [
            (
                soak_calls.batch_of(seed, number, setting),
                soak_calls.workspace_of(seed, number, setting),
                soak_calls.call_of(seed, (number, 3), setting),
                soak_calls.data_of(seed, number, 1, 2),
            )
            for number in range(60)
        ]

    assert calls(5) == calls(5)
    assert not any(a == b for a, b in zip(calls(5), calls(6), strict=True))
    found = calls(5)
    assert len({batch.calls for batch, *_ in found}) == 60
    assert len({data.key for *_, data in found}) == 60
    assert len({str(workspace) for _, workspace, *_ in found}) > 1
    replays = [soak_calls.data_of(5, 1, call, replay) for call in range(8) for replay in range(8)]
    assert len({data.key for data in replays}) == 64
    assert found[0][1] == found[soak_calls.BATCHES_A_WORKSPACE - 1][1]  # one for several batches


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_nothing_is_left_out(setting):
    counts = soak.Counts(setting)
    rows = set()
    for number in range(600):
        batch = soak_calls.batch_of(1, number, setting)
        counts.new_workspace(soak_calls.workspace_of(1, number, setting)["how"])
        for i, kind in enumerate(batch.calls):
            rows.add(kind.rows)
            gemma_ar_norm.ops.check_arguments(
                torch.empty(kind.shape, dtype=kind.dtype, device="meta"),
                torch.empty(kind.hidden, dtype=kind.weight_dtype, device="meta"),
                None, None, kind.eps, kind.weight_bias, kind.algorithm,
            )  # fmt: skip
            found = soak_calls.categories_of(batch, kind, soak_calls.data_of(1, number, i, 0))
            for category, value in found.items():
                counts.by_category[category][value] += 1
    missing = {text.split(":")[0] for text in counts.missing()}
    assert missing == ({"path", "launches"} if setting.gpu else set())
    # Nothing is counted that the summary would not miss.
    possible = soak_calls.all_categories(setting)
    for category, values in counts.by_category.items():
        assert set(values) == set(possible[category])
    most = soak_calls.MAX_ELEMENTS if setting.gpu else soak_calls.MAX_ELEMENTS_CPU
    assert max(rows) > most // 640 / 2
    if setting.gpu:
        assert {15, 17, 31, 33, 63, 65, 127, 129} <= rows


def test_values_are_the_same_numbers_always():
    """On every device and in every version: those of integers without an end."""
    h = soak_calls.hashed(DATA.key, 100_000, CPU)
    low, high = DATA.key % 2**32, DATA.key >> 32
    for place in (0, 1, 2, 99_999):
        want = place ^ low
        for multiplier, word in ((0x7FEB352D, high), (0x045D9F3B, low), (0x7FEB352D, 0)):
            want = ((want ^ want >> 16) * multiplier + word) % 2**32
        assert h[place].item() == want ^ want >> 16
    assert 0 <= int(h.min()) < int(h.max()) < 1 << 32
    assert abs(h.double().mean().item() / 2**31 - 1) < 0.01
    assert len(h.unique()) > 99_990
    other = soak_calls.hashed(DATA.key + 1, 100_000, CPU)
    assert len(torch.cat([h, other]).unique()) > 199_980
    for dtype in checks.DTYPES:
        values = soak_calls.numbers(h, dtype, 3)
        assert 7.9 < values.max() <= 8
        assert -8 <= values.min() < -7.9
        assert abs(values.double().mean()) < 0.1


@pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
@pytest.mark.parametrize("values", soak_calls.VALUES)
def test_special_values_are_there_and_rows_between_are_ordinary(values, dtype):
    h = soak_calls.hashed(7, 3 * 9 * 2048, CPU).view(3, 9, 2048)
    ordinary = soak_calls.numbers(h, dtype, 0)
    data = ordinary.clone()
    soak_calls.plant(values, data, h, 2)
    bits = data.view(checks.BITS[dtype])
    even, odd = data[:, ::2], data[:, 1::2]
    tiny = torch.finfo(dtype).tiny
    found = {
        "ordinary": torch.equal(data, ordinary),
        "bits": len(bits.unique()) > 20_000 and bool(data.isnan().any()),
        "zeros": bool((even == 0).all()),
        "negative zero": bool(((even == 0) & even.signbit()).all(0).any(-1).all()),
        "nan": bool(even.isnan().any(-1).all()),
        "inf": bool((even == torch.inf).any()) and bool((even == -torch.inf).any()),
        "subnormal": bool((even.abs() <= tiny).all()) and bool((even != 0).any()),
        "huge": even.abs().max().item() > torch.finfo(dtype).max / 5,
        "empty words": bool((data.view(torch.int32) == -1).any(-1)[:, ::2].all())
        and bool((bits[1, ::4] == -1).all()),
    }[values]
    assert found
    if values != "bits":
        assert torch.equal(odd, ordinary[:, 1::2])
    with pytest.raises(ValueError, match=r"values: one of ordinary, .* is required; got 'other'"):
        soak_calls.plant("other", data, h, 2)


# ----------------------------------------------------------------------------- what is found wrong


def filled(kind=KIND, ranks=3, data=DATA) -> Call:
    call = Call(kind, ranks, range(ranks), CPU)
    call.fill(data)
    return call


def right(call: Call) -> Call:
    """As if every rank's call had been right."""
    call.got = {r: tuple(v.clone() for v in call.expected[r]) for r in call.mine}
    assert call.wrong().item() == 0
    assert call.explain() == ""
    return call


def test_a_wrong_element_is_found_wherever_it_is():
    for r in range(3):
        for i, name in enumerate(("norm_out", "residual_out")):
            call = right(filled())
            call.got[r][i][2, 5] = 100.0
            want = call.expected[r][i][2, 5].item()
            assert call.wrong().item() == 1
            assert call.explain() == (
                f"rank {r}: {name}[2, 5] is 100.0, must be {want!r}; 1 of 256 elements differ"
            )
    for of in ("_x", "_residual"):
        call = right(filled())
        getattr(call, of)[1][3, 63] += 1
        assert call.wrong().item() == 1
        assert call.explain().startswith(f"rank 1: {of[1:]} (an input)[3, 63] is ")


def test_bits_count_and_nan_is_nan():
    want = torch.tensor([0.0, float("nan"), 1.0, -0.0], dtype=torch.float16)
    got = torch.tensor([-0.0, float("nan"), 1.0009765625, -0.0], dtype=torch.float16)
    got.view(torch.int16)[1] = -1  # another NaN
    assert soak_calls.unequal(got, want).tolist() == [True, False, True, False]
    assert soak_calls.unequal(want, torch.full_like(want, torch.nan)).tolist() == [
        True, False, True, True,
    ]  # fmt: skip


def test_outputs_are_those_of_the_call(monkeypatch):
    """What is returned is what out= named, dense and like x."""
    call, returned = filled(replace(KIND, out="separate")), []
    fused = "fused_allreduce_gemma_rmsnorm"
    monkeypatch.setattr(gemma_ar_norm, fused, lambda *_, **__: tuple(returned))
    norm_out, residual_out = returned[:] = call._out[1]
    call.run(1, None)
    assert call.got[1][0] is norm_out
    for wrong, says in (
        ((norm_out.clone(), residual_out), "out: its tensors are to be returned"),
        ((norm_out, residual_out[:2]), "residual_out: a dense tensor like x is required"),
        ((norm_out.float(), residual_out), "norm_out: a dense tensor like x is required"),
        ((norm_out.t().contiguous().t(), residual_out), "norm_out: a dense tensor like x"),
    ):
        returned[:] = wrong
        with pytest.raises(AssertionError, match=says):
            call.run(1, None)


def test_residuals_of_each_rank_and_expected_results():
    call = filled()
    xs = [call._sources[r][0] for r in range(3)]
    residuals = [call._sources[r][1] for r in range(3)]
    assert len({residual.double().sum().item() for residual in residuals}) == 3
    for r in range(3):
        wants = reference.fused_allreduce_gemma_rmsnorm(
            xs, call._weight.clone(), residuals[r], post_weight=call._post_weight.clone()
        )
        for got, want in zip(call.expected[r], wants, strict=True):
            checks.assert_bit_equal(got, want)
        checks.assert_bit_equal(call._x[r].contiguous(), xs[r])
        assert call._x[r].stride() == (72, 1)
        assert call._residual[r].stride() == (128, 2)
    assert call._weight.data_ptr() % 16 == 4
    before = call.expected[0][0].clone()
    call.fill(replace(DATA, key=99))
    assert not torch.equal(before, call.expected[0][0])


@pytest.mark.parametrize("differ", [True, False])
def test_expected_results_of_one_rank(differ):
    """Those of its own x alone; also in a chain, where x is what a call of all ranks gave."""
    call = filled(replace(KIND, alone=True, differ=differ))
    for r in range(3):
        (x, residual), options = call._sources[r], {"post_weight": call._post_weight}
        wants = reference.fused_allreduce_gemma_rmsnorm([x], call._weight, residual, **options)
        for got, want in zip(call.expected[r], wants, strict=True):
            checks.assert_bit_equal(got, want)
    dense = replace(KIND, x_layout="dense", residual_layout="dense", differ=False)
    before = filled(dense)
    after = Call(replace(dense, alone=True), 3, range(3), CPU, before)
    after.fill(DATA)
    x, residual = before.expected[2]
    wants = reference.fused_allreduce_gemma_rmsnorm(
        [x], after._weight, residual, post_weight=after._post_weight
    )
    for got, want in zip(after.expected[2], wants, strict=True):
        checks.assert_bit_equal(got, want)


@pytest.mark.parametrize("out", soak_calls.OUTS)
def test_outputs_are_poisoned_and_inputs_are_not(out):
    """So that what a call does not write is seen: also where the values are those of before."""
    dense = replace(KIND, out=out, x_layout="dense", residual_layout="dense")
    call = filled(dense)
    if out == "none":
        assert call._out == {0: None, 1: None, 2: None}
        right(call)  # as a graph's outputs, of the first replay
    else:
        call.got = dict(call._out)
    for _ in range(2):
        call.fill(DATA)
        for r in call.mine:
            own = {"x": call._x[r], "residual": call._residual[r]}
            for name, source in zip(("x", "residual"), call._sources[r], strict=True):
                checks.assert_bit_equal(own[name], source)
            names = out.split() if " " in out else ("-", "-")
            for name, output in zip(names, call.got[r], strict=True):
                if name == "-":
                    assert bool((output == soak_calls.POISON).all())
                else:
                    assert output is own[name]
        assert call.wrong().item() > 3 * 2 * 250  # few are right by chance


# ------------------------------------------------------------------- ranks as streams, without any


class FakeStreams(soak.Streams):
    """Everything of it but the GPU."""

    def __init__(self, ranks: int) -> None:
        self.setting, self.mine, self.device = Setting(ranks, True, True), range(ranks), CPU
        self.where = "nowhere"

    def renew(self, *, how, **arguments):
        assert how == "local_group"
        self._group = FakeGroup(self.setting.ranks)

    def synchronize(self):
        pass


class FakeGroup(list):
    error = None  # that its synchronize() raises

    def __init__(self, ranks):
        super().__init__(FakeRank(rank) for rank in range(ranks))

    def synchronize(self):
        if self.error is not None:
            raise self.error

    def close(self):
        pass


class FakeRank:
    def __init__(self, rank):
        self.rank, self.stream = rank, f"stream {rank}"


@pytest.fixture
def streams_without_gpu(monkeypatch):
    """Ranks as streams, whose fused call takes what the peers have from the soak's own sources.
    Returns a list with, for each call of each rank, (stream, "eager" or "replayed")."""
    log, current, on = [], [], [None, "eager"]

    class KnownCall(Call):
        def run(self, r, group):
            current[:] = [self, r]
            super().run(r, group)

    def fused(x, weight, residual, *, post_weight, eps, weight_bias, group, algorithm, out):
        call, r = current
        assert on[0] == f"stream {r}"
        assert group is None if call.kind.alone else group.rank == r
        if on[1] == "captured":
            return (
                (torch.empty(x.shape, dtype=x.dtype), torch.empty_like(x)) if out is None else out
            )
        log.append(tuple(on))
        if call.before is None:
            xs = [call._sources[r][0] for r in call.mine]
        else:
            xs = [call.before.expected[r][0] for r in call.mine]
        checks.assert_bit_equal(x.contiguous(), xs[r])
        xs = xs[r : r + 1] if call.kind.alone else xs
        result = reference.fused_allreduce_gemma_rmsnorm(
            xs, weight, residual, post_weight=post_weight, eps=eps, weight_bias=weight_bias
        )
        if out is None:
            return result
        for output, value in zip(out, result, strict=True):
            output.copy_(value)
        return out

    @contextlib.contextmanager
    def stream(one):
        on[0] = one
        yield
        on[0] = None

    def capture(calls, one, device):
        """As a graph: nothing is computed before the replay."""

        def made(how):
            on[1] = how
            calls()
            on[1] = "eager"

        with stream(one):
            made("captured")

        def replay():
            assert on[0] == one
            made("replayed")

        return replay

    monkeypatch.setattr(soak, "Call", KnownCall)
    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", fused)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(soak, "capture", capture)
    path = {"path": "one_shot", "launches": "1"}
    monkeypatch.setattr(soak.Counts, "_path", lambda self, kind, group: path)
    monkeypatch.setattr(soak_calls, "MAX_ELEMENTS", 5000)
    return log


def test_batches_of_streams(streams_without_gpu):
    told = []
    report = soak.soak(
        FakeStreams(3), 11, (0, 30), None, lambda one: told.append((one["batch"], one["finished"]))
    )
    assert report["problems"] == []
    assert (report["finished"], report["mismatches"], report["as"]) == (True, 0, "streams")
    assert told == [*((n, False) for n in range(31)), (30, True)]
    batches = [soak_calls.batch_of(11, n, AS_STREAMS) for n in range(31)]
    assert report["calls"] == sum(batch.replays * len(batch.calls) for batch in batches)
    assert report["counts"]["workspace"] == {"local_group": 2}  # that of batch 0, and of 25
    assert sum(report["counts"]["mode"].values()) == report["calls"]
    in_graphs = sum(b.replays * len(b.calls) for b in batches if b.how == "graph")
    replayed = [stream for stream, how in streams_without_gpu if how == "replayed"]
    assert len(replayed) == 3 * in_graphs > 0
    eager = [stream for stream, how in streams_without_gpu if how == "eager"]
    assert eager == [f"stream {r}" for r in range(3)] * (len(eager) // 3) != []


def test_streams_with_a_wrong_result(streams_without_gpu, monkeypatch):
    fake = gemma_ar_norm.fused_allreduce_gemma_rmsnorm

    def wrong(x, *rest, group, **options):
        norm_out, residual_out = fake(x, *rest, group=group, **options)
        if group is not None and group.rank == 2 and x.numel() and len(streams_without_gpu) > 200:
            norm_out.view(-1)[-1] = 123.0
        return norm_out, residual_out

    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", wrong)
    report = soak.soak(FakeStreams(3), 11, (0, None), 0.3, lambda one: None)
    assert report["mismatches"] > 0
    assert 3 < report["batch"] < 40
    assert "rank 2: norm_out[" in report["problems"][0]
    assert "is 123.0, must be" in report["problems"][0]
    text = soak.summary(report)
    batch = report["batch"]
    assert f"FAILED in batch {batch} of seed 11" in text
    assert f"soak --seed 11 --ranks 3 --as streams --batch {batch}\n" in text
    assert f"--batch {batch // 25 * 25}-{batch}\n" in text


def test_an_exception_ends_the_run_in_words(streams_without_gpu, monkeypatch):
    def raises(*arguments, **options):
        raise ZeroDivisionError("as the test wants it")

    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", raises)
    report = soak.soak(FakeStreams(2), 3, (7, None), 0.1, lambda one: None)
    assert report["batch"] == 7
    assert report["problems"][0].endswith("ZeroDivisionError: as the test wants it")
    assert "--seed 3 --ranks 2 --as streams --batch 7\n" in soak.summary(report)


def test_a_rank_says_what_is_wrong_before_it_asks_the_others(
    streams_without_gpu, monkeypatch, capsys
):
    def raises(*arguments, **options):
        raise ZeroDivisionError("as the test wants it")

    class Lonely(FakeStreams):
        def failed(self, text, *, raised):
            assert raised
            soak.Processes.failed(self, text, raised=False)

        def agree(self, message):
            raise gemma_ar_norm.WorkspaceError("nobody came")

    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", raises)
    with pytest.raises(gemma_ar_norm.WorkspaceError, match="nobody came"):
        soak.soak(Lonely(2), 3, (7, None), 0.1, lambda one: None)
    said = capsys.readouterr().err
    assert "FAILED in batch 7 of seed 3:\n  Traceback" in said
    assert "ZeroDivisionError: as the test wants it\n" in said
    assert "--seed 3 --ranks 2 --as streams --batch 7\n" in said


def test_ctrl_c_ends_with_the_summary(streams_without_gpu, monkeypatch, capsys):
    fake = gemma_ar_norm.fused_allreduce_gemma_rmsnorm

    def interrupted(*arguments, **options):
        if len(streams_without_gpu) > 200:
            raise KeyboardInterrupt
        return fake(*arguments, **options)

    monkeypatch.setattr(gemma_ar_norm, "fused_allreduce_gemma_rmsnorm", interrupted)
    monkeypatch.setattr(launcher, "gpu_count", lambda: 1)
    monkeypatch.setattr(soak, "Streams", FakeStreams)
    assert soak.main(["--minutes", "9", "--ranks", "3", "--seed", "11"]) == 130
    said = capsys.readouterr()
    last = said.out.splitlines()[-1]
    found = re.fullmatch(
        r"soak: did not finish: (\d+) calls in \d+ s, 0 mismatches, seed 11, nowhere", last
    )
    assert found is not None, last
    assert 10 < int(found[1]) < 200
    assert "soak --seed 11 --ranks 3 --as streams --batch " in said.out
    assert said.err == "soak: interrupted\n"


def test_ctrl_c_with_processes(monkeypatch, capsys):
    """As the launcher ends then; before the first batch, and after a report of the ranks."""
    report = {
        "seed": 5, "ranks": 2, "as": "processes", "where": "there", "minutes": 1.0, "seconds": 2.0,
        "batch": 26, "calls": 77, "mismatches": 0, "problems": [], "counts": {}, "missing": [],
        "finished": False,
    }  # fmt: skip
    shown = threading.Event()

    class Progress(soak.Progress):
        def __call__(self, report):
            super().__call__(report)
            shown.set()

    def run(command, *arguments, **options):
        if reports:
            soak.ReportFile(Path(command[command.index("--worker") + 1]))(report)
            assert shown.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(soak, "Progress", Progress)
    monkeypatch.setattr(launcher, "run", run)
    for reports, last in (
        (False, "soak: did not finish: no batch, seed 5, 2 ranks as processes"),
        (True, "soak: did not finish: 77 calls in 2 s, 0 mismatches, seed 5, there"),
    ):
        assert soak.main(["--minutes", "1", "--ranks", "2", "--seed", "5"]) == 130
        said = capsys.readouterr()
        assert said.out.splitlines()[-1] == last
        assert said.err == "soak: interrupted\n"
        assert ("--batch 25-26\n" in said.out) == reports


def test_a_missing_peer_is_named(streams_without_gpu, monkeypatch):
    error = gemma_ar_norm.PeerTimeoutError("rank 1: its rows are required", 1, 0, 0)
    monkeypatch.setattr(FakeGroup, "error", error)
    report = soak.soak(FakeStreams(2), 3, (7, None), 0.1, lambda one: None)
    assert report["problems"] == ["PeerTimeoutError: rank 1: its rows are required"]
    assert (report["batch"], report["mismatches"]) == (7, 0)


# ---------------------------------------------------------------------------------- by the command


def test_two_processes(tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["soak", "--minutes", "0.005", "--ranks", "2", "--seed", "7", "--json", str(file)]
    assert command_line.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    report = json.loads(file.read_text())
    assert said[0] == "soak: seed 7, 2 ranks as processes"
    seconds = f"{report['seconds']:.0f}"
    assert said[-1] == (
        f"soak: {report['calls']:,} calls in {seconds} s, 0 mismatches, seed 7, "
        "2 ranks as processes (2 CPU processes)"
    )
    assert report["seconds"] >= 0.3
    assert report["counts"]["ranks"]["one"] >= 1  # in batch 0 of this seed
    assert report["problems"] == []
    assert (report["seed"], report["ranks"], report["mismatches"]) == (7, 2, 0)
    for category in ("dtype", "form", "algorithm", "mode"):
        assert sum(report["counts"][category].values()) == report["calls"]
        assert any(line.startswith(f"  {category}: ") for line in said)
    missing = [line for line in said if line.startswith("no call of: ")]
    assert missing == (["no call of: " + "; ".join(report["missing"])] if report["missing"] else [])


# The soak with a fused call that is wrong on rank 1, in calls of many rows.
PLANT = """
import os, sys
import gemma_ar_norm
from gemma_ar_norm import soak

right = gemma_ar_norm.fused_allreduce_gemma_rmsnorm

def wrong(x, *rest, **options):
    chosen = os.environ["RANK"] == "1" and x.numel() > 15000
    if chosen:
        pass
    norm_out, residual_out = right(x, *rest, **options)
    if chosen:
        residual_out.view(-1)[9] = 5.5
    return norm_out, residual_out

gemma_ar_norm.fused_allreduce_gemma_rmsnorm = wrong
sys.exit(soak.main(sys.argv[1:]))
"""


def test_a_mismatch_ends_the_run_and_can_be_repeated(tmp_path, capsys):
    program = tmp_path / "planted.py"
    program.write_text(PLANT)
    run = functools.partial(soak.main, worker=[sys.executable, str(program), "--worker"])
    # A batch with such a call, and not the first.
    seed = next(s for s in range(100) if [big(s, number) for number in range(3)] == [0, 0, 1])
    assert run(["--minutes", "2", "--ranks", "2", "--seed", str(seed)]) == 1
    first = capsys.readouterr().out
    assert f"FAILED in batch 2 of seed {seed}:" in first
    failure = next(line for line in first.splitlines() if "on rank 1: " in line)
    assert "rank 1: residual_out[" in failure
    assert "is 5.5, must be" in failure
    assert not re.search(r"\b0 mismatches", first.splitlines()[-1])

    command = next(line for line in first.splitlines() if "that batch alone: " in line)
    words = shlex.split(command.split(":")[-1])
    assert words[:4] == ["python", "-m", "gemma_ar_norm", "soak"]
    assert run(words[4:]) == 1
    assert failure in capsys.readouterr().out.splitlines()


def big(seed: int, number: int) -> bool:
    """Whether the batch has a call that the planted program has wrong."""
    calls = soak_calls.batch_of(seed, number, ON_CPU).calls
    return any(kind.rows * kind.hidden > 15000 for kind in calls)


def any_alone(seed: int, number: int) -> bool:
    return any(kind.alone for kind in soak_calls.batch_of(seed, number, ON_CPU).calls)


def test_an_exception_on_one_rank(tmp_path, capsys):
    """The other one waits for its rows then; both end, and say why."""
    program = tmp_path / "raises.py"
    program.write_text(PLANT.replace("pass", "raise ZeroDivisionError('as planted')"))
    worker = [sys.executable, str(program), "--worker"]
    seed = next(s for s in range(100) if big(s, 0) and not any_alone(s, 0))
    started = time.monotonic()
    arguments = ["--batch", "0-100", "--ranks", "2", "--seed", str(seed)]
    assert soak.main(arguments, worker) == 1
    assert time.monotonic() - started < soak.GROUP_TIMEOUT_S
    said = capsys.readouterr().out
    assert f"FAILED in batch 0 of seed {seed}:" in said
    assert "on rank 1: Traceback" in said
    assert "ZeroDivisionError: as planted" in said
    assert f"--seed {seed} --ranks 2 --as processes --batch 0\n" in said
    assert "PeerTimeoutError: rank 1: to take part in a call" in said  # on rank 0


def test_a_process_that_dies(tmp_path, capsys):
    """In the middle of a batch: the exit code is not 0, and its last words are shown."""
    program = tmp_path / "dies.py"
    program.write_text(
        PLANT.replace("residual_out.view(-1)[9] = 5.5", "print('last words'); os._exit(9)")
    )
    worker = [sys.executable, str(program), "--worker"]
    assert soak.main(["--batch", "0-100", "--ranks", "2", "--seed", "1"], worker) == 9
    batch = next(number for number in range(100) if big(1, number))
    said = capsys.readouterr()
    assert "did not finish" in said.out
    assert f"--seed 1 --ranks 2 --as processes --batch {batch}\n" in said.out
    assert "last words" in said.err
    assert "2 CPU processes: rank 1 ended with 9" in said.err


# ----------------------------------------------------------------------------------- the arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "--minutes: how long to run is required; got none; pass --minutes 5"),
        ("--batch 3-", "--minutes: how long to run is required"),
        ("--minutes -1", "argument --minutes: a number from 0 to 1000000 is required; got '-1'"),
        ("--minutes nan", "argument --minutes: a number from 0"),
        ("--minutes 1 --ranks 1", "argument --ranks: an integer from 2 to 8 is required; got '1'"),
        ("--minutes 1 --ranks 9", "argument --ranks: an integer from 2 to 8 is required; got '9'"),
        ("--minutes 1 --seed x", "argument --seed: an integer, 0 or more, is required; got 'x'"),
        ("--batch 4-3", "argument --batch: 17, 0-17 or 17- is required; got '4-3'"),
        ("--minutes 1 --as threads", "argument --as: invalid choice: 'threads'"),
        (
            "--minutes 1 --as streams",
            "--as: processes is required where there is no CUDA GPU; got streams; leave it out",
        ),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        soak.main(arguments.split())
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_help_names_the_soak_and_the_demo_is_the_default(capsys):
    for arguments, says in (
        (["--help"], "python -m gemma_ar_norm soak --help"),
        (["soak", "--help"], "--as {streams,processes}"),
    ):
        with pytest.raises(SystemExit) as ended:
            command_line.main(arguments)
        assert ended.value.code == 0
        assert says in capsys.readouterr().out


def test_progress(capsys, monkeypatch):
    report = defaultdict(
        int, seconds=61.2, calls=12345, mismatches=0, seed=7, batch=31, minutes=5.0
    )
    line = "soak: 61/300 s, 12,345 calls, 0 mismatches, seed 7, batch 31"
    now = [100.0]
    monkeypatch.setattr(soak.time, "monotonic", lambda: now[0])
    progress = soak.Progress()
    for seconds in (0, 5, 5.1, 5, 5.2):
        now[0] += seconds
        progress(report)
    progress.end()
    assert capsys.readouterr().out == f"{line}\n{line}\n"  # every 10 s

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = soak.Progress()
    for _ in range(3):
        now[0] += 0.25
        progress(report)
    progress.end()
    assert capsys.readouterr().out == f"\r{line}\x1b[K" * 3 + "\r\x1b[K"

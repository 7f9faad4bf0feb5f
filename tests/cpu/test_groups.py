"""Which group is meant, in one process. (With several: test_processes.py.)"""

from __future__ import annotations

import gc
import timeit
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gemma_ar_norm import groups


@pytest.fixture
def default_group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


class LocalRank:
    rank, group_name = 1, "gemma_ar_norm.local.test.1"

    def size(self) -> int:
        return 3


def test_no_group_is_one_rank():
    assert groups.resolve() == groups.resolve("") == groups.Group("", 0, 1)
    assert groups.name_of() == groups.name_for_compile() == ""


def test_the_default_group(default_group):
    name = default_group.group_name
    for group in (None, default_group, name):
        assert groups.resolve(group) == groups.Group(name, 0, 1, default_group)
        assert groups.name_of(group) == groups.name_for_compile(group) == name


def test_a_local_rank_is_found_by_its_name_while_it_lives():
    rank = LocalRank()
    groups.register_local(rank)
    for group in (rank, rank.group_name):
        found = groups.resolve(group)
        assert found == groups.Group(rank.group_name, 1, 3)
        assert found.is_local
    with pytest.raises(ValueError, match="a CUDA tensor is required by a local group"):
        groups.refuse_cpu_tensors(found)
    del rank, group
    gc.collect()
    with pytest.raises(ValueError, match="name of a live process group or local group"):
        groups.resolve("gemma_ar_norm.local.test.1")


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ("nobody", ValueError, "group: the name of a live process group.*got 'nobody'"),
        (3, TypeError, "group: None, a ProcessGroup, a rank of a local_group.*got int"),
        (torch.ones(2), TypeError, "got Tensor; pass the ProcessGroup"),
        (SimpleNamespace(group_name=3, size=len), TypeError, "got SimpleNamespace"),
        (-100, ValueError, "must be a member of the group; got GroupMember.NON_GROUP_MEMBER"),
    ],
)
def test_what_is_no_group(group, error, words):
    with pytest.raises(error, match=words):
        groups.resolve(group)


def test_the_end_of_a_group_is_told_once(default_group):
    gone = []
    groups.on_gone(gone.append)
    sub = dist.new_group([0])
    name = groups.name_of(sub)
    assert groups.name_of(sub) == name
    dist.destroy_process_group(sub)
    assert gone == [name]
    del sub
    gc.collect()
    assert gone == [name]
    groups._gone_callbacks.remove(gone.append)


def test_the_late_end_of_a_group_does_not_touch_its_successor(default_group, tmp_path):
    name = groups.name_of()
    owner = groups._owners[name]
    dist.destroy_process_group()
    store = dist.FileStore(str(tmp_path / "store2"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    assert groups.name_of() == name
    gone = []
    groups.on_gone(gone.append)
    groups._forget(*owner)  # as when the last that keeps the old group lets go of it
    groups._gone_callbacks.remove(gone.append)
    assert gone == []
    assert groups._owners[name] != owner


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        ("cpu:gloo,cuda:nccl", {"cpu": "gloo", "cuda": "nccl"}),
        ("nccl", {"cuda": "nccl"}),
        ("mpi", {"cpu": "mpi"}),
    ],
)
def test_devices_of_a_backend(monkeypatch, config, devices):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert groups.devices_of(object()) == devices
    if "cpu" in devices:
        assert groups.exchange_device(object()) == torch.device("cpu")


def test_cpu_tensors_in_a_group_without_a_cpu_backend(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    group = groups.Group("0", 0, 2, object())
    with pytest.raises(ValueError, match=r"x: a CPU tensor needs .* 'cuda:nccl'.*cpu:gloo"):
        groups.refuse_cpu_tensors(group)


def test_without_gloo_the_backends_own_words_are_kept(monkeypatch):
    """The cause of an exception is dropped by api.py; and it tells more than "some rank"."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "mpi")
    refused = mock.Mock(side_effect=RuntimeError("MPI_ERR_TRUNCATE: message truncated"))
    monkeypatch.setattr(dist, "all_gather", refused)
    group = groups.Group("0", 0, 2, object())
    with pytest.raises(groups.RanksLost, match=r"some rank \(MPI_ERR_TRUNCATE: message trunc"):
        groups.all_gather_rows(group, torch.ones(1, 8))


def test_hanging_up_is_tried_with_all_peers(monkeypatch):
    """Of four ranks 3 is lost and 1 has hung up before: there is nothing to wait for."""
    work = mock.Mock()

    def irecv(_, group_src, **options):
        if group_src == 1:
            raise RuntimeError("Connection closed by peer")
        assert group_src == 2
        return work

    monkeypatch.setattr(dist, "irecv", irecv)
    monkeypatch.setitem(groups._lost, "0", [3])
    groups.hang_up(groups.Group("0", 0, 4, object()))
    work.wait.assert_called_once()


def test_naming_the_default_group_is_cheap(default_group):
    """It is part of every eager call. The limit is for a loaded machine: a tenth is usual."""
    assert min(timeit.repeat(groups.name_of, number=2000, repeat=5)) / 2000 < 5e-6


def test_a_group_of_one_rank_has_no_name_in_calls(default_group):
    """With NO_GROUP the op runs our local kernel at once, without Python."""
    name = groups.name_of()
    assert name != groups.NO_GROUP
    assert groups.name_for_call() == groups.NO_GROUP
    dist.destroy_process_group()
    assert name not in groups._of_one_rank

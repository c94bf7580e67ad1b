"""Which GPU a process takes, and what is said where the exchange between processes fails."""

import pytest
import torch
import torch.distributed as dist

from llamalora.distributed import world
from llamalora.distributed.world import DeviceError, ExchangeError, LostError, join_world


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many visible GPUs, and a process of it; calls to torch.distributed are noted in a list."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []

    def note(name):
        return lambda *arguments, **named: calls.append((name, arguments, named))

    def describe(gpus: int, **environment) -> list:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
        monkeypatch.setattr(world, "prepare_gpu", note("prepare_gpu"))
        for name in ("init_process_group", "barrier", "destroy_process_group"):
            monkeypatch.setattr(dist, name, note(name))
        monkeypatch.setattr(dist, "get_rank", lambda: int(environment["RANK"]))
        return calls

    return describe


@pytest.mark.parametrize("gpus, environment, taken", [
    (0, {}, "cpu"), (4, {}, "cuda:0"), (4, {"LOCAL_RANK": 3}, "cuda:3"),
    (1, {"LOCAL_RANK": 3}, "cuda:0"),  # SLURM shows a process its own alone
])  # fmt: skip
def test_a_process_takes_the_gpu_of_its_place(machine, gpus, environment, taken):
    calls = machine(gpus, **environment)
    with join_world() as joined:
        assert joined.device == torch.device(taken)
    assert [name for name, *_ in calls] == (["set_device", "prepare_gpu"] if gpus else [])


@pytest.mark.parametrize("gpus, environment", [
    (2, {"LOCAL_RANK": 2}), (1, {"LOCAL_RANK": 1, "TORCHELASTIC_RUN_ID": "none"}),
])  # fmt: skip
def test_more_processes_than_gpus_are_refused(machine, gpus, environment):
    machine(gpus, **environment)
    with pytest.raises(DeviceError, match=rf"LOCAL_RANK is \d.*visible to them: {gpus}.*--nproc_per_node {gpus}"):
        join_world().__enter__()


PLACE = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}


@pytest.mark.parametrize("gpus, backend, more", [
    (0, "gloo", {}), (2, "nccl", {"device_id": torch.device("cuda:1")}),
])  # fmt: skip
def test_the_group_is_made_for_the_device_and_taken_down_at_the_end(machine, gpus, backend, more):
    calls = machine(gpus, **PLACE)
    with join_world() as joined:
        assert (joined.rank, joined.size) == (1, 2)
        assert calls[-1][1] == (backend,) and calls[-1][2].items() >= more.items()
        del calls[:]
    assert [name for name, *_ in calls] == ["barrier", "destroy_process_group"]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), SystemExit(143), KeyboardInterrupt()], ids=repr)
def test_after_a_failure_nobody_is_waited_for(machine, error):
    """Before it is printed: a barrier, or taking NCCL down, would wait for processes that are stuck."""
    calls = machine(2, **PLACE)
    with pytest.raises(type(error)) as raised, join_world():
        del calls[:]
        raise error
    assert raised.value is error
    assert not calls


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, {}, NCCL 2.21\n{}\nLast error:\n{}"
INVALID = NCCL.format(
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000",
)
REMOTE = NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "socketProgress: Connection closed by remote peer",
)
STORE = "[1] is setting up NCCL communicator ..., but store->get('0') got error: Connection reset by peer"


@pytest.mark.parametrize("error, kind, said", [
    (dist.DistBackendError(INVALID), ExchangeError, "ncclInvalidUsage: .* rank 0 and rank 1 both on CUDA device 1000"),
    (dist.DistBackendError(REMOTE), LostError, "process 1 of 2 has lost another one, .* 30 minutes .*network error"),
    (dist.DistBackendError(STORE), LostError, "Connection reset by peer"),
    (dist.DistNetworkError("timed out"), LostError, "timed out"),
    (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed"), LostError, "Connection closed"),
], ids=["two processes on one GPU", "remote", "store", "network", "gloo"])  # fmt: skip
@pytest.mark.parametrize("where", ["in the run", "at the start"])
def test_a_failed_exchange_is_told_from_a_lost_process(machine, monkeypatch, error, kind, said, where):
    machine(2, **PLACE)
    if where == "at the start":
        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(kind, match=said), join_world():
        raise error


def test_other_errors_stay_what_they_are(machine):
    machine(2, **PLACE)
    with pytest.raises(RuntimeError, match="^shapes do not fit$"), join_world():
        raise RuntimeError("shapes do not fit")

"""Two processes over gloo against one: the same gradients, sums and decisions on each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import close, random_ids, randomise_lora, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F

from llamalora.distributed.gradients import GradientSum
from llamalora.distributed.world import World, join_world
from llamalora.lora.inject import inject_lora, trainable_parameters
from llamalora.training.batch import Example, MicroBatch, deal, plan_epoch
from llamalora.training.step import Optimizer, backward

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
STEPS = 3
EXAMPLES = [Example(tuple(random_ids(n, seed=n).tolist()), 1 + n % 5) for n in (12, 7, 30, 9, 22, 15, 40)]

# what each of the two processes does; results go to files named after its rank
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from test_distributed import train
from llamalora.distributed import gradients
from llamalora.distributed.world import join_world

gradients.STRETCH_BYTES = 2000  # of a model that has 14,000 bytes of gradients
out = Path(sys.argv[1])
with join_world(timeout_minutes=5) as world:
    found = {
        "place": [world.rank, world.size, world.is_main],
        "sum": world.sum([1.0, 10.0 ** world.rank, 0.1]),
        "gather": world.gather({"rank": world.rank, "items": ["x"] * world.rank}),
        "from_main": world.from_main(f"said by {world.rank}"),
    }
    world.say("hello from", world.rank)
    world.barrier()
    tensors, skipped, found["late"] = train(world)
    # one process sees a gradient that is not finite: both must leave the step out
    poisoned, found["skipped"], _ = train(world, poison=1)
    # a step of one example: the second process has none, and still takes part
    alone, _, _ = train(world, examples=1)
    early, _, found["early"] = train(world, early=True)
    early_alone, _, found["early_alone"] = train(world, examples=1, early=True)
found["plain_skipped"] = skipped
groups = {"train": tensors, "poisoned": poisoned, "alone": alone, "early": early, "early_alone": early_alone}
flat = {f"{key}.{name}": tensor for key, group in groups.items() for name, tensor in group.items()}
save_file(flat, out / f"{world.rank}.safetensors")
(out / f"{world.rank}.json").write_text(json.dumps(found))
"""


def train(world: World, poison: int | None = None, examples: int = len(EXAMPLES), early: bool = False):
    """A few steps on all processes of a world; the parameters afterwards, the last gradients; the skips; how
    many stretches of gradients left before the end of a backward pass, of how many.

    Args:
        early: gradients are summed while the backward pass goes on, as in the training loop.
    """
    model = tiny_model(tie_word_embeddings=True)
    inject_lora(model, "all", 4)
    randomise_lora(model)
    optimizer = Optimizer(model, "fp32", torch.device("cpu"), 0.01, 1.0)
    lengths = [len(example) for example in EXAMPLES[:examples]]
    tensors, skips, left = {}, [], 0
    for number in range(STEPS):
        (step,) = plan_epoch(lengths, 10**6, seed=0, epoch=number)
        supervised = sum(EXAMPLES[index].supervised for index in step)
        shares = [indices for indices in deal(step, lengths, world.size, 40)[world.rank] if indices]
        for indices in shares:
            batch = MicroBatch.of([EXAMPLES[index] for index in indices], torch.device("cpu"))
            sums = optimizer.sums(world) if early and indices is shares[-1] else None
            backward(model, batch, supervised, optimizer.scaler, "fp32", number % 2, sums)
        left += len(optimizer.sums(world).pending)
        if poison == world.rank and number == 1:
            optimizer.parameters["lm_head.lora_B"].grad[3, 1] = float("nan")
        if number == STEPS - 1:
            optimizer.sums(world).end()
            tensors = {f"gradient.{name}": p.grad.clone() for name, p in optimizer.parameters.items()}
            break
        skips.append(optimizer.step(1e-2, world).skipped)
    tensors |= {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    return tensors, skips, [left, STEPS * len(optimizer.sums(world).stretches)]


def launch(folder: Path, script: str, processes: int = 2, timeout: float = 400) -> list[subprocess.CompletedProcess]:
    """Processes as torchrun starts them, without its own start-up time."""
    (folder / "script.py").write_text(script)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}:{TESTS / 'distributed'}",
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, *out) for p, out in zip(running, outputs, strict=True)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes wrote: (JSON, tensors) of each, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(folder, SCRIPT)
    assert [process.returncode for process in done] == [0, 0], "\n".join(process.stderr for process in done)
    results = [
        (json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"))
        for rank in range(2)
    ]
    return results, [process.stdout for process in done]


def of(tensors, key):
    return {name.removeprefix(f"{key}."): t for name, t in tensors.items() if name.startswith(f"{key}.")}


def test_each_process_knows_its_place(two):
    (first, second), printed = two
    assert first[0]["place"] == [0, 2, True]
    assert second[0]["place"] == [1, 2, False]
    assert "hello from 0" in printed[0] and "hello" not in printed[1]


def test_sums_items_and_the_main_process_are_the_same_everywhere(two):
    (first, second), _ = two
    for found, _ in (first, second):
        assert found["sum"] == [2.0, 11.0, 0.2]  # in fp64
        assert found["gather"] == [{"rank": 0, "items": []}, {"rank": 1, "items": ["x"]}]
        assert found["from_main"] == "said by 0"


@pytest.mark.parametrize("case, options", [("train", {}), ("alone", {"examples": 1})])
def test_gradients_and_updates_are_those_of_one_process(two, case, options):
    (first, second), _ = two
    expected, _, _ = train(World(), **options)
    one, other = of(first[1], case), of(second[1], case)
    assert one.keys() == other.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], other[name]), name  # bitwise alike, or the processes drift apart
        assert (one[name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-7, name
    assert any(name.startswith("gradient.") and tensor.any() for name, tensor in expected.items())


@pytest.mark.parametrize("case, early", [("train", "early"), ("alone", "early_alone")])
def test_gradients_that_leave_early_are_the_same_sums(case, early, two):
    """Bit for bit. Of a process without an example none leave early, of the others all."""
    for found, tensors in two[0]:
        expected, actual = of(tensors, case), of(tensors, early)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
        assert found["late"] == [0, found["early"][1]] and found["early"][1] > 4 * STEPS
    (left, stretches), (left_without, _) = (found[early] for found, _ in two[0])
    assert left == stretches and left_without == (0 if case == "alone" else stretches)


def test_all_processes_leave_out_the_step_that_one_cannot_make(two):
    (first, second), _ = two
    assert first[0]["plain_skipped"] == second[0]["plain_skipped"] == [False, False]
    assert first[0]["skipped"] == second[0]["skipped"] == [False, True]
    one, other = of(first[1], "poisoned"), of(second[1], "poisoned")
    for name in one:
        assert torch.isfinite(one[name]).all()
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["lm_head.lora_B"], of(first[1], "train")["lm_head.lora_B"])


def test_one_process_that_fails_takes_the_other_with_it(tmp_path):
    """Not before long: the one that waits sees the connection close, or its timeout."""
    script = """
from llamalora.distributed.world import join_world
with join_world(timeout_minutes=0.5) as world:
    if world.rank == 1:
        raise RuntimeError("lost")
    world.sum([1.0])
"""
    done = launch(tmp_path, script)
    assert all(process.returncode != 0 for process in done)
    assert "lost" in done[1].stderr


def test_alone_there_is_nothing_to_exchange(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.sum([1.5, 2.0]) == [1.5, 2.0]
        assert world.gather("x") == ["x"] and world.from_main("x") == "x"
        world.barrier()
        model = tiny_model()
        F.cross_entropy(model(random_ids(1, 4))[0], random_ids(4)).backward()
        before = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
        sums = GradientSum(model.parameters(), world)
        sums.begin(model)
        sums.end()
        for name, parameter in trainable_parameters(model).items():
            close(parameter.grad, before[name], 0)

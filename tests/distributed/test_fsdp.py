"""ddp, fsdp and one process learn and answer the same, and take over each other's checkpoints."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import random_ids, tiny_model
from safetensors.torch import load_file, save_file
from test_distributed import launch

import train
from llamalora.cli import run_command
from llamalora.distributed.sharding import in_step, merged
from llamalora.distributed.world import World
from llamalora.evaluation.generate import generate
from llamalora.model.checkpoint import save_model, skeleton
from llamalora.model.config import LlamaConfig
from llamalora.model.precision import autocast
from llamalora.model.tensors import is_sharded, whole, write_tensors
from llamalora.runs.settings import Settings
from llamalora.runs.setup import build_model
from llamalora.runs.state import load_checkpoint
from llamalora.training.batch import Example, MicroBatch, deal, plan_epoch
from llamalora.training.loop import Progress, load_progress, save, save_progress
from llamalora.training.step import MovementCheck, Optimizer, backward

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 20
LARGE = LlamaConfig(
    vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
LENGTHS = (12, 7, 30, 9, 22, 15, 40, 5, 33, 18, 26, 11)
EXAMPLES = [Example(tuple(random_ids(n + 1, seed=n).tolist()), 1 + n % 5) for n in LENGTHS]
PROMPTS = [random_ids(n, seed=90 + n).tolist() for n in (3, 9, 4, 14, 6)]
# rank 3 on four processes, a vocabulary of 97: rows that do not divide evenly, and processes without any
CASES = {
    "lora, tied, recomputed": {"model": "tied", "recompute": 2},
    "lora, fp16": {"precision": "fp16"},
    "lora, a block whole": {"whole": 1, "recompute": 1, "steps": 3},
    "full, tied": {"method": "full", "model": "tied", "lr": 1e-3},
    "full, tied, bf16": {"method": "full", "model": "tied", "precision": "bf16", "lr": 1e-4},
    "head alone": {"targets": "head", "steps": 3},
    "dora, tied": {"model": "tied", "dora": True, "steps": 3},
    "partial": {"method": "partial", "targets": "q,down,embed", "steps": 3, "lr": 1e-3},
}
WITH_DDP = ("lora, tied, recomputed", "lora, fp16")  # the slowest here; test_distributed.py has more of it


def settings_of(case: str, folder: Path) -> Settings:
    changes = {"model": "untied", "precision": "fp32", "rank": 3, "lr": 1e-2} | CASES[case]
    changes = {name: value for name, value in changes.items() if name not in ("recompute", "steps", "whole")}
    return Settings(**changes | {"model": str(folder / changes["model"])})


def start(case: str, folder: Path, world: World, parallel: str):
    settings = settings_of(case, folder)
    model = build_model(settings, world, parallel, CASES[case].get("whole", 0)).train()
    return settings, model, Optimizer(model, settings.precision, world.device, 0.01, 1.0)


def learn(case: str, model, optimizer: Optimizer, world: World, steps: range) -> list[list]:
    """Loss, norm of the gradient and whether it was skipped, of each step: micro-batches of 40 tokens, every fifth step
    of a single example."""
    settings, records = settings_of(case, Path()), []
    moved = MovementCheck(optimizer.parameters)
    for number in steps:
        step = plan_epoch(LENGTHS, 190, seed=0, epoch=number)[0][: 1 if number % 5 == 4 else None]
        supervised = sum(EXAMPLES[index].supervised for index in step)
        loss = 0.0
        for indices in deal(step, LENGTHS, world.size, 40)[world.rank]:
            batch = MicroBatch.of([EXAMPLES[index] for index in indices or step[:1]], world.device)
            counted = supervised if indices else math.inf
            recompute = CASES[case].get("recompute", 0)
            loss += backward(model, batch, counted, optimizer.scaler, settings.precision, recompute)
        update = optimizer.step(settings.lr, world)
        records.append([*world.sum([loss]), update.grad_norm, update.skipped])
    moved(world)
    return records


def answers(model, precision: str, world: World) -> list[list[int]]:
    """Of the merged model; the last process has no prompt, the others unequal numbers of passes."""
    mine = [index for index in range(len(PROMPTS)) if index % max(1, world.size - 1) == world.rank]
    limits = [4 + 5 * index for index in mine]
    with merged(model.eval(), world), autocast(precision, world.device):
        decoding = in_step(model, world, lambda: generate(model, [PROMPTS[index] for index in mine], 1, limits, 2))
    model.train()
    shares = world.gather(dict(zip(mine, decoding.outputs, strict=True)))
    return [share[index] for index in range(len(PROMPTS)) for share in shares if index in share]


def everything(model) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def follow(case: str, folder: Path, world: World, parallel: str) -> dict:
    """A run from start to end that leaves a checkpoint and the trained folder behind."""
    settings, model, optimizer = start(case, folder, world, parallel)
    whole = [not is_sharded(block.mlp.up_proj.weight) for block in model.model.layers]
    found = {"whole": sum(whole) if parallel == "fsdp" else 0}
    found |= {"steps": learn(case, model, optimizer, world, range(CASES[case].get("steps", STEPS)))}
    trained = everything(model)
    found["answers"] = answers(model, settings.precision, world)
    found["restored"] = all(map(torch.equal, trained.values(), everything(model).values()))
    place = folder / case / f"{parallel} x {world.size}"
    save_progress(place, optimizer, Progress(cursor=STEPS), 1, world)
    save(model, settings, place, "last", world, None)
    if world.is_main:
        save_file(trained, place / "trained.safetensors")
    return found


def go_on(case: str, folder: Path, world: World, parallel: str, of: str) -> dict:
    """Three more steps of another run."""
    _, model, optimizer = start(case, folder, world, parallel)
    assert load_progress(folder / case / of, optimizer, world) == Progress(cursor=STEPS)
    return {"steps": learn(case, model, optimizer, world, range(STEPS, STEPS + 3))}


def write_large(folder: Path) -> None:
    """A checkpoint of 300 MiB in fp16, in which embedding and head are as small a part as in Llama-2-7B."""
    model = skeleton(LARGE).half()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LARGE.to_dict()))
    values = torch.randn(2**20).half()
    entries = {name: (p.dtype, tuple(p.shape)) for name, p in model.named_parameters()}

    def tensor(name: str) -> torch.Tensor:
        shape = entries[name][1]
        return values.repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].view(shape)

    write_tensors(folder / "model.safetensors", entries, tensor)


def load_large(folder: Path, world: World) -> list[int]:
    """Bytes of private memory (RssAnon: the mapped checkpoint, which is the system's cache, is not in it) that loading
    took at its peak over what the process had before, on each."""
    settings = Settings(model=str(folder / "large"), precision="fp16")
    start("head alone", folder, world, "fsdp")  # has imported and allocated what any model needs
    before, peak, done = private_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    model = build_model(settings, world, "fsdp")
    done.set()
    watching.join()
    assert all(is_sharded(parameter) for parameter in model.parameters())
    return world.gather(max(peak[0], private_memory()) - before)


def private_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


FOUR = """
import json, sys
from pathlib import Path
from test_fsdp import CASES, WITH_DDP, follow, load_large
from llamalora.distributed.world import join_world

folder = Path(sys.argv[1])
with join_world(timeout_minutes=3) as world:
    memory = load_large(folder, world)
    found = {case: {"fsdp": follow(case, folder, world, "fsdp")} for case in CASES}
    for case in WITH_DDP:
        found[case]["ddp"] = follow(case, folder, world, "ddp")
if world.is_main:
    (folder / "found.json").write_text(json.dumps([found, memory]))
"""
TWO = """
import json, sys
from pathlib import Path
from test_fsdp import RESUMED, go_on, poisoned
from llamalora.distributed.world import join_world

folder = Path(sys.argv[1])
with join_world(timeout_minutes=3) as world:
    found = {of: go_on(RESUMED, folder, world, "fsdp", of) for of in ("fsdp x 4", "ddp x 1")}
    found["poisoned"] = world.gather(poisoned(folder, world))
if world.is_main:
    (folder / "resumed.json").write_text(json.dumps(found))
"""
RESUMED = "lora, tied, recomputed"


def run_all(folder: Path, script: str, processes: int) -> None:
    done = launch(folder, script, processes)
    failed = [process.stderr[-3000:] for process in done if process.returncode]
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where everything is, by case what one process, ddp and fsdp on four found, and the memory that loading took."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name in ("tied", "untied"):
        save_model(tiny_model(tie_word_embeddings=name == "tied"), folder / name)
    write_large(folder / "large")
    run_all(folder, FOUR, 4)
    found, memory = json.loads((folder / "found.json").read_text())
    for case in CASES:
        found[case]["one"] = follow(case, folder, World(), "ddp")
    return folder, found, memory


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_same(case, runs):
    """In half precision within its rounding: 2^-8 of a value in bf16, and 2^-11 in fp16, over 20 steps."""
    found = {how: torch.tensor(of["steps"], dtype=torch.float64) for how, of in runs[1][case].items()}
    one = found.pop("one")
    loss, norm = {"fp16": (2e-3, 3e-2), "bf16": (8e-3, 3e-2)}.get(case[-4:], (1e-5, 1e-4))
    for how, other in found.items():
        assert (other[:, 0] / one[:, 0] - 1).abs().max() < loss, how
        assert torch.equal(other[:, 2], one[:, 2]), how  # the steps that a loss scale too large cost
        assert (other / one - 1)[one[:, 2] == 0, 1].abs().max() < norm, how
    assert len(one) == CASES[case].get("steps", STEPS) and one[-1, 0] < one[0, 0]


def test_blocks_are_kept_whole_where_it_was_asked_for(runs):
    assert {case: found["fsdp"]["whole"] for case, found in runs[1].items()} == {
        case: how.get("whole", 0) for case, how in CASES.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_merged_models_answer_the_same_and_are_restored(case, runs):
    """Half precision may decide a near tie otherwise: there the trained weights are not the same either."""
    found = runs[1][case]
    for how, other in found.items():
        assert other["restored"], how
        assert [len(ids) > 0 for ids in other["answers"]] == [True] * len(PROMPTS)
        if not case.endswith("16"):
            assert other["answers"] == found["one"]["answers"], how


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_trained(case, runs):
    """Gathered row by row: in the run's state and in the folder for other tools; the files are one process's."""
    folder = runs[0] / case
    lora = CASES[case].get("method", "lora") == "lora"
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    trained = load_file(folder / "fsdp x 4/trained.safetensors")
    state, _ = load_checkpoint(folder / "fsdp x 4")
    one, _ = load_checkpoint(folder / "ddp x 1")
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {n: (t.dtype, t.shape) for n, t in one.items()}
    learnt = {name.removeprefix("parameter."): t for name, t in state.items() if name.startswith("parameter.")}
    for name, tensor in learnt.items():
        assert torch.equal(tensor, trained[name]), name
    saved, expected = (load_file(folder / how / "last" / file) for how in ("fsdp x 4", "ddp x 1"))
    assert saved.keys() == expected.keys()
    if lora:  # under other names, in the same order
        one_by_one = zip(sorted(saved), sorted(learnt), strict=True)
        assert all(torch.equal(saved[theirs], learnt[ours]) for theirs, ours in one_by_one)
    else:
        assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in trained)
    if not case.endswith("16"):
        for key, tensor in expected.items():
            assert (saved[key] - tensor).norm() < 1e-3 * tensor.norm() + 1e-6, key


def poisoned(folder: Path, world: World) -> list:
    """Which steps are left out if one process, in fp16, once has a gradient that is not finite; the scales."""
    settings, model, optimizer = start("lora, fp16", folder, world, "fsdp")
    updates = []
    for number in range(3):
        batch = MicroBatch.of(EXAMPLES[:2], world.device)
        backward(model, batch, 40.0, optimizer.scaler, settings.precision)
        if number == 1 and world.rank == 1:
            optimizer.parameters["lm_head.lora_B"].grad.to_local()[0, 0] = math.inf
        update = optimizer.step(1e-2, world)
        updates.append([update.skipped, update.scale])
    return updates


def test_checkpoints_move_between_ddp_and_fsdp_and_numbers_of_processes(runs):
    folder = runs[0]
    run_all(folder, TWO, 2)
    found = json.loads((folder / "resumed.json").read_text())
    for of in ("fsdp x 4", "ddp x 1"):
        alone, both = go_on(RESUMED, folder, World(), "ddp", of)["steps"], found[of]["steps"]
        for one, other in zip(alone, both, strict=True):
            assert one == pytest.approx(other, rel=1e-4), of
    # and in fp16 all processes leave out the step that one cannot make, with the same scale ever after
    first, second = found["poisoned"]
    assert first == second == [[False, 65536.0], [True, 65536.0], [False, 32768.0]]


def test_four_processes_load_a_checkpoint_in_little_more_than_its_size(runs):
    """On the CPU, where the shards themselves are host memory, with the updates that they carry."""
    size = (runs[0] / "large/model.safetensors").stat().st_size
    assert sum(runs[2]) < 1.3 * size, [taken / size for taken in runs[2]]
    assert sum(runs[2]) > 0.95 * size  # or this has measured nothing


def test_two_nodes_are_two_launchers(tmp_path):
    """The worked example of docs/hardware.md, on loopback, with a process a node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--data data/sample --limit-train 6 --epochs 1 --batch-tokens 256 --eval-limit 2 --precision fp32".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "7",
             "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--local_addr", "localhost",
             "train.py", *flags, "--model", "weights/tiny", "--parallel", "fsdp", "--out", str(tmp_path / "two")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert sum("on 2 x cpu" in output and "fsdp (requested)" in output for output in outputs) == 1
    run_command(train.main, [*flags, "--model", str(ROOT / "weights/tiny"), "--out", str(tmp_path / "one")])
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5) and len(one) > 1
    a, b = (load_file(tmp_path / name / "last/adapter_model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys() and all((a[key] - b[key]).norm() < 1e-3 * a[key].norm() for key in a)

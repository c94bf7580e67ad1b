"""What `auto` becomes on cards of several sizes, and what a step says that did not fit after all."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import train
from llamalora.cli import UsageError, run_command
from llamalora.commands.audit import parse_capacity
from llamalora.distributed.sharding import whole_blocks
from llamalora.distributed.world import World
from llamalora.lora.inject import make_trainable
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LlamaConfig
from llamalora.runs.settings import Settings
from llamalora.training import hardware, job, loop
from llamalora.training.memory import (
    GIB,
    LENGTHS,
    USABLE,
    OutOfMemory,
    Plan,
    explained,
    plan_host,
    plan_memory,
    typical,
)
from llamalora.training.placement import Placement, fit, place

SEVEN = LlamaConfig.named("llama-2-7b")


def fitted(card: str, gpus: int, **changes) -> Placement:
    settings = Settings(**{"precision": "fp16", "rank": 128, "batch_tokens": 4096} | changes)
    model = make_trainable(skeleton(SEVEN), **settings.learning)
    return fit(model, settings, LENGTHS, gpus, parse_capacity(card))


def test_the_headline_command_is_sharded_on_four_v100_and_not_on_larger_cards():
    v100 = fitted("16GB", 4)
    assert v100.parallel == "fsdp" and "18.8 of 15.0" in v100.why
    assert v100.plan.fits and v100.plan.total < USABLE * v100.plan.capacity
    assert fitted("24GB", 4, precision="bf16").parallel == "ddp"
    assert fitted("16GB", 1).parallel == "ddp", "one process has nobody to share with"
    assert "NOT ENOUGH MEMORY" in fitted("16GB", 1).why and "NOT ENOUGH" not in v100.why
    assert fitted("24GB", 4, parallel="fsdp").why == "requested"


def test_no_more_is_recomputed_than_a_share_of_the_step_in_one_pass_asks_for():
    """Blocks first, and when all are recomputed the micro-batch."""
    found = [fitted("16GB", 4, batch_tokens=tokens) for tokens in (1024, 8192, 16384, 2**20)]
    recomputed = [one.recompute or 33 for one in found]
    assert recomputed == sorted(recomputed, reverse=True) and recomputed[0] > recomputed[-1] == 1
    for one, tokens in zip(found[:3], (1024, 8192, 16384), strict=True):
        assert one.micro_tokens == max(LENGTHS) + tokens // 4 and one.plan.fits
    last = found[-1]
    assert last.plan.fits and last.micro_tokens == last.plan.largest_micro_tokens < 2**18


def test_blocks_stay_whole_in_half_of_what_is_spare():
    """A block of Llama-2-7B has 202,383,360 frozen values; on each of four V100 a quarter of them is there anyway."""
    model = make_trainable(skeleton(SEVEN), rank=128)
    more = 202_383_360 * 2 * 3 // 4
    assert [whole_blocks(model, 4, 2, free) for free in (-1, more - 1, more, 8 * more, 2**40)] == [0, 0, 1, 8, 32]
    assert whole_blocks(skeleton(SEVEN).requires_grad_(True), 4, 2, 2**40) == 0  # nothing is frozen
    found = fitted("16GB", 4)
    assert found.whole == found.plan.spare // 2 // more > 0 and f"{found.whole} blocks kept whole" in str(found)
    assert fitted("40GB", 8, method="full", precision="bf16").whole == fitted("40GB", 4, precision="bf16").whole == 0


def test_what_is_asked_for_is_kept():
    found = fitted("16GB", 4, micro_tokens=800, activation_checkpointing=2)
    assert (found.micro_tokens, found.recompute) == (800, 2)


def test_full_fine_tuning_on_eight_a100():
    found = fitted("40GB", 8, method="full", precision="bf16")
    assert found.parallel == "fsdp" and found.plan.fits


def test_on_the_cpu_only_the_host_is_planned():
    found = place(Settings(precision="fp32"), SEVEN, [100], World())
    assert (found.parallel, found.micro_tokens, found.recompute, found.plan) == ("ddp", 2048, 0, None)
    assert "one process" in str(found)
    given = place(Settings(precision="fp32", micro_tokens=300, activation_checkpointing=1), SEVEN, [100], World())
    assert (given.micro_tokens, given.recompute) == (300, 1) and "recomputing every block" in str(given)
    assert place(Settings(precision="fp32"), SEVEN, [100], World(0, 4)).why == "on the CPU"
    with pytest.raises(UsageError, match="one process"):
        place(Settings(parallel="fsdp"), SEVEN, [100], World())
    with pytest.raises(UsageError, match="magnitudes"):
        place(Settings(parallel="fsdp", dora=True, precision="bf16"), SEVEN, [100], World(0, 4))


def test_the_host_is_planned_too():
    """By hand, in bf16: a run on the CPU holds all but activations, the factors of linear layers in bf16, too, and
    twice the frozen weights while they are merged; a GPU's process one tensor (in fp32), and under fsdp its share of
    the frozen weights."""
    on_host = place(Settings(precision="bf16", rank=128), SEVEN, [100], World())
    base, learning, tensor = 2 * 6_738_415_616, 329_056_256, 4 * 32000 * 4096
    cast = 2 * (learning - 128 * (32000 + 4096))
    *always, merging = on_host.host.values()
    assert sum(always) == pytest.approx(base + 16 * learning + cast + tensor, rel=1e-6)
    assert merging == pytest.approx(base, rel=1e-3)  # all matrices, and not the norms
    assert f"{merging / GIB:.2f} more to merge updates" in str(on_host)
    model = make_trainable(skeleton(SEVEN), **Settings(rank=128).learning)
    assert list(plan_host(model, "fsdp", 4, "fp16", computes=False).values()) == [tensor, merging // 4]


def test_the_table_of_cards(monkeypatch):
    """Of the 7B alone, for speed; every cell is the plan's."""
    monkeypatch.setattr(hardware, "LLAMA_2", {"llama-2-7b": SEVEN})
    cells = {(cell["method"], cell["card"]): cell for cell in hardware.table()}
    assert len(cells) == len(hardware.METHODS) * len(hardware.COLUMNS)
    assert cells["LoRA on all, r=128", "V100 16 GB"]["fewest_gpus"] == 2
    assert cells["LoRA on all, r=128", "RTX 24 GB"]["fewest_gpus"] == 1
    assert cells["full", "A100 40 GB"]["fewest_gpus"] <= 8
    for cell in cells.values():
        sizes = list(cell["bytes"].values())
        assert sizes[1:] == sorted(sizes[1:], reverse=True)
        assert cell["bytes"][cell["fewest_gpus"]] <= USABLE * cell["capacity"]
    model = make_trainable(skeleton(SEVEN), **Settings(rank=128).learning)
    longest = max(LENGTHS)
    planned = plan_memory(model, "fsdp", 2, parse_capacity("16GB"), "fp16", longest, recompute=1)
    assert cells["LoRA on all, r=128", "V100 16 GB"]["bytes"][2] == planned.total
    shown = hardware.show(list(cells.values())).splitlines()
    assert len(shown) == 2 + len(hardware.METHODS) and f"fsdp, 2 or more ({planned.total / GIB:.1f})" in shown[3]
    page = (Path(train.__file__).parent / "docs/hardware.md").read_text(encoding="utf-8").splitlines()
    assert all(line in page for line in shown), "python -m llamalora audit --hardware"


def test_every_kth_block_is_recomputed_and_planned_so():
    model = make_trainable(skeleton(SEVEN), **Settings(rank=8).learning)
    plans = [plan_memory(model, "fsdp", 4, 0, "fp16", 2048, every) for every in (0, 4, 2, 1)]
    held = [one.items["activations"] for one in plans]
    assert held == sorted(held, reverse=True)
    assert held[2] == pytest.approx((held[0] + held[3]) / 2, rel=0.02)
    assert held[1] == pytest.approx((3 * held[0] + held[3]) / 4, rel=0.02)


def test_examples_are_summed_up_by_the_longest_and_deciles():
    assert typical(range(1, 101)) == (100, 90, 80, 70, 60, 50, 40, 30, 20, 10)
    assert typical([7]) == (7,) * 10


# ---- when it does not fit ----


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_sets_the_plan_beside_what_was_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 14 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 15 * GIB)
    plan = fitted("16GB", 4, parallel="ddp").plan
    with pytest.raises(OutOfMemory) as caught, explained(plan, torch.device("cuda")):
        no_memory()
    text = str(caught.value)
    for words in ("Tried to allocate 2.00 GiB", "14.00 GiB held", "15.00 by the allocator", "--parallel fsdp",
                  "--micro-tokens", "optimizer", f"{plan.total / GIB:.2f}"):  # fmt: skip
        assert words in text
    with pytest.raises(torch.OutOfMemoryError), explained(None, torch.device("cpu")):
        no_memory()


def test_out_of_memory_ends_a_run_with_an_error(monkeypatch, tmp_path, capsys):
    def placed(*_):
        plan = Plan("ddp", 698, {"activations": 5 * GIB}, 4 * GIB)
        return Placement("ddp", 698, 0, plan, "of this test")

    monkeypatch.setattr(job, "place", placed)
    monkeypatch.setattr(loop, "backward", no_memory)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    flags = "--model weights/tiny --data data/sample --limit-train 4 --epochs 1 --precision fp32 --out"
    with pytest.raises(SystemExit) as stop:
        run_command(train.main, [*flags.split(), str(tmp_path / "run")])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "memory does not suffice" in message and "activations" in message


# ---- what is measured on a GPU ----


def test_the_benchmark_runs_where_there_is_nothing_to_measure(capsys):
    path = Path(train.__file__).parent / "benchmarks/memory.py"
    specification = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    benchmark.main("--model tiny --precision fp32 --batch-tokens 900 --steps 3".split())
    text, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    result = json.loads(line)
    assert result["losses"][0] > result["losses"][-1] and result["measured"][0]["peak"] == 0
    assert "optimizer" in text and result["plan"]["tensors"] > 0

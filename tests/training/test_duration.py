"""The plan of a run's time: what is counted against what torch counts, rates by hand, and what an H200 took."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from llamalora.__main__ import main
from llamalora.cli import UsageError, run_command
from llamalora.distributed.world import World
from llamalora.lora.inject import count_parameters, make_trainable
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LLAMA_2
from llamalora.training import timetable
from llamalora.training.arithmetic import FORMS, Batch, Form, Part, Work, micro_batches, model_flops
from llamalora.training.batch import Example, MicroBatch, plan_epoch
from llamalora.training.cards import CARDS, recognise
from llamalora.training.duration import (
    ATTENTION,
    COLLECTIVE,
    FEW_ROWS,
    KERNEL,
    MEMORY,
    PRODUCTS,
    TRAINING_LAUNCH,
    UPDATE,
    Links,
    Machine,
)
from llamalora.training.memory import GIB, LENGTHS, typical
from llamalora.training.placement import Placement
from llamalora.training.step import backward
from llamalora.training.timetable import Corpus

pytestmark = pytest.mark.quick
SHARED = Path(__file__).parents[3] / "shared/data"
SETUPS = [("lora", "all", False), ("lora", "q", False), ("lora", "down", False), ("lora", "head", False),
          ("lora", "o,up", True), ("full", "all", False), ("partial", "q,v", False),
          ("partial", "embed,down", False), ("partial", "head", False)]  # fmt: skip


@pytest.fixture(scope="module")
def seven():
    return make_trainable(skeleton(LLAMA_2["llama-2-7b"]), "lora", "all", 128)


@pytest.fixture(scope="module")
def corpus():
    return Corpus.bc5cdr()


def steps_of(corpus: Corpus, batch_tokens: int) -> list[list[int]]:
    return plan_epoch(corpus.lengths, batch_tokens, seed=0, epoch=0)[: 100_000 // batch_tokens]


def sum_of(corpus: Corpus, batch_tokens: int) -> int:
    return sum(corpus.lengths[index] for step in steps_of(corpus, batch_tokens) for index in step)


def training(machine: Machine, work: Work, corpus: Corpus, batch_tokens: int, micro_tokens: int):
    steps = steps_of(corpus, batch_tokens)
    return machine.training(
        work, micro_batches(corpus.lengths, corpus.supervised, steps, machine.links.size, micro_tokens)
    )


# ---- what is counted ----


@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("method, targets, dora", SETUPS)
def test_products_are_those_that_torch_counts(method, targets, dora, recompute):
    model = make_trainable(tiny_model(num_hidden_layers=3), method, targets, rank=5, dora=dora).train()
    examples = [Example(tuple(range(3, 4 + length)), max(1, length // 2)) for length in (40, 30, 20, 10)]
    batch, supervised = MicroBatch.of(examples, torch.device("cpu")), sum(one.supervised for one in examples)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **how: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        backward(model, batch, supervised, torch.amp.GradScaler("cpu", enabled=False), "fp32", recompute)
    of = Work(model, "fp32", recompute).products
    counted = batch.ids.numel() * (of["weights"] + of["updates"]) + supervised * of["head"] + of["norms"]
    assert counted == counter.get_total_flops()


def test_the_flops_of_mfu(seven):
    """28.8 GFLOP a token of 512, all of them supervised: 4 a frozen parameter, 6 one of LoRA's, and attention."""
    assert model_flops(seven, Batch.of([512], 1.0)) / 512 == pytest.approx(28.8e9, rel=0.005)
    frozen, lora, attention = 6_738_415_616 - 32000 * 4096, 329_056_256, 6 * 32 * 4096 * 512
    assert model_flops(seven, Batch.of([512], 1.0)) / 512 == 4 * frozen + 6 * lora + attention
    full = make_trainable(skeleton(LLAMA_2["llama-2-7b"]), "full")
    assert model_flops(full, Batch.of([512], 1.0)) / 512 == 6 * frozen + attention


def test_a_padded_rectangle(seven):
    batch = Batch.of([30, 10, 20], 0.5)
    assert batch == Batch(tokens=60, supervised=30, squares=1400, slots=90, slot_squares=2700)
    padded, plain = (Work(seven, "bf16", form=Form(padded=one)).parts(batch) for one in (True, False))
    assert padded["attention"].flops / plain["attention"].flops == 2700 / 1400
    assert plain["attention"].flops == 32 * 4096 * 1400 * 7  # 2 L D forward, half of it by causality; 2.5 times back
    assert padded["rows of attention"].bytes > 3 * plain["rows of attention"].bytes


def test_the_corpus_is_as_long_as_the_memory_plan_thinks(corpus):
    assert len(corpus.lengths) == 4579
    for ours, theirs in zip(typical(corpus.lengths), LENGTHS, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    assert 0.58 < corpus.supervised < 0.59


def test_the_corpus_is_as_long_as_bc5cdr(corpus, tmp_path):
    if not (SHARED / "bc5cdr").is_dir():
        pytest.skip(f"{SHARED / 'bc5cdr'} is not there")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2["llama-2-7b"].to_dict()))
    (tmp_path / "tokenizer.model").symlink_to(SHARED / "llama2-tokenizer/tokenizer.model")
    real = Corpus.read(str(SHARED / "bc5cdr"), str(tmp_path))
    assert (len(real.lengths), sum(real.lengths), real.evaluated) == (4579, 489_663, corpus.evaluated)
    assert sum(corpus.lengths) == pytest.approx(sum(real.lengths), rel=0.01)
    assert (corpus.prompt, corpus.answer) == pytest.approx((real.prompt, real.answer), abs=0.05)


# ---- rates, by hand ----


def test_the_slowest_of_arithmetic_memory_and_kernels():
    machine = Machine(CARDS["H100"])
    for part in (
        Part(flops=PRODUCTS * 989e12, bytes=1.0),
        Part(flops=ATTENTION * 989e12, small=True),
        Part(flops=1.0, bytes=MEMORY * 3350e9),
        Part(flops=1.0, bytes=FEW_ROWS * 3350e9, few_rows=True),
        Part(bytes=1.0, kernels=1 / KERNEL),
    ):
        assert machine.seconds(part, "bf16") == pytest.approx(1)
    assert machine.seconds(Part(flops=PRODUCTS * 67e12), "fp32") == pytest.approx(1)


def test_exchange_over_links():
    assert Links(4, 1, 100, 10).seconds(80e9, 0) == pytest.approx(0.75)  # three of four parts, at 80 %
    assert Links(4, 1, 100, 10).seconds(0, 4) == pytest.approx(1e-4)
    assert Links(4, 2, 100, 10).seconds(8e9, 0) == pytest.approx(0.875)  # seven of eight, through the network
    assert Links(1, 2, 5, 10).seconds(8e9, 0) == pytest.approx(0.5)  # on no link inside a node
    assert Links().seconds(1e12, 100) == 0


def test_ddp_sums_gradients_and_fsdp_gathers_parameters(seven):
    work, links = Work(seven, "fp16"), Links(4, 1, 40)
    assert Machine(CARDS["V100-32"], links).update(work)["links"] == links.seconds(2 * 4 * 329_056_256, 40)  # of 32 MiB
    assert Machine(CARDS["V100-32"]).update(work)["links"] == 0
    spread = Machine(CARDS["V100-16"], links, sharded=True)
    taken = spread.micro_batch(work, Batch.of([100], 0.6))
    gathered = 2 * 2 * sum(count_parameters(seven).values()) + 4 * 329_056_256
    assert sum(taken.values()) == pytest.approx(links.seconds(gathered, 99)) and taken["links"] > 0
    keeping = replace(spread, whole=8).micro_batch(work, Batch.of([100], 0.6))
    kept = 2 * 2 * 8 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert sum(keeping.values()) == pytest.approx(links.seconds(gathered - kept, 99))
    assert spread.update(work)["optimizer"] == UPDATE * 452 > 48 * 329_056_256 / 4 / (MEMORY * 900e9)
    assert Machine(CARDS["V100-32"]).update(work)["optimizer"] == pytest.approx(48 * 329_056_256 / (MEMORY * 900e9))


def test_sums_go_on_beside_the_last_backward_pass(seven):
    """Three micro-batches of a step: half of the last one hides what it can of the sums."""
    work, batch = Work(seven, "bf16"), Batch.of([100] * 20, 0.6)
    alone, machine = Machine(CARDS["H100"]), Machine(CARDS["H100"], Links(4, 1, 450))
    one, update = sum(alone.micro_batch(work, batch).values()), machine.update(work)
    for count, hides in ((3, 0.5 * one), (1, 0.5 * one)):
        taken = machine.training(work, [[[batch] * count] * 4]).seconds
        assert taken == pytest.approx(count * one + update["optimizer"] + max(0, update["links"] - hides))
    slow = replace(machine, links=Links(4, 1, 10))
    assert slow.training(work, [[[batch]] * 4]).parts["links"] == pytest.approx(slow.update(work)["links"] - 0.5 * one)


def test_a_small_micro_batch_waits_for_the_host(seven):
    """Which launches 8,358 kernels."""
    taken = Machine(CARDS["H100"]).micro_batch(Work(seven, "bf16"), Batch.of([100] * 2, 0.6))
    assert sum(taken.values()) == pytest.approx(8358 * TRAINING_LAUNCH) and taken["host"] > 0.1


# ---- beside what an H200 took (docs/hardware.md, 2026-11-26) ----


@pytest.mark.parametrize("form, measured", list(zip(FORMS.values(), (0.364, 0.400, 0.534), strict=True)), ids=FORMS)
def test_shares_of_peak(form, measured, seven, corpus):
    planned = training(Machine(CARDS["H200"]), Work(seven, "bf16", form=form), corpus, 4096, 4096)
    assert planned.mfu == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("tokens, measured", [(2048, 7400), (4096, 15000), (8192, 18000)])
def test_tokens_a_second_where_each_batch_is_another(tokens, measured, seven, corpus):
    planned = training(Machine(CARDS["H200"]), Work(seven, "bf16", form=FORMS["and compiled"]), corpus, tokens, tokens)
    assert 1 / planned.seconds * sum_of(corpus, tokens) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("rows, tokens, reach, graphed, milliseconds", [
    (1, 1, 256, True, 4.68), (8, 1, 140, True, 4.88), (32, 1, 169, True, 6.44), (32, 11, 150, False, 35.4),
])  # fmt: skip
def test_a_pass_of_decoding(rows, tokens, reach, graphed, milliseconds, seven):
    seconds = Machine(CARDS["H200"]).decoding(Work(seven, "bf16"), rows, tokens, reach, graphed)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.2)


# ---- beside an independent model, which was reckoned from kernels one by one ----


def test_four_v100_over_pcie(seven, corpus):
    machine = Machine(CARDS["V100-16"], Links(4, 1, 12.5), sharded=True)
    planned = training(machine, Work(seven, "fp16"), corpus, 1024, 3000)
    assert planned.seconds / planned.steps * 512 / 60 == pytest.approx(19, rel=0.2)


def test_summing_gradients_of_seven_billion(seven):
    """15 to 20 ms for 452 sums; in stretches of 32 MiB there are 40, and less to wait for."""
    links = Machine(CARDS["H100"], Links(4, 1, 450)).update(Work(seven, "bf16"))["links"]
    assert 0.015 < links + (452 - 40) * COLLECTIVE < 0.020


# ---- more of anything is never slower ----


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_more_is_never_slower(parallel, seven, corpus):
    card = CARDS["A100-40"]

    def seconds(gpus=2, nodes=1, inside=300.0, network=25.0, form=FORMS["attention padded"], **faster):
        machine = Machine(replace(card, **faster), Links(gpus, nodes, inside, network), parallel == "fsdp")
        return training(machine, Work(seven, "bf16", form=form), corpus, 32768, 2048).seconds

    usual = seconds()
    assert seconds(gpus=4) < usual and seconds(gpus=8) < seconds(gpus=4)
    assert seconds(bandwidth=2 * card.bandwidth) < usual > seconds(teraflops={"bf16": 600})
    assert seconds(inside=1) > usual >= seconds(inside=600)
    assert seconds(gpus=2, nodes=2, network=1) > seconds(gpus=2, nodes=2) >= seconds(gpus=4)
    unpadded, compiled = (seconds(form=FORMS[name]) for name in ("attention unpadded", "and compiled"))
    assert compiled < unpadded < usual


def test_recomputation_and_sentences_side_by_side(seven, corpus):
    machine = Machine(CARDS["A100-40"])
    none, half, all_ = (training(machine, Work(seven, "bf16", k), corpus, 4096, 4096).seconds for k in (0, 2, 1))
    assert none < half < all_ < 1.5 * none
    work = Work(seven, "bf16")
    assert machine.sentences_a_second(work, 32, 45, 63) > 5 * machine.sentences_a_second(work, 1, 45, 63)


# ---- cards ----


@pytest.mark.parametrize("name, gib, card", [
    ("Tesla V100-SXM2-16GB", 15.77, "V100-16"),
    ("Tesla V100-SXM3-32GB", 31.7, "V100-32"),
    ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"),
    ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80"),
    ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
    ("NVIDIA H200", 139.8, "H200"),
    ("NVIDIA GeForce RTX 4090", 23.5, "RTX-4090"),
    ("NVIDIA GeForce RTX 4090 D", 23.5, None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
    ("NVIDIA H100 PCIe", 79.1, None),
    ("Tesla V100-PCIE-16GB", 15.77, None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.6, None),
    ("NVIDIA GH200 480GB", 94.5, None),
    ("Tesla T4", 14.6, None),
])  # fmt: skip
def test_cards_by_their_names(name, gib, card):
    assert recognise(name, int(gib * GIB)) == card


# ---- what a person sees ----


def job_of(model, lengths):
    examples = [Example(tuple(range(length + 1)), length // 2) for length in lengths]
    settings = SimpleNamespace(precision="bf16", compile="off")
    steps = [(epoch, [index]) for epoch in range(2) for index in range(len(lengths))]
    placement = Placement("ddp", 2048, 0, None, "")
    return SimpleNamespace(examples=examples, lengths=lengths, settings=settings, steps=steps, placement=placement)


def test_a_run_says_what_it_expects_where_its_gpu_is_known(seven, monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(timetable, "attention_kernel", lambda *_: "rectangles")
    job, on_gpu = job_of(seven, [500] * 120), World(device=torch.device("cuda", 0))
    assert timetable.expected(job, seven, World()) is None
    # 500 tokens wait for the host, 293 ms, and so does the optimizer, 11 ms
    assert timetable.expected(job, seven, on_gpu) == "36 s an epoch, as planned for 1 x H100 at 5% of its peak"
    properties.name = "NVIDIA L4"
    assert timetable.expected(job, seven, on_gpu) is None
    properties.name, properties.total_memory = "Tesla V100-SXM2-16GB", 15.77 * GIB
    assert timetable.expected(job, seven, on_gpu) is None  # which computes no bf16


def test_audit_prints_times_and_assumptions(capsys, monkeypatch):
    flags = ["audit", "--model", "weights/tiny", "--time", "--gpu", "A100-40"]
    main([*flags, "--nodes", "2", "--network", "50", "--data", "data/sample", "--batch-tokens", "256"])
    text = capsys.readouterr().out
    assert "in each of 2 nodes" in text and "data/sample" in text
    assert "network of a node, each direction: 50 GB/s (assumed; --network)" in text
    placement = Placement("ddp", 2048, 0, None, "as the plan says")
    monkeypatch.setattr(timetable, "fit", lambda *_: placement)  # seconds of a search, which has its own tests
    main([*flags, "--json"])
    result = json.loads(capsys.readouterr().out)
    forms = result["training"]
    assert list(forms) == list(FORMS) and result["precision"] == "bf16" and result["epochs"] == 7
    for form in forms.values():
        assert sum(form["parts"].values()) == pytest.approx(form["seconds_an_epoch"])
        run = result["epochs"] * (form["seconds_an_epoch"] + form["seconds_an_evaluation"]) / 3600
        assert form["hours_a_run"] == pytest.approx(run)
    main(flags)
    text = capsys.readouterr().out
    for words in (
        "planned, not measured",
        "4 x A100-40, bf16, ddp",
        "300 GB/s",
        "2.5 hours an epoch",
        "found on an H200",
    ):
        assert words in text
    assert "--network" not in text and "beside which ddp sums" in text
    monkeypatch.setattr(timetable, "fit", lambda *_: replace(placement, parallel="fsdp"))
    main(flags)
    text = capsys.readouterr().out
    assert "a collective waits" in text and "beside which ddp sums" not in text
    with pytest.raises(UsageError, match="--dora: under fsdp"):
        main([*flags, "--dora"])


@pytest.mark.parametrize("flags, message", [
    (["--time", "--gpu", "K80"], "invalid choice"),
    (["--time", "--precision", "bf16"], "a V100-16 has fp16 and fp32"),
    (["--time", "--link", "0"], "--link is 0; it must be above 0"),
    (["--time", "--nodes", "2", "--network", "nan"], "--network is nan"),
    (["--time", "--network", "10"], "--network: no effect on one node"),
    (["--time", "--gpus", "1", "--link", "10"], "--link: no effect on one GPU"),
    (["--time", "--micro-tokens", "9"], "--micro-tokens: no effect with --time"),
    (["--time", "--data", "data/sample"], "give a model folder"),
    (["--time", "--gpus", "2000"], "at most 1,024 GPUs"),
    (["--memory", "--gpu", "H100"], "--gpu: no effect without --time"),
    (["--time", "--batch-tokens", "0"], "--batch-tokens is 0"),
    (["--time", "--memory"], "not allowed with"),
])  # fmt: skip
def test_flags_that_cannot_be(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["audit", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_corpus_that_cannot_be_read(tmp_path):
    with pytest.raises(Exception, match="no training split|no corpus"):
        Corpus.read(str(tmp_path), "weights/tiny")
    with pytest.raises(UsageError, match="at most"):
        timetable.table(None, None, None, "H100", Links(64, 64))

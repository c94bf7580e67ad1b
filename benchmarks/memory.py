#!/usr/bin/env python3
"""Peak memory of training steps on a GPU, measured, beside the memory plan.

Random weights at the exact shape of a model, examples as long as BC5CDR's, the package's own step: what `train.py`
holds, without a checkpoint or a corpus. Several processes emulate several cards on one large GPU:

    torchrun --nproc_per_node 4 benchmarks/memory.py --share 15.41GiB --precision fp16 --rank 128
    torchrun --nproc_per_node 8 benchmarks/memory.py --precision bf16 --method full       # one GPU a process
    python benchmarks/memory.py --precision bf16 --method full                            # one large GPU

With `--share SIZE` all processes use GPU 0 over gloo (NCCL wants a GPU for each), and torch refuses to each more
than SIZE; 15.41 GiB is what a V100 of 16 GB leaves to tensors. Such a run does not show speed, nor what NCCL itself
allocates, nor the kernels of another GPU. On the CPU (`--model tiny`) it only shows that the script works: peaks are 0.
"""

import argparse
import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from llamalora.cli import run_command
from llamalora.commands.audit import parse_capacity, read_shape
from llamalora.distributed.sharding import shard
from llamalora.distributed.world import World, join_world
from llamalora.lora.inject import count_parameters, make_trainable
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LlamaConfig
from llamalora.model.precision import DTYPES, prepare_gpu
from llamalora.model.tensors import is_sharded
from llamalora.runs.settings import Settings
from llamalora.training.batch import Example, MicroBatch, deal
from llamalora.training.memory import CONTEXT_BYTES, GIB, LENGTHS, Plan, explained, micro_batch, plan_memory
from llamalora.training.placement import Placement, fit
from llamalora.training.step import Optimizer, backward

TINY = LlamaConfig(
    vocab_size=515, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help="llama-2-7b, -13b, -70b, tiny, or a folder (its shape)")
    parser.add_argument("--method", default="lora", choices=("lora", "full"))
    parser.add_argument("--targets", default="all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--parallel", default="auto", choices=("auto", "ddp", "fsdp"))
    parser.add_argument("--batch-tokens", type=int, default=8192, help="of an optimizer step, over all processes")
    parser.add_argument("--micro-tokens", default="auto", help="as in train.py")
    parser.add_argument("--activation-checkpointing", default="auto", help="as in train.py")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--share", metavar="SIZE", help="emulate: what each process may take of GPU 0, such as 15.41GiB"
    )
    arguments = parser.parse_args(argv)
    with world_of(arguments.share) as world:
        result = measure(arguments, world)
        if world.is_main:
            print(show(result), flush=True)
            print(json.dumps(result), flush=True)


@contextmanager
def world_of(share: str | None):
    """train.py's processes, each on its own GPU; or all on GPU 0, each with a share of it."""
    if share is None or not torch.cuda.is_available():
        with join_world() as world:
            yield world
        return
    device, size = torch.device("cuda", 0), int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(device)
    prepare_gpu(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, parse_capacity(share) / total), device)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:gloo", timeout=timedelta(minutes=30))
    try:
        yield World(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def measure(arguments: argparse.Namespace, world: World) -> dict:
    number_or_auto = {
        name: value if (value := getattr(arguments, name)) == "auto" else int(value)
        for name in ("micro_tokens", "activation_checkpointing")
    }
    same = ("method", "targets", "rank", "precision", "parallel", "batch_tokens")
    settings = Settings(lr=1e-4, **{name: getattr(arguments, name) for name in same}, **number_or_auto)
    config = TINY if arguments.model == "tiny" else read_shape(arguments.model)
    capacity = _capacity(arguments.share, world)
    chosen = fit(make_trainable(skeleton(config), **settings.learning), settings, LENGTHS, world.size, capacity)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    with explained(chosen.plan, world.device):
        model = random_model(config, settings, world, chosen.parallel)
        loaded = _allocated(world)
        optimizer = Optimizer(model, settings.precision, world.device, 0.0, 1.0)
        losses, skipped = [], 0
        for _ in range(arguments.steps):
            loss, update = step(model, optimizer, settings, chosen, world)
            losses.append(loss)
            skipped += update.skipped
    peak, reserved = (0, 0)
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(world.device)
        reserved = torch.cuda.max_memory_reserved(world.device)
    plan = plan_of(settings, config, chosen, world, capacity)
    tensors = plan.total - plan.items["overhead"]
    measured = world.gather({"loaded": loaded, "peak": peak, "reserved": reserved})
    return {
        "model": arguments.model,
        "processes": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "share": arguments.share,
        "settings": {name: getattr(settings, name) for name in same},
        "placement": {name: value for name, value in asdict(chosen).items() if name != "plan"},
        "plan": {"items": plan.items, "tensors": tensors},
        "measured": measured,  # bytes, of each process
        "measured_of_planned": max(each["peak"] for each in measured) / tensors,
        "losses": losses,
        "skipped": skipped,
        "parameters": count_parameters(model),
        "torch": torch.__version__,
    }


def plan_of(settings: Settings, config: LlamaConfig, chosen: Placement, world: World, capacity: int) -> Plan:
    """The plan of the largest micro-batch that the steps have, which is smaller than the largest that is allowed."""
    lengths = micro_batch(settings.batch_tokens, LENGTHS)
    shares = deal(range(len(lengths)), lengths, world.size, chosen.micro_tokens)
    tokens = max(sum(lengths[index] for index in batch) for share in shares for batch in share)
    model = make_trainable(skeleton(config), **settings.learning)
    return plan_memory(
        model, chosen.parallel, world.size, capacity, settings.precision, tokens, chosen.recompute, LENGTHS
    )


def random_model(config: LlamaConfig, settings: Settings, world: World, parallel: str):
    """As `runs.setup.build_model` makes it, but for the values: small and random, since there is no checkpoint."""
    products = DTYPES[settings.precision]
    model = skeleton(config).to(torch.float32 if settings.method == "full" else products)
    make_trainable(model, **settings.learning)
    if parallel == "fsdp":
        shard(model, world, products)
    model.to_empty(device=world.device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(world.rank if parallel == "fsdp" else 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = parameter.to_local() if is_sharded(parameter) else parameter
            if "norm" in name:
                own.fill_(1.0)
            elif name.endswith("lora_B" if "embed" not in name else "lora_A"):
                own.zero_()
            else:
                own.normal_(0, 0.02)

    return model.train()


def step(model, optimizer: Optimizer, settings: Settings, chosen: Placement, world: World):
    """One optimizer step over examples of BC5CDR's lengths; of each the last half is supervised."""
    lengths = micro_batch(settings.batch_tokens, LENGTHS)
    vocabulary = model.config.vocab_size
    examples = [Example(tuple(i % vocabulary for i in range(n + 1)), max(1, n // 2)) for n in lengths]
    supervised = sum(example.supervised for example in examples)
    loss = 0.0
    for indices in deal(range(len(lengths)), lengths, world.size, chosen.micro_tokens)[world.rank]:
        batch = MicroBatch.of([examples[i] for i in indices] or examples[-1:], world.device)
        counted = supervised if indices else math.inf
        loss += backward(model, batch, counted, optimizer.scaler, settings.precision, chosen.recompute)
    update = optimizer.step(settings.lr, world)
    return world.sum([loss])[0], update


def _capacity(share: str | None, world: World) -> int:
    """What the plan may take: the share and CUDA's own part, or the whole GPU; on the CPU, as if on 16 GB."""
    if share is not None:
        return parse_capacity(share) + CONTEXT_BYTES
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return parse_capacity("16GB")


def _allocated(world: World) -> int:
    return torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0


def show(result: dict) -> str:
    gib = GIB
    lines = [f"{result['model']} on {result['processes']} x {result['device']}: {result['placement']}"]
    lines += [f"  {name:28}{size / gib:8.2f} GiB planned" for name, size in result["plan"]["items"].items()]
    lines += [f"  {'tensors, all together':28}{result['plan']['tensors'] / gib:8.2f} GiB planned"]
    for rank, each in enumerate(result["measured"]):
        lines.append(
            f"  process {rank}: {each['peak'] / gib:.2f} GiB at the peak, {each['reserved'] / gib:.2f} reserved, "
            f"{each['loaded'] / gib:.2f} after loading"
        )
    lines.append(f"  measured / planned: {result['measured_of_planned']:.3f}; losses {result['losses']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)

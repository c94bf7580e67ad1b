#!/usr/bin/env python3
"""The headline run at the exact shape of Llama-2-7B, traced: every tensor has a shape and a dtype, and no values.

    python benchmarks/trace_7b.py        # LoRA of rank 128 on all, fp16, four processes; and one

Loading, two steps, an evaluation and saving go through the package's own code, on fake tensors of an emulated CUDA
device (`tests/emulated_cuda`), under fsdp in a fake process group. What tensors hold of one GPU is added up as it comes
and goes; its peaks stand beside the memory plan and what a V100 of 16 GB leaves to tensors. Nothing is measured: what
kernels take for a while, what the allocator wastes, and CUDA's own part are not seen. Needs a CPU build of torch, a C++
compiler and some minutes.
"""

import argparse
import os
import sys
import tempfile
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/emulated_cuda"))
from build import build  # noqa: E402

os.environ.setdefault("LLAMALORA_EMULATED", str(build(Path(tempfile.mkdtemp()))))
import emulated  # noqa: E402, F401  (before torch)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from work import drawn_lengths  # noqa: E402

from llamalora.distributed import sharding  # noqa: E402
from llamalora.distributed.sharding import in_step, merged  # noqa: E402
from llamalora.distributed.world import World  # noqa: E402
from llamalora.evaluation import graphed  # noqa: E402
from llamalora.evaluation.generate import generate  # noqa: E402
from llamalora.lora.inject import make_trainable  # noqa: E402
from llamalora.model import checkpoint, tensors  # noqa: E402
from llamalora.model.checkpoint import skeleton  # noqa: E402
from llamalora.model.config import LLAMA_2  # noqa: E402
from llamalora.model.packing import Packing  # noqa: E402
from llamalora.model.precision import DTYPES, autocast  # noqa: E402
from llamalora.runs.resolve import step_tokens
from llamalora.runs.settings import Settings  # noqa: E402
from llamalora.training.batch import Example, MicroBatch  # noqa: E402
from llamalora.training.memory import GIB, LENGTHS  # noqa: E402
from llamalora.training.placement import Placement, fit  # noqa: E402
from llamalora.training.step import Optimizer, backward  # noqa: E402

DEVICE = torch.device("cuda", 0)
REPORTED, LEFT = int(15.77 * GIB), int(15.41 * GIB)  # what a V100 of 16 GB reports, and leaves to tensors
PROMPTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[4, 1])
    parser.add_argument("--layers", type=int, default=32, help="fewer try the script (default: 32)")
    parser.add_argument("--answer", type=int, default=64, help="tokens decoded of each answer (default: 64)")
    arguments = parser.parse_args()
    config = replace(LLAMA_2["llama-2-7b"], num_hidden_layers=arguments.layers)
    print(f"Llama-2-7B, {arguments.layers} layers, LoRA of rank 128 on all, fp16; GiB held by tensors of one GPU\n")
    for processes in arguments.processes:
        trace(config, processes, arguments.answer)


def trace(config, processes: int, answer: int) -> None:
    """Prints the peak of each part of a run."""
    step = step_tokens(DEVICE, processes)
    settings = Settings(lr=1e-4, targets="all", rank=128, precision="fp16", batch_tokens=step)
    dtype = DTYPES[settings.precision]
    model = make_trainable(skeleton(config).to(dtype), **settings.learning)
    placement: Placement = fit(model, settings, LENGTHS, processes, REPORTED)
    world = Fake(0, processes, DEVICE)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    if placement.parallel == "fsdp":
        sharding.shard(model, world, dtype)
    peaks: dict[str, int] = {}
    with unreal(), FakeTensorMode(allow_non_fake_inputs=True), Held() as held, tracked(held):

        @contextmanager
        def part(name: str):
            held.peak = held.now
            yield
            peaks[name] = held.peak

        with part("loading"):
            files = dict.fromkeys((name for name, p in model.named_parameters() if not p.requires_grad), Path())
            shapes.update({name: (p.shape, dtype) for name, p in model.named_parameters()})
            sharding.fill(model, files, DEVICE, seed=0)
        model.train()
        optimizer = Optimizer(model, settings.precision, DEVICE, 0.01, 1.0)
        for number in range(2):
            with part("step"):
                lengths = drawn_lengths(placement.micro_tokens - LENGTHS[0], number) + [LENGTHS[0]]
                examples = [Example((5,) * (length + 1), 1) for length in lengths]  # all supervised, as planned
                supervised = sum(example.supervised for example in examples)
                with _disable_current_modes():
                    batch = MicroBatch.of(examples, DEVICE)
                backward(model, batch, supervised, optimizer.scaler, settings.precision, placement.recompute)
                optimizer.step(1e-4, world)
        model.eval()
        prompts = [[5] * max(8, 2 * length // 5) for length in drawn_lengths(110 * PROMPTS, 2)[:PROMPTS]]
        with part("evaluation"), merged(model, world), autocast(settings.precision, DEVICE):
            in_step(model, world, lambda: generate(model, prompts, 2, answer, PROMPTS))
        with part("saving"):
            tensors.save_tensors(optimizer.state()[0], Path(os.devnull))
    dist.destroy_process_group()
    show(processes, placement, peaks)


def show(processes: int, placement: Placement, peaks: dict[str, int]) -> None:
    assert placement.plan is not None
    plan = placement.plan
    planned = {
        "step": plan.total - plan.items["overhead"],
        "evaluation": plan.evaluation_total - plan.evaluation["overhead"],  # of one sentence at a time
    }
    print(f"{processes} process{'es' * (processes > 1)}: {placement}\n")
    print("| part | peak, traced | planned | left by a V100 of 16 GB |\n|---|---:|---:|---:|")
    for name, peak in peaks.items():
        expected = f"{planned[name] / GIB:.2f}" if name in planned else ""
        print(f"| {name} | {peak / GIB:.2f} | {expected} | {(LEFT - peak) / GIB:.2f} |")
    print(flush=True)


class Held(TorchDispatchMode):
    """Bytes of the device's tensors: now, and the most so far. What is read is 1.0, or token 7."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}  # storage -> bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 7
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda and not tensors.is_sharded(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.resized(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self.gone, storage._cdata)
        return results

    def resized(self, storage: int, size: int) -> None:
        size = -(-size // 512) * 512
        self.now += size - self.known.get(storage, 0)
        self.known[storage] = size
        self.peak = max(self.peak, self.now)

    def gone(self, storage: int) -> None:
        self.now -= self.known.pop(storage)


@contextmanager
def tracked(held: Held):
    """FSDP gives memory back by making storages empty, which is no operation."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        result = resize(storage, size)
        if storage._cdata in held.known:
            held.resized(storage._cdata, size)
        return result

    torch.UntypedStorage.resize_ = resize_
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize


class Fake(World):
    """One of several processes that all have the same, whose sums are its own numbers."""

    def sum(self, values):
        return [float(value) for value in values]

    def gather(self, item):
        return [item] * self.size

    def barrier(self):
        pass


class Stream:
    """Of a device that does everything at once."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


shapes: dict[str, tuple] = {}  # of what is read


@contextmanager
def unreal():
    """Files are read as tensors without values and written nowhere; positions in a packed row are real; passes are
    launched, for a graph holds what its pass does."""
    make = Packing.__init__

    def make_real(*arguments, **named):
        with _disable_current_modes():
            make(*arguments, **named)

    places = [
        (sharding, "read_tensor", lambda file, name: torch.empty(shapes[name][0], dtype=shapes[name][1])),
        (checkpoint, "read_tensor", lambda file, name: torch.empty(shapes[name][0], dtype=shapes[name][1])),
        (tensors, "write_tensors", lambda path, entries, tensor: [tensor(name) for name in entries] and None),
        (Packing, "__init__", make_real),
        (torch, "Stream", Stream), (torch, "Event", Stream),
        (torch.cuda, "Stream", Stream), (torch.cuda, "Event", Stream),
        (torch.cuda, "current_stream", Stream), (torch.cuda, "default_stream", Stream),
        (torch.cuda, "stream", lambda stream: nullcontext()),
        (graphed, "most_tokens", lambda *_: 0),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


if __name__ == "__main__":
    main()

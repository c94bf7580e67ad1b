"""A model spread over the processes (FSDP2, `fully_shard`): its loading, merging, and decoding in step.

Every parameter is cut along its first dimension; each process keeps its own rows, and a block's are gathered
while it computes. Forward and backward passes are collectives therefore: every process makes as many, if need
be over tokens that count for nothing.

Embedding, last norm and head are one group, gathered once for all that `within` runs. So the two may be one
matrix (tied), and each process may call the head as often as it has chunks of logits or tokens to choose.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ..lora.inject import lora_layers, merge, restore
from ..lora.layers import LoRALayer
from ..model.free_memory import GIB, SHARE, free_memory
from ..model.llama import Llama
from ..model.tensors import own_rows, placed, read_tensor
from .world import World

T = TypeVar("T")


def whole_blocks(model: Llama, processes: int, width: int, free: int) -> int:
    """How many blocks' frozen weights every process can keep whole in so many free bytes, beyond its own rows of them:
    what is whole need not be gathered in each pass.

    Args:
        width: bytes of a value.
    """
    more = width * frozen_of_a_block(model) * (processes - 1) // processes
    return min(len(model.model.layers), max(0, free) // more) if more else 0


def frozen_of_a_block(model: Llama) -> int:
    """Values that do not learn of the block that has the most of them."""
    return max(sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in model.model.layers)


def shard(model: Llama, world: World, dtype: torch.dtype, whole: int = 0) -> None:
    """Spreads a model, which may be on the meta device, over all processes, in place.

    Parameters stay in their own dtype where they are kept, and are gathered in `dtype` for the products.
    Gradients are summed (the loss is a share of the whole step's already) in fp32.

    Args:
        whole: blocks of which every process keeps all frozen weights, which must be in `dtype`. They stand evenly among
            the others, so that what is gathered next has a block more to hide behind.
    """
    # here, since these take a second to import and few runs need them
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = list(model.model.layers)
    kept = [block for i, block in enumerate(blocks) if (i + 1) * whole // len(blocks) > i * whole // len(blocks)]
    frozen = {parameter for block in kept for parameter in block.parameters() if not parameter.requires_grad}
    assert all(parameter.dtype == dtype for parameter in frozen), "nothing converts what is not gathered"
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        spread = cast(Any, part)
        spread.set_gradient_divide_factor(1.0)  # FSDP would make means
        spread.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    # a method of the model, so that FSDP can gather its outer group around whatever `within` runs
    model.__dict__["compute"] = lambda function: function()
    register_fsdp_forward_method(model, "compute")


def fill(model: Llama, files: Mapping[str, Path], device: torch.device, seed: int) -> None:
    """Gives a sharded model on the meta device its values; each process reads only its rows of the base.

    The updates start as they would on one process (`inject_lora` with this seed), layer by layer.

    Args:
        files: tensor name -> safetensors file (`model_files`).
    """
    tied = model.tied
    model.to_empty(device=device)
    if tied:
        model.tie()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in files:
                parameter.copy_(placed(read_tensor(files[name], name), parameter))
        for name, layer in lora_layers(model).items():
            key = f"{name}.weight" if f"{name}.weight" in files else "model.embed_tokens.weight"  # a tied head
            layer.start(read_tensor(files[key], key).to(layer.weight.dtype), generator)


def is_spread(model: Llama) -> bool:
    """Whether the model is sharded."""
    return hasattr(model, "compute")


def within(model: Llama, function: Callable[[], T]) -> T:
    """function(), which finds embedding, norm and head gathered if the model is sharded."""
    return cast(Any, model).compute(function) if is_spread(model) else function()


def in_step(model: Llama, world: World, decode: Callable[[], T]) -> T:
    """decode(), which calls the model as often as this process's documents need.

    With a sharded model every pass is announced, and a process that is done goes on with passes over one token
    until all are.
    """
    if not is_spread(model):
        return decode()

    def announce(*_) -> None:
        world.sum([1])

    @torch.no_grad()
    def together() -> T:
        hook = model.model.register_forward_pre_hook(announce)
        try:
            result = decode()
        finally:
            hook.remove()
        idle = torch.zeros(1, 1, dtype=torch.long, device=world.device)
        while any(world.sum([0])):
            model.model(idle)
        return result

    result = within(model, together)
    cast(Any, model).reshard()
    return result


@contextmanager
def merged(model: Llama, world: World) -> Iterator[None]:
    """The model with its updates merged, or apart, which is slower, where no memory has room for the frozen weights
    beside the merged ones; afterwards it is bitwise as before.

    Where the ends of a sharded model are one matrix, they stay as they are: it cannot take the updates of both.
    """
    ends = (model.model.embed_tokens, model.lm_head)
    left_out = ends if is_spread(model) and model.tied else ()
    layers = [layer for layer in lora_layers(model).values() if layer not in left_out]
    where = _where_to_wait(model, layers, world)
    if where is None:
        yield
        return
    try:
        merge(model, layers, offload=where.type == "cpu")
        yield
    finally:
        restore(model)


def _where_to_wait(model: Llama, layers: Sequence[LoRALayer], world: World) -> torch.device | None:
    """Where there is room on every process for the frozen weights of layers while merged ones take their place: on the
    host, else on the GPU, else nowhere."""
    if not layers:
        return None
    kept = [own_rows(layer.weight).nbytes for layer in layers]
    largest = 8 * max(layer.weight.numel() for layer in layers)  # W0 and the update in fp32, while a layer is merged
    host, free = torch.device("cpu"), 0
    for device in dict.fromkeys((host, host if is_spread(model) else world.device)):
        free = free_memory(device)
        if not any(world.sum([sum(kept) + largest > SHARE * free])):
            return device
    world.say(
        f"the updates stay apart while the model is evaluated, which makes it slower: to merge them, "
        f"{sum(kept) / GIB:.1f} GiB of frozen weights would be kept beside the merged ones, and {free / GIB:.1f} GiB "
        "are free"
    )
    return None

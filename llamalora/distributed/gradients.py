"""Gradients summed over processes that hold the whole model, while the backward pass still computes others.

They stand behind each other in one tensor, those first that are ready first: the head's, then block after block from
the last. As soon as a stretch of it is complete it is on its way. Processes send the same stretches in the same order,
whatever share of a step each of them has.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from .world import World

STRETCH_BYTES = 2**25  # large enough that its latency does not count, small enough that the last one ends soon
ALIGNED = 32  # values: a gradient begins where a GPU reads fastest


class GradientSum:
    """The gradients of parameters (fp32), from here on views of one tensor if there are several processes.

    A process that has no example in a step contributes zeros.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.parameters, self.world = list(parameters)[::-1], world
        self.stretches: list[torch.Tensor] = []
        self.pending: list[dist.Work] = []  # of the first stretches
        if world.size == 1:
            return
        sizes = [-(-parameter.numel() // ALIGNED) * ALIGNED for parameter in self.parameters]
        flat = torch.zeros(sum(sizes), device=self.parameters[0].device)
        places = flat.split(sizes)
        self.views = [place[: one.numel()].view_as(one) for place, one in zip(places, self.parameters, strict=True)]
        self.stretch_of: dict[int, int] = {}  # id of a parameter -> its stretch
        first = last = 0
        for parameter, size in zip(self.parameters, sizes, strict=True):
            self.stretch_of[id(parameter)] = len(self.stretches)
            last += size
            if 4 * (last - first) >= STRETCH_BYTES or last == len(flat):
                self.stretches.append(flat[first:last])
                first = last
        self.flat, self.missing = flat, [-1] * len(self.stretches)
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            parameter.grad = view
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin(self, module: nn.Module) -> None:
        """The backward pass that begins now, through this module, is the step's last: what it completes may leave."""
        if self.world.size == 1:
            return
        self.missing = [0] * len(self.stretches)
        reached = {id(parameter) for parameter in module.parameters()}
        for parameter in self.parameters:
            self.missing[self.stretch_of[id(parameter)]] += id(parameter) in reached
        self._send()

    def _arrived(self, parameter: nn.Parameter) -> None:
        self.missing[self.stretch_of[id(parameter)]] -= 1  # below zero before the last pass
        self._send()

    def _send(self, everything: bool = False) -> None:
        while len(self.pending) < len(self.stretches) and (everything or self.missing[len(self.pending)] == 0):
            self.pending.append(dist.all_reduce(self.stretches[len(self.pending)], async_op=True))

    def end(self) -> None:
        """Sends what has not left, and waits until all are sums."""
        if self.world.size == 1:
            return
        self._send(everything=True)
        for work in self.pending:
            work.wait()

    def clear(self) -> None:
        """No gradients, for the next step."""
        if self.world.size == 1:
            for parameter in self.parameters:
                parameter.grad = None
            return
        self.pending, self.missing = [], [-1] * len(self.stretches)
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

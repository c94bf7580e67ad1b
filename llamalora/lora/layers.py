"""Low-rank adaptation: W0 + scale * B A (Hu et al. 2022). With DoRA the rows of that are brought to a length that is
learnt, m.

Dimensions: N tokens, I input features, O output features, R rank, V vocabulary, D hidden.
A is (R, I) and B is (O, R), both fp32, whatever the dtype of the frozen W0 (O, I), which keeps its own
name and place, so that the keys of the base model do not move.
"""

import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.tensors import is_sharded, own_rows, placed, whole
from .dora import Stretch, initial_magnitude, normalise_, row_norms
from .fused import Factors, FusedLinears

ALL = slice(None)  # rows
PARTS = ("lora_A", "lora_B", "lora_magnitude")  # the parameters of an update; the last with DoRA only


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """The factor in front of B A: alpha / rank (Hu et al. 2022), or alpha / sqrt(rank) (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale * B A x, what an update adds to W0 x: from x (..., I) to (..., O), by way of (..., R)."""
    return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))


def adapted_linear(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """h = W0 x + scale * B A x (the paper's equation 2): what every form below computes, and is tested against."""
    return F.linear(x, W0) + low_rank(x, A, B, scale)


class LoRALayer:
    """What both kinds of adapted layer share: the factors, merging, and undoing that exactly."""

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None  # (O,), with DoRA
    turn: Callable[[Tensor], Tensor]  # a matrix (O, I) to the shape of the weight, and back

    def _init_lora(
        self,
        base: nn.Linear | nn.Embedding,
        A: tuple[int, int],
        B: tuple[int, int],
        alpha: float,
        rslora: bool,
        dora: bool,
        generator: torch.Generator | None,
    ):
        rank = A[0]
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = lora_scale(alpha, rank, rslora)
        self.weight = base.weight.requires_grad_(False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(A, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(B, dtype=torch.float32, device=device))
        magnitude = torch.empty(B[0], dtype=torch.float32, device=device)
        self.lora_magnitude = nn.Parameter(magnitude) if dora else None
        self._original: Tensor | None = None
        self.training = base.training
        if not base.weight.is_meta:
            self.start(base.weight, generator)

    @torch.no_grad()
    def start(self, weight: Tensor, generator: torch.Generator | None) -> None:
        """Gives A, B and m the values with which the update is zero; of sharded ones each process keeps its rows.

        Args:
            weight: W0, whole.
            generator: draws on the CPU, so that every process and device starts alike.
        """
        A, B = self._draw(weight, generator)
        self.lora_A.copy_(placed(A, self.lora_A))
        self.lora_B.copy_(placed(B, self.lora_B))
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(placed(initial_magnitude(self.turn(weight)), self.lora_magnitude))

    def _draw(self, weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Initial values of A and B, in fp32 on the CPU."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        return self._original is not None

    @property
    def frozen(self) -> Tensor:
        """W0, also of a merged layer."""
        return self.weight if self._original is None else self._original

    @property
    def dora(self) -> bool:
        return self.lora_magnitude is not None

    @property
    def parts(self) -> list[nn.Parameter]:
        """A, B and, with DoRA, m."""
        magnitude = [] if self.lora_magnitude is None else [self.lora_magnitude]
        return [self.lora_A, self.lora_B, *magnitude]

    def delta(self, rows: slice = ALL) -> Tensor:
        """scale * B A in fp32, in the shape of the weight, or of some of its rows."""
        B, A = self._factors(rows)
        return self.turn(B.float() @ A.float()).mul_(self.scale)

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The parts of B and A that update those rows of the weight."""
        raise NotImplementedError

    @torch.no_grad()
    def applied(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """W0 with the update, in fp32.

        Args:
            weight: W0, or those of its rows, where each can be had without the others (`row_by_row`).
        """
        updated = weight.to(torch.float32, copy=True).add_(self.delta(rows))
        if self.lora_magnitude is not None:
            assert self.row_by_row or rows == ALL
            normalise_(self.turn(updated), whole(self.lora_magnitude)[rows])
        return updated

    @property
    def row_by_row(self) -> bool:
        """Whether each row of the merged weight can be computed without the others. DoRA scales rows of a linear layer,
        but columns of an embedding."""
        return not self.dora or isinstance(self, nn.Linear)

    def _stretch(self, y: Tensor) -> Tensor:
        """What the layer gives for y = (W0 + scale * B A) x (..., O): y itself, or with DoRA its entries stretched."""
        return Stretch.apply(y, self._gain()) if self.dora else y

    def _gain(self) -> Tensor:
        """m / ||W0 + scale * B A||, (O,)."""
        assert self.lora_magnitude is not None, "a layer with DoRA"
        return self.lora_magnitude / row_norms(self.turn(self.weight), self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def merge(self, offload: bool = False) -> None:
        """W0 with the update takes W0's place; W0 is kept, on the host if `offload`.

        A sharded layer is computed whole by every process, so all must call this; each keeps its rows of the result,
        and those of W0 on the host.
        """
        if self.merged:
            return
        merged = self.applied(whole(self.weight).to(self.lora_A.device)).to(self.weight.dtype)
        if is_sharded(self.weight):
            self._original = own_rows(self.weight).to("cpu", copy=True)
            self.weight.copy_(placed(merged, self.weight))
            return
        original = self.weight
        if offload:
            original.data = original.data.cpu()
        # past nn.Module, for which it would become a parameter of the model, counted and saved
        self.__dict__["_original"] = original
        self.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def restore(self) -> None:
        """W0 takes its place again, bitwise what it was."""
        original, self._original = self._original, None
        if original is None:
            return
        if is_sharded(self.weight):
            own_rows(self.weight).copy_(original)
        else:
            original.data = original.data.to(self.lora_A.device)
            self.weight = original


class LoRALinear(LoRALayer, nn.Linear):
    """A bias-free linear layer with a low-rank update: h = W0 x + scale * B A x (the paper's equation 2).

    A starts as nn.Linear's own initialisation and B as zeros, so the update starts as zero.
    """

    cast: Factors | None = None  # in the products' dtype, if `inject.cast_factors` keeps them

    @staticmethod
    def turn(matrix: Tensor) -> Tensor:
        return matrix

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, rslora: bool, dropout: float, generator=None, dora: bool = False
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.register_parameter("bias", None)
        self.dropout = dropout
        self._init_lora(base, (rank, self.in_features), (self.out_features, rank), alpha, rslora, dora, generator)

    def _draw(self, weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        return A, torch.zeros(self.lora_B.shape)

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        return whole(self.lora_B)[rows], whole(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight)
        if not self._drops:
            return self._side_by_side(x, [self])[0]
        dtype = self._dtype(x)
        dropped = F.dropout(x, self.dropout).to(dtype)
        update = low_rank(dropped, self.lora_A, self.lora_B, self.scale)
        if self.dora:  # as in PEFT: what stretching adds to W0 x is computed from the dropped input, too
            c = self._gain()
            update = (c * update + (c - 1) * F.linear(dropped, self.weight)).to(dtype)
        return F.linear(x, self.weight) + update

    @property
    def _drops(self) -> bool:
        return self.dropout > 0 and self.training

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the products run in."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype

    @staticmethod
    def _side_by_side(x: Tensor, layers: "Sequence[LoRALinear]") -> list[Tensor]:
        matrices = chain.from_iterable((layer.weight, layer.lora_A, layer.lora_B) for layer in layers)
        scales, casts = [layer.scale for layer in layers], [layer.cast for layer in layers]
        outputs = FusedLinears.apply(x, layers[0]._dtype(x), scales, casts, *matrices)
        return [layer._stretch(y) for layer, y in zip(layers, outputs, strict=True)]

    @staticmethod
    def fan_out(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
        """The output of each of several layers for x. Those with an update share the work, unless they have hooks."""
        sharing = [layer for layer in layers if isinstance(layer, LoRALinear) and layer._shares]
        outputs = iter(LoRALinear._side_by_side(x, sharing) if sharing else ())
        return [next(outputs) if layer in sharing else layer(x) for layer in layers]

    @property
    def _shares(self) -> bool:
        return not (self.merged or self._drops or self._forward_hooks or self._forward_pre_hooks)


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """An embedding with a low-rank update: row i is W0[i] + scale * B A[:, i]; A is (R, V), B is (D, R).

    As in loralib and PEFT, A starts as zeros and B as a normal draw; but B's standard deviation is that of
    W0, not 1: the values of an embedding are small (0.02 in Llama-2), and with 1 the first steps at a rate that
    suits the other layers would drown them.
    """

    @staticmethod
    def turn(matrix: Tensor) -> Tensor:
        return matrix.T

    def __init__(
        self,
        base: nn.Embedding,
        rank: int,
        alpha: float,
        rslora: bool,
        dropout: float,
        generator=None,
        dora: bool = False,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False  # for nn.Embedding's repr
        self._init_lora(base, (rank, self.num_embeddings), (self.embedding_dim, rank), alpha, rslora, dora, generator)

    def _draw(self, weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        B = torch.empty(self.lora_B.shape).normal_(generator=generator)
        return torch.zeros(self.lora_A.shape), B * weight.float().std().item()

    def _factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        return whole(self.lora_B), whole(self.lora_A)[:, rows]

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        if self.merged:
            return rows
        inner = F.embedding(ids, self.lora_A.T) * self.scale  # (..., R)
        return self._stretch(rows + F.linear(inner, self.lora_B).to(rows.dtype))

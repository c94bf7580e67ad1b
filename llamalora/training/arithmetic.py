"""What training and decoding do on a GPU, counted from a model's shape: operations of matrix products, bytes that
kernels read and write, kernels.

Dimensions: N tokens of a micro-batch, L of a sequence, D hidden, R rank, V vocabulary, I and O features of a layer; w
bytes of a value in the products' precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..distributed.sharding import frozen_of_a_block
from ..lora.inject import count_parameters, lora_layers, trainable_parameters
from ..lora.layers import LoRAEmbedding, LoRALayer, LoRALinear
from ..model.config import LlamaConfig
from ..model.llama import Block, Llama
from ..model.precision import DTYPES
from .batch import deal
from .saved import learns, parameter_count

# kernels of a training step's block, forward and backward; of its forward pass again; of a layer with an update, and of
# another parameter that learns; of embedding, norm, head and loss
BLOCK, AGAIN, ADAPTED, LEARNING, ENDS = 160, 75, 14, 3, 88
UNPADDED, COMPILED = 14, 50  # fewer in each block
DECODING, GRAPHED, DECODING_ENDS = 40, 10, 39  # of a block of the merged model, and of the rest


@dataclass(frozen=True)
class Form:
    """Which kernels do the work.

    Attributes:
        padded: attention over one rectangle, as wide as the longest sequence; else over sequences as they are.
        compiled: norms, rotary embedding, SwiGLU and residual take a kernel each; else one for every operation.
    """

    padded: bool = True
    compiled: bool = False


FORMS = {
    "attention padded": Form(),
    "attention unpadded": Form(padded=False),
    "and compiled": Form(padded=False, compiled=True),
}


@dataclass(frozen=True)
class Part:
    """Some of the work.

    Attributes:
        flops: operations of matrix products.
        bytes: that are read and written.
        small: the products are attention's, which reach less of a GPU's peak.
        few_rows: the products read weights for few rows, which reach less of its memory's bandwidth.
    """

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    small: bool = False
    few_rows: bool = False


@dataclass(frozen=True)
class Batch:
    """The sizes of a micro-batch.

    Attributes:
        supervised: tokens.
        squares: the sum of L².
        slots, slot_squares: tokens and squares of one rectangle, as wide as the longest sequence.
    """

    tokens: int
    supervised: float
    squares: int
    slots: int = 0
    slot_squares: int = 0

    @staticmethod
    def of(lengths: Sequence[int], supervised: float) -> "Batch":
        """Args: supervised: share of the tokens."""
        tokens, longest = sum(lengths), max(lengths)
        squares = sum(length**2 for length in lengths)
        return Batch(tokens, supervised * tokens, squares, len(lengths) * longest, len(lengths) * longest**2)


def micro_batches(
    lengths: Sequence[int], supervised: float, steps: Sequence[Sequence[int]], ranks: int, micro_tokens: int
) -> list[list[list[Batch]]]:
    """Of each step those of each process, as `batch.deal` makes them.

    Args:
        supervised: share of the tokens.
        steps: indices of `lengths`.
    """

    def share(bins: Sequence[Sequence[int]]) -> list[Batch]:
        return [Batch.of([lengths[index] for index in bin], supervised) for bin in bins if bin]

    return [[share(bins) for bins in deal(step, lengths, ranks, micro_tokens)] for step in steps]


def model_flops(model: Llama, batch: Batch) -> float:
    """What training on some tokens needs, by which a share of peak (MFU) is reckoned: 4 a token and frozen parameter,
    6 a parameter that learns, and causal attention; nothing that is done twice. The embedding is no product, and the
    head works at supervised positions only."""
    config, counts, supervised = model.config, count_parameters(model), batch.supervised / batch.tokens
    head = config.vocab_size * config.hidden_size
    products = counts["base"] - head * (1 if config.tie_word_embeddings else 2) + supervised * head
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * batch.squares
    if lora_layers(model):
        return batch.tokens * (4 * products + 6 * counts["trainable"]) + attention
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    learning = sum(p.numel() for name, p in trainable_parameters(model).items() if name not in ends)
    return batch.tokens * (4 * products + 2 * (learning + supervised * head * learns(model.lm_head))) + attention


@dataclass(frozen=True)
class Work:
    """What a training step of a model does, which is set up for it; the meta device will do."""

    model: Llama
    precision: str
    recompute: int = 0
    form: Form = Form()

    @property
    def width(self) -> int:
        """Bytes of a value in the products."""
        return DTYPES[self.precision].itemsize

    @cached_property
    def backward(self) -> float:
        """The share of the blocks that make a backward pass: all from the first on before whose end anything learns."""
        layers = self.model.model.layers
        if learns(self.model.model.embed_tokens):
            return 1.0
        first = next((n for n, block in enumerate(layers) if any(map(learns, block.modules()))), len(layers))
        return 1 - first / len(layers)

    @property
    def forward(self) -> float:
        """Forward passes of a block: 1, and what is made again."""
        blocks = self.model.config.num_hidden_layers
        return 1 + (self.backward * -(-blocks // self.recompute) / blocks if self.recompute else 0.0)

    @cached_property
    def learning(self) -> list[nn.Parameter]:
        return list(trainable_parameters(self.model).values())

    @cached_property
    def trainable(self) -> int:
        """Values that learn."""
        return sum(parameter.numel() for parameter in self.learning)

    @cached_property
    def size(self) -> int:
        """Values of the model, updates included."""
        return parameter_count(self.model)

    @cached_property
    def frozen_of_a_block(self) -> int:
        return frozen_of_a_block(self.model)

    @cached_property
    def adapted(self) -> list[LoRALinear]:
        return [layer for layer in lora_layers(self.model).values() if isinstance(layer, LoRALinear)]

    @cached_property
    def _beside_updates(self) -> int:
        """Values a token that products of updates read and write; q, k and v share their input, gate and up, too."""
        return sum(3 * layer.in_features + 4 * layer.out_features + 6 * layer.rank for layer in self.adapted)

    @cached_property
    def _stretched(self) -> int:
        """Values a token that DoRA stretches."""
        return sum(layer.out_features for layer in self.adapted if layer.dora)

    @cached_property
    def _casts(self) -> float:
        """Bytes of a micro-batch for each value that learns: its cast forward, back and again, its gradient's, and
        adding that up."""
        w = self.width
        if lora_layers(self.model):
            return (self.forward + 1) * (12 + w) + 24
        return 16 if w == 4 else 20 + 3 * w

    @cached_property
    def products(self) -> dict[str, float]:
        """Operations of the matrix products, forward and backward: of weights and updates for a token, of the head for
        a supervised one, and of DoRA's norms for a micro-batch.

        A layer takes 2 I O a token, as much for the gradient of its input if anything before it learns, and as much
        for the weight's if that learns; its update 2 R (I + O), and for its gradients twice that.
        """
        total = dict.fromkeys(("weights", "updates", "head", "norms"), 0.0)
        embedding = self.model.model.embed_tokens
        reached = learns(embedding)
        if isinstance(embedding, LoRAEmbedding):
            total["updates"] += 6 * embedding.rank * embedding.embedding_dim
            total["norms"] += _norms(embedding, embedding.embedding_dim, embedding.num_embeddings)
        for number, block in enumerate(self.model.model.layers):
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            again = reached or any(map(learns, block.modules()))  # else it keeps nothing that could be made again
            forward = 2 if again and self.recompute and number % self.recompute == 0 else 1
            for norm, *layers in (
                (block.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
                (None, attention.o_proj),
                (block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
                (None, mlp.down_proj),
            ):
                reached = reached or (norm is not None and learns(norm))
                for layer in layers:
                    # it ends as soon as it has what was kept, which is the input of `down`, unless an update keeps more
                    ends = layer is mlp.down_proj and not isinstance(layer, LoRALinear)
                    _count(total, layer, 1 if ends else forward, reached, "weights", "updates")
                reached = reached or any(map(learns, layers))
        _count(total, self.model.lm_head, 1, True, "head", "head")  # its input's gradient is always made
        return total

    def parts(self, batch: Batch, shards: int = 1) -> dict[str, Part]:
        """The work of a micro-batch on one GPU, which keeps one of so many shards of what learns."""
        config, w, n, forward, of = self.model.config, self.width, batch.tokens, self.forward, self.products
        backward = self.backward
        blocks, heads, keys, weights = _sizes(config)

        def of_values(values: int, apart: tuple[int, int], fused: tuple[int, int]) -> Part:
            """So many values a token and block, and the bytes that are read and written of each, forward and back."""
            there, back = fused if self.form.compiled else apart
            return Part(bytes=blocks * n * values * (forward * there + backward * back))

        rows, squares = n * (forward * 4 + backward * 8), batch.squares
        if self.form.padded:  # copied into the rectangle, which is filled with zeros first, and back
            rows, squares = n * (forward * 10 + backward * 8), batch.slot_squares
            rows += batch.slots * (forward * 7 + backward * 9)
        logits = batch.supervised * config.vocab_size
        return {
            "weights": Part(of["weights"] * n, w * weights * (forward + backward)),
            "updates": Part(of["updates"] * n, w * n * self._beside_updates),
            "head": Part(of["head"] * batch.supervised, 2 * w * config.vocab_size * config.hidden_size),
            "loss": Part(bytes=logits * (4 * w + 28)),
            "norms and residual": of_values(2 * config.hidden_size, (7 * w + 28, 8 * w + 48), (4 * w, 5 * w)),
            "rotary embedding": of_values(heads + keys, (2 * w + 36, 2 * w + 36), (2 * w, 2 * w)),
            "SwiGLU": of_values(config.intermediate_size, (5 * w, 11 * w), (3 * w, 5 * w)),
            "attention": Part(blocks * heads * squares * (2 * forward + 5 * backward), small=True),
            "rows of attention": Part(bytes=blocks * heads * w * rows),
            "DoRA": Part(of["norms"], self._stretched * n * w * (2 * forward + 6)),
            "casts and gradients": Part(bytes=self._casts * self.trainable / shards),
        }

    def decoding(self, rows: int, tokens: int, reach: float, graphed: bool = False) -> dict[str, Part]:
        """The work of a pass of the merged model.

        Args:
            rows: sentences side by side, with `tokens` new tokens each.
            reach: tokens of each that the cache holds.
            graphed: few kernels, which are one launch.
        """
        config, w, n = self.model.config, self.width, rows * tokens
        blocks, heads, keys, weights = _sizes(config)
        weights += config.vocab_size * config.hidden_size
        values = 2 * config.hidden_size * (7 * w + 28) + (heads + keys) * (2 * w + 36)
        values += 5 * w * config.intermediate_size + 4 * w * heads
        return {
            "weights": Part(2 * weights * n, w * weights, few_rows=True),
            "attention": Part(4 * blocks * heads * n * reach, blocks * 2 * w * keys * reach * rows, small=True),
            "all else": Part(bytes=blocks * values * n, kernels=blocks * (GRAPHED if graphed else DECODING)),
        }

    @cached_property
    def launches(self) -> float:
        """Kernels of a micro-batch."""
        block = BLOCK - UNPADDED * (not self.form.padded) - COMPILED * self.form.compiled + AGAIN * (self.forward - 1)
        learning = ADAPTED * len(self.adapted) or LEARNING * len(self.learning)
        return self.model.config.num_hidden_layers * block + learning + ENDS


def _count(total: dict[str, float], layer: nn.Linear, forward: int, reached: bool, weights: str, updates: str) -> None:
    """Adds the operations of a linear layer."""
    inputs, outputs = layer.in_features, layer.out_features
    if not isinstance(layer, LoRALinear):
        total[weights] += 2 * inputs * outputs * (forward + reached + learns(layer))
        return
    total[weights] += 2 * inputs * outputs * (forward + reached)
    total[updates] += 2 * layer.rank * (forward * (inputs + outputs) + 2 * outputs + inputs * (1 + reached))
    total["norms"] += forward * _norms(layer, outputs, inputs)


def _norms(layer: LoRALayer, rows: int, columns: int) -> int:
    """Operations of DoRA's norms of a weight (rows, columns), in a forward pass (`dora.row_norms`)."""
    return 2 * layer.dora * layer.rank * (rows * columns + layer.rank * (rows + columns))


def _sizes(config: LlamaConfig) -> tuple[int, int, int, int]:
    """Blocks, features of all query and of all key heads, and values of all the blocks' matrices."""
    blocks, size = config.num_hidden_layers, config.head_dim
    heads, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    return blocks, heads, keys, blocks * config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)

"""What the benchmarks share: the arithmetic that a training token takes, and batches as the peer pads them."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from llamalora.lora.inject import count_parameters
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LlamaConfig
from llamalora.training.batch import Example


def need_peer(parser: argparse.ArgumentParser) -> None:
    """Ends with what to install, if the peer is not."""
    if missing := [name for name in ("transformers", "peft") if find_spec(name) is None]:
        parser.error(f"compares with {' and '.join(missing)}, not installed here: pip install -e '.[test]'")


def flops_per_token(config: LlamaConfig, lora: int, examples: Sequence[Example]) -> float:
    """4 a frozen parameter in a product, 6 a LoRA parameter, and causal attention; the embedding is no product, and the
    head works at supervised positions only.

    Args:
        lora: number of LoRA parameters.
    """
    lengths = [len(example) for example in examples]
    supervised = sum(example.supervised for example in examples) / sum(lengths)
    head = config.vocab_size * config.hidden_size
    frozen = count_parameters(skeleton(config))["base"] - head * (1 if config.tie_word_embeddings else 2)
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * width * sum(length**2 for length in lengths) / sum(lengths)
    return 4 * (frozen + supervised * head) + 6 * lora + attention


def padded(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """The arguments of transformers' models, each (batch, longest): padded on the right, prompts not supervised."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        labels[row, example.prompt : length] = ids[row, example.prompt : length]
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

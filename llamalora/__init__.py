"""LoRA fine-tuning of Llama-2 for named-entity recognition, in plain PyTorch.

>>> model = load_model("weights/tiny")
>>> inject_lora(model, targets="all", rank=8)
"""

from .adapter import load_adapter, save_adapter
from .checkpoint import load_model, save_model
from .decode import generate
from .lora import LoRAEmbedding, LoRALinear, count_parameters, inject_lora, merge, restore
from .model import Llama, LlamaConfig
from .packing import KVCache, Packing
from .tokenizer import load_tokenizer

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "Packing",
    "count_parameters",
    "generate",
    "inject_lora",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "restore",
    "save_adapter",
    "save_model",
]

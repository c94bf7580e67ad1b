"""The public names of the package: `from llamalora import load_model`."""

from .evaluation.annotate import Mention, annotate
from .evaluation.generate import generate
from .evaluation.systems import load_annotator
from .lora.adapter import load_adapter, save_adapter
from .lora.inject import count_parameters, inject_lora, merge, restore
from .lora.layers import LoRAEmbedding, LoRALinear
from .model.checkpoint import load_model, save_model
from .model.config import LlamaConfig
from .model.llama import Llama
from .model.packing import KVCache, Packing
from .task.definition import Task
from .task.tokenizer import load_tokenizer

__all__ = [
    "KVCache",
    "Llama",
    "LlamaConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "Mention",
    "Packing",
    "Task",
    "annotate",
    "count_parameters",
    "generate",
    "inject_lora",
    "load_adapter",
    "load_annotator",
    "load_model",
    "load_tokenizer",
    "merge",
    "restore",
    "save_adapter",
    "save_model",
]

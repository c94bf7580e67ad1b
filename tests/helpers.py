"""Tiny random models, and transformers' twins of them: independent implementations with the same weights."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from llamalora.lora.inject import lora_layers
from llamalora.lora.layers import LoRAEmbedding
from llamalora.model.config import LlamaConfig
from llamalora.model.llama import Llama

torch.set_num_threads(1)  # tiny matrices are slower on several

NINE = ("q", "k", "v", "o", "up", "down", "gate", "embed", "head")


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, grouped-query attention, 97 tokens."""
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    return LlamaConfig(**(shape | changes))


def tiny_model(seed: int = 0, **changes) -> Llama:
    """A model of that shape; weights large enough that attention is far from uniform, none left at one."""
    model = Llama(tiny_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                spread = 1.0 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, spread, generator=generator)
    return model


def transformers_config(config: LlamaConfig):
    """transformers' own configuration of the same shape."""
    from transformers import LlamaConfig as Theirs

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {name: value for name, value in vars(config.rope_scaling).items() if value is not None}
    shape = {name: value for name, value in vars(config).items() if not name.startswith("rope")}
    return Theirs(**shape, rope_parameters=rope, attn_implementation="eager", pad_token_id=0)


def transformers_twin(model: Llama):
    """transformers' model with the weights of ours."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        twin = LlamaForCausalLM(transformers_config(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def peft_model(base, targets: str | Sequence[str], rank: int, alpha: float, **options):
    """`base` (transformers') with peft's LoRA on these module names, kept from asking the network."""
    import peft

    targets = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tied layer has an update is what is tested
        return peft.get_peft_model(base, config).eval()


def peft_pairs(theirs) -> dict[str, tuple[Tensor, ...]]:
    """Module name -> A, B and, with DoRA, m, parameters of a peft model."""
    from peft.tuners.lora import LoraLayer

    pairs = {}
    for name, layer in theirs.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            if "default" in layer.lora_embedding_A:
                pairs[name] = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                pairs[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if "default" in layer.lora_magnitude_vector:
                pairs[name] += (layer.lora_magnitude_vector["default"].weight,)
    return pairs


def copy_to_peft(model: Llama, theirs) -> None:
    """Gives peft's model the updates of ours; both must have the same layers."""
    pairs, ours = peft_pairs(theirs), lora_layers(model)
    assert pairs.keys() == ours.keys()
    with torch.no_grad():
        for name, parts in pairs.items():
            for theirs_, ours_ in zip(parts, ours[name].parts, strict=True):
                theirs_.copy_(ours_)


def randomise_lora(model: Llama, seed: int = 1, spread: float = 0.3) -> None:
    """Updates that are far from zero, as after long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            size = 1.0 if isinstance(layer, LoRAEmbedding) else layer.in_features**-0.5
            layer.lora_A.normal_(0, size, generator=generator)
            layer.lora_B.normal_(0, spread, generator=generator)
            if layer.dora:
                layer.lora_magnitude.mul_(torch.rand(layer.lora_magnitude.shape, generator=generator) + 0.5)


def random_ids(*shape: int, vocabulary: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    """The logits of either kind of model."""
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

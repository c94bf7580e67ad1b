"""Converts a Llama from GGUF to a Hugging Face folder, for `fetch`."""

import json
from pathlib import Path

import numpy as np
import torch

from ..model.checkpoint import save_model
from ..model.config import LlamaConfig
from ..model.llama import Llama

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the Llama of a GGUF file, with its byte-level BPE tokenizer, as a Hugging Face folder in fp16."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if tensor.name.endswith("attn_q.weight"):
            weight = rotate_half_rows(weight, heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = rotate_half_rows(weight, kv_heads)
        state[_hugging_face_name(tensor.name)] = weight.half()
    tied = "lm_head.weight" not in state
    config = LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        # stored as fp32, in which 1e-5 is 9.99999975e-06: take the shortest number that rounds to it
        rms_norm_eps=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        rope_theta=meta["llama.rope.freq_base"],
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
    )
    with torch.device("meta"):
        model = Llama(config)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    save_model(model, folder)
    _write_tokenizer(meta, folder)


def rotate_half_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix (heads * E, D), from GGUF's order to Hugging Face's.

    GGUF has the two dimensions of each rotary pair side by side, Hugging Face half a head apart.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _hugging_face_name(name: str) -> str:
    match name.split("."):
        case "blk", layer, part, "weight":
            return f"model.layers.{layer}.{_BLOCK[part]}.weight"
        case part, "weight":
            return f"{_TOP[part]}.weight"
    raise AssertionError(f"a tensor that no Llama has: {name}")


def _write_tokenizer(meta: dict, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == 3])  # control
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")

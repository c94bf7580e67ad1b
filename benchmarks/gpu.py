#!/usr/bin/env python3
"""Training and decoding at the exact shape of Llama-2-7B, random weights, on one GPU; transformers + peft beside it.

    python benchmarks/gpu.py --peak-tflops 989 --bandwidth 4800        # H100 or H200: dense bf16, GB/s

Reports tokens/s and model FLOPs utilisation of LoRA training (all nine kinds, r=128, packed rows), and batch-1 decoding
of the base and of the merged model against the memory bandwidth. Sequences are as long as BC5CDR's are, each repeat has
others, and none has the shape of one before, as in training. `--tiny` tries the script without a GPU.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from itertools import chain, pairwise

import torch
from work import drawn_lengths, flops_per_token, need_peer, padded

from llamalora.distributed.world import World
from llamalora.evaluation.generate import generate
from llamalora.lora.inject import cast_factors, inject_lora, merge, restore
from llamalora.model.checkpoint import skeleton
from llamalora.model.config import LLAMA_2, LlamaConfig
from llamalora.model.elementwise import compile_formulas
from llamalora.model.llama import Llama
from llamalora.model.precision import DTYPES, choose_precision, prepare_gpu
from llamalora.runs.setup import choose_compiled
from llamalora.training.arithmetic import Batch, Form, Work
from llamalora.training.batch import Example, MicroBatch
from llamalora.training.cards import CARDS, recognise
from llamalora.training.duration import Machine
from llamalora.training.step import Optimizer, backward

PROMPT, NEW = 128, 256  # tokens to begin with, and tokens that are decoded
REACH = PROMPT + NEW / 2  # what a token sees on average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense, in the precision used (default: 989)")
    parser.add_argument("--bandwidth", type=float, default=4800.0, help="of the memory, GB/s (default: 4800)")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens of a packed row (default: 2048)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers + peft out")
    parser.add_argument("--tiny", action="store_true", help="two small layers: tries the script, measures nothing")
    arguments = parser.parse_args()
    if not arguments.no_peer:
        need_peer(parser)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("needs a GPU; --tiny tries the script without one")
    if device.type == "cuda":
        prepare_gpu(device)
    config = LLAMA_2["llama-2-7b"]
    if arguments.tiny:
        config = replace(config, num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
                         num_key_value_heads=2, head_dim=32, vocab_size=512)  # fmt: skip
    precision, why = choose_precision("auto", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {"device": name, "precision": precision, "torch": torch.__version__}
    print(f"{name}, {precision} ({why})")
    model = random_model(config, DTYPES[precision], device)
    if compiles := choose_compiled("auto", device)[0]:
        compile_formulas(model)
    # one to warm up, and one a repeat
    batches = [fake_examples(arguments.micro_tokens, config, number) for number in range(arguments.repeats + 1)]
    lengths = [[len(example) for example in batch] for batch in batches]
    result["slots per token, padded"] = statistics.mean(len(one) * max(one) / sum(one) for one in lengths)
    result["decoding, base"] = decode(model, arguments)
    inject_lora(model, "all", rank=128)
    result["training"] = train(model, batches, precision, device, arguments)
    merge(model)
    result["decoding, merged"] = decode(model, arguments)
    result["merged by base"] = (
        result["decoding, merged"]["tokens_per_second"] / result["decoding, base"]["tokens_per_second"]
    )
    restore(model)
    if expected := planned(model, batches[1:], precision, device, compiles):
        result["planned"] = expected
        for what, speed in (("training", "training"), ("decoding, merged", "decoding")):
            print(f"{what}: {result[what]['tokens_per_second']:,.0f} tokens/s, planned {expected[speed]:,.0f}")
    if not arguments.no_peer:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        result["peer"] = peer(config, batches, precision, device, arguments)
    print(json.dumps(result, indent=2))


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    model = skeleton(config).to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, 0.0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    return model.requires_grad_(False)


def fake_examples(tokens: int, config: LlamaConfig, seed: int) -> list[Example]:
    """A micro-batch of sequences as long as BC5CDR's, with random ids; the answer is 60 % of each."""
    lengths = drawn_lengths(tokens, seed)
    ids = torch.randint(3, config.vocab_size, (max(lengths) + 1,)).tolist()
    return [Example(tuple(ids[: length + 1]), prompt=max(1, round(0.4 * length))) for length in lengths]


def seconds_of(work, repeats: int) -> list[float]:
    """Of each repeat, after one to warm up; `work` is given their number, from 0 on."""
    taken = []
    for number in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        work(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken[1:]


def train(model: Llama, batches: list[list[Example]], precision: str, device: torch.device, arguments) -> dict:
    optimizer = Optimizer(model, precision, device, weight_decay=0.0, clip=1.0)

    def step(number: int) -> None:
        examples = batches[number]
        supervised = sum(example.supervised for example in examples)
        with cast_factors(model, DTYPES[precision]):
            backward(model, MicroBatch.of(examples, device), supervised, optimizer.scaler, precision)
        optimizer.step(1e-4, World(device=device))

    speeds = speeds_of(step, batches)
    flops = flops_per_token(model, list(chain.from_iterable(batches[1:])))
    speed = statistics.median(speeds)
    return {
        "tokens_per_second": speed,
        "repeats": speeds,
        "mfu": speed * flops / (arguments.peak_tflops * 1e12),
        "gflop_per_token": flops / 1e9,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def speeds_of(step, batches: list[list[Example]]) -> list[float]:
    """Tokens a second of each repeat."""
    seconds = seconds_of(step, len(batches) - 1)
    return [sum(map(len, examples)) / taken for examples, taken in zip(batches[1:], seconds, strict=True)]


def decode(model: Llama, arguments) -> dict:
    """Batch-1 greedy decoding; each token reads every weight but the embedding once. The median token's time leaves out
    what is done once, such as capturing a graph; that of a whole answer does not."""
    prompt, moments = list(range(3, 3 + PROMPT)), []

    def no_draft(index: int, output: list[int]) -> list[int]:
        moments.append(time.perf_counter())  # the token before has been read
        return []

    whole = statistics.median(seconds_of(lambda _: generate(model, [prompt], -1, NEW, 1, no_draft), arguments.repeats))
    each = statistics.median(later - earlier for earlier, later in pairwise(moments))
    read = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if "embed" not in name and "lora" not in name
    )
    return {
        "tokens_per_second": 1 / each,
        "of_bandwidth": read / each / (arguments.bandwidth * 1e9),
        "whole_answer_tokens_per_second": NEW / whole,
    }


def planned(
    model: Llama, batches: list[list[Example]], precision: str, device: torch.device, compiled: bool
) -> dict | None:
    """tokens/s of training on these batches and of decoding, as `audit --time` plans them; None for an unknown GPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    card = recognise(properties.name, properties.total_memory)
    if card is None:
        return None
    machine, work = Machine(CARDS[card]), Work(model, precision, form=Form(False, compiled))
    steps = []
    for examples in batches:
        lengths = [len(example) for example in examples]
        steps.append([[Batch.of(lengths, sum(example.supervised for example in examples) / sum(lengths))]])
    training, tokens = machine.training(work, steps), sum(map(len, chain.from_iterable(batches)))
    return {
        "training": tokens / training.seconds,
        "mfu": training.mfu,
        "decoding": 1 / machine.decoding(work, 1, 1, REACH, graphed=True),
    }


def peer(config: LlamaConfig, batches: list[list[Example]], precision: str, device: torch.device, arguments) -> dict:
    """transformers + peft on the same sequences, padded to the longest, in batches of 16."""
    import peft
    import transformers

    shape = {key: value for key, value in config.to_dict().items() if key not in ("architectures", "model_type")}
    with torch.device(device):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(DTYPES[precision])
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj", "embed_tokens", "lm_head"]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=128, lora_alpha=128, target_modules=seven))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(number: int) -> None:
        examples = batches[number]
        for start in range(0, len(examples), 16):
            batch = padded(examples[start : start + 16], device)
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
                wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    result = {"tokens_per_second": statistics.median(speeds_of(step, batches))}
    if device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    merged = wrapped.merge_and_unload().eval()
    prompt = torch.arange(3, 67, device=device)[None]
    taken = {}
    for new in (1, 64):
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        taken[new] = statistics.median(seconds_of(lambda _, o=options: merged.generate(prompt, **o), arguments.repeats))
    return result | {"decoding_tokens_per_second": 63 / (taken[64] - taken[1])}


if __name__ == "__main__":
    main()

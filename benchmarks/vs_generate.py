#!/usr/bin/env python3
"""Decoding: ours against transformers' `generate` and its prompt-lookup decoding, on the same merged weights.

Both sides answer the same sentences of the development split, greedily, in one precision and with one number of
threads, in turns, several times; the peer at several batch sizes, of which the best counts. Medians, ratios with their
spread, and every output that differs, with how far apart the two choices stood where it begins.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from work import need_peer

from llamalora.corpus.read import find_splits, read_documents
from llamalora.distributed.world import World, join_world
from llamalora.evaluation.answer import Speed, answer_sentences, new_tokens, select_sentences
from llamalora.evaluation.systems import System, load_run, load_system
from llamalora.model.precision import DTYPES
from llamalora.runs.settings import Settings
from llamalora.task.prompt import render_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="run folder of train.py")
    parser.add_argument("--model", help="Hugging Face folder, instead of --run")
    parser.add_argument("--adapter", help="PEFT adapter folder for --model")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--sentences", type=int, default=32, help="of the development split (default: 32)")
    parser.add_argument("--repeats", type=int, default=3, help="of each contestant, in turns (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--precision", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--batch", type=int, default=32, help="ours: sentences side by side (default: 32)")
    parser.add_argument("--peer-batches", default="1,8,32", help="the peer's (default: 1,8,32)")
    parser.add_argument("--lookup", type=int, default=10, help="the peer's prompt_lookup_num_tokens (default: 10)")
    parser.add_argument("--out", help="write the JSON there as well")
    arguments = parser.parse_args()
    need_peer(parser)
    if bool(arguments.run) == bool(arguments.model):
        parser.error("give either --run, or --model with or without --adapter")
    torch.set_num_threads(arguments.threads)
    with join_world() as world:
        result = compare(arguments, world)
    print(table(result))
    print(json.dumps(result))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n")


def compare(arguments: argparse.Namespace, world: World) -> dict:
    system = load(arguments, world)
    documents = read_documents(find_splits(arguments.data)["dev"])
    _, asked = select_sentences(documents, arguments.sentences)
    peer = Peer(system, asked)
    speeds: list[Speed] = []

    def ours(constrain: bool = False) -> list[str]:
        answers, speed = answer_sentences(
            system.model, system.tokenizer, system.task, asked, world, arguments.batch, quiet=True,
            constrain=constrain, known=system.known,
        )  # fmt: skip
        speeds.append(speed)
        return [item.output for item in answers]

    contestants = {"llamalora": ours, "llamalora, --constrain": lambda: ours(constrain=True)}
    for batch in map(int, arguments.peer_batches.split(",")):
        contestants[f"generate, batch {batch}"] = lambda batch=batch: peer.generate(batch)
    contestants["prompt lookup, batch 1"] = lambda: peer.generate(1, prompt_lookup_num_tokens=arguments.lookup)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    outputs: dict[str, list[str]] = {}
    for _ in range(arguments.repeats):
        for name, answer in contestants.items():
            started, worked = time.perf_counter(), time.process_time()
            outputs[name] = answer()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - worked)
            print(f"{name}: {seconds[name][-1]:.1f} s, {cpu[name][-1]:.1f} of all cores", flush=True)
    rivals = [name for name in contestants if name.startswith("generate")]
    best = min(rivals, key=lambda name: statistics.median(seconds[name]))
    speed = speeds[0].to_dict()
    return {
        "sentences": len(asked),
        "precision": arguments.precision,
        "threads": arguments.threads,
        "seconds": seconds,
        "cpu_seconds": cpu,  # on a busy machine the better measure
        "sentences_per_second": {name: len(asked) / statistics.median(times) for name, times in seconds.items()},
        "best_generate": best,
        "ratios": {name: ratio(seconds[name], seconds["llamalora"]) for name in (best, "prompt lookup, batch 1")},
        "cpu_ratios": {name: ratio(cpu[name], cpu["llamalora"]) for name in (best, "prompt lookup, batch 1")},
        "differing_outputs": {
            name: peer.differences(outputs["llamalora"], theirs)
            for name, theirs in outputs.items()
            if name.startswith(("generate", "prompt"))
        },
        "tokens_per_row_pass": speed["tokens_per_row_pass"],
        "tokens_per_pass": speed["tokens_per_pass"],
    }


def load(arguments: argparse.Namespace, world: World) -> System:
    if arguments.run:
        return load_run(Path(arguments.run), "best", arguments.precision, world)
    settings = Settings(model=arguments.model, data=arguments.data)
    return load_system(settings, arguments.adapter, arguments.precision, world)


class Peer:
    """transformers' model with our merged weights, used as its documentation has it: batches of sentences in
    the order of the corpus, padded on the left."""

    def __init__(self, system: System, asked):
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = system.model.config.to_dict() | {"tie_word_embeddings": False}  # an update may have parted them
        rope = {"rope_type": "default"} | (shape.pop("rope_scaling") or {}) | {"rope_theta": shape.pop("rope_theta")}
        weight = system.model.model.norm.weight
        self.model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)).to(weight.device, weight.dtype).eval()
        weights = system.model.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self.tokenizer = system.tokenizer
        self.prompts = [system.tokenizer.encode(render_prompt(system.task, sentence.text)) for sentence in asked]
        context = system.model.config.max_position_embeddings
        self.limits = [
            new_tokens(system.tokenizer, system.task, sentence.text, context - len(prompt))
            for sentence, prompt in zip(asked, self.prompts, strict=True)
        ]

    @torch.no_grad()
    def generate(self, batch: int, **options) -> list[str]:
        device, end = self.model.device, self.tokenizer.eos_id
        outputs = []
        for first in range(0, len(self.prompts), batch):
            prompts, limits = self.prompts[first : first + batch], self.limits[first : first + batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
            written = self.model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=max(limits), eos_token_id=end,
                pad_token_id=end, **options,
            )[:, longest:].tolist()  # fmt: skip
            for new, limit in zip(written, limits, strict=True):
                new = new[: min(limit, new.index(end) if end in new else limit)]
                outputs.append(self.tokenizer.decode(new))
        return outputs

    @torch.no_grad()
    def differences(self, ours: list[str], theirs: list[str]) -> list[dict]:
        """Where outputs differ, and how far apart the logits of the two choices are there in the peer's model."""
        found = []
        for prompt, mine, other in zip(self.prompts, ours, theirs, strict=True):
            if mine == other:
                continue
            a, b = (self.tokenizer.encode_continuation(" " + text) + [self.tokenizer.eos_id] for text in (mine, other))
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            logits = self.model(torch.tensor([prompt + a[:at]], device=self.model.device)).logits[0, -1].float()
            gap = logits[b[at]] - logits[a[at]]
            found.append({"ours": mine, "theirs": other, "logit_gap": gap.item(), "largest_logit": logits.max().item()})
        return found


def ratio(theirs: list[float], ours: list[float]) -> dict:
    """How many times faster: the ratio of the medians, and the smallest and largest of any repeat."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(theirs) / statistics.median(ours), "low": min(each), "high": max(each)}


def table(result: dict) -> str:
    lines = [
        f"{result['sentences']} sentences, {result['precision']}, {result['threads']} threads; ours "
        f"{result['tokens_per_row_pass']:.1f} tokens a forward pass and sentence, "
        f"{result['tokens_per_pass']:.0f} a forward pass",
        "",
        "| | sentences/s | ours is faster | in processor time | other outputs |",
        "|---|---|---|---|---|",
    ]
    for name, rate in result["sentences_per_second"].items():
        faster = " | ".join(
            f"{times['median']:.1f} x ({times['low']:.1f} to {times['high']:.1f})" if times else ""
            for times in (result["ratios"].get(name), result["cpu_ratios"].get(name))
        )
        gaps = result["differing_outputs"].get(name)
        lines.append(f"| {name} | {rate:.2f} | {faster} | {'' if gaps is None else len(gaps)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

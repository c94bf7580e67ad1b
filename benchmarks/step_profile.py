#!/usr/bin/env python3
"""Where the time goes: torch.profiler's operations by their own time, in training and, with an adapter, in decoding.

python benchmarks/step_profile.py --model weights/smollm2-135m --data data/bc5cdr --threads 2 --adapter RUN/best
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from llamalora.corpus.documents import sentences_of
from llamalora.corpus.read import read_splits
from llamalora.distributed.world import World
from llamalora.evaluation.answer import answer_sentences
from llamalora.evaluation.answered import select_sentences
from llamalora.evaluation.systems import load_system
from llamalora.model.precision import choose_precision
from llamalora.runs.settings import Settings
from llamalora.runs.setup import build_model, make_task, read_base
from llamalora.training.batch import MicroBatch, deal, encode_all, plan_epoch
from llamalora.training.step import Optimizer, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="corpus folder")
    parser.add_argument("--adapter", help="PEFT adapter folder, trained to tag")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = World()
    precision, _ = choose_precision("auto", world.device)
    settings = Settings(
        model=arguments.model, data=arguments.data, targets="q,k,v,o,up,down,gate", rank=8, precision=precision
    )
    splits = read_splits(settings.data)
    show(f"four steps of 8 sentences, {precision}", training(settings, splits, world))
    if arguments.adapter:
        system = load_system(settings, arguments.adapter, precision, world)
        _, asked = select_sentences(splits["dev"], 64)
        show(
            f"decoding 64 sentences, 32 side by side, {precision}",
            lambda: answer_sentences(
                system.model, system.tokenizer, system.task, asked, world, quiet=True, known=system.known
            ),
        )


def training(settings: Settings, splits: dict, world: World) -> Callable[[], None]:
    """Four optimizer steps, after two that warm up."""
    _, tokenizer = read_base(settings)
    model = build_model(settings, world, "ddp").train()
    sentences = [s for document in splits["train"] for s in sentences_of(document)][:64]
    examples, _ = encode_all(make_task(settings, splits), tokenizer, sentences, 10**9, "error")
    lengths = [len(example) for example in examples]
    optimizer = Optimizer(model, settings.precision, world.device, 0.0, 1.0)

    def work(steps: list[list[int]]) -> None:
        for step in steps:
            ((indices,),) = deal(step, lengths, 1, 10**9)
            batch = MicroBatch.of([examples[index] for index in indices], world.device)
            backward(model, batch, float(len(batch.targets)), optimizer.scaler, settings.precision)
            optimizer.step(1e-3, world)

    steps = plan_epoch([1] * len(examples), 8, seed=0, epoch=0)
    work(steps[:2])
    return lambda: work(steps[2:6])


def show(what: str, work: Callable, rows: int = 14) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    print(f"\n{what}: {total / 1e6:.2f} s\n\n| operation | share | calls |\n|---|---|---|")
    for event in found[:rows]:
        print(f"| `{event.key}` | {100 * event.self_cpu_time_total / total:.1f} % | {event.count:,} |")


if __name__ == "__main__":
    main()

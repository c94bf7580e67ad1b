#!/usr/bin/env python3
"""Fine-tunes a Llama for named-entity recognition: `python train.py`, or under torchrun for several processes.

The loop itself is `llamalora/training/loop.py`.
"""

from dataclasses import asdict, replace
from pathlib import Path

from llamalora.cli import Parser, UsageError, add_flags, refuse_idle, run_command
from llamalora.distributed.world import join_world
from llamalora.runs.folder import read_settings
from llamalora.runs.settings import Settings
from llamalora.training.loop import train


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue the run in RUN (default: --out)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings, errors and the final result")
    add_flags(parser, Settings)
    arguments = parser.parse_args(argv)
    chosen = {name: getattr(arguments, name) for name in arguments.given - {"resume", "quiet"}}
    resume = arguments.resume is not None
    if resume:
        folder = arguments.resume or arguments.out
        if not folder:
            raise UsageError("--resume needs the run to continue: --resume RUN")
        refuse_idle(arguments, {"out": arguments.resume and "with --resume RUN, which goes on in that folder"})
        chosen = asdict(read_settings(Path(folder))) | chosen | {"out": folder}
    settings = Settings(**chosen)
    refuse_idle(arguments, {
        " ".join(settings.idle): f"with --method {settings.method}",
        "dropout loraplus": settings.targets == "embed" and "on the embedding, which is the only target",
        "batch_tokens": settings.batch_sentences and "with --batch-sentences, which takes its place",
    })  # fmt: skip
    with join_world(settings.timeout) as world:
        train(settings, replace(world, terse=arguments.quiet), resume)


if __name__ == "__main__":
    run_command(main)

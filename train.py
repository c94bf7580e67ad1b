#!/usr/bin/env python3
"""Fine-tunes a Llama for named-entity recognition: `python train.py`, or under torchrun for several processes.

The loop itself is `llamalora/training/loop.py`.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from llamalora.cli import UsageError, add_flags, from_flags, run_command
from llamalora.distributed.world import join_world
from llamalora.runs.folder import read_settings
from llamalora.runs.settings import Settings
from llamalora.training.loop import train


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue the run in RUN (default: --out)")
    add_flags(parser, Settings)
    arguments = parser.parse_args(argv)
    settings = from_flags(Settings, arguments)
    resume = arguments.resume is not None
    if resume:
        folder = arguments.resume or settings.out
        if not folder:
            raise UsageError("--resume needs the run to continue: --resume RUN")
        stored = asdict(read_settings(Path(folder)))
        # argparse leaves alone what a namespace holds already, so what is still None was not on the command line
        given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(arguments)))))
        explicit = {name: given[name] for name in stored if given[name] is not None}
        settings = Settings(**stored | explicit | {"out": folder})
    with join_world(settings.timeout) as world:
        train(settings, world, resume)


if __name__ == "__main__":
    run_command(main)

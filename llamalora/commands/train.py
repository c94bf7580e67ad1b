"""Fine-tunes a Llama for named-entity recognition, in this process or under torchrun in several: torchrun
--nproc_per_node 4 -m llamalora train.

The loop itself is `training/loop.py`.
"""

from dataclasses import asdict, replace
from pathlib import Path

from ..cli import Parser, UsageError, add_flags, flag, refuse_idle
from ..runs.settings import Settings

EXAMPLES = """
--data data/bc5cdr --targets q,v --rank 16
--resume RUN
"""


def main(argv: list[str]) -> None:
    parser = Parser("train", EXAMPLES, usage="%(prog)s [FLAG ...]", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue the run in RUN (default: --out)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings, errors and the final result")
    add_flags(parser, Settings)
    arguments = parser.parse_args(argv)
    chosen = {name: getattr(arguments, name) for name in arguments.given - {"resume", "quiet"}}
    resume = arguments.resume is not None
    if resume:
        from ..runs.folder import read_settings, recorded_folder

        folder = arguments.resume or arguments.out
        if not folder:
            raise UsageError("--resume needs the run to continue: --resume RUN")
        refuse_idle(arguments, {"out": arguments.resume and "with --resume RUN, which goes on in that folder"})
        for name in ("model", "data"):
            if name not in arguments.given:
                recorded_folder(Path(folder), name, f"give its folder with {flag(name)}")
        chosen = asdict(read_settings(Path(folder))) | chosen | {"out": folder}
    settings = Settings(**chosen)
    refuse_idle(arguments, {
        " ".join(settings.idle): f"with --method {settings.method}",
        "dropout loraplus": settings.targets == "embed" and "on the embedding, which is the only target",
        "batch_tokens": settings.batch_sentences and "with --batch-sentences, which takes its place",
    })  # fmt: skip
    from ..distributed.world import join_world  # not before, for torch takes a while to load
    from ..training.loop import train

    with join_world(settings.timeout) as world:
        train(settings, replace(world, terse=arguments.quiet), resume)

"""`llamalora COMMAND`, or `python -m llamalora COMMAND`: imports the module that does the work, and runs it."""

from importlib import import_module

from . import __version__
from .cli import UsageError, called, run_command
from .mistakes import nearest

# name -> the module whose `main` it is, and what it does in a line
COMMANDS = {
    "train and use": {
        "train": ("commands.train", "fine-tune a model on a corpus"),
        "eval": ("commands.eval", "score a run, or any adapter, on a split of a corpus"),
        "predict": ("commands.predict", "annotate new text with a run"),
        "merge": ("commands.merge", "base model and adapter as one Hugging Face folder"),
    },
    "before training": {
        "fetch": ("commands.fetch", "bring a small real model or the corpus BC5CDR"),
        "stats": ("paper.stats", "documents, sentences and mentions of a corpus"),
        "convert": ("commands.convert", "a corpus in another format: brat, BioC, CoNLL, ..."),
        "audit": ("commands.audit", "parameters, storage and GPU memory of a model"),
    },
    "after training": {
        "score": ("commands.score", "score anyone's predictions against gold"),
        "compare": ("commands.compare", "two runs, or files of predictions, on the same gold"),
        "plot": ("commands.plot", "loss, learning rate, gradient norm and dev F1 of runs"),
        "inspect": ("commands.inspect", "norms, spectra and ranks of an adapter, as a page"),
        "verify": ("commands.verify", "check all that a run has saved against its SHA-256"),
    },
    "the paper": {
        "tables": ("paper.tables", "its tables again, ours beside the paper's"),
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
    elif argv[0] == "--version":
        print(f"llamalora {__version__}")
    elif argv[0] not in MODULES:
        hint = nearest(argv[0], MODULES) or f"; choose from {', '.join(MODULES)}"
        raise UsageError(f"unknown command {argv[0]!r}{hint}")
    else:
        import_module(f".{MODULES[argv[0]]}", "llamalora").main(argv[1:])


def overview() -> str:
    lines = [f"usage: {called('COMMAND')} ...", "", "LoRA fine-tuning of Llama-2 for named-entity recognition."]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<9} {summary}" for name, (_, summary) in commands.items())]
    lines += ["", "Each explains itself with --help. To try it on what is built in, two minutes:"]
    return "\n".join([*lines, f"  {called('train')}"])


def run() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    run()

"""`python -m llamalora COMMAND`: dispatches to the module that does the work."""

import argparse
import json

from . import corpus, fetch, predict, score
from .cli import UsageError, run_command

HELP = """usage: python -m llamalora COMMAND ...

commands:
  fetch    bring a real small checkpoint (smollm2-135m) or the corpus (bc5cdr)
  stats    documents, sentences and mentions of a corpus
  predict  annotate new text with a trained run
  score    score PubTator predictions against gold

Each command explains itself with --help. Training is train.py, evaluation eval.py."""


def score_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llamalora score", description="Exact-mention P/R/F1.")
    parser.add_argument("gold", metavar="GOLD", help="PubTator or CoNLL file")
    parser.add_argument("predicted", metavar="PRED", help="predictions about it; PubTator may lack the texts")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON and nothing else")
    arguments = parser.parse_args(argv)
    result = score.score_files(arguments.gold, arguments.predicted)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(score.format_table(result))
    if result["missing"]:
        print(f"{result['missing']} of {result['documents']} documents have no prediction")


def stats_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m llamalora stats", description="Counts of a corpus (Table 5).")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="corpus folder")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON and nothing else")
    arguments = parser.parse_args(argv)
    splits = {name: corpus.read(path) for name, path in corpus.find_splits(arguments.data).items()}
    counts = {name: corpus.statistics(documents) for name, documents in splits.items()}
    if arguments.json:
        print(json.dumps(counts, indent=2))
        return
    labels = corpus.labels(document for documents in splits.values() for document in documents)
    table = {
        "": list(splits),
        "documents": [count["documents"] for count in counts.values()],
        "sentences": [count["sentences"] for count in counts.values()],
        "characters a sentence": [round(count["characters_per_sentence"]["mean"]) for count in counts.values()],
        "overlapping mentions": [count["overlapping"] for count in counts.values()],
    }
    table |= {label: [count["mentions"].get(label, 0) for count in counts.values()] for label in labels}
    for first, values in table.items():
        print(f"{first:<24}" + "".join(f"{value:>10}" for value in values))


COMMANDS = {"fetch": fetch.main, "stats": stats_command, "predict": predict.main, "score": score_command}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)

"""`python -m llamalora COMMAND`: dispatches to the module that does the work."""

import argparse
import json

from . import audit, fetch, inspect_adapter, merging, predict, score, stats, tables, verify
from .cli import UsageError, run_command

HELP = """usage: python -m llamalora COMMAND ...

commands:
  fetch    bring a real small checkpoint (smollm2-135m) or the corpus (bc5cdr)
  stats    documents, sentences and mentions of a corpus, beside the paper's Table 5
  audit    exact parameter counts, storage and GPU memory of a model before it is trained
  predict  annotate new text with a trained run
  score    score PubTator predictions against gold
  merge    base model and adapter as one Hugging Face folder
  tables   the paper's tables again, ours beside the paper's
  verify   check every file that a run has saved against its SHA-256 sum
  inspect  norms, spectra and ranks of a trained adapter, as table, page and heat maps

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


COMMANDS = {
    "fetch": fetch.main,
    "stats": stats.main,
    "audit": audit.main,
    "predict": predict.main,
    "score": score_command,
    "merge": merging.main,
    "inspect": inspect_adapter.main,
    "tables": tables.main,
    "verify": verify.main,
}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)

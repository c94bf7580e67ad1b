"""`python -m llamalora COMMAND`: dispatches to the module that does the work."""

from .cli import UsageError, run_command
from .commands import audit, compare, convert, fetch, inspect, merge, predict, score, verify
from .mistakes import nearest
from .paper import stats, tables

HELP = """usage: python -m llamalora COMMAND ...

commands:
  fetch    bring a real small checkpoint (smollm2-135m) or the corpus (bc5cdr)
  stats    documents, sentences and mentions of a corpus, beside the paper's Table 5
  audit    exact parameter counts, storage and GPU memory of a model before it is trained
  predict  annotate new text with a trained run
  score    score PubTator predictions against gold
  convert  a corpus in another format: brat, BioC, JSON lines, CoNLL, PubTator, tokens with tags
  compare  two runs, or two files of predictions, on the same gold
  merge    base model and adapter as one Hugging Face folder
  tables   the paper's tables again, ours beside the paper's
  verify   check every file that a run has saved against its SHA-256 sum
  inspect  norms, spectra and ranks of a trained adapter, as table, page and heat maps

Each command explains itself with --help. Training is train.py, evaluation eval.py."""


COMMANDS = {
    "fetch": fetch.main,
    "stats": stats.main,
    "audit": audit.main,
    "predict": predict.main,
    "score": score.main,
    "convert": convert.main,
    "compare": compare.main,
    "merge": merge.main,
    "inspect": inspect.main,
    "tables": tables.main,
    "verify": verify.main,
}

SCRIPTS = ("train", "eval")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
    elif argv[0] not in COMMANDS:
        hint = nearest(argv[0], (*COMMANDS, *SCRIPTS)) or f"; choose from {', '.join(COMMANDS)}"
        hint = f"; that is python {argv[0]}.py" if argv[0] in SCRIPTS else hint
        raise UsageError(f"unknown command {argv[0]!r}{hint}")
    else:
        COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_command(main)

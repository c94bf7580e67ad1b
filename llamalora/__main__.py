"""`python -m llamalora COMMAND`: dispatches to the module that does the work."""

from .cli import UsageError, run_command
from .commands import audit, compare, fetch, inspect, merge, plot, predict, score, verify
from .mistakes import nearest
from .paper import stats, tables

HELP = """usage: python -m llamalora COMMAND ...

commands:
  fetch    bring a real small checkpoint (smollm2-135m) or the corpus (bc5cdr)
  stats    documents, sentences and mentions of a corpus, beside Table 5
  audit    exact parameter counts, storage and GPU memory before training
  predict  annotate new text with a trained run
  score    score PubTator predictions against gold
  compare  two runs, or two files of predictions, on the same gold
  merge    base model and adapter as one Hugging Face folder
  tables   the paper's tables again, ours beside the paper's
  verify   check every file that a run has saved against its SHA-256 sum
  plot     loss, learning rate, gradient norm and dev F1 of runs, as a picture
  inspect  norms, spectra and ranks of a trained adapter, as table and page

Each command explains itself with --help.
Training is train.py, evaluation eval.py."""


COMMANDS = {
    "fetch": fetch.main,
    "stats": stats.main,
    "audit": audit.main,
    "predict": predict.main,
    "score": score.main,
    "compare": compare.main,
    "merge": merge.main,
    "plot": plot.main,
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

"""Tables 5 to 8, which need no run: counts of a corpus, the formats, parameters and costs of Llama-2-7B."""

from pathlib import Path

from ..corpus.documents import Span
from ..corpus.read import read_splits
from ..model.config import LLAMA_2
from ..task.definition import Task
from ..task.prompt import render_answer
from ..text_table import wrapped
from . import stats
from .printed import TABLE6, TABLE6_INPUT, TABLE6_MENTIONS

COUNTED = ("5", "6", "7", "8")


def counted(name: str, data: str) -> tuple[str, str]:
    """Title and text of one of Tables 5 to 8; `data` is the corpus folder."""
    from .costs import show_table7, show_table8, table7, table8

    if name == "5":
        splits = read_splits(data)
        title, text = f"Mentions by label ({Path(data).name})", stats.show(stats.statistics(splits))
    elif name == "6":
        title, text = f"Formats of the answer to: {TABLE6_INPUT}", wrapped("\n".join(formats()), indent=20)
    elif name == "7":
        title, text = "Trainable parameters of Llama-2-7B", show_table7(table7(LLAMA_2["llama-2-7b"]))
    else:
        title, text = "Cost, Llama-2-7B", show_table8(table8(LLAMA_2["llama-2-7b"]))
    return f"Table {name}: {title}", text


def formats() -> list[str]:
    """The lines of Table 6, rendered, each ticked if it is the paper's."""
    text = TABLE6_INPUT
    spans = [Span(text.index(m), text.index(m) + len(m), label) for m, label in TABLE6_MENTIONS.items()]
    lines = []
    for (form, labels), printed in TABLE6.items():
        names = ("Disease", "Chemical") if labels == "all" else (labels,)
        answer = render_answer(Task(form, names, per_label=labels != "all"), text, spans)
        lines.append(f"{form:<10} {labels:<8} {answer} {'✓' if answer == printed else f'(printed: {printed})'}")
    return lines

"""The paper's experiments as data: tables of rows, each with the settings in which it differs from the common ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..lora.kinds import KINDS
from ..model.config import LlamaConfig
from .printed import RANKS, TABLE1, TABLE2, TABLE3, TABLE4, TARGETS

Changes = Mapping[str, Any]  # to the settings of `train`

# what the tables vary themselves, and what each run of theirs has in common
VARIED = ("out", "format", "labels", "instruction", "shots", "method", "targets", "rank", "rslora", "dora", "loraplus",
          "seed", "eval_every")  # fmt: skip
BASE: Changes = {"format": "tagging", "labels": "all", "method": "lora", "targets": "all", "rank": 8}


@dataclass(frozen=True)
class Row:
    """A system of a table.

    Attributes:
        title: what it is, a cell for each column of the table's head.
        runs: one training run each, as changes to `BASE`; several answer for one label each and are joined.
            Without a run it is only cited.
        paper: F1 in percent and its deviation, None where the paper gives none.
    """

    title: tuple[str, ...]
    runs: tuple[Changes, ...]
    paper: float | None = None
    deviation: float | None = None

    @property
    def name(self) -> str:
        return ", ".join(self.title)


@dataclass(frozen=True)
class Claim:
    """Something to be judged by a table: what the paper concludes from it, or what is asked beyond the paper.

    Attributes:
        text: the claim in words.
        a, b: titles of the rows whose F1 is compared, A less B.
        equal: the claim is that they do not differ; else that A is better.
    """

    text: str
    a: tuple[str, ...]
    b: tuple[str, ...]
    equal: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the paper, or beyond it.

    Attributes:
        head: titles of the columns that name a row.
        split: on which its systems are scored.
    """

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    split: str = "dev"


def table1(labels: tuple[str, ...], shots: int, chat_model: str | None) -> Table:
    """The first model is called a base model only beside a chat model: of one alone nobody has said which it is."""
    label = "Chemical" if "Chemical" in labels else labels[0]
    prompt = {"instruction": True, "shots": shots}
    rows = []
    if chat_model:
        chat = {"model": chat_model, "labels": label}
        (_, _, *with_prompt), (_, _, *without), _ = TABLE1
        rows.append(Row(("chat model", "instruction and demonstrations"), ({**chat, **prompt},), *with_prompt))
        rows.append(Row(("chat model", "input sentence only"), (chat,), *without))
    first = "base model" if chat_model else "the model"
    (_, _, *base) = TABLE1[-1]
    rows.append(Row((first, "instruction and demonstrations"), ({"labels": label, **prompt},)))
    rows.append(Row((first, "input sentence only"), ({"labels": label},), *base))
    model = "chat model" if chat_model else first
    claim = Claim(
        "The prompt does not matter once the model is fine-tuned",
        (model, "instruction and demonstrations"),
        (model, "input sentence only"),
        equal=True,
    )
    return Table("1", f"Prompt ({label} only)", ("model", "prompt"), tuple(rows), (claim,))


def table2(labels: tuple[str, ...]) -> Table:
    rows, claims = [], []
    for form in ("tagging", "extraction"):
        per_label = tuple({"format": form, "labels": label} for label in labels)
        for how, runs in {"per-label": per_label, "all": ({"format": form},)}.items():
            rows.append(Row((form, how), runs, *TABLE2[form, how]))
    for how, words in {"all": "all labels at once", "per-label": "one model per label"}.items():
        claims.append(Claim(f"Tagging beats extraction ({words})", ("tagging", how), ("extraction", how)))
    claims.append(
        Claim(
            "One model for all labels is as good as one per label", ("tagging", "all"), ("tagging", "per-label"), True
        )
    )
    return Table("2", "Way to solve the task", ("format", "labels"), tuple(rows), tuple(claims))


def table3(ranks: Iterable[int]) -> Table:
    ranks = tuple(ranks)
    least, most = str(min(ranks)), str(max(ranks))
    printed = {(t, r): f1 for t, row in TABLE3.items() for r, f1 in zip(RANKS, row, strict=True)}
    rows = [
        Row((targets, str(rank)), ({"targets": targets, "rank": rank},), printed.get((targets, rank)))
        for targets in TARGETS
        for rank in ranks
    ]
    claims = [
        Claim(f"q,k,v,o at r={least} beats q alone at r={most}", ("q,k,v,o", least), ("q", most)),
        Claim(f"All kinds at r={least} beat q alone at r={most}", ("all", least), ("q", most)),
        Claim(f"All kinds at r={least} beat q,k,v,o at r={most}", ("all", least), ("q,k,v,o", most)),
        Claim(
            f"With all kinds the rank does not matter (r={most} against {least})", ("all", most), ("all", least), True
        ),
    ]
    return Table("3", "Target layers and rank", ("targets", "r"), tuple(rows), tuple(claims) if least != most else ())


def table4() -> Table:
    (lora, _, f1_lora), (full, _, f1_full), (cited, _, f1_cited) = TABLE4
    rows = (
        Row((lora,), ({"rank": 128},), f1_lora),
        Row((full,), ({"method": "full", "rank": 128},), f1_full),
        Row((cited,), (), f1_cited),
    )
    claim = Claim("LoRA on all kinds equals full fine-tuning", (lora,), (full,), equal=True)
    return Table("4", "Against full fine-tuning", ("system",), rows, (claim,), split="test")


def ablation(config: LlamaConfig, rank: int) -> Table:
    """Each kind of layer alone, and all but one, with as many parameters as all nine have at `rank`."""
    sizes = {kind: _size(config, kind, 1) for kind in KINDS}
    budget = rank * sum(sizes.values())
    rows, claims = [Row(("all nine", str(rank)), ({"rank": rank},))], []
    for kind in KINDS:
        others = tuple(other for other in KINDS if other != kind)
        for title, kinds in ((f"{kind} alone", (kind,)), (f"all but {kind}", others)):
            equal = max(1, round(budget / sum(sizes[one] for one in kinds)))
            rows.append(Row((title, str(equal)), ({"targets": ",".join(kinds), "rank": equal},)))
        claims.append(Claim(f"All but {kind} equal all nine", rows[-1].title, rows[0].title, equal=True))
    caption = f"Kinds of layer at {budget:,} trainable parameters"
    return Table("ablation", caption, ("targets", "r"), tuple(rows), tuple(claims))


def _size(config: LlamaConfig, targets: str, rank: int) -> int:
    from ..lora.inject import count_parameters, make_trainable
    from ..model.checkpoint import skeleton

    return count_parameters(make_trainable(skeleton(config), "lora", targets, rank))["trainable"]


def recipe(rates: Mapping[int, Iterable[float]], rates_full: Iterable[float]) -> Table:
    """The search for the learning rates, on the development split: of LoRA for each rank, and of full fine-tuning."""
    rows = [Row(("LoRA", str(r), f"{lr:g}"), ({"rank": r, "lr": lr},)) for r, those in rates.items() for lr in those]
    rows += [Row(("full", "-", f"{lr:g}"), ({"method": "full", "lr": lr},)) for lr in rates_full]
    return Table("recipe", "Learning rates tried", ("method", "r", "learning rate"), tuple(rows))


def methods() -> Table:
    """LoRA beside its relatives, under one recipe."""
    runs: dict[str, Changes] = {
        "LoRA": {},
        "rsLoRA": {"rslora": True},
        "LoRA+ (B learns 4 times as fast)": {"loraplus": 4.0},
        "DoRA": {"dora": True},
        "full fine-tuning of the same layers": {"method": "partial"},
    }
    rows = tuple(Row((name,), (run,)) for name, run in runs.items())
    lora, *others = (row.title for row in rows)
    claims = tuple(Claim(f"{' '.join(title)} equals LoRA", title, lora, equal=True) for title in others)
    return Table("methods", "Low-cost methods", ("method",), rows, claims)

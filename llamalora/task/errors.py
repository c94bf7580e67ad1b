"""What kind of mistake each mention is, and the scores that follow from it.

Gold and predicted mentions are paired one to one, the closest first: the same place and label, the same place, an
overlap under the same label, any overlap. The pairs, and what stays alone, are of six kinds (`KINDS`), and each of the
four schemes of SemEval-2013 task 9.1 (Segura-Bedmar et al. 2013, after MUC-5) counts a kind in its own way (`CREDIT`).
`strict` is the exact score of `score.py`.

The library nervaluate has the same schemes, and the same numbers wherever no mention overlaps two of the other side.
Where one does, it pairs anew for each scheme, in the order of the lists; here one pairing serves all schemes and does
not depend on any order. As there, the figures of a label are those of its mentions alone, so that a mention with
another label is spurious under one label and missing under the other; `kinds` tells of such pairs.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..corpus.documents import label_order
from .score import Keys, fractions, score

KINDS = ("correct", "boundary", "type", "boundary_and_type", "missing", "spurious")
# scheme -> kind -> what a pair of that kind is worth; a kind that is not named is worth nothing
CREDIT: dict[str, dict[str, float]] = {
    "strict": {"correct": 1},
    "exact": {"correct": 1, "type": 1},
    "partial": {"correct": 1, "type": 1, "boundary": 0.5, "boundary_and_type": 0.5},
    "type": {"correct": 1, "boundary": 1},
}
BINS = 10  # of confidence, equally wide
RATES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Match:
    """A gold mention and the predicted one that stands for it, as keys (document, start, end, label).

    Without the one it is spurious, without the other missing. Entities that the text does not hold have a longer key
    (document, ..., string, label), and are spurious.
    """

    gold: tuple | None
    predicted: tuple | None

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.gold is None:
            return "spurious"
        if self.predicted is None:
            return "missing"
        if self.gold[:-1] == self.predicted[:-1]:
            return "correct" if self.gold[-1] == self.predicted[-1] else "type"
        return "boundary" if self.gold[-1] == self.predicted[-1] else "boundary_and_type"

    @property
    def keys(self) -> list[tuple]:
        """Gold and prediction, as far as there are any."""
        return [key for key in (self.gold, self.predicted) if key is not None]

    @property
    def mention(self) -> tuple:
        """The gold mention, or the predicted one where there is none."""
        return self.keys[0]


def match(gold: Keys, predicted: Keys) -> list[Match]:
    """Pairs the mentions, and lists what stays alone, in the order of the texts."""
    pairs = []
    left, right = set(gold), set(predicted)
    for mine, other in sorted(_overlapping(gold, predicted), key=_distance):
        if mine in left and other in right:
            pairs.append(Match(mine, other))
            left.remove(mine)
            right.remove(other)
    pairs += [Match(key, None) for key in left] + [Match(None, key) for key in right]
    return sorted(pairs, key=lambda pair: _place(pair.mention))


def _place(key: tuple) -> tuple:
    return (len(key) > 4, *key)  # what has no place comes last


def _overlapping(gold: Keys, predicted: Keys) -> Iterator[tuple[tuple, tuple]]:
    """All pairs of mentions that share a character."""
    by_document = defaultdict(list)
    for key in sorted(key for key in predicted if len(key) == 4):
        by_document[key[0]].append(key)
    longest = max((key[2] - key[1] for keys in by_document.values() for key in keys), default=0)
    for mention in gold:
        document, start, end, _ = mention
        others = by_document.get(document, [])
        for other in others[bisect_left(others, (document, start - longest)) :]:
            if other[1] >= end:
                break
            if start < other[2]:
                yield mention, other


def _distance(pair: tuple[tuple, tuple]) -> tuple:
    """Less for what belongs together more; distinct for each pair, so that sets have one order."""
    mine, other = pair
    shared = min(mine[2], other[2]) - max(mine[1], other[1])
    return mine[1:3] != other[1:3], mine[-1] != other[-1], -shared, mine, other


def analyse(
    gold: Keys,
    predicted: Keys,
    labels: Iterable[str] = (),
    texts: Mapping[str, str] | None = None,
    known: Collection[tuple[str, str]] | None = None,
    confidence: Mapping[tuple, float] | None = None,
) -> dict:
    """The error analysis, ready for JSON.

    Args:
        labels: to list even if no mention has them.
        texts: of the documents, by id; needed with `known`.
        known: the (label, string) of the mentions in training.
        confidence: of predicted mentions, by key; calibration is measured on those that have one.

    Returns:
        kinds: for `all` mentions and by label (`types`), how many are of each of the `KINDS`, and the gold mentions
            among them (`support`). The label is the gold one, of spurious mentions the predicted one.
        schemes: scheme -> `micro`, `macro` (the mean over labels) and `types` (by label); see `_scheme`.
        confusion: `labels` and `counts`, of which the last row holds what was predicted where no gold mention is, and
            the last column what was not predicted.
        seen: scores (as in `score.py`) of the mentions `seen` in training and `unseen`, gold and predicted each by
            their own label and string; None without `known`.
        words: of gold mentions of one, two, three, and four or more words, how many there are (`gold`) and how many of
            them are `correct`; None without `texts`.
        calibration: see `calibrate`; None without `confidence`.
    """
    labels = label_order([*labels, *(key[-1] for key in gold | predicted)])
    matches = match(gold, predicted)
    kinds = Counter(pair.kind for pair in matches)
    types = {label: Counter(pair.kind for pair in matches if pair.mention[-1] == label) for label in labels}
    alone = {label: Counter(pair.kind for pair in match(_of(label, gold), _of(label, predicted))) for label in labels}
    return {
        "kinds": {"all": _table(kinds), "types": {label: _table(counts) for label, counts in types.items()}},
        "schemes": {name: _schemes(kinds, alone, credit) for name, credit in CREDIT.items()},
        "confusion": _confusion(matches, labels),
        "seen": None if known is None else _by_novelty(gold, predicted, texts or {}, known),
        "words": None if texts is None else _by_words(matches, texts),
        "calibration": None if confidence is None else calibrate(confidence, gold),
    }


def _of(label: str, keys: Keys) -> Keys:
    return {key for key in keys if key[-1] == label}


def _table(kinds: Counter[str]) -> dict:
    return {"support": kinds.total() - kinds["spurious"], **{kind: kinds[kind] for kind in KINDS}}


def _schemes(kinds: Counter[str], alone: Mapping[str, Counter[str]], credit: Mapping[str, float]) -> dict:
    types = {label: _scheme(counts, credit) for label, counts in alone.items()}
    macro = {rate: sum(row[rate] for row in types.values()) / max(1, len(types)) for rate in RATES}
    return {"micro": _scheme(kinds, credit), "macro": macro, "types": types}


def _scheme(kinds: Counter[str], credit: Mapping[str, float]) -> dict:
    """How many pairs are `correct`, `partial` or `incorrect`, what is `missing` and `spurious`, and the fractions."""
    pairs = [kind for kind in KINDS if kind not in ("missing", "spurious")]
    worth = {1: "correct", 0.5: "partial", 0: "incorrect"}
    counts = dict.fromkeys(worth.values(), 0) | {kind: kinds[kind] for kind in ("missing", "spurious")}
    for kind in pairs:
        counts[worth[credit.get(kind, 0)]] += kinds[kind]
    earned, paired = counts["correct"] + counts["partial"] / 2, sum(kinds[kind] for kind in pairs)
    rates = fractions(earned, paired + kinds["spurious"] - earned, paired + kinds["missing"] - earned)
    return counts | {rate: rates[rate] for rate in RATES}


def _confusion(matches: Iterable[Match], labels: Sequence[str]) -> dict:
    row = {label: index for index, label in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in range(len(labels) + 1)]
    for pair in matches:
        here, there = (len(labels) if key is None else row[key[-1]] for key in (pair.gold, pair.predicted))
        counts[here][there] += 1
    return {"labels": list(labels), "counts": counts}


def string_of(key: tuple, texts: Mapping[str, str]) -> str:
    """The string of a mention, in its document or, if that does not hold it, as it was predicted."""
    return key[-2] if len(key) > 4 else texts[key[0]][key[1] : key[2]]


def _by_novelty(gold: Keys, predicted: Keys, texts: Mapping[str, str], known: Collection[tuple[str, str]]) -> dict:
    seen = {key for key in gold | predicted if (key[-1], string_of(key, texts)) in known}
    return {
        "seen": score(gold & seen, predicted & seen)["micro"],
        "unseen": score(gold - seen, predicted - seen)["micro"],
    }


def _by_words(matches: Iterable[Match], texts: Mapping[str, str]) -> dict:
    counts = {name: {"gold": 0, "correct": 0} for name in ("1", "2", "3", "4 or more")}
    for pair in matches:
        if pair.gold:
            words = len(string_of(pair.gold, texts).split())
            row = counts[str(words) if words < 4 else "4 or more"]
            row["gold"] += 1
            row["correct"] += pair.kind == "correct"
    return counts


def calibrate(confidence: Mapping[tuple, float], gold: Keys) -> dict:
    """How far a model knows how sure to be.

    Returns:
        The number of predicted mentions (`count`), their mean `confidence`, the share of them that is `correct`, and
        the expected calibration error `ece`: the mean, over mentions, of |confidence - correct| of their bin. `bins`
        has the same for each tenth (`low`, `high`) that is not empty. Fractions of no mention are 0.0.
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for key, sure in confidence.items():
        bins.setdefault(min(int(sure * BINS), BINS - 1), []).append((sure, key in gold))
    rows = [{"low": place / BINS, "high": (place + 1) / BINS, **_means(bins[place])} for place in sorted(bins)]
    gaps = sum(row["count"] * abs(row["confidence"] - row["correct"]) for row in rows)
    return {**_means(sum(bins.values(), [])), "ece": gaps / max(1, len(confidence)), "bins": rows}


def _means(pairs: Sequence[tuple[float, bool]]) -> dict:
    count = len(pairs)
    sure, right = (sum(column) / max(1, count) for column in zip((0, 0), *pairs, strict=True))
    return {"count": count, "confidence": sure, "correct": right}

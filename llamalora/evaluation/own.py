"""A run's own results, recognised by what they were scored with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..runs.folder import fingerprint, read_fingerprints, read_settings


def scored_with(
    models: Sequence[str | Path], data: str, limit: int | None, precision: str, constrained: bool
) -> dict[str, object]:
    """What decides a result, in the form in which `eval-SPLIT.json` records it.

    Args:
        models: folders with the weights, of adapters, too.
        data: the fingerprint of the corpus.
        limit: only the first so many sentences of the split.
        constrained: only answers that are the sentence with legal tags were allowed.
    """
    return {
        "models": [fingerprint(sorted(Path(folder).glob("*.safetensors"))) for folder in models],
        "data": data,
        "limit": limit,
        "precision": precision,
        "constrained": constrained,
    }


def own_scoring(run: Path, split: str) -> dict[str, object]:
    """What a run's own result on a split is scored with: its best model, freely decoded, in its precision, on all of
    the split, but of the development split on what --eval-limit leaves.

    Raises:
        CheckpointError: no run is there.
    """
    settings = read_settings(run)
    limit = settings.eval_limit if split == "dev" else None
    return scored_with([run / "best"], read_fingerprints(run).get("data", ""), limit, settings.precision, False)


def foreign(scored: Mapping[str, object], run: Path, split: str) -> list[str]:
    """In words, in what a result differs from the run's own on that split."""
    own = own_scoring(run, split)
    words = {
        "models": f"it is not about the model in {run / 'best'}",
        "data": "it is not on the corpus of the run",
        "limit": f"it is on {_sentences(scored)}, the run's own on {_sentences(own)}",
        "precision": f"it was computed in {scored.get('precision')}, the run's own in {own['precision']}",
        "constrained": "its answers were constrained",
    }
    return [words[name] for name in own if name not in scored or scored[name] != own[name]]


def _sentences(scored: Mapping[str, object]) -> str:
    limit = scored.get("limit")
    return "all sentences" if limit is None else f"the first {limit}"

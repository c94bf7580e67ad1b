"""What benchmarks/reproduction.py makes of kept cells."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamalora.paper.experiments import Row, methods, table3

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "docs/results/cells"


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return SimpleNamespace(kept=import_module("kept"), conclusions=import_module("conclusions"))


@pytest.fixture
def kept(scripts, tmp_path):
    """Reads some of the kept results, changed, beside all others of their seed."""

    def read(**changes):
        for path in CELLS.glob("*.json"):
            result = json.loads(path.read_text())
            if result["runs"][0]["seed"] != 0:
                continue
            if all(run["lr"] == 4e-3 and run["labels"] == "all" for run in result["runs"]):
                result["runs"] = [run | changes for run in result["runs"]]
            (tmp_path / path.name).write_text(json.dumps(result))
        return scripts.kept.Kept.read(tmp_path)

    return read


ROW = Row(("LoRA",), ({"rank": 8, "lr": 4e-3},))


def test_a_result_is_found_by_what_decided_it(kept):
    assert [*kept().by_seed(ROW, "dev")] == [0]
    assert not kept().by_seed(ROW, "test")
    assert [*kept(seed=2).by_seed(ROW, "dev")] == [2]
    for free in ({"precision": "fp32"}, {"out": "elsewhere"}, {"eval_batch": 7}, {"compile": "off"}):
        assert kept(**free).by_seed(ROW, "dev")
    for other in ({"epochs": 3}, {"dropout": 0.1}, {"lr": 3e-3}):
        assert not kept(**other).by_seed(ROW, "dev")


@pytest.mark.parametrize("changes, message", [
    ({"limit_train": 400}, "is of a part of the corpus"),
    ({"eval_limit": 20}, "is of a part of the corpus"),
    ({"data": "sample"}, "is of another data"),
])  # fmt: skip
def test_results_that_cannot_stand_beside_the_others_are_refused(kept, changes, message):
    with pytest.raises(SystemExit, match=message):
        kept(**changes)


def test_every_rank_has_its_best_rate(kept, scripts):
    found = kept()
    for rank, rate in found.rates.items():
        tried = {}
        for lr in scripts.kept.RATES[rank]:
            (result,) = found.results(Row(("",), ({"rank": rank, "lr": lr},)), "dev")
            tried[lr] = result["micro"]["f1"]
        assert max(tried, key=tried.__getitem__) == rate


def test_a_row_counts_the_seeds_that_all_rows_have(kept, scripts):
    """Others would compare seeds, too."""
    found, result = kept(), json.loads((CELLS / "tagging-all-all-r8-s0-ccfa5a0c83.json").read_text())
    for seed in (1, 2):
        key = scripts.kept.runs_of({"runs": [result["runs"][0] | {"seed": seed}]})
        found.by_runs[key, "dev"] = result
    table = table3((2, 8))
    rows = {tuple(row["title"]): row for row in found.summary(table)["rows"]}
    assert rows["all", "8"]["seeds"] == rows["all", "2"]["seeds"] == 1


def test_each_method_stands_at_its_own_best_rate(kept):
    table, tried = kept().at_own_rates(methods())
    for row in table.rows:
        at = tried[row.name]
        assert len(at) >= 3 and at[row.runs[0]["lr"]] == max(at.values())
    assert len({row.runs[0]["lr"] for row in table.rows if row.name.startswith("rsLoRA") or row.name == "LoRA"}) == 2


def test_of_the_same_runs_one_result_is_kept(kept, scripts, tmp_path):
    kept()
    name = "tagging-all-all-r8-s0-ccfa5a0c83"
    (tmp_path / "other.json").write_text((tmp_path / f"{name}.json").read_text())
    with pytest.raises(SystemExit, match=f"{name}.json: is of the same runs as other; keep one of them"):
        scripts.kept.Kept.read(tmp_path)


def test_rows_that_were_run_again_stand_beside_rows_of_that_machine(scripts):
    kept = scripts.kept.Kept.read(CELLS)
    assert kept.again and kept.again.keys() <= kept.by_runs.keys()
    (first,), (second,) = kept.results(ROW, "dev")[:1], kept.beside_again.results(ROW, "dev")[:1]
    assert {result["made_by"]["machine"]["device"] for result in (first, second)} >= {"NVIDIA H200"}
    assert first["runs"][0]["seed"] == second["runs"][0]["seed"] == 0


def test_what_was_chosen_under_the_constraint_is_scored_under_it(kept, scripts):
    found = kept()
    (free,) = found.results(ROW, "dev")
    key = scripts.kept.runs_of(free)
    assert found.scored(free) == []
    for constrained, word in ((False, ""), (True, ", constrained")):
        for split in ("dev", "test"):
            found.by_runs[key, split + word] = {**free, "constrained": constrained, "split": split}
        dev, test = found.scored(free)[0]
        assert (dev["constrained"], test["constrained"]) == (constrained, constrained)
        assert (dev["split"], test["split"]) == ("dev", "test")


def claim(text: str, verdict: str) -> dict:
    exact = {"difference": 0.012, "low": -0.008, "high": 0.032, "verdict": verdict}
    return {"text": text, "equal": False, "by": {"exact": exact}}


def test_a_verdict_is_read_in_words(scripts):
    text = "One model for all labels is as good as one per label"
    assert "(-0.8 to +3.2)" in scripts.conclusions.reading(claim(text, "holds"))
    assert scripts.conclusions.reading(claim("B beats A", "not decided")).startswith(
        "B beats A: open (+1.2, -0.8 to +3.2); about 2.8"
    )
    apart = claim("A equals B", "not decided") | {"equal": True}
    apart["by"]["exact"]["low"] = 0.002
    assert "whether the difference exceeds a point is open (+1.2, +0.2" in scripts.conclusions.reading(apart)
    with pytest.raises(SystemExit, match="READINGS has no words for 'B beats A', which does not hold"):
        scripts.conclusions.reading(claim("B beats A", "does not hold"))

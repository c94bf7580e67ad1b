"""The table, the heat maps and the page of `inspect`: complete, well-formed, and without any other file."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from helpers import randomise_lora, tiny_model

from llamalora.__main__ import main
from llamalora.cli import UsageError
from llamalora.errors import RunError
from llamalora.inspection import report
from llamalora.lora.adapter import save_adapter
from llamalora.lora.inject import inject_lora
from llamalora.model.checkpoint import save_model

image = pytest.importorskip("matplotlib.image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, an adapter of all kinds, one of three kinds with a higher rank, and an untrained one."""
    root = tmp_path_factory.mktemp("report")
    save_model(tiny_model(), root / "base")
    for name, targets, rank in (("one", "all", 3), ("two", "q,down,embed", 20), ("zero", "v", 3)):
        model = tiny_model()
        inject_lora(model, targets, rank)
        if name != "zero":
            randomise_lora(model, seed=rank)
        save_adapter(model, root / name)
    return root


@pytest.fixture(scope="module")
def written(folders):
    """The output folder of a run with everything on."""
    one, two, base, out = (str(folders / name) for name in ("one", "two", "base", "out"))
    main(["inspect", one, "--model", base, "--against", two, "--spectra", "--layers", "1,head", "--out", out])
    return folders / "out"


@pytest.fixture(scope="module")
def result(written):
    return json.loads((written / "inspect.json").read_text())


@pytest.fixture(scope="module")
def page(written):
    return (written / "inspect.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks that every element is closed in its place, and collects texts and attributes."""

    VOID = {"meta", "link", "br", "input", "img", "hr"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.attributes = [], {}, []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, text):
        for element in self.open:
            self.texts[element] = self.texts.get(element, "") + text


def page_data(page: str) -> dict:
    return json.loads(Reader(page).texts["script", "data"])


# ---- the page ----


def test_the_page_is_well_formed_and_loads_nothing(page):
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and "{{" not in page
    assert reader.texts["h1", None].startswith("Inside ")
    assert not [a for a in reader.attributes if a[1] in ("src", "href", "action")]
    assert not re.findall(r"<link|@import|url\(|https?://(?!www\.w3\.org/2000/svg\")", page)
    assert "prefers-color-scheme: dark" in page


def test_the_page_holds_the_data_of_every_cell(page, result):
    cells = {cell["name"]: cell for cell in page_data(page)["matrices"]}
    assert cells.keys() == {matrix["name"] for matrix in result["matrices"]}
    for matrix in result["matrices"]:
        cell = cells[matrix["name"]]
        assert cell.keys() == matrix.keys()
        assert cell["singular_values"] == pytest.approx(matrix["singular_values"], rel=1e-4)
        for name in report.METRICS.keys() & matrix.keys():
            assert cell[name] == pytest.approx(matrix[name], rel=1e-4)
    assert list(page_data(page)["metrics"]) == report.present(result) == list(report.METRICS)


def test_phi_is_thinned_out_to_a_grid_that_keeps_its_ends(page, result):
    (matrix,) = [m for m in result["matrices"] if m["kind"] == "embed"]
    (cell,) = [c for c in page_data(page)["matrices"] if c["kind"] == "embed"]
    assert len(matrix["phi_A"]) == 3 and len(matrix["phi_A"][0]) == 20
    shown = cell["phi_A"]
    assert shown["i"] == [1, 2, 3] and len(shown["j"]) == 16 and (shown["j"][0], shown["j"][-1]) == (1, 20)
    for row, i in enumerate(shown["i"]):
        for column, j in enumerate(shown["j"]):
            assert shown["phi"][row][column] == pytest.approx(matrix["phi_A"][i - 1][j - 1], rel=1e-3)


def test_names_cannot_break_out_of_the_page(result):
    hostile = "</script><img src=x onerror=alert(1)>{{data}}&"
    page = report.html_page(result | {"adapter": hostile, "model": hostile, "against": hostile})
    reader = Reader(page)
    assert reader.texts["h1", None] == f"Inside {hostile}"
    assert not [attribute for attribute in reader.attributes if attribute[0] == "img"]
    strange = [matrix | {"name": hostile} for matrix in result["matrices"]]
    assert page_data(report.html_page(result | {"matrices": strange}))["matrices"][0]["name"] == hostile


@pytest.mark.parametrize("name", ["two", "zero"])
def test_adapters_of_few_kinds_and_without_training(folders, name, tmp_path):
    main(["inspect", str(folders / name), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "inspect.json", "inspect.html", "norm.png", "effective_rank.png"
    }  # fmt: skip
    data = page_data((tmp_path / "out" / "inspect.html").read_text(encoding="utf-8"))
    assert len(data["matrices"]) == {"two": 5, "zero": 2}[name]
    if name == "zero":
        assert all(value == 0 for cell in data["matrices"] for value in cell["singular_values"])


def test_pointing_at_cells_in_a_browser(page, opened):
    """Hovering shows a spectrum, clicking holds it, arrow keys walk, another metric repaints."""
    script = """<script>
    const log = [], at = (name, event) => {
      document.querySelector(`[data-name="${name}"]`).dispatchEvent(event);
      log.push([$("name").textContent, $("curve").getAttribute("d").split(",").length - 1, $("tip").textContent]);
    };
    at("model.layers.0.self_attn.q_proj", new PointerEvent("pointerenter"));
    at("model.layers.1.mlp.up_proj", new MouseEvent("click"));
    at("model.layers.0.mlp.up_proj", new PointerEvent("pointerenter"));
    at("model.layers.1.mlp.up_proj", new KeyboardEvent("keydown", {key: "ArrowRight"}));
    document.querySelector("input[value=norm]").click();
    at("lm_head", new PointerEvent("pointerenter"));
    document.body.replaceChildren();
    element(document.body, "pre", {id: "log"}, JSON.stringify(log));
    </script></body>"""
    dom = opened(page.replace("</body>", script))
    log = json.loads(re.search(r'<pre id="log">(.*?)</pre>', dom)[1])
    assert [name for name, _, _ in log] == ["layer 0 · q", "layer 1 · up", "layer 1 · up", "output head", "output head"]
    assert all(points == 3 for _, points, _ in log)  # one for each singular value
    norm = next(cell["norm"] for cell in page_data(page)["matrices"] if cell["name"] == "lm_head")
    assert log[-1][2].startswith("output head: ") and float(log[-1][2].split()[-1]) == pytest.approx(norm, rel=1e-2)


def test_nothing_is_cut_or_collides_at_any_width(page, opened):
    """At the widths of a telephone, a laptop and a desk: nothing sticks out of the page or of what holds it, and no
    two labels lie on each other."""
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>' for width in (420, 1200, 1900)
    )
    script = """<script>
    const clear = (a, b) => a.right <= b.left + 0.5 || a.bottom <= b.top + 0.5;
    const collide = ([, a], [, b]) => !clear(a, b) && !clear(b, a);
    onload = () => {
      const found = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => {
        const all = (query) => [...page.querySelectorAll(query)];
        const labels = all("#grid > span, #panes text, td").map((e) => [e.textContent, e.getBoundingClientRect()]);
        const pairs = labels.flatMap((one, k) => labels.slice(k + 1).map((other) => [one, other]));
        return {
          out: all("html, section, .scroll, #legend, #panes").filter((e) => e.scrollWidth > e.clientWidth + 1)
            .map((e) => e.id || e.className || e.tagName),
          collide: pairs.filter(([one, other]) => collide(one, other)).map(([[one], [other]]) => `${one} / ${other}`),
          figures: all("td[data-kind=q]").length,
        };
      });
      document.body.innerHTML = "<pre></pre>";
      document.querySelector("pre").textContent = JSON.stringify(found);
    };
    </script>"""
    dom = opened(f"<!DOCTYPE html><body>{frames}{script}</body>")
    found = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom)[1]))
    assert found == [{"out": [], "collide": [], "figures": 2 + len(report.METRICS)}] * 3


# ---- heat maps ----


def test_heat_maps_are_pictures(written):
    for name in ("ratio", "effective_rank", "amplification"):
        picture = image.imread(written / f"{name}.png")
        assert min(picture.shape[:2]) > 150
        assert len({tuple(pixel) for pixel in (picture[::3, ::3, :3].reshape(-1, 3) * 255).round()}) > 10


@pytest.mark.parametrize("kinds", [("embed",), ("head",), ("q",), ("down", "head")])
def test_a_heat_map_of_few_kinds(result, kinds, tmp_path):
    part = result | {
        "kinds": {kind: result["kinds"][kind] for kind in kinds},
        "matrices": [matrix for matrix in result["matrices"] if matrix["kind"] in kinds],
    }
    report.save_heatmap(part, "norm", tmp_path / "norm.png")
    assert image.imread(tmp_path / "norm.png").size
    Reader(report.html_page(part))


# ---- the table ----


def test_the_table_shows_medians_and_extremes(result):
    table = report.format_table(result)
    lines = table.splitlines()
    heads = [line.split() for line in lines if line.startswith("kind ")]
    assert heads[0][:3] == ["kind", "matrices", "parameters"] and len(sum(heads, [])) > len(report.METRICS)
    assert [line.split()[0] for line in lines[1:10]] == list(result["kinds"])
    assert all(len(line) <= 80 for line in lines)
    q = next(line for line in lines if line.startswith("q "))
    assert report.number(result["kinds"]["q"]["norm"]["median"]) in q.split()
    largest = max(result["matrices"], key=lambda matrix: matrix["norm"])
    extremes, _ = [line for line in lines if line.strip().startswith("|dW| ")]
    assert extremes.split()[1] == report.label(largest)
    # and what each word means
    meanings = table.split("what the words mean\n")[1].splitlines()
    assert [line.split("  ")[1].strip() for line in meanings] == [metric.short for metric in report.METRICS.values()]
    assert "nan" not in table and "None" not in table


def test_numbers():
    shown = {0: "0", 7: "7", 4.5: "4.50", 12.0: "12", 0.99999: "1", 0.012345: "0.0123", 123.4: "123"}
    assert {value: report.number(value) for value in shown} == shown
    assert report.number(1234567.0) == "1.23e+06" and report.number(1.5e-7) == "1.50e-07"
    assert report.number(0.0567, 2) == "0.057"


# ---- writing ----


def test_an_output_folder_that_is_there_is_kept(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    main(["inspect", str(folders / "one"), "--out", str(tmp_path / "empty")])
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    with pytest.raises(UsageError, match="exists"):
        main(["inspect", str(folders / "one"), "--out", str(tmp_path / "empty")])
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == before
    assert (tmp_path / "empty" / "inspect.json").stat().st_mode & 0o444 == 0o444


def test_nothing_is_left_of_an_output_that_fails(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "save_heatmap", fail)
    with pytest.raises(RunError, match="No space left"):
        main(["inspect", str(folders / "one"), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_without_out(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "one", tmp_path / "adapter")
    main(["inspect", "adapter"])
    assert capsys.readouterr().out.startswith("kind")
    assert len(list(tmp_path.rglob("*"))) == 3  # the adapter and its two files

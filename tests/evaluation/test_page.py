"""The page of predictions: complete, unbreakable, and alive in a real browser."""

import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

from llamalora.corpus.documents import Document, Span, all_sentences, sentence_bounds
from llamalora.evaluation.answered import Answer
from llamalora.evaluation.page import ERRORS, describe, html_page, predictions_page
from llamalora.task.definition import Parsed
from llamalora.task.error_tables import tables
from llamalora.task.errors import KINDS, analyse, match
from llamalora.task.score import span_keys

HOSTILE = "</script><b>&amp;\"'\u2028{{data}}"
TEXT = "Severe renal failure after aspirin, lead or gold. No fever \U0001d6fc but no rash."


def document(id: str, text: str, *spans: tuple[str, str]) -> Document:
    found = [Span(text.index(string), text.index(string) + len(string), label) for string, label in spans]
    return Document(id, text, tuple(found), sentence_bounds(text))


GOLD = [
    document("7", TEXT, ("renal failure", "Disease"), ("aspirin", "Chemical"), ("lead", "Chemical"),
             ("gold", "Chemical"), ("fever", "Disease")),
    document("8", "Nothing here. Nor there."),
    document("9", f"A {HOSTILE} rash.", (HOSTILE, "<Gene>"), ("rash", "Disease")),
]  # fmt: skip
MINE = [
    document("7", TEXT, ("Severe renal failure", "Disease"), ("aspirin", "Chemical"), ("lead", "Disease"),
             ("or gold", "Disease"), ("rash", "Disease")),
    GOLD[1],
    document("9", GOLD[2].text, (HOSTILE, "<Gene>"), ("rash", "Disease")),
]  # fmt: skip
PREDICTED = span_keys(MINE) | {("7", 0, "not in source", "nausea <i>", "Disease")}
CONFIDENCE = dict.fromkeys(span_keys(MINE), 0.25)
KNOWN = {("Disease", "fever"), ("Chemical", "aspirin")}


def page_of(documents=GOLD, predicted=PREDICTED, asked=None, gold=None, confidence=CONFIDENCE, known=KNOWN) -> str:
    texts = {document.id: document.text for document in documents}
    gold = span_keys(documents) if gold is None else gold
    shown = describe(match(gold, predicted), texts, confidence, known)
    counts = tables(analyse(gold, predicted, (), texts, known, confidence))
    asked = all_sentences(documents) if asked is None else asked
    return html_page(
        "Predictions of <runs/one>", ["3 & 4"], documents, asked, shown, ERRORS, ["correct"], "Only errors", counts
    )


class Reader(HTMLParser):
    """Checks that every element is closed, and collects the texts of elements by their id."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.tags = [], Counter(), Counter()
        self.by_id: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        if tag not in ("meta", "br", "input"):
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for tag, id in self.open:
            self.by_id[id or tag] = self.by_id.get(id or tag, "") + text


def data_of(page: str) -> dict:
    return json.loads(Reader(page).by_id["data"])


def test_the_page_holds_every_mention_at_its_place():
    data = data_of(page_of())

    def words(unit: dict, side: dict | None) -> str | None:
        if side is None:
            return None
        return side["string"] if "string" in side else unit["text"][side["start"] : side["end"]]

    seen = []
    for unit in data["units"]:
        for mention in unit["mentions"]:
            sides = (words(unit, mention.get(side)) for side in ("gold", "predicted"))
            seen.append((unit["document"], mention["kind"], *sides, mention["seen"], *mention["notes"]))
    assert sorted(seen, key=str) == sorted([
        ("7", "boundary", "renal failure", "Severe renal failure", False, "confidence 0.25"),
        ("7", "correct", "aspirin", "aspirin", True, "confidence 0.25"),
        ("7", "type", "lead", "lead", False, "confidence 0.25"),
        ("7", "boundary_and_type", "gold", "or gold", False, "confidence 0.25"),
        ("7", "missing", "fever", None, True),
        ("7", "spurious", None, "rash", False, "confidence 0.25"),
        ("7", "spurious", None, "nausea <i>", False),
        ("9", "correct", HOSTILE, HOSTILE, False, "confidence 0.25"),
        ("9", "correct", "rash", "rash", False, "confidence 0.25"),
    ], key=str)  # fmt: skip
    assert data["labels"] == ["Disease", "Chemical", "<Gene>"] and list(data["kinds"]) == list(KINDS)
    assert [unit["text"] for unit in data["units"] if unit["document"] == "8"] == ["Nothing here.", "Nor there."]


def test_sentences_that_a_mention_crosses_are_one():
    whole = document("1", "One. Two. Three.", ("One. Two", "Gene"), ("Three", "Gene"))
    data = data_of(page_of([whole], span_keys([whole]), confidence={}))
    assert [(unit["text"], len(unit["mentions"])) for unit in data["units"]] == [("One. Two.", 1), ("Three.", 1)]
    only = data_of(page_of([whole], set(), asked=all_sentences([whole])[2:], gold=set()))
    assert [unit["text"] for unit in only["units"]] == ["Three."]


def test_nothing_in_the_data_breaks_the_page_and_it_loads_nothing():
    page = page_of()
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and reader.tags["script"] == 2 and not reader.tags["b"]
    assert reader.by_id["h1"] == "Predictions of <runs/one>" and "3 & 4" in reader.by_id["p"]
    assert "<Gene>" in reader.by_id["table"]
    assert not re.findall(r"<link|@import|url\(|https?://|src=|innerHTML", page)
    assert "prefers-color-scheme: dark" in page


def test_without_training_and_confidence():
    mentions = [mention for unit in data_of(page_of(known=(), confidence={}))["units"] for mention in unit["mentions"]]
    assert len(mentions) == 9 and not any("seen" in mention or mention["notes"] for mention in mentions)


# ---- without gold ----


def answers_about(documents) -> list[Answer]:
    """Predictions with confidences from 0.2 up."""
    answers, sure = [], 0.2
    for sentence in all_sentences(documents):
        confidence = {}
        for span in sentence.spans:
            confidence[span] = sure
            sure = min(1.0, sure + 0.3)
        parsed = Parsed(tuple(confidence), (), (), (), True, False, False, 0, ())
        answers.append(Answer(sentence, "", parsed, confidence=confidence))
    return answers


def test_predictions_without_gold_are_shown_by_their_confidence():
    documents = [document("7", TEXT, ("renal failure", "Disease"), ("lead", "Chemical"), ("rash", "Disease")), GOLD[1]]
    answers = answers_about(documents)
    answers[-1] = replace(answers[-1], overlong=True)
    page = predictions_page("notes.txt <1>", documents, answers, KNOWN)
    data, reader = data_of(page), Reader(page)
    seen = [(m["kind"], m["predicted"]["label"], *m["notes"]) for unit in data["units"] for m in unit["mentions"]]
    assert seen == [
        ("unsure", "Disease", "confidence 0.20"),
        ("likely", "Chemical", "confidence 0.50"),
        ("likely", "Disease", "confidence 0.80"),
    ]
    assert not any("gold" in mention for unit in data["units"] for mention in unit["mentions"])
    assert reader.by_id["kinds"] == "Confidence" and reader.by_id["labels"] == "Label"
    assert "may lack mentions: 1" in reader.by_id["p"] and "gold" not in reader.by_id["p"]
    assert reader.by_id["h1"] == "notes.txt <1>"
    assert "Disease011" in reader.by_id["table"]  # by confidence from above


PREDICTED_LOG = """<script>
const log = {}, all = (selector) => [...document.querySelectorAll(selector)];
const state = () => ({status: $("status").textContent, pressed: $("only").getAttribute("aria-pressed"),
  tags: all(".tag").map((tag) => [tag.textContent.replaceAll("\\u00a0", " "), tag.getAttribute("aria-label")])});
log.all = state();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "e"})); log.unsure = state();
document.body.replaceChildren();
element(document.body, "pre", {id: "log"}, JSON.stringify(log));
</script></body>"""


def test_predictions_without_gold_in_a_browser(opened):
    strings = ("renal failure", "Disease"), ("lead", "Chemical"), ("fever", "Disease"), ("rash", "Disease")
    documents = [document("7", TEXT, *strings)]
    log = after(opened(predictions_page("x", documents, answers_about(documents)).replace("</body>", PREDICTED_LOG)))
    assert log["all"]["status"] == "4 mentions in 2 sentences" and log["all"]["pressed"] == "false"
    assert log["all"]["tags"] == [
        ["Disease · unsure", "Disease “renal failure”, confidence 0.20"],
        ["Chemical · likely", "Chemical “lead”, confidence 0.50"],
        ["Disease · likely", "Disease “fever”, confidence 0.80"],
        ["Disease", "Disease “rash”, confidence 1.00"],
    ]
    assert log["unsure"]["status"] == "3 mentions in 2 sentences, of 4 in 2" and log["unsure"]["pressed"] == "true"


def test_the_button_does_nothing_where_nothing_is_usual(opened):
    documents = [document("7", TEXT, ("renal failure", "Disease"))]
    log = after(opened(predictions_page("x", documents, answers_about(documents)).replace("</body>", PREDICTED_LOG)))
    assert log["all"]["pressed"] == log["unsure"]["pressed"] == "false"
    assert log["all"]["tags"] == log["unsure"]["tags"]


# ---- in a browser ----

LOG = """<script>
const log = {}, number = (text) => parseInt(text.replaceAll(",", "")) || 0;
const all = (selector) => [...document.querySelectorAll(selector)];
const state = () => ({
  status: $("status").textContent,
  counts: Object.fromEntries(Object.entries(facets).map(([id, facet]) =>
    [id, Object.fromEntries(facet.boxes.map(({value, output}) => [value, number(output.textContent)]))])),
  texts: all("article p").map((p) => {
    const copy = p.cloneNode(true);
    copy.querySelectorAll(".tag, .lost").forEach((mark) => mark.remove());
    return copy.textContent;
  }),
  boxes: all("article .box, article .line").map((part) => [part.className, part.textContent]),
  tags: all(".tag").map((tag) => [tag.textContent, tag.getAttribute("aria-label")]),
});
const uncheck = (id, value) => facets[id].boxes.find((one) => one.value === value).box.click();
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
const search = (text) => { $("search").value = text; $("search").dispatchEvent(new Event("input")); };
log.all = state();
press("e"); log.errors = state();
uncheck("labels", "Chemical"); log.disease = state();
uncheck("novelty", false); log.seen = state();
$("reset").click(); search("RASH"); log.search = state();
$("reset").click(); log.again = state();
press("j"); press("j");
log.focused = [document.activeElement.getAttribute("aria-label"), $("tip").hidden, $("tip").textContent];
press("k"); press("Escape"); log.back = [document.activeElement.textContent, $("tip").hidden];
document.querySelector(".box").dispatchEvent(new PointerEvent("pointerenter")); log.hover = $("tip").textContent;
document.body.replaceChildren();
element(document.body, "pre", {id: "log"}, JSON.stringify(log));
</script></body>"""


def after(dom: str) -> dict:
    return json.loads(unescape(re.search(r'<pre id="log">(.*?)</pre>', dom, re.DOTALL)[1]))


def test_filters_search_and_keys(opened):
    log = after(opened(page_of().replace("</body>", LOG)))
    texts = [unit["text"] for unit in data_of(page_of())["units"]]
    shown = log["all"]
    assert shown["status"] == "9 mentions in 5 sentences"
    assert [text.strip() for text in shown["texts"]] == texts
    counts = Counter(pair.kind for pair in match(span_keys(GOLD), PREDICTED))
    assert shown["counts"]["kinds"] == counts
    assert shown["counts"]["labels"] == {"Disease": 7, "Chemical": 3, "<Gene>": 1}
    assert shown["counts"]["novelty"] == {"true": 2, "false": 7}
    assert ["first box of-boundary", "Severe "] in shown["boxes"]
    assert ["last line by-boundary box of-boundary", "renal failure"] in shown["boxes"]
    assert ["first last box of-spurious", "rash"] in shown["boxes"]  # behind a character of two UTF-16 units
    assert ["line by-missing", "fever"] in shown["boxes"]
    assert ["first last line by-correct box of-correct", HOSTILE] in shown["boxes"]
    tags = [text.replace("\u00a0", " ") for text, _ in shown["tags"]]
    assert tags == [
        "Disease · boundary", "Chemical", "Chemical → Disease", "Chemical → Disease · boundary",
        "Disease · not in the text", "Disease · missing", "Disease · spurious", "<Gene>", "Disease",
    ]  # fmt: skip
    assert shown["tags"][0][1] == (
        "wrong boundary, gold: Disease “renal failure”, predicted: Disease “Severe renal failure”, "
        "confidence 0.25, not seen in training"
    )

    assert log["errors"]["status"] == "6 mentions in 2 sentences, of 9 in 5"
    assert log["errors"]["counts"]["kinds"] == counts  # a count tells what its box would show
    assert log["errors"]["counts"]["labels"] == {"Disease": 6, "Chemical": 2, "<Gene>": 0}
    assert not [name for name, _ in log["errors"]["boxes"] if "correct" in name]
    assert log["disease"]["counts"]["kinds"]["missing"] == 1 and log["disease"]["counts"]["kinds"]["correct"] == 2
    assert log["seen"]["status"] == "1 mention in 1 sentence, of 9 in 5"
    assert [tag[0].replace("\u00a0", " ") for tag in log["seen"]["tags"]] == ["Disease · missing"]
    assert log["search"]["status"] == "4 mentions in 2 sentences, of 9 in 5"
    assert log["again"] == shown

    assert log["focused"][0].startswith("correct, gold: Chemical “aspirin”") and log["focused"][1] is False
    assert "confidence 0.25" in log["focused"][2] and "confidence 0.25" in log["hover"]
    assert log["back"] == ["Disease\u00a0·\u00a0boundary", True]


def test_five_thousand_sentences_are_drawn_as_one_scrolls(opened):
    documents = [
        document(f"d{n}", f"Sentence {n} has a fever and lead in it.", ("fever", "Disease"), ("lead", "Chemical"))
        for n in range(5000)
    ]
    predicted = {(*key[:3], "Gene") if key[0].endswith("7") else key for key in span_keys(documents)}
    page = page_of(documents, predicted, confidence={})
    script = """<script>
    const start = performance.now();
    apply();
    const log = {drawn: document.querySelectorAll("article").length, status: $("status").textContent};
    log.filter = performance.now() - start;
    for (let k = 0; k < 200; k++) step(1);
    log.later = document.querySelectorAll("article").length;
    log.text = document.activeElement.closest("article").textContent;
    document.body.replaceChildren();
    element(document.body, "pre", {id: "log"}, JSON.stringify(log));
    </script></body>"""
    log = after(opened(page.replace("</body>", script)))
    assert log["status"] == "10,000 mentions in 5,000 sentences"
    assert 0 < log["drawn"] <= 200 and log["later"] >= 100
    assert "Sentence 99 " in log["text"]
    assert log["filter"] < 3000  # ms; about 20 on a laptop

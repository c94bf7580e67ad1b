"""Scores of answers, and how answers of several systems are joined."""

from pathlib import Path

from llamalora.corpus.documents import Document, Span, sentences_of
from llamalora.corpus.read import read_documents
from llamalora.evaluation.answered import Answer, join_answers, select_sentences
from llamalora.evaluation.result import assess, format_report, predicted_documents
from llamalora.task.definition import Task
from llamalora.task.parse import parse
from llamalora.task.prompt import render_answer

HOME = Path(__file__).parents[2]


def gold_answers(documents, task, change=lambda output: output):
    """Answers of a model that knows the gold, after `change`."""
    for document in documents:
        for sentence in sentences_of(document):
            output = change(render_answer(task, sentence.text, sentence.spans))
            yield Answer(sentence, output, parse(task, sentence.text, output))


def test_assess_counts_as_sets_of_document_offsets():
    documents = read_documents(HOME / "data/sample/dev.PubTator.txt")
    task = Task("tagging", ("Disease", "Chemical"), per_label=False)
    perfect = assess(documents, list(gold_answers(documents, task)), task.labels)
    assert perfect["micro"]["f1"] == 1 and perfect["health"]["exact_copy"] == 1
    assert perfect["micro"]["tp"] == sum(len(document.spans) for document in documents)
    assert perfect["secondary"]["string_set"]["micro"]["f1"] == 1

    def only_first_tag(output):
        return output.replace("[Chemical]", "").replace("[/Chemical]", "")

    answers = list(gold_answers(documents, task, only_first_tag))
    result = assess(documents, answers, task.labels)
    gold = {(d.id, s.start, s.end, s.label) for d in documents for s in d.spans}
    found = {(d.id, s.start, s.end, s.label) for d in predicted_documents(documents, answers) for s in d.spans}
    assert result["micro"]["tp"] == len(gold & found)
    assert result["micro"]["fn"] == len(gold - found) == result["types"]["Chemical"]["fn"]


def test_an_entity_that_is_not_in_the_source_is_a_false_positive():
    document = Document("1", "Nothing here.", (), ((0, 13),))
    task = Task("extraction", ("Disease",), per_label=True)
    (answer,) = gold_answers([document], task, lambda output: "fever")
    result = assess([document], [answer], task.labels)
    assert (result["micro"]["tp"], result["micro"]["fp"]) == (0, 1)
    assert result["placed"]["micro"]["fp"] == 0
    told = "stand nowhere in their sentence, so that files of predictions lack them: 1;"
    assert told in " ".join(format_report(result).split())
    assert result["health"]["not_in_source"] == 1


def test_select_keeps_only_the_gold_of_the_chosen_sentences():
    documents = read_documents(HOME / "data/sample/dev.PubTator.txt")
    for limit in (1, 5, 30):
        kept, chosen = select_sentences(documents, limit)
        inside = sum(len(sentence.spans) for sentence in chosen)
        assert len(chosen) == limit and sum(len(document.spans) for document in kept) == inside
    assert select_sentences(documents, None)[0] == documents


def test_joined_answers_obey_the_order():
    document = Document("1", "Lead poisoning kills.", (), ((0, 21),))
    answers = {}
    for label, mention in (("Disease", "Lead poisoning"), ("Chemical", "Lead")):
        task = Task("extraction", (label,), per_label=True)
        answers[label] = list(gold_answers([document], task, lambda output, mention=mention: mention))
    (disease,) = join_answers(answers, ("Disease", "Chemical"))
    (chemical,) = join_answers(answers, ("Chemical", "Disease"))
    assert [span.label for span in disease.parsed.spans] == ["Disease"]
    assert [span.label for span in chemical.parsed.spans] == ["Chemical"]


def test_joined_answers_keep_every_label_of_each_system():
    """Those of a system of two labels were lost."""
    document = Document("1", "Lead in Rome kills.", (), ((0, 19),))
    outputs = {
        ("Disease", "Chemical"): "[Chemical]Lead[/Chemical] in Rome [Disease]kills[/Disease].",
        ("PLACE", "PER"): "Lead in [PLACE]Rome[/PLACE] [PER]kills[/PER].",
    }
    answers = {
        "+".join(labels): list(gold_answers([document], Task("tagging", labels, False), lambda _, o=output: o))
        for labels, output in outputs.items()
    }
    (joined,) = join_answers(answers, ("Disease", "Chemical", "PER", "PLACE"))
    assert [span.label for span in joined.parsed.spans] == ["Chemical", "PLACE", "Disease"]


def test_each_extracted_string_is_placed_once_under_the_other_convention():
    text = "Fever came, and fever went; then Fever again."
    document = Document("1", text, (Span(0, 5, "Disease"), Span(33, 38, "Disease")), ((0, 45),))
    (sentence,) = sentences_of(document)
    tagged = "[Disease]Fever[/Disease] came, and fever went; then [Disease]Fever[/Disease] again."
    written = {"extraction": "Fever", "tagging": tagged}
    counts = {}
    for form, output in written.items():
        task = Task(form, ("Disease",), per_label=False)
        output = f"Disease: {output}" if form == "extraction" else output
        answer = Answer(sentence, output, parse(task, text, output))
        result = assess([document], [answer], ("Disease",))
        counts[form] = [result["by_document"][name]["1"] for name in ("exact", "first_occurrence")]
    assert counts == {"extraction": [[2, 0, 0], [1, 0, 1]], "tagging": [[2, 0, 0], [2, 0, 0]]}


def nested() -> Document:
    text = "Activation of the human IL-1 promoter. Cut. Here."
    spans = (Span(18, 37, "DNA"), Span(24, 28, "protein"), Span(24, 37, "DNA"), Span(39, 49, "DNA"))
    return Document("1", text, spans, ((0, 38), (39, 43), (44, 49)))


def test_a_mention_within_one_of_another_label_is_answered_where_that_is_not_asked():
    """A mention lost to another label's was in no answer, and counted as missed."""
    task = Task("tagging", ("protein",), per_label=True)
    result = assess([nested()], list(gold_answers([nested()], task)), task.labels)
    assert result["micro"]["tp"] == 1 and result["micro"]["f1"] == result["secondary"]["string_set"]["micro"]["f1"] == 1


def test_all_conventions_have_the_same_gold():
    task = Task("tagging", ("DNA", "protein"), per_label=False)
    result = assess([nested()], list(gold_answers([nested()], task)), task.labels)
    for scores in (result, *result["secondary"].values()):
        assert (scores["micro"]["tp"], scores["micro"]["fn"]) == (1, 3)


def test_one_document_has_no_interval():
    task = Task("tagging", ("DNA",), per_label=True)
    result = assess([nested()], list(gold_answers([nested()], task)), task.labels)
    assert (result["interval"]["low"], result["interval"]["high"]) == (0, 1)
    assert "no interval of micro F1" in format_report(result) and "95 %" not in format_report(result)

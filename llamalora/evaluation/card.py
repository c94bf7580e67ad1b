"""The model card beside a saved model: `README.md` as the Hugging Face Hub reads it, made of what the record there
says (`runs.shared`) and of scores. It never quotes a corpus: its example is one of our own."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..corpus.documents import Span
from ..files import replace_file
from ..lora.kinds import METHODS
from ..runs.shared import on_hub, read_record
from ..runs.state import CARD
from ..task.definition import Task, enumerated
from ..task.prompt import render_answer, render_prompt
from .own import foreign
from .result import RESULT, find_changes, read_result

EXAMPLES = {  # labels -> a sentence, and the mentions in it
    ("Disease", "Chemical"): ("A mild fever followed the second dose of naloxone.", ("fever", "naloxone")),
    (): ("Alpha was found beside beta in every sample.", ("Alpha", "beta")),
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its --max-lora-rank takes (vllm/config/lora.py)
SPLITS = {"train": "training", "dev": "development", "test": "test"}
BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"  # eval.py keeps what stands between them up to date


def model_card(record: dict, results: Sequence[dict] = (), merged: bool = False) -> str:
    """The card of a saved model.

    Args:
        record: see `runs.shared.describe_model`.
        results: what `write_result` takes, of each split that the model was scored on.
        merged: the updates are in the weights, so the model needs neither its base nor peft.
    """
    task, settings, base = Task.from_dict(record["task"]), record["settings"], record["base"]["name"]
    adapter = METHODS[settings["method"]].adapts and not merged
    names = enumerated(list(task.labels))
    what = f"LoRA adapter for {base}" if adapter else f"{base}, fine-tuned"
    header = [
        f"base_model: {json.dumps(base)}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [llamalora, named-entity-recognition" + (", lora]" if METHODS[settings["method"]].adapts else "]"),
    ]
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {what}: named-entity recognition",
        f"It marks mentions of {names} in text. llamalora trained it and wrote this card.",
        f"## What it is asked\n\n{_asked(task)}",
        "## Scores\n\nExact mentions (the same characters, the same label), micro average, in percent; the interval "
        "is 95 %, by bootstrap over documents. The development split, where there is one, chose the model among those "
        f"of its run.\n\n{BEGIN}\n{END}",
        f"## How to use it\n\n{_use(record, task, adapter)}",
        f"## How it was trained\n\n{_trained(record, merged)}",
        "## Licence\n\nNone is stated here. The base model and the corpus have licences of their own, which may bind "
        "what is made from them; `license`, `language` and `datasets` can be added at the top.",
    ]
    return with_scores("\n\n".join(parts) + "\n", record, results)


def _asked(task: Task) -> str:
    labels = tuple(task.labels)
    known = set(labels) <= {"Disease", "Chemical"}
    text, strings = EXAMPLES["Disease", "Chemical"] if known else EXAMPLES[()]
    order = ("Disease", "Chemical") if known else labels
    spans = [Span(text.index(s), text.index(s) + len(s), label) for s, label in zip(strings, order, strict=False)]
    prompt = render_prompt(replace(task, demonstrations=()), text)
    shown = f"Format: {task.format}. A prompt, and the answer that is wanted:\n\n```\n{prompt}"
    shown += f" {render_answer(task, text, spans)}\n```"
    if task.demonstrations:
        shown += (
            f"\n\nBefore the input stand {len(task.demonstrations)} demonstrations from the training corpus, which are "
            "not shown here. They are in `llamalora.json`: whoever passes it on passes on these sentences."
        )
    return shown


def _use(record: dict, task: Task, adapter: bool) -> str:
    """The commands for this model. FOLDER stands for where it lies."""
    base = record["base"]["name"]
    text = json.dumps(EXAMPLES["Disease", "Chemical"][0])
    prompt = json.dumps(render_prompt(replace(task, demonstrations=()), EXAMPLES["Disease", "Chemical"][0]))
    beside = (
        f", and looks for {base} in `weights/`; `--model` and `model=` give another place for it" if adapter else ""
    )
    kind = "adapter" if adapter else "model"
    own = f"""FOLDER is the folder with this file. llamalora knows the prompt from `llamalora.json`{beside}:

```
python -m llamalora predict --{kind} FOLDER notes.txt
```

```python
from llamalora import annotate, load_annotator

model, tokenizer, task = load_annotator({kind}="FOLDER")
for mention in annotate(model, tokenizer, [{text}], task)[0]:
    print(mention.start, mention.end, mention.label, mention.text, f"{{mention.confidence:.2f}}")
```"""
    first, load = "", 'model = AutoModelForCausalLM.from_pretrained("FOLDER")'
    if adapter:
        first = "from peft import PeftModel\n"
        load = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "FOLDER")'
    named = "is the base by its name on the Hub" if on_hub(base) else "is the base's folder; put in where it lies"
    where = f" `{base}` {named}." if adapter else ""
    packages = "transformers peft" if adapter else "transformers"
    theirs = f"""{"transformers and peft give" if adapter else "transformers gives"} the answer as text (`pip install
{packages} sentencepiece protobuf`).{where}

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = tokenizer({prompt}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=False)[0, ids.shape[1] :]))
```"""
    commands = ["vllm serve FOLDER"]
    if adapter:
        commands = ["python -m llamalora merge --adapter FOLDER --out MERGED", "vllm serve MERGED"]
    served = "\n".join(["vLLM (not tried here):", "", "```", *commands, "```"])
    return "\n\n".join([own, theirs, served, *([_vllm(record["settings"], base)] if adapter else [])])


def _vllm(settings: Mapping, base: str) -> str:
    """Whether vLLM may do without the merge."""
    targets = settings["targets"].split(",")
    if settings["dora"]:
        return "Merged, since vLLM takes no DoRA adapters."
    if {"all", "embed", "head"} & set(targets):
        return (
            "Merged, since the adapter changes the embedding or the head, which servers of adapters often leave out, "
            "or change together where the two are one matrix. For the same reason peft's own `merge_and_unload` is "
            "wrong here where the base ties them (`tie_word_embeddings`)."
        )
    rank = next((rank for rank in VLLM_RANKS if rank >= settings["rank"]), None)
    if rank is None:
        return f"Merged, since vLLM takes no adapters of rank {settings['rank']}."
    return (
        f"Or unmerged: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules ner=FOLDER`, and "
        "`ner` as the model of a request."
    )


def _trained(record: dict, merged: bool) -> str:
    base, data, settings = record["base"], record["data"], record["settings"]
    facts = {
        "base": f"{base['name']} (fingerprint of the weights: {base['fingerprint']})",
        "data": f"{data['name']}: {data['sentences']:,} sentences",
        "labels": ", ".join(record["task"]["labels"]),
        "trained parameters": f"{record['trainable']:,}" + (", merged into the weights" if merged else ""),
    } | {name.replace("_", " "): value for name, value in settings.items() if value is not None}
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


# ---- scores ----


_TOP = re.compile(r"\A---\n.*?(?=^---\n)", re.DOTALL | re.MULTILINE)
_INDEX = re.compile(r"^model-index:\n((?!---)[ -].*\n)*", re.MULTILINE)
_SCORES = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)


def with_scores(card: str, record: dict, results: Sequence[dict]) -> str:
    """A card with these scores in place of those that it has: in its text, and at its top for the Hub. One that
    somebody has rewritten keeps what it has where it has no place for them."""
    rows = "| split | sentences | P | R | F1 | interval |\n|---|---:|---:|---:|---:|---:|\n"
    rows += "".join(map(_row, results))
    if not results:
        rows = "It has not been scored.\n"
    return _put(card, _index(record, results) if results else "", f"{BEGIN}\n{rows}{END}")


def merged_card(record: dict, card: str) -> str:
    """The card of a model with an adapter merged into it, by the adapter's record and card."""
    new, top, scores = model_card(record, merged=True), _TOP.match(card), _SCORES.search(card)
    index = _INDEX.search(top[0]) if top else None
    return _put(new, index[0] if index else "", scores[0]) if scores else new


def _put(card: str, index: str, scores: str) -> str:
    card = _TOP.sub(lambda top: _INDEX.sub("", top[0]) + index, card)
    return _SCORES.sub(lambda _: scores, card, count=1)


def _row(result: dict) -> str:
    micro, interval = result["micro"], result["interval"]
    scores = [f"{100 * value:.2f}" for value in (micro["precision"], micro["recall"], micro["f1"])]
    low, high = (f"{100 * interval[end]:.1f}" for end in ("low", "high"))
    split = SPLITS.get(result["split"], result["split"])
    return f"| {split} | {result['sentences']:,} | {' | '.join(scores)} | {low} to {high} |\n"


def _index(record: dict, results: Sequence[dict]) -> str:
    """Scores as the Hub's `model-index`, as shares of 1."""
    data = json.dumps(record["data"]["name"])
    name = "-".join([record["base"]["name"].rpartition("/")[2], record["data"]["name"], record["task"]["format"]])
    lines = ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for result in results:
        lines += [
            "  - task: {type: token-classification, name: named-entity recognition}",
            f"    dataset: {{name: {data}, type: {data}, split: {result['split']}}}",
            "    metrics:",
            *(f"    - {{type: {key}, value: {result['micro'][key]:.4f}}}" for key in ("f1", "precision", "recall")),
        ]
    return "\n".join(lines) + "\n"


def update_card(run: Path) -> None:
    """Puts the run's own results into the card of its best model, if there is one."""
    path, record = run / "best" / CARD, read_record(run / "best")
    if path.is_file() and record is not None:
        scored = (split for split in SPLITS if (run / RESULT.format(split)).is_file())
        sound = [read_result(run, split) for split in scored if not find_changes(run, split)]
        results = [result for result in sound if not foreign(result, run, result["split"])]
        replace_file(path, with_scores(path.read_text(encoding="utf-8"), record, results))

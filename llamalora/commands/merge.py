"""Makes base model and adapter one Hugging Face folder, tensor by tensor.

A few rows are merged at a time on each core, and one matrix is in memory for the probe, so a model of any size can be
merged.
The arithmetic is `llamalora.merge`'s: fp32, rounded once to the dtype that the base model is stored in.
"""

import argparse
import json
import sys
from pathlib import Path

from ..cli import Parser, UsageError
from ..files import why_not_new
from ..lora.peft_config import ADAPTER_CONFIG, read_peft_config
from ..model.config import read_config
from ..runs.folder import adapter_of, recorded_folder
from ..runs.shared import find_base, other_base, verify_shared
from ..text_table import aligned, wrapped

PROBE = (
    "Input: A mild fever followed the second dose of naloxone, but the rash had gone.\n"
    "Answer: A mild [Disease]fever[/Disease] followed the second dose of [Chemical]naloxone[/Chemical], "
    "but the [Disease]rash[/Disease] had gone."
)

EXAMPLES = """
--run RUN --out FOLDER
--adapter FOLDER --out FOLDER
"""


def main(argv: list[str]) -> None:
    parser = Parser("merge", EXAMPLES, description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="run folder: its best adapter and its base model")
    source.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter folder")
    parser.add_argument("--model", metavar="FOLDER", help="base model (default: the run's, or what the adapter names)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the merged model, new or empty")
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument("--probe", default=PROBE, metavar="TEXT", help="text to compare the logits of both models on")
    probe.add_argument("--no-probe", action="store_true", help="leave that out: it reads both models once")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    arguments = parser.parse_args(argv)
    adapter, model = _sources(arguments)
    out = Path(arguments.out)
    if why := why_not_new(out):
        raise UsageError(f"--out {out}: {why}")
    read_config(model), read_peft_config(adapter / ADAPTER_CONFIG)  # what they refuse need not wait for torch

    if doubt := other_base(adapter, model):
        print(wrapped(doubt), file=sys.stderr)
    from .merging import merge_folders

    report = merge_folders(model, adapter, out, None if arguments.no_probe else arguments.probe)
    print(json.dumps(report, indent=2) if arguments.json else show(report))


def _sources(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of adapter and base model.

    Raises:
        UsageError: a base model that is not where it is looked for, or a run that trained without LoRA.
        CheckpointError: no such run, or one without an adapter yet.
    """
    if arguments.run is None:
        adapter = Path(arguments.adapter)
        verify_shared(adapter)
        return adapter, find_base(adapter) if arguments.model is None else Path(arguments.model)
    run = Path(arguments.run)
    adapter = adapter_of(run)
    return adapter, Path(arguments.model or recorded_folder(run, "model", "give its folder with --model"))


def show(report: dict) -> str:
    rows = [["", "layers", "update", "rounding error"]]
    for kind, of in report["kinds"].items():
        rows.append([kind, str(of["layers"]), _ratio(of["update"]), _ratio(of["rounding_error"])])
    merged = f"{report['out']}: {report['model']} with {report['adapter']} merged into {report['layers']} layers"
    lines = [wrapped(merged), ""]
    lines += [aligned(rows), "", "update: |delta| / |W|; rounding error: |rounded - exact| / |delta|"]
    if report["untied"]:
        lines.append("embed and head were one matrix and are now two: tie_word_embeddings is false")
    if report["probe"]:
        probe = report["probe"]
        lines.append(wrapped(
            f"probe of {probe['tokens']} tokens: largest logit difference {probe['largest_logit_difference']:.3g}, "
            f"most likely token changed at {probe['changed_argmax']} ({100 * probe['changed_argmax_share']:.1f} %)"
        ))  # fmt: skip
    return "\n".join(lines)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"

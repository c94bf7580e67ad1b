"""Shows what a trained adapter looks like inside."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import Parser, UsageError, check_least, refuse_idle
from ..drawing import need_matplotlib
from ..errors import RunError
from ..files import new_folder, why_not_new
from ..inspection import report
from ..lora.peft_config import ADAPTER_CONFIG, read_peft_config
from ..mistakes import is_run
from ..model.config import read_config
from ..runs.folder import adapter_of, recorded_folder
from ..runs.shared import verify_shared

if TYPE_CHECKING:
    from ..lora.peft_format import Adapter

DRAWN = ("ratio", "norm", "effective_rank", "amplification")  # as PNG; the norm only where there is no ratio


def main(argv: list[str]) -> None:
    parser = Parser("inspect", "RUN --out page", description=__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter folder, or run folder (its best)")
    parser.add_argument(
        "--model", metavar="FOLDER", help="base model, to set the updates against W0 (default: the run's)"
    )
    parser.add_argument("--against", metavar="ADAPTER2", help="second adapter, for subspace similarity")
    parser.add_argument("--spectra", action="store_true", help="decompose W0: overlap, intruder dimensions (slow)")
    parser.add_argument("--layers", metavar="0,5,...", help="only of these layers (numbers, embed, head)")
    parser.add_argument("--top", type=int, default=10, help="leading vectors searched for intruders (default: 10)")
    parser.add_argument("--epsilon", type=float, default=0.5, help="largest cosine of an intruder (default: 0.5)")
    parser.add_argument("--out", metavar="FOLDER", help="write inspect.json, inspect.html and heat maps there")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON and nothing else")
    arguments = parser.parse_args(argv)
    out = check_flags(arguments)
    result = inspect_adapter(arguments)
    if out is not None:
        write(result, out)
    if arguments.json:
        print(json.dumps(result))
        return
    print(report.format_table(result))
    if out is not None:
        print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def check_flags(arguments: argparse.Namespace) -> Path | None:
    """The output folder.

    Raises:
        UsageError: flags that do not go together, a folder that is not empty, no matplotlib for it.
    """
    refuse_idle(arguments, {"layers top epsilon": not arguments.spectra and "without --spectra"})
    check_least(arguments, top=1)
    if not 0 < arguments.epsilon <= 1:
        raise UsageError(f"--epsilon is {arguments.epsilon}; it must be above 0 and at most 1")
    if arguments.out is None:
        return None
    out = Path(arguments.out).resolve()
    if why := why_not_new(out):
        raise UsageError(f"--out {arguments.out}: {why}")
    need_matplotlib("--out draws heat maps")
    return out


def inspect_adapter(arguments: argparse.Namespace) -> dict:
    """All figures, as they go into inspect.json."""
    folder, model = find_adapter(arguments.adapter), arguments.model
    if model is None and folder != Path(arguments.adapter):
        remedy = f"give its folder with --model, or inspect {folder} without it"
        model = recorded_folder(Path(arguments.adapter), "model", remedy)
    if arguments.spectra and model is None:
        raise UsageError("--spectra decomposes the weights of the base model; give its folder with --model")
    config = None if model is None else read_config(model)
    second = None if arguments.against is None else find_adapter(arguments.against)
    for each in (folder, second):
        if each is not None:
            read_peft_config(each / ADAPTER_CONFIG)  # what it refuses need not wait for torch

    from ..inspection import analysis
    from ..lora.peft_format import read_adapter
    from ..model.checkpoint import skeleton

    base = None if config is None else skeleton(config)
    adapter = read_adapter(folder, base)
    other = None if second is None else read_adapter(second, base)
    spectra = chosen_layers(adapter, arguments.layers) if arguments.spectra else ()
    matrices = analysis.measure(adapter, model, other, spectra, arguments.top, arguments.epsilon)
    return {
        "adapter": arguments.adapter,
        "model": model,
        "against": arguments.against,
        "top": arguments.top,
        "epsilon": arguments.epsilon,
        "kinds": analysis.by_kind(matrices),
        "matrices": analysis.to_json(matrices),
    }


def find_adapter(given: str) -> Path:
    """The folder itself, or that of a run's best adapter.

    Raises:
        UsageError, CheckpointError: as `adapter_of`.
    """
    folder = Path(given)
    if (folder / ADAPTER_CONFIG).is_file() or not is_run(folder):
        verify_shared(folder)
        return folder
    return adapter_of(folder)


def chosen_layers(adapter: "Adapter", wanted: str | None) -> list[str]:
    """Module names of the adapter in the listed layers; all of them if none are listed.

    Raises:
        UsageError: a layer in which the adapter has no update.
    """
    from ..lora.peft_format import block_of

    by_layer: dict[str, list[str]] = {}
    for name, factors in adapter.layers.items():
        layer = factors.kind if block_of(name) is None else str(block_of(name))
        by_layer.setdefault(layer, []).append(name)
    chosen = list(by_layer) if wanted is None else [layer.strip() for layer in wanted.split(",")]
    for layer in chosen:
        if layer not in by_layer:
            raise UsageError(f"--layers: the adapter has no update in {layer!r}; it has some in {','.join(by_layer)}")
    return [name for layer in chosen for name in by_layer[layer]]


def write(result: dict, out: Path) -> None:
    """Writes JSON, page and heat maps into a new folder, all or nothing.

    Raises:
        RunError: it cannot be written.
    """
    metrics = [name for name in DRAWN if name in report.present(result)]
    if "ratio" in metrics:
        metrics.remove("norm")
    page = report.html_page(result)
    try:
        with new_folder(out) as folder:
            (folder / "inspect.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
            (folder / "inspect.html").write_text(page, encoding="utf-8")
            for metric in metrics:
                report.save_heatmap(result, metric, folder / f"{metric}.png")
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written ({error.strerror or error})") from None

"""Makes base model and adapter one Hugging Face folder, tensor by tensor.

Only one matrix is in memory at a time, for the merge and for the probe, so a model of any size can be merged.
The arithmetic is `llamalora.merge`'s: fp32, rounded once to the dtype that the base model is stored in.
"""

import argparse
import ctypes
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import Parser, UsageError
from ..evaluation.card import merged_card
from ..files import is_occupied, new_folder
from ..lora.inject import adapt, lora_layers
from ..lora.kinds import KINDS, kind_of
from ..lora.layers import PARTS, LoRALayer
from ..lora.peft_format import Adapter, Factors, read_adapter
from ..model.checkpoint import entries_of, model_files, read_config, read_json, skeleton, tensor_files
from ..model.llama import Llama
from ..model.tensors import CheckpointError, read_tensor, streamed, write_tensors
from ..progress import Bar
from ..runs.folder import adapter_of
from ..runs.shared import RECORD, copy_tokenizer, find_base, read_record, write_record
from ..runs.state import CARD, MANIFEST
from ..task.tokenizer import TokenizerError, check_fit, load_tokenizer
from ..text_table import aligned, wrapped

PROBE = (
    "Input: A mild fever followed the second dose of naloxone, but the rash had gone.\n"
    "Answer: A mild [Disease]fever[/Disease] followed the second dose of [Chemical]naloxone[/Chemical], "
    "but the [Disease]rash[/Disease] had gone."
)
COPIED = (".json", ".model", ".txt", ".jinja")  # tokenizer, generation settings, licence; configurations aside
OWN = ("config.json", RECORD, MANIFEST)  # of the base alone
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder of the merged model; must not exist")
    probe = parser.add_mutually_exclusive_group()
    probe.add_argument("--probe", default=PROBE, metavar="TEXT", help="text to compare the logits of both models on")
    probe.add_argument("--no-probe", action="store_true", help="leave that out: it reads both models once")
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    arguments = parser.parse_args(argv)
    adapter, model = _sources(arguments)
    report = merge_folders(model, adapter, Path(arguments.out), None if arguments.no_probe else arguments.probe)
    print(json.dumps(report, indent=2) if arguments.json else show(report))


def _sources(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of adapter and base model.

    Raises:
        UsageError: a base model that is not where it is looked for, or a run that trained without LoRA.
        CheckpointError: no such run, or one without an adapter yet.
    """
    if arguments.run is None:
        adapter = Path(arguments.adapter)
        return adapter, find_base(adapter) if arguments.model is None else Path(arguments.model)
    adapter, base = adapter_of(Path(arguments.run))
    return adapter, Path(base if arguments.model is None else arguments.model)


def merge_folders(base: Path, adapter_folder: Path, out: Path, probe: str | None = PROBE) -> dict:
    """Writes the merged model to the folder `out`: complete, or not at all.

    Args:
        probe: text on which the model with its update apart and the merged one are compared, both computed
            in fp32; None leaves that out.

    Returns:
        The report: `kinds`, for each kind of layer the size of the update against the weights, |delta| / |W|, and
        what rounding changed of it, |rounded - exact| / |delta| (Frobenius norms over all its layers); `probe`,
        the largest logit difference and the share of positions whose most likely token changed.

    Raises:
        CheckpointError: what `load_model` and `read_adapter` refuse, a merged weight that is not finite, or a folder
            that cannot be written.
        UsageError: `out` exists, or is the base model's.
        TokenizerError: a probe, but no tokenizer beside the base model.
    """
    if is_occupied(out):
        raise UsageError(f"--out {out}: exists and is not an empty folder")
    _return_freed_memory()
    model = skeleton(read_config(base))
    files = model_files(base, model)
    adapter = read_adapter(adapter_folder, model)
    ids = None if probe is None else _probe_ids(base, probe, model.config.vocab_size)
    tied = model.config.tie_word_embeddings
    untied = tied and any(kind_of(name) in ("embed", "head") for name in adapter.layers)
    ranks = {name: (layer.rank, adapter.alphas[name]) for name, layer in adapter.layers.items()}
    adapt(model, ranks, adapter.rslora, dora=adapter.dora)
    kinds = _Kinds()
    try:
        with new_folder(out) as folder:
            _write_merged(model, adapter, files, folder, untied, kinds)
            _copy_the_rest(base, folder, untied)
            _describe(adapter_folder, folder)
            compared = None if ids is None else _compare(model, adapter, files, folder, ids)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error})") from None
    return {
        "model": str(base),
        "adapter": str(adapter_folder),
        "out": str(out),
        "layers": len(adapter.layers),
        "untied": untied,
        "kinds": kinds.report(),
        "probe": compared,
    }


def _return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MiB, in a heap that fragments and grows with every matrix; here
    all above 1 MiB go back at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def _probe_ids(base: Path, probe: str, vocabulary: int) -> Tensor:
    try:
        tokenizer = load_tokenizer(base)
        check_fit(tokenizer, vocabulary, base)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; --no-probe merges without one") from None
    if not probe.strip():
        raise UsageError("--probe is empty; --no-probe merges without one")
    return torch.tensor([tokenizer.encode(probe)])


def _write_merged(
    model: Llama, adapter: Adapter, files: dict[str, Path], folder: Path, untied: bool, kinds: "_Kinds"
) -> None:
    """The safetensors files, named and cut as the base model's. What it stores beside its parameters (rotary
    frequencies, a second copy of a tied matrix) is left out."""
    names = [name for name, _ in model.named_parameters() if not name.endswith(PARTS)] + [HEAD] * untied
    stored, sources = entries_of(files), {name: name if name in files else EMBEDDING for name in names}
    shards: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = defaultdict(dict)
    for name, source in sources.items():
        shards[files[source].name][name] = stored[source]

    adapted = lora_layers(model)
    bar = Bar("merging", len(names), "tensor")

    def merged(name: str) -> Tensor:
        bar.update()
        weight = _read_frozen(adapter, files, name)
        layer = name.removesuffix(".weight")
        if layer not in adapter.layers:
            return weight
        weight = kinds.merge(adapted[layer], adapter.layers[layer], weight)
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{adapter.path}: {name} is not finite when it is merged into {weight.dtype}")
        return weight

    with bar:
        for file, entries in shards.items():
            write_tensors(folder / file, entries, merged)
    if set(shards) != {"model.safetensors"}:
        total = sum(dtype.itemsize * math.prod(shape) for file in shards.values() for dtype, shape in file.values())
        index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, s in shards.items() for n in s}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _read_frozen(adapter: Adapter, files: dict[str, Path], name: str) -> Tensor:
    """A parameter of the base model, or what the adapter brings along in its place."""
    source = name if name in files else EMBEDDING
    return adapter.frozen(name.removesuffix(".weight"), read_tensor(files[source], source))


class _Kinds:
    """Merges layers and adds up, by kind, squared norms: of weights, updates, and what rounding changed."""

    def __init__(self):
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
        self.layers: dict[str, int] = defaultdict(int)

    @torch.no_grad()
    def merge(self, layer: LoRALayer, factors: Factors, weight: Tensor) -> Tensor:
        """The weight with the update, as `LoRALayer.merge` computes it."""
        parts = factors.read()
        for part, tensor in zip(PARTS, parts, strict=False):
            setattr(layer, part, nn.Parameter(tensor.float()))
        exact = layer.applied(weight)
        rounded = exact.to(weight.dtype)
        squares = [_square(weight), _square(exact, weight), _square(exact, rounded)]
        self.sums[factors.kind] += torch.tensor(squares, dtype=torch.float64)
        self.layers[factors.kind] += 1
        for part, tensor in zip(PARTS, parts, strict=False):
            setattr(layer, part, nn.Parameter(tensor.to("meta")))
        return rounded

    def report(self) -> dict[str, dict]:
        result = {}
        for kind in KINDS:
            if kind in self.layers:
                weight, delta, error = self.sums[kind].sqrt().tolist()
                result[kind] = {
                    "layers": self.layers[kind],
                    "update": delta / weight if weight else None,
                    "rounding_error": error / delta if delta else None,
                }
        return result


def _square(matrix: Tensor, other: Tensor | None = None) -> float:
    """The squared norm of a matrix, or of its difference from another; by groups of rows, to save memory."""
    total = 0.0
    for rows in range(0, len(matrix), step := max(1, 2**20 // matrix.shape[1])):
        part = matrix[rows : rows + step].double()
        total += (part if other is None else part - other[rows : rows + step]).square_().sum().item()
    return total


def _copy_the_rest(base: Path, folder: Path, untied: bool) -> None:
    config = read_json(base / "config.json")
    config.pop("_name_or_path", None)  # it is not that model any more
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in base.iterdir():
        known = path.suffix in COPIED and path.name not in OWN and not path.name.endswith(".index.json")
        if known and path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_tokenizer(base, folder)


def _describe(adapter: Path, folder: Path) -> None:
    """What the model is asked, and its card, if the adapter has them."""
    if (record := read_record(adapter)) is not None:
        write_record(record, folder)
        card = adapter / CARD
        written = merged_card(record, card.read_text(encoding="utf-8") if card.is_file() else "")
        (folder / CARD).write_text(written, encoding="utf-8")


# ---- the probe ----


def _compare(model: Llama, adapter: Adapter, files: dict[str, Path], folder: Path, ids: Tensor) -> dict:
    """Logits of the model with its update apart and of the merged one."""
    keys: dict[str, str] = {}
    for name, layer in adapter.layers.items():
        keys |= zip((f"{name}.{part}" for part in PARTS), layer.keys, strict=False)

    def apart(name: str) -> Tensor:
        if name in keys:
            return read_tensor(adapter.path, keys[name])
        return _read_frozen(adapter, files, name)

    merged_files = tensor_files(folder)

    def merged(name: str) -> Tensor:
        name = name if name in merged_files else EMBEDDING
        return read_tensor(merged_files[name], name)

    before, after = _logits(model, apart, ids), _logits(skeleton(model.config), merged, ids)
    changed = (before.argmax(-1) != after.argmax(-1)).sum().item()
    return {
        "tokens": ids.shape[1],
        "largest_logit_difference": (before - after).abs().max().item(),
        "changed_argmax": changed,
        "changed_argmax_share": changed / ids.shape[1],
    }


@torch.no_grad()
def _logits(model: Llama, read: Callable[[str], Tensor], ids: Tensor) -> Tensor:
    with streamed(model, read):
        return model(ids)[0]


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

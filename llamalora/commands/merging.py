"""How `merge` makes base model and adapter one folder: the weights, then the probe."""

import ctypes
import json
import math
import shutil
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..cli import UsageError
from ..errors import RunError
from ..evaluation.card import merged_card
from ..files import new_folder
from ..lora.inject import adapt, lora_layers
from ..lora.kinds import KINDS, kind_of
from ..lora.layers import PARTS, LoRALayer
from ..lora.peft_config import ADAPTER_CONFIG
from ..lora.peft_format import Adapter, Factors, read_adapter
from ..model.checkpoint import entries_of, model_files, skeleton, tensor_files
from ..model.config import CheckpointError, read_config, read_json
from ..model.llama import Llama
from ..model.tensors import finite, read_tensor, streamed, write_tensors
from ..progress import Bar
from ..runs.shared import RECORD, copy_tokenizer, read_record, write_record
from ..runs.state import CARD, MANIFEST
from ..task.tokenizer import TokenizerError, check_fit, load_tokenizer

COPIED = (".json", ".model", ".txt", ".jinja")  # tokenizer, generation settings, licence; configurations aside
OWN = ("config.json", RECORD, MANIFEST, ADAPTER_CONFIG)  # of the base alone
BLOCK = 2**18  # numbers that are merged at a time: they stay in a core's cache, and in memory that is used again
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

T = TypeVar("T")
R = TypeVar("R")


def merge_folders(base: Path, adapter_folder: Path, out: Path, probe: str | None) -> dict:
    """Writes the merged model to the folder `out`: complete, or not at all.

    Args:
        probe: text on which the model with its update apart and the merged one are compared, both computed
            in fp32; None leaves that out.

    Returns:
        The report: `kinds`, for each kind of layer the size of the update against the weights, |delta| / |W|, and
        what rounding changed of it, |rounded - exact| / |delta| (Frobenius norms over all its layers); `probe`,
        the largest logit difference and the share of positions whose most likely token changed.

    Raises:
        CheckpointError: what `load_model` and `read_adapter` refuse, or merged weights or logits that are not finite.
        RunError: a folder that cannot be written.
        UsageError: a probe that is empty.
        TokenizerError: a probe, but no tokenizer beside the base model.
    """
    _keep_small_blocks()
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
        raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None
    return {
        "model": str(base),
        "adapter": str(adapter_folder),
        "out": str(out),
        "layers": len(adapter.layers),
        "untied": untied,
        "kinds": kinds.report(),
        "probe": compared,
    }


def _keep_small_blocks() -> None:
    """glibc keeps freed memory of up to 32 MiB a piece, in a heap that fragments and grows with every matrix; here
    all above 8 MiB goes back at once, and what smaller pieces take is kept for the next ones."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**23)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**26)  # M_TRIM_THRESHOLD


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

    def merged(name: str) -> Tensor | Iterator[Tensor]:
        bar.update()
        weight = _read_frozen(adapter, files, name)
        layer = name.removesuffix(".weight")
        return kinds.merge(adapted[layer], adapter.layers[layer], weight) if layer in adapter.layers else weight

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
    weight = finite(read_tensor(files[source], source), files[source], source)
    return adapter.frozen(name.removesuffix(".weight"), weight)


class _Kinds:
    """Merges layers and adds up, by kind, squared norms: of weights, updates, and what rounding changed."""

    def __init__(self):
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
        self.layers: dict[str, int] = defaultdict(int)

    def merge(self, layer: LoRALayer, factors: Factors, weight: Tensor) -> Iterator[Tensor]:
        """The weight with the update, as `LoRALayer.merge` computes it, in blocks of rows.

        Raises:
            CheckpointError: a merged weight that is not finite.
        """
        parts = factors.read()
        for part, tensor in zip(PARTS, parts, strict=False):
            setattr(layer, part, nn.Parameter(tensor.float()))
        whole = None if layer.row_by_row else layer.applied(weight)

        @torch.no_grad()
        def block(rows: slice) -> tuple[Tensor, Tensor]:
            frozen = weight[rows].to(torch.float32, copy=True)
            exact = layer.applied(frozen, rows) if whole is None else whole[rows]
            rounded = exact.to(weight.dtype)
            norms = [_norms(frozen), _norms(frozen.sub_(exact)), _norms(frozen.copy_(rounded).sub_(exact))]
            return rounded, torch.stack(norms).double().square_().sum(1)

        count = min(-(-weight.numel() // BLOCK), len(weight))
        bounds = [len(weight) * number // count for number in range(count + 1)]  # of blocks alike: none of a row or two
        for rounded, squares in _side_by_side(block, [slice(*pair) for pair in pairwise(bounds)]):
            if not math.isfinite(squares[2]) and not rounded.isfinite().all():
                raise CheckpointError(
                    f"{factors.path}: {factors.name}.weight is not finite when it is merged into {weight.dtype}"
                )
            self.sums[factors.kind] += squares
            yield rounded
        self.layers[factors.kind] += 1
        for part, tensor in zip(PARTS, parts, strict=False):
            setattr(layer, part, nn.Parameter(tensor.to("meta")))

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


def _side_by_side(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """What the function gives for each item, in order: threads compute a few ahead of the one that is asked for, as
    many as torch has. torch itself would divide each operation among them, and all would wait for the last at its end.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    torch.set_num_threads(threads // workers)
    waiting: deque[Future] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


def _norms(matrix: Tensor) -> Tensor:
    """Of the rows."""
    return torch.linalg.vector_norm(matrix, dim=1)


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

    both = [(model, apart), (skeleton(model.config), merged)]
    before, after = _side_by_side(lambda each: _logits(*each, ids), both)
    if not (before.isfinite().all() and after.isfinite().all()):
        base = next(iter(files.values())).parent
        raise CheckpointError(f"{base} with {adapter.path.parent}: the logits on the probe are not finite")
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

"""Hugging Face model folders in and out: `config.json` and safetensors, one file or shards."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import CheckpointError, LlamaConfig, read_config, read_json
from .llama import Llama
from .tensors import Entries, finite, read_tensor, save_tensors, tensor_entries

SHARD_BYTES = 5 * 10**9  # Hugging Face's customary size of a shard


def tensor_files(folder: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of the folder that holds it.

    As in transformers, `model.safetensors` is read where it is there, whatever index stands beside it.

    Raises:
        CheckpointError: no safetensors, a missing shard, a damaged file, what `tensor_entries` refuses, or shards that
            contradict each other or their index.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(tensor_entries(single), single)
    if not index.is_file():
        raise CheckpointError(f"{folder}: has no model.safetensors{_instead_of_weights(folder)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map")
    found: dict[str, Path] = {}
    for path in sorted({folder / name for name in weight_map.values()}):
        for name in tensor_entries(path):
            if name in found:
                raise CheckpointError(f"{path}: holds {name}, which {found[name].name} holds as well")
            found[name] = path
    for name, file in weight_map.items():
        if found.get(name, folder / file) != folder / file:
            raise CheckpointError(f"{index}: says that {name} is in {file}, but it is in {found[name].name}")
    return found


def _instead_of_weights(folder: Path) -> str:
    """What else is there, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    shards = [name for name in names if re.search(r"-\d+-of-\d+\.safetensors$", name)]
    if shards:
        return f" and no model.safetensors.index.json, which says what its {len(shards)} shards hold; download it, too"
    if others := [name for name in names if re.fullmatch(r"(?!adapter).*\.safetensors", name)]:
        return f" but {', '.join(others)}; what is to be read must have that name"
    if any(name.endswith((".bin", ".pth")) for name in names):
        return "; its pickled weights are not read, convert them to safetensors (transformers' save_pretrained does)"
    return ""


def entries_of(files: Mapping[str, Path]) -> Entries:
    """Tensor name -> dtype and shape, as the files hold them (`tensor_files`)."""
    inside = {path: tensor_entries(path) for path in set(files.values())}
    return {name: inside[path][name] for name, path in files.items()}


class _NoInit(TorchFunctionMode):
    """Leaves out initial values: on the meta device they are nothing, and drawing them imports for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """What is made here has names and shapes, on the meta device, and no values."""
    with torch.device("meta"), _NoInit():
        yield


def skeleton(config: LlamaConfig) -> Llama:
    """The model on the meta device: names and shapes, no weights."""
    with without_values():
        return Llama(config)


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Llama:
    """The model of a Hugging Face folder, in evaluation mode.

    Tensors stream one by one to their place, so that host memory peaks at the size of the model plus one
    tensor.

    Args:
        dtype: of the weights; default as stored, where several dtypes are stored the one that holds the values of all.

    Raises:
        CheckpointError: what `read_config` and `tensor_files` raise, tensors that are missing, unexpected or of another
            shape than the configuration asks for (all are listed), or a value that is not finite in the dtype.
    """
    model = skeleton(read_config(folder))
    files = model_files(folder, model)
    entries, parameters = entries_of(files), dict(model.named_parameters())
    dtype = dtype or reduce(torch.promote_types, (entries[name][0] for name in parameters))
    for name, parameter in parameters.items():
        tensor = read_tensor(files[name], name).to(device=device, dtype=dtype, copy=True)
        finite(tensor, files[name], name)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, parameter.requires_grad))
    if model.config.tie_word_embeddings:
        model.tie()
    return model.eval()


def model_files(folder: str | Path, model: Llama) -> dict[str, Path]:
    """`tensor_files` of a folder that holds just this model, which may be on the meta device.

    Raises:
        CheckpointError: as in `load_model`.
    """
    files = tensor_files(folder)
    _check_tensors(folder, model, files)
    if model.config.tie_word_embeddings and "lm_head.weight" in files:
        head = read_tensor(files["lm_head.weight"], "lm_head.weight")
        embedding = read_tensor(files["model.embed_tokens.weight"], "model.embed_tokens.weight")
        if not torch.equal(head, embedding):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight; set it to false to use both"
            )
    return files


def _check_tensors(folder: str | Path, model: Llama, files: dict[str, Path]) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # older conversions stored the rotary frequencies, which are computed; tied ones may repeat the head
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    entries = entries_of(files)
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in files]
    problems += [f"unexpected {name}" for name in sorted(files.keys() - wanted.keys() - ignored)]
    for name in wanted.keys() & files.keys():
        shape = entries[name][1]
        if shape != wanted[name]:
            problems.append(f"{name} has shape {shape}, config.json asks for {wanted[name]}")
    if problems:
        rest = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise CheckpointError("\n  ".join([f"{folder}: tensors do not match config.json:", *problems[:12], *rest]))


def save_model(model: Llama, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `config.json` and safetensors that `load_model` and transformers read.

    Saved are the tensors that a model of this configuration has: the updates of adapted layers must be merged first. A
    tied matrix is stored once; one that a merge has untied twice, with `tie_word_embeddings: false`.

    Raises:
        CheckpointError: a layer with an update that is not merged, or a folder that holds a model already.
    """
    # a layer whose weight may lack something says so by `merged`
    unmerged = [name for name, layer in model.named_modules() if not getattr(layer, "merged", True)]
    if unmerged:
        raise CheckpointError(
            f"{unmerged[0]} carries an update that is not merged ({len(unmerged)} such layers); "
            "merge the model, or save the adapter"
        )
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: holds a model already")
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(model.config, tie_word_embeddings=model.tied)
    stored = config.to_dict() | {"torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    tensors = {name: model.get_parameter(name).detach() for name, _ in skeleton(config).named_parameters()}
    _save_shards(tensors, folder, shard_bytes)


def _save_shards(tensors: dict[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

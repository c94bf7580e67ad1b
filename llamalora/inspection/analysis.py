"""What a trained adapter looks like inside: size, spectrum and rank of each update, how it lies to W0, and how
to the updates of a second adapter.

Dimensions: O and I rows and columns of the weight, R rank of the update, K directions of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..lora.kinds import KINDS, kind_of
from ..lora.peft_format import Adapter, Factors, block_of
from ..model.checkpoint import tensor_files
from ..model.config import CheckpointError
from ..model.tensors import read_tensor, tensor_entries
from ..progress import Bar
from .spectrum import (
    decompose,
    directions,
    effective_rank,
    energy_rank,
    existing,
    intruder_cosines,
    singular_values,
    stable_rank,
    subspace_similarity,
)

LEADING = 10  # directions of an update whose place in W0 is looked up


@dataclass(frozen=True)
class Matrix:
    """The figures of one update; those that need W0, its decomposition or a second adapter are None without.

    Attributes:
        kind: `q` ... `head`.
        layer: number of the block; None for embedding and head.
        shape: of the weight, (O, I); of the embedding (V, D).
        scale: what B A is multiplied by.
        norm: Frobenius norm of scale * B A.
        effective_rank: exp of the entropy of the normalised singular values (Roy and Vetterli 2007).
        stable_rank: squared Frobenius norm over squared largest singular value.
        energy_rank: how many singular values hold 99 % of the squared norm.
        used: effective rank / R.
        singular_values: of scale * B A, falling.
        base_norm: Frobenius norm of W0.
        ratio: norm / base_norm.
        projected: || U^T W0 V ||_F, with U, V the singular directions of the update (Hu et al. 2022, 7.3).
        amplification: norm / projected (the same section): how much stronger than in W0 they become.
        base_singular_values: the R largest of W0.
        overlap_left, overlap_right: share of the update's ten leading directions (left in the rows, right in
            the columns) that lies in W0's R leading ones; random directions would give R / O and R / I.
        overlap_sizes, overlap_left_curve, overlap_right_curve: the same for the 1, 2, 4, ... leading ones.
        intruder_cosines: for each of the k leading left singular vectors of W0 + scale * B A, its largest
            absolute cosine with any of W0's (Shuttleworth et al. 2024, algorithm 1).
        intruders: how many of these are below epsilon.
        phi_A, phi_B: subspace similarity phi(i, j) with the second adapter's, (R, R2), of the right singular
            directions of A and the left ones of B (Hu et al. 2022, 7.2).
        similarity_A, similarity_B: phi of the whole subspaces, its entry (R, R2).
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    rank: int
    scale: float
    norm: float
    effective_rank: float
    stable_rank: float
    energy_rank: int
    used: float
    singular_values: list[float]
    base_norm: float | None = None
    ratio: float | None = None
    projected: float | None = None
    amplification: float | None = None
    base_singular_values: list[float] | None = None
    overlap_left: float | None = None
    overlap_right: float | None = None
    overlap_sizes: list[int] | None = None
    overlap_left_curve: list[float] | None = None
    overlap_right_curve: list[float] | None = None
    intruder_cosines: list[float] | None = None
    intruders: int | None = None
    phi_A: list[list[float]] | None = None
    phi_B: list[list[float]] | None = None
    similarity_A: float | None = None
    similarity_B: float | None = None


# the figures that can be compared over matrices
METRICS = tuple(
    field.name
    for field in fields(Matrix)
    if field.type in (float, int, float | None, int | None) and field.name not in ("layer", "rank", "scale")
)


def measure(
    adapter: Adapter,
    model: str | Path | None = None,
    other: Adapter | None = None,
    spectra: Iterable[str] = (),
    top: int = 10,
    epsilon: float = 0.5,
) -> list[Matrix]:
    """The figures of every update of an adapter, read and released one by one, with a progress bar.

    Args:
        model: folder of the base model; one weight at a time is held, in fp32.
        other: a second adapter of the same base model.
        spectra: module names whose W0 is decomposed.
        top, epsilon: of the intruder dimensions.

    Raises:
        CheckpointError: a tensor that is missing, not finite or of a shape that does not fit; a DoRA adapter.
    """
    for one in (adapter, other):
        if one is not None and one.dora:
            raise CheckpointError(
                f"{one.path}: a DoRA adapter; as it changes the length of every row of W0, its update is not of low "
                "rank, and only such can be inspected"
            )
    spectra = frozenset(spectra)
    files = None if model is None else tensor_files(model)
    if files is not None:  # nothing is measured in them, but what the adapter replaces is checked, and said
        for name in adapter.base.keys() - adapter.layers.keys():
            _, shape = tensor_entries(adapter.path)[adapter.base[name]]
            adapter.frozen(name, read_weight(files, name, shape))
    if other is not None:
        check_comparable(adapter, other)
    matrices, threads = [], torch.get_num_threads()
    try:
        with Bar("inspecting", len(adapter.layers), "layer") as bar:
            for layer in adapter.layers.values():
                decomposed = layer.name in spectra
                # narrow factors and small weights have threads only wait for each other
                torch.set_num_threads(threads if decomposed and min(layer.shape) > 1000 else 1)
                matrices.append(_inspect_layer(adapter, layer, files, other, (top, epsilon) if decomposed else None))
                bar.update(note=layer.name.removeprefix("model."))
    finally:
        torch.set_num_threads(threads)
    return matrices


def _inspect_layer(
    adapter: Adapter,
    layer: Factors,
    files: Mapping[str, Path] | None,
    other: Adapter | None,
    intruders: tuple[int, float] | None,
) -> Matrix:
    name, scale = layer.name, adapter.scale(layer.name)
    A, B = (factor.double() for factor in layer.read())
    left, right = (A.T, B.T) if kind_of(name) == "embed" else (B, A)
    if files is None:
        found = describe(singular_values(left, right, scale), layer.rank)
    else:
        U, S, Vh = decompose(left, right, scale)
        weight = adapter.frozen(name, read_weight(files, name, layer.shape))
        found = describe(S, layer.rank) | compare_with_base(weight, U, S, Vh)
        if intruders is not None:
            found |= compare_with_spectrum(weight, U, S, Vh, layer.rank, *intruders)
    if other is not None and name in other.layers:
        A2, B2 = (factor.double() for factor in other.layers[name].read())
        found |= compare_factors(A, B, A2, B2)
    return Matrix(name, layer.kind, block_of(name), layer.shape, layer.rank, scale, **found)


def check_comparable(adapter: Adapter, other: Adapter) -> None:
    """Refuses two adapters that cannot belong to one base model.

    Raises:
        CheckpointError: a layer of other shape, or no layer in common.
    """
    common = adapter.layers.keys() & other.layers.keys()
    for name in sorted(common):
        shape, wanted = other.layers[name].shape, adapter.layers[name].shape
        if shape != wanted:
            raise CheckpointError(
                f"{other.path}: {name} updates a weight of shape {shape}, in {adapter.path} one of {wanted}; "
                "they are not adapters of one base model"
            )
    if not common:
        raise CheckpointError(f"{other.path}: has no layer in common with {adapter.path}")


def read_weight(files: Mapping[str, Path], name: str, shape: tuple[int, ...]) -> Tensor:
    """W0 of a layer in fp32, (O, I); the head of a tied model is its embedding.

    Raises:
        CheckpointError: missing, not finite or of another shape.
    """
    key = f"{name}.weight"
    if key not in files and kind_of(name) == "head":
        key = "model.embed_tokens.weight"
    if key not in files:
        raise CheckpointError(f"{next(iter(files.values())).parent}: lacks {key}")
    weight = read_tensor(files[key], key)
    if tuple(weight.shape) != shape:
        raise CheckpointError(f"{files[key]}: {key} has shape {tuple(weight.shape)}, the adapter needs {shape}")
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise CheckpointError(f"{files[key]}: {key} holds NaN or infinity")
    return weight


# ---- figures ----


def describe(S: Tensor, rank: int) -> dict:
    """What the singular values (K,) of an update say; all figures are 0 for an update of zero."""
    effective = effective_rank(S)
    return {
        "norm": float(S.norm()),
        "effective_rank": effective,
        "stable_rank": stable_rank(S),
        "energy_rank": energy_rank(S),
        "used": effective / rank,
        "singular_values": S.tolist(),
    }


def compare_with_base(weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> dict:
    """Sizes of the update and of W0 (O, I), over all and along the update's own directions."""
    K = existing(S, max(weight.shape))
    norm, base_norm = float(S.norm()), float(weight.norm(dtype=torch.float64))
    projected = float((U[:, :K].T.float() @ weight @ Vh[:K].T.float()).norm())
    return {
        "base_norm": base_norm,
        "ratio": _quotient(norm, base_norm),
        "projected": projected,
        "amplification": _quotient(norm, projected),
    }


def _quotient(x: float, y: float) -> float | None:
    if x == 0:
        return 0.0
    return x / y if y else None


def compare_with_spectrum(
    weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor, rank: int, top: int, epsilon: float
) -> dict:
    """What needs W0's own decomposition, in fp32: overlap of the leading directions, intruder dimensions.

    LAPACK reduces a matrix that is much taller than wide (embedding, head) by QR first, so that these two
    cost the decomposition of a D x D matrix.
    """
    U0, S0, Vh0 = torch.linalg.svd(weight, full_matrices=False)
    K = min(LEADING, existing(S, max(weight.shape)))
    left = _shares(U0, U[:, :K].float())
    right = _shares(Vh0.T, Vh[:K].T.float())
    sizes = [2**n for n in range(len(S0).bit_length()) if 2**n < len(S0)] + [len(S0)]
    rank = min(rank, len(S0))
    cosines = intruder_cosines(weight, U0, (U.float() * S.float()) @ Vh.float(), top)
    return {
        "base_singular_values": S0[:rank].tolist(),
        "overlap_left": float(left[rank - 1]),
        "overlap_right": float(right[rank - 1]),
        "overlap_sizes": sizes,
        "overlap_left_curve": [float(left[size - 1]) for size in sizes],
        "overlap_right_curve": [float(right[size - 1]) for size in sizes],
        "intruder_cosines": cosines.tolist(),
        "intruders": int((cosines < epsilon).sum()),
    }


def _shares(base: Tensor, X: Tensor) -> Tensor:
    """The share of the squared length of orthonormal columns X that lies in the first 1, 2, ... columns of base."""
    return (base.T @ X).square().sum(1).cumsum(0) / max(1, X.shape[1])


def compare_factors(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> dict:
    """phi between two adapters' factors of one layer, A (R, wide) and B (tall, R), each with its own rank."""
    phi_A = subspace_similarity(directions(A.T), directions(A2.T))
    phi_B = subspace_similarity(directions(B), directions(B2))
    return {
        "phi_A": phi_A.round(decimals=5).tolist(),  # in full they would triple the size of a JSON file
        "phi_B": phi_B.round(decimals=5).tolist(),
        "similarity_A": float(phi_A[-1, -1]),
        "similarity_B": float(phi_B[-1, -1]),
    }


# ---- kinds of layer ----


def by_kind(matrices: Iterable[Matrix]) -> dict[str, dict]:
    """Kind -> `count`, `parameters`, and median, least and largest of each figure that is there."""
    groups = {kind: [matrix for matrix in matrices if matrix.kind == kind] for kind in KINDS}
    result = {}
    for kind, group in groups.items():
        if not group:
            continue
        row: dict[str, Any] = {
            "count": len(group),
            "parameters": sum(matrix.rank * sum(matrix.shape) for matrix in group),
        }
        for metric in METRICS:
            values = [value for matrix in group if (value := getattr(matrix, metric)) is not None]
            if values:
                row[metric] = {"median": median(values), "least": min(values), "largest": max(values)}
        result[kind] = row
    return result


def to_json(matrices: Iterable[Matrix]) -> list[dict]:
    """As JSON objects, without the figures that were not computed."""
    return [{n: value for n, value in vars(m).items() if value is not None or n == "layer"} for m in matrices]

"""Spectra and subspaces of low-rank products, from their factors alone.

For left (O, R) and right (R, I), left = Q_l R_l and right^T = Q_r R_r give left right = Q_l (R_l R_r^T) Q_r^T,
whose middle is R x R: exact, and nothing of the size O x I is formed.

Dimensions: O and I rows and columns of the product, R rank, K = min(O, I, R), d length of a direction.
"""

import torch
from torch import Tensor


def singular_values(left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """The singular values of scale * left right, for left (O, R) and right (R, I): (K,), falling."""
    R_left, R_right = torch.linalg.qr(left, mode="r").R, torch.linalg.qr(right.T, mode="r").R
    return torch.linalg.svdvals(R_left @ R_right.T * scale)


def decompose(left: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition U (O, K), S (K,), Vh (K, I) of scale * left right."""
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R_left @ R_right.T * scale, full_matrices=False)
    return Q_left @ U, S, Vh @ Q_right.T


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of S / sum S (Roy and Vetterli 2007): 1 for one direction, n for n equal ones."""
    return float(torch.special.entr(S / S.sum()).sum().exp()) if S.any() else 0.0


def stable_rank(S: Tensor) -> float:
    """Squared Frobenius norm over squared largest singular value: at most the rank, deaf to small values."""
    return float((S / S.max()).square().sum()) if S.any() else 0.0


def energy_rank(S: Tensor, share: float = 0.99) -> int:
    """The least number of singular values whose squares make up this share of all."""
    if not S.any():
        return 0
    sums = (S / S.max()).square().cumsum(0)
    return int((sums < share * sums[-1]).sum()) + 1


def existing(S: Tensor, size: int) -> int:
    """How many singular values are more than the rounding error of a decomposition of this size."""
    return int(S.gt(S.max() * size * torch.finfo(S.dtype).eps).sum())


def directions(X: Tensor) -> Tensor:
    """The left singular vectors of X (d, R), leading ones first: (d, min(d, R)); zeros where X has no more."""
    Q, R = torch.linalg.qr(X)
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    U[:, existing(S, max(X.shape)) :] = 0
    return Q @ U


def subspace_similarity(X: Tensor, Y: Tensor) -> Tensor:
    """phi(i, j) = ||X_i^T Y_j||_F^2 / min(i, j) for the first i and j columns (Hu et al. 2022, section 7.2).

    From orthonormal (d, R1) and (d, R2): (R1, R2), between 0, orthogonal, and 1, one within the other.
    """
    squares = (X.T @ Y).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, dtype=X.dtype) for size in squares.shape)
    return squares / torch.minimum(i[:, None], j)


def intruder_cosines(weight: Tensor, U0: Tensor, update: Tensor, top: int = 10) -> Tensor:
    """How well W0 knows the leading directions of W0 + update (Shuttleworth et al. 2024, "LoRA vs full
    fine-tuning: an illusion of equivalence", algorithm 1).

    Args:
        weight: W0 (O, I), and U0 (O, min(O, I)) its left singular vectors.
        update: scale * B A (O, I).

    Returns:
        (top,): for each leading left singular vector of the sum its largest absolute cosine with a column of
        U0. Where that is below an epsilon, the vector is an intruder dimension.
    """
    U1 = torch.linalg.svd(weight + update, full_matrices=False).U
    return (U0.T @ U1[:, :top]).abs().amax(0)

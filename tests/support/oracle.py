"""The formulas of the papers in float64 NumPy, written as loops over sums so that they can be read against the page."""

import numpy as np


def normalise(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two views' projections, [B, d] each, of [2B, d]."""
    hidden = hidden.astype(np.float64)
    hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    return hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]


def nt_xent(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """Chen et al. 2020, eq. 1, summed over both views and averaged over images."""
    count = len(z1)
    total = 0.0
    for anchors, others in ((z1, z2), (z2, z1)):
        for i in range(count):
            positive = np.exp(anchors[i] @ others[i] / temperature)
            denominator = sum(np.exp(anchors[i] @ others[j] / temperature) for j in range(count))
            denominator += sum(np.exp(anchors[i] @ anchors[j] / temperature) for j in range(count) if j != i)
            total -= np.log(positive / denominator)
    return total / count


def contrast(z1: np.ndarray, z2: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """g of both views, [B] each: the mean of exp(s/tau) over the 2(B-1) negatives."""
    count = len(z1)
    g = np.zeros((2, count))
    for view, (anchors, others) in enumerate(((z1, z2), (z2, z1))):
        for i in range(count):
            terms = [np.exp(anchors[i] @ side[j] / temperature) for side in (others, anchors) for j in range(count) if j != i]
            g[view, i] = sum(terms) / (2 * (count - 1))
    return g[0], g[1]


def global_contrastive(z1: np.ndarray, z2: np.ndarray, u1: np.ndarray, u2: np.ndarray, temperature: float) -> float:
    """Yuan et al. 2022, Algorithm 1: the surrogate, given both views' updated estimates, [B] each."""
    count = len(z1)
    total = 0.0
    for anchors, others, u in ((z1, z2, u1), (z2, z1, u2)):
        for i in range(count):
            total -= anchors[i] @ others[i]
            for side in (others, anchors):
                for j in range(count):
                    if j != i:
                        similarity = anchors[i] @ side[j]
                        total += np.exp(similarity / temperature) / u[i] * similarity / (2 * (count - 1))
    return total / count


def decoupled_nt_xent(z1: np.ndarray, z2: np.ndarray, temperature: float) -> float:
    """NT-Xent with the positive left out of the denominator (the global objective of one batch, up to a constant)."""
    g1, g2 = contrast(z1, z2, temperature)
    positive = np.sum(z1 * z2, axis=1) / temperature
    return float(np.mean(np.log(g1) - positive + np.log(g2) - positive))

"""TensorFlow's stateless uniform numbers in NumPy, for a machine without TensorFlow. Philox 4x32-10 (Salmon et al. 2011)."""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_ROUNDS = 10
_SEED_KEY = (0x3EC8F720, 0x02461E29)
"""The key by which TensorFlow makes key and counter from a seed (`StatelessRandomGetKeyCounter`)."""


def uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """Returns what `tf.random.stateless_uniform([count], seed, alg="philox")` does for each seed, [n, count] float32 in [0, 1).

    `seeds` is [n, 2] int64.
    """
    halves = np.ascontiguousarray(seeds, np.int64).view(np.uint32)
    mixed = philox([halves[:, i] for i in range(4)], [np.full(len(halves), part, np.uint32) for part in _SEED_KEY])
    blocks = -(-count // 4)
    block = np.broadcast_to(np.arange(blocks, dtype=np.uint32), (len(halves), blocks))
    zeros = np.zeros_like(block)
    counter = [block, zeros, *(np.broadcast_to(part[:, None], block.shape) for part in mixed[2:])]
    bits = np.stack(philox(counter, [part[:, None] for part in mixed[:2]]), axis=-1).reshape(len(halves), -1)[:, :count]
    # The 23 lowest bits are the fraction of a number in [1, 2).
    return ((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)


def philox(counter: list[np.ndarray], key: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the four words, uint32, of each `counter` of four words under each `key` of two. Arrays broadcast."""
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        ac, ca = (word.astype(np.uint64) * by for word, by in zip((a, c), _MULTIPLIERS, strict=True))
        high = [(product >> np.uint64(32)).astype(np.uint32) for product in (ac, ca)]
        low = [product.astype(np.uint32) for product in (ac, ca)]
        a, b, c, d = high[1] ^ b ^ first, low[1], high[0] ^ d ^ second, low[0]
        first, second = first + _WEYL[0], second + _WEYL[1]
    return [a, b, c, d]

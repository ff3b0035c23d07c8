"""Which draw is this? Randomness as a function of names and counters; no generator state is ever kept.

A draw is `bits(key, *counters)`: `key` is a hash of names (run seed, purpose, epoch, ...), the counters say which image
and which slot. The same numbers come out on the host (NumPy) and on a device (torch), for one image or for a batch, in
any order. The mixing function is the finaliser of SplitMix64 (Steele, Lea & Flood 2014).
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB

U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]


def seed_of(*names: int | str) -> int:
    """A 64-bit key for a draw that goes by these names, e.g. `seed_of(run_seed, "views", epoch, view)`."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
    return z ^ (z >> np.uint64(31))


def bits(key: int, *counters: npt.ArrayLike) -> U64:
    """64 random bits for every element of the broadcast counters (non-negative integers)."""
    z = np.asarray(key, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            z = _mix(z + (np.asarray(counter).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return z


def uniform(key: int, *counters: npt.ArrayLike) -> F32:
    """Uniform float32 in [0, 1) with 24 random bits, for every element of the broadcast counters."""
    return (bits(key, *counters) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, n: int) -> Tensor:
    return (z >> n) & ((1 << (64 - n)) - 1)


def bits_on(key: int, *counters: Tensor) -> Tensor:
    """`bits` on the counters' device; the 64 bits come as int64."""
    z = torch.full((), _signed(key), dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        z = z + (counter.to(torch.int64) + 1) * _signed(_GOLDEN)
        z = (z ^ _shift(z, 30)) * _signed(_MIX1)
        z = (z ^ _shift(z, 27)) * _signed(_MIX2)
        z = z ^ _shift(z, 31)
    return z


def uniform_on(key: int, *counters: Tensor) -> Tensor:
    """`uniform` on the counters' device: equal numbers, float32."""
    return _shift(bits_on(key, *counters), 40).to(torch.float32) * 2**-24


@overload
def permuted(position: int, length: int, key: int) -> int: ...
@overload
def permuted(position: npt.NDArray[np.int64], length: int, key: int) -> npt.NDArray[np.int64]: ...
def permuted(position: int | npt.NDArray[np.int64], length: int, key: int) -> int | npt.NDArray[np.int64]:
    """Where a keyed permutation of range(length) sends each position: random access, no list.

    A four-round balanced Feistel network over the smallest even number of bits that holds `length`, walked along its
    cycle until it lands inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [seed_of(key, "feistel", turn) for turn in range(4)]

    def once(x: U64) -> U64:
        left, right = x >> np.uint64(half), x & mask
        for turn in keys:
            left, right = right, left ^ (bits(turn, right) & mask)
        return (left << np.uint64(half)) | right

    x = once(np.atleast_1d(np.asarray(position)).astype(np.uint64))
    while (outside := x >= length).any():
        x[outside] = once(x[outside])
    out = x.astype(np.int64)
    return int(out[0]) if np.ndim(position) == 0 else out.reshape(np.shape(position))


def permutation(length: int, key: int) -> npt.NDArray[np.int64]:
    """The whole keyed permutation of range(length)."""
    return permuted(np.arange(length), length, key)


def seed_here(*names: int | str) -> None:
    """Seed torch's own generators for what is drawn next (initialisation, dropout, masks)."""
    torch.manual_seed(seed_of(*names) & (_MASK >> 1))


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Inside, the global generators of Python, NumPy and torch (CPU) draw what goes by these names; then as before.

    For code of others that draws from them, such as timm's augmentations.
    """
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    key = seed_of(*names)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key & (_MASK >> 1))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])

"""Two parity blocks over some data blocks: any two blocks that are known to be bad come back exactly.

``P`` is the sum of the data blocks and ``Q`` the sum of ``2^i`` times block ``i``, byte by byte in the field
of 256 elements with the polynomial x^8 + x^4 + x^3 + x^2 + 1, where a sum is XOR. It is the code of RAID 6
(H. P. Anvin, The mathematics of RAID-6, 2004). With at most 255 data blocks all powers of 2 differ, so any
two blocks can be solved for.

Blocks are numpy arrays of uint8 of one length, a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Block = NDArray[np.uint8]

MOST_DATA_BLOCKS: Final = 255
_POLYNOMIAL: Final = 0x1D
"""The polynomial without x^8: what a doubling folds back."""
_SEVEN_BITS: Final = np.uint64(0xFEFEFEFEFEFEFEFE)
_LOWEST_BITS: Final = np.uint64(0x0101010101010101)


def _powers() -> tuple[list[int], list[int]]:
    """Return the powers 2^0 to 2^254, and the exponent of each element but 0."""
    powers, exponents = [1], [0] * 256
    while len(powers) < 255:
        doubled = powers[-1] << 1
        powers.append(doubled ^ (0x100 | _POLYNOMIAL) if doubled & 0x100 else doubled)
    for number, power in enumerate(powers):
        exponents[power] = number
    return powers, exponents


_POWER, _EXPONENT = _powers()


def parity(data: Sequence[Block]) -> tuple[Block, Block]:
    """Return ``P`` and ``Q`` of 1 to 255 data blocks."""
    p = data[-1].copy().view(np.uint64)
    q = p.copy()
    carried = np.empty_like(q)
    # From the last block to the first, doubling between them: block i ends up doubled i times.
    for block in reversed(data[:-1]):
        words = block.view(np.uint64)
        p ^= words
        np.right_shift(q, np.uint64(7), out=carried)
        carried &= _LOWEST_BITS
        carried *= np.uint64(_POLYNOMIAL)
        np.left_shift(q, np.uint64(1), out=q)
        q &= _SEVEN_BITS
        q ^= carried
        q ^= words
    return p.view(np.uint8), q.view(np.uint8)


def restore(data: Sequence[Block | None], extra: Mapping[int, Block]) -> list[Block] | None:
    """Solve for the data blocks that are missing.

    Parameters
    ----------
    data
        The data blocks, None for each that is missing; a block that is there must be right.
    extra
        Those of the parity blocks that are there: 0 is ``P``, 1 is ``Q``.

    Returns
    -------
    All data blocks, or None where more blocks are missing than parity blocks are there.
    """
    missing = [number for number, block in enumerate(data) if block is None]
    known = [block for block in data if block is not None]
    if not missing:
        return known
    if len(missing) > len(extra):
        return None
    nothing = np.zeros_like(next(iter(extra.values())))
    filled = [nothing if block is None else block for block in data]
    first, last = missing[0], missing[-1]
    if first == last and 0 in extra:
        filled[first] = np.bitwise_xor.reduce([*known, extra[0]])
        return filled
    rest = parity(filled)
    sums = {number: block ^ rest[number] for number, block in extra.items()}
    if first == last:
        filled[first] = _times(_inverse(_POWER[first]), sums[1])
        return filled
    # With D_a + D_b = u and 2^a D_a + 2^b D_b = v, D_b is (2^a u + v) / (2^a + 2^b).
    numerator = _times(_POWER[first], sums[0]) ^ sums[1]
    filled[last] = _times(_inverse(_POWER[first] ^ _POWER[last]), numerator)
    filled[first] = sums[0] ^ filled[last]
    return filled


def _inverse(factor: int) -> int:
    return _POWER[-_EXPONENT[factor] % 255]


def _times(factor: int, block: Block) -> Block:
    """Return the product of a number other than 0 and each byte of a block."""
    shift = _EXPONENT[factor]
    products = [0, *(_POWER[(_EXPONENT[value] + shift) % 255] for value in range(1, 256))]
    return np.array(products, np.uint8)[block]

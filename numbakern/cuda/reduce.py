"""Sums and maxima over the lanes that share a row, and where rows lie.

A team is a power of two of lanes: part of a warp, a warp, or a block of whole warps. Sums run over
a binary tree, neighbouring lanes first, so that another walker can add in the same order.
"""

from numbakern.cuda.device import (
    barrier,
    divmod_positive,
    larger,
    shared,
    shared_load,
    shared_store,
    shuffle_xor,
)

WARP = 32


def team_fold(v, lanes, thread, combine):
    """Combine v (f4, f8 or i4) over each team of lanes; every lane gets the result.

    Parameters
    ----------
    lanes : int
        Size of a team; beyond a warp it is the block.
    thread : Value
        Number of the thread in the block.
    combine : function (a, b) -> c
        Commutative.
    """
    offset = 1
    while offset < min(lanes, WARP):
        v = combine(v, shuffle_xor(v, offset))
        offset *= 2
    if lanes <= WARP:
        return v
    warps = lanes // WARP
    area = shared(thread, 8 * warps)
    lane = thread & (WARP - 1)
    shared_store(area + ((thread >> 5) << 3), v, lane == 0)
    barrier(thread)
    v = shared_load(area + ((lane & (warps - 1)) << 3))
    offset = 1
    while offset < warps:
        v = combine(v, shuffle_xor(v, offset))
        offset *= 2
    return v


def team_sum(v, lanes, thread):
    """Σ v over the team."""
    return team_fold(v, lanes, thread, lambda a, b: a + b)


def team_max(v, lanes, thread):
    """The largest v of the team; NaN if one is."""
    return team_fold(v, lanes, thread, larger)


def offsets(frame, row, dimensions, names):
    """Where row number `row` of the batch starts in each of these arrays, in bytes.

    The batch has `dimensions` axes, the last one running fastest. Axis d of size `size{d}` (its
    reciprocal is `inverse{d}`) is `{name}_step{d}` bytes apart in the array `name`.
    """
    found = [row.like(row.constant(0)) for _ in names]
    for d in range(dimensions - 1, -1, -1):
        i = row
        if d:
            row, i = divmod_positive(row, getattr(frame, f"size{d}"), getattr(frame, f"inverse{d}"))
        found = [
            at + i * getattr(frame, f"{name}_step{d}")
            for at, name in zip(found, names, strict=True)
        ]
    return found

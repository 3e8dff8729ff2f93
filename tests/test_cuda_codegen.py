"""The code that the CUDA kernels become, read from their machine code; no GPU is needed.

The default run takes a kernel of every operation, of every type and of every way through a row,
and some for all three architectures; ``-m "codegen and slow"`` takes every kernel that ships, for
all of them. ``python -m numbakern.cuda`` prints the figures.
"""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.codegen

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numbakern.cuda import codegen  # noqa: E402
from numbakern.cuda.codegen import ARCHITECTURES, case, figures  # noqa: E402

try:
    from cuda import pathfinder

    TOOLS = [pathfinder.find_nvidia_binary_utility(n) for n in ("nvdisasm", "cuobjdump")]
except ImportError:
    TOOLS = [None]
if None in TOOLS:
    pytest.skip("nvdisasm and cuobjdump are not installed", allow_module_level=True)

REGISTERS = 65536  # of a multiprocessor
IN_FLIGHT = 28 << 10
"""Bytes that a multiprocessor has to have asked for to keep the memory busy: 0.8 µs at 4.3 TB/s
over 132 of them."""

# Instructions for each element of an aligned row that a warp (a block, in chunks) takes, all of the
# row's own work included. An H100 issues 62 in the time that 8 bytes take to move, 31 for 4 bytes.
BUDGET = {
    "log_softmax": 36,
    "softmax": 38,
    "logsumexp": 34,
    "log_softmax_backward": 36,
    "softmax_backward": 26,
    "cross_entropy": 34,
    "cross_entropy_value_and_grad": 46,
    "cross_entropy_backward": 46,
    "cross_entropy_backward-lse": 34,
    "cross_entropy_value_and_grad-smooth": 62,
    "cross_entropy_value_and_grad-soft": 70,
    "nll_loss_backward": 20,
}
SINGLE = 8
"""Accesses of less than 16 bytes for what there is one of a row: label, logit there, weight, …"""
SOME = ("log_softmax", "softmax_backward", "cross_entropy_value_and_grad")


def check(one, arch):
    found = figures(one, arch)
    assert found.calls == 0, found
    assert found.local == 0, found
    size = 2 if one.kind in ("bf", "f2") else int(one.kind[1])
    threads = one.step.block
    # Registers are given to warps by 256; so many threads there are at once.
    resident = REGISTERS // (-(-found.registers // 8) * 8) // threads * threads
    assert resident >= threads, found
    params = dict(one.step.spec.params)
    lanes, vectors, group, chunks = params["part"]
    inputs = sum(name in ("x", "y") for name, _ in params["modes"])
    if lanes * vectors * group >= 1000 and inputs and one.layout != "columns":
        asked = min(resident, 2048) * vectors * group * size * inputs
        assert asked >= IN_FLIGHT, found
    if one.layout == "whole" and one.operation != "nll_loss":
        assert found.wide > 0, found
        assert found.wide % vectors == 0, found
        assert found.narrow <= (0 if chunks else SINGLE), found
    if one.layout == "whole" and vectors * group >= 31 and one.kind != "f8":
        assert found.instructions <= BUDGET[one.operation], found
    return found


def cases_of(operations, kinds, part):
    """A case each, of whole rows of the given part of COUNTS."""
    return [case(op, kind, codegen.COUNTS[kind][part]) for op in operations for kind in kinds]


DEFAULT = [
    *((one, "sm_90a") for one in cases_of(SOME, codegen.KINDS, 1)),
    *(
        (case(op, "f4", 1000), "sm_90a")
        for op in codegen.OPERATIONS
        if op not in (*SOME, "nll_loss")
    ),
    *((one, "sm_90a") for part in (0, 2, 3) for one in cases_of(SOME[:1], ("f4", "bf"), part)),
    (case(SOME[2], "bf", 65536), "sm_90a"),
    *((case("log_softmax", kind, 1001, "shifted"), "sm_90a") for kind in ("f4", "bf")),
    (case("log_softmax", "f4", 21, "columns"), "sm_90a"),
    *((one, arch) for arch in ("sm_80", "sm_100a") for one in cases_of(SOME, ("f4", "bf"), 1)),
]


def named(pairs):
    return [pytest.param(one, arch, id=f"{one.name}-{arch}") for one, arch in pairs]


@pytest.mark.parametrize("one, arch", named(DEFAULT))
def test_machine_code(one, arch):
    check(one, arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "one, arch", named((one, arch) for arch in ARCHITECTURES for one in codegen.cases())
)
def test_machine_code_of_everything(one, arch):
    check(one, arch)


def test_table():
    """What `python -m numbakern.cuda` prints is a line for each kernel."""
    few = [case("log_softmax", "f4", 1000)]
    lines = codegen.table(few, "sm_90a").splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| log_softmax-f4-1000-whole | 128 |")

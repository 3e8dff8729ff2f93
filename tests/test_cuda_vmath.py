"""What CUDA threads compute with, densely, on the NumPy machine of `emulator`.

exp and log are those of the CPU target (`numbakern.vmath`); here is what a GPU needs beside them,
and that both see the same numbers.
"""

from __future__ import annotations

import math
import types

import ml_dtypes
import numpy as np
import pytest

from numbakern import vmath
from numbakern.cuda import device
from numbakern.cuda.device import Value
from numbakern.cuda.kernels import quotient
from numbakern.cuda.softmax import exponentials, scaled_exp, share_of, share_of_halves
from tests import accuracy, cases, emulator
from tests.cases import float32, float64
from tests.emulator import Emulator, Fault, Memory

WORK = np.longdouble
THREADS = 1024


@pytest.fixture
def machine():
    return Emulator(Memory([]), range(8), THREADS)


def value(machine, array):
    kinds = {"float32": "f4", "float64": "f8", "int32": "i4", "int64": "i8"}
    return Value(machine, array.reshape(machine.shape), kinds[array.dtype.name])


def count(machine):
    return machine.shape[0] * machine.shape[1]


def spread(machine, low, high, dtype=np.float64):
    return np.linspace(low, high, count(machine)).astype(dtype)


def test_reciprocal_and_division(machine, monkeypatch):
    with np.errstate(all="ignore"):
        b = 2.0 ** spread(machine, -900.0, 900.0)
        b = b * cases.generator(1).uniform(1, 2, b.shape)
        a = cases.generator(2).normal(0, 1, b.shape)
        r = device.reciprocal(value(machine, b)).value.ravel()
        assert accuracy.errors(r, 1 / b.astype(WORK), float64).max() <= 1.0
        b = cases.generator(3).uniform(1e-3, 1e7, b.shape)
        q = device.divide(value(machine, a), value(machine, b)).value.ravel()
        assert accuracy.errors(q, a.astype(WORK) / b, float64).max() <= 0.5 + 1e-6
        for sign in 1.0, -1.0:
            monkeypatch.setattr(emulator, "RECIPROCAL_ERROR", sign)
            q = device.divide(value(machine, a), value(machine, b), "f4").value.ravel()
            assert np.all(abs(q - a.astype(WORK) / b) <= 2.0**-44 * abs(a / b))


@pytest.mark.parametrize("b", [0.0, -0.0, 2.0, -2.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("a", [0.0, 3.0, -3.0, math.nan])
def test_quotient_as_ieee_has_it_but_by_0(machine, a, b):
    """That is the mean of nothing."""
    full = np.ones(count(machine))
    with np.errstate(all="ignore"):
        got = quotient(value(machine, a * full), value(machine, b * full)).value.flat[0]
        want = np.float64(a) / np.float64(b) if b != 0 else np.nan
    np.testing.assert_equal(abs(got), abs(want))
    if np.isfinite(want) and want:
        assert got == want


def test_positive_division(machine):
    rng = cases.generator(4)
    n = rng.integers(0, 2**50, count(machine))
    for size in (1, 2, 3, 7, 97, 1000, 2**20 + 1, 2**33 + 5):
        q, r = device.divmod_positive(value(machine, n), size, 1.0 / size)
        np.testing.assert_array_equal(q.value.ravel(), n // size)
        np.testing.assert_array_equal(r.value.ravel(), n % size)


@pytest.mark.parametrize("m", [0.0, 1.5, -37.25, 300.0, 511.0, -513.0, 1e5, 3e7])
@cases.dtypes(float32, float64)
def test_exponentials_below_a_maximum(machine, dtype, m):
    """exp(x − m) of every x down to where the type ends, without a subtraction that rounds."""
    elem = {float32: "f4", float64: "f8"}[dtype]
    m = float(dtype.type(m))
    x = (m - spread(machine, 0.0, 80.0 if elem == "f4" else 700.0)).astype(dtype)
    with np.errstate(all="ignore"):
        params, factor = exponentials(value(machine, np.full(count(machine), m)), elem)
        e = scaled_exp(value(machine, x), *params)
        got = device.convert(e, "f8").value.ravel().astype(WORK) * factor.value.flat[0]
        below = scaled_exp(value(machine, np.full_like(x, -np.inf)), *params)
    want = np.exp(x.astype(WORK) - WORK(m))
    # An ulp of the exponential, an ulp of the row's factor.
    assert (np.abs(got - want) / accuracy.ulp(want, dtype)).max() <= 2.0
    tiny = device.convert(below, "f8").value.flat[0] * WORK(factor.value.flat[0])
    assert tiny < accuracy.smallest_normal(dtype) * WORK(2) ** -40


@pytest.mark.parametrize("off", [2.0, -2.0])
@pytest.mark.parametrize("m", [0.0, 1.5, -37.25, 300.0, 511.0, -514.0, 1e5])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_exponentials_of_every_half(machine, dtype, m, off, monkeypatch):
    """exp(x − m) of all halves that are not above m, by an exp2 as far off as it may be."""
    monkeypatch.setattr(emulator, "EXP2_ERROR", off)
    with np.errstate(all="ignore"):
        m = float(np.array(m).astype(dtype)) if m < 65504 else 60000.0
        every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
        params, factor = exponentials(value(machine, np.full(count(machine), m)), "f4")
        for x in np.array_split(every, 65536 // count(machine)):
            e = scaled_exp(value(machine, x), *params, True)
            got = device.convert(e, "f8").value.ravel().astype(WORK) * factor.value.flat[0]
            want = np.exp(x.astype(WORK) - WORK(m))
            inside = (x <= m) & (x >= m - 80.0)
            # 2 ulp from the rounded 2**f, and as much as all the rest is off.
            assert np.all(abs(got - want)[inside] <= 3 * 2.0**-23 * want[inside])
            assert np.all(got[~(x >= m - 120.0)] < 2.0**-170)
            assert np.all(np.isfinite(got[x <= m]))


@pytest.mark.parametrize("m", [0.0, -0.0, 1.5, -37.25, 300.0, 511.0, -514.0, 1e5, 2.0**22])
@pytest.mark.parametrize("kind, dtype", [("f2", np.float16), ("bf", ml_dtypes.bfloat16)])
def test_halves_two_at_a_time(machine, kind, dtype, m):
    """A thread's 16 halves that are not above m: as they are one by one, and as they should be."""
    if m >= 65504 and kind == "f2":
        m = 60000.0
    m = float(np.array(m).astype(dtype))
    rng = cases.generator(9)
    x = m - np.abs(rng.normal(0, 12, (count(machine), 16)))
    x[rng.random(x.shape) < 0.2] = m
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[0], x[1], x[2] = m, -np.inf, m - 200.0
    with np.errstate(all="ignore"):
        halves = np.minimum(x.astype(dtype).astype(np.float64), m).astype(dtype)
        words = [value(machine, w.copy()) for w in halves.view(np.int32).T]
        top = value(machine, np.full(count(machine), m))
        op = types.SimpleNamespace(elem="f4", halves=True, linear=False)
        numbers = [
            (i, value(machine, halves[:, i].astype(np.float32)), None, None) for i in range(16)
        ]
        single, _ = share_of(op, None, None, numbers, top)
        found = share_of_halves(words, kind, top, False, lambda v: v, None)
        wide = halves.astype(WORK)
        want = np.sum(np.where(wide < m, np.exp(wide - m), 0), axis=1)
    np.testing.assert_array_equal(found.k.value.ravel(), np.sum(wide == m, axis=1))
    np.testing.assert_array_equal(found.k.value, single.k.value)
    rest = found.rest.value.ravel()
    inside = want > 1e-37
    # Each of them 3 ulp, and half a one for each of four additions.
    assert np.all(abs(rest - want)[inside] <= 5 * 2.0**-23 * want[inside])
    assert np.all(rest[~inside] < 2.0**-160)
    np.testing.assert_array_equal(rest[inside], single.rest.value.ravel()[inside])


@pytest.mark.parametrize("m", [0.0, -37.25, 300.0, 511.0, -514.0, 1e5])
@pytest.mark.parametrize("kind, dtype", [("f2", np.float16), ("bf", ml_dtypes.bfloat16)])
def test_halves_of_a_large_sum(machine, kind, dtype, m):
    """Two to sixteen of a thread's 16 halves are near m, the others anywhere below it."""
    m = float(np.array(min(m, 60000.0) if kind == "f2" else m).astype(dtype))
    rng = cases.generator(10)
    x = m - np.abs(rng.normal(0, 1, (count(machine), 16))) * rng.choice([0.5, 4.0, 100.0])
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[:, 0] = m
    x[0], x[1], x[2], x[3] = m, -np.inf, np.nan, m - 1.0
    x[3, 0], x[4, 1:] = m, -np.inf
    with np.errstate(all="ignore"):
        halves = np.minimum(x.astype(dtype).astype(np.float64), m).astype(dtype)
        words = [value(machine, w.copy()) for w in halves.view(np.int32).T]
        top = value(machine, np.max(halves.astype(np.float64), axis=1))
        apart = share_of_halves(words, kind, top, False, lambda v: v, None)
        found = share_of_halves(words, kind, top, True, lambda v: v, lambda _, compute: compute())
        wide = halves.astype(WORK)
        want = np.sum(np.exp(wide - np.max(wide, axis=1, keepdims=True)), axis=1)
    k, rest = found.k.value.ravel(), found.rest.value.ravel()
    large, near = want >= 3.001, abs(m) < 512
    assert near == np.any(rest != apart.rest.value.ravel()) and np.any(want < 2.9)
    assert np.all(abs(k + rest - want)[large] <= 5e-7 * want[large])
    rarely = ~(want >= 2.999) | (not near)
    np.testing.assert_array_equal(k[rarely], apart.k.value.ravel()[rarely])
    np.testing.assert_array_equal(rest[rarely], apart.rest.value.ravel()[rarely])


@pytest.mark.parametrize("kind, dtype", [("f2", np.float16), ("bf", ml_dtypes.bfloat16)])
def test_equal_halves(machine, kind, dtype):
    """Both halves of a word at once; zeros are equal, NaN is not."""
    rng = cases.generator(7)
    some = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-14, 3.0]).astype(dtype)
    a, b = (rng.choice(some, 2 * count(machine)) for _ in range(2))
    words = (value(machine, v.view(np.int32)) for v in (a, b))
    got = device.equal_halves(*words, kind).value.ravel().view(np.uint16)
    want = np.where(a.astype(np.float32) == b.astype(np.float32), 0xFFFF, 0)
    np.testing.assert_array_equal(got, want)


def test_one_below(machine):
    x = np.resize(np.array([1.0, 2.0, -np.inf, np.nan, -0.0], np.float32), count(machine))
    for dtype in (np.float32, np.float64):
        got = device.one_below(value(machine, x.astype(dtype)), 2.0)
        np.testing.assert_array_equal(got.value.ravel(), np.where(x < 2, 1, 0).astype(dtype))


@pytest.mark.parametrize("kind, dtype", [("f2", np.float16), ("bf", ml_dtypes.bfloat16)])
def test_larger_halves(machine, kind, dtype):
    """Both halves of a word at once: NaN if one is."""
    a, b = cases.generator(6).integers(0, 65536, (2, 2 * count(machine))).astype(np.uint16)
    words = (value(machine, v.view(np.int32)) for v in (a, b))
    got = device.larger_halves(*words, kind).value.ravel().view(np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        want = np.maximum(a.view(dtype).astype(np.float32), b.view(dtype).astype(np.float32))
    np.testing.assert_array_equal(got.astype(np.float32), want)


@cases.dtypes(float32, float64)
def test_root_of_exp(machine, dtype):
    """Of what is no number of the type itself, too."""
    bits = 250 if dtype == float32 else 2042
    y = (spread(machine, -bits, bits, float64) * np.log(2)).astype(dtype)
    y[:4] = 0.0, -np.inf, np.inf, np.nan
    with np.errstate(all="ignore"):
        got = vmath.root_of_exp(value(machine, y)).value.ravel()
    np.testing.assert_array_equal(got[:4], [1.0, 0.0, np.inf, np.nan])
    assert accuracy.errors(got[4:], np.exp(y[4:].astype(WORK) / 2), dtype).max() <= 1.1


def test_log_sum_of_a_confident_row(machine):
    """log(1 + r) for r down to nothing."""
    r = 2.0 ** spread(machine, -1000.0, 20.0)
    one = np.ones(count(machine))
    with np.errstate(all="ignore"):
        got = vmath.log_sum(value(machine, one), value(machine, r), "f8").value.ravel()
        single = vmath.log_sum(value(machine, one), value(machine, r), "f4").value.ravel()
    want = np.log1p(r.astype(WORK))
    assert accuracy.errors(got, want, float64).max() <= 2.0
    assert np.all(abs(single - want) <= 1e-9 * want)


@pytest.mark.parametrize("elem, off", [("f4", 1e-9), ("f8", 2.0**-51)])
def test_log_sum_of_a_count_and_a_rest(machine, elem, off):
    """log(k + r) of any whole number k and what is beside it, at both ends of each power of 2."""
    rng = cases.generator(10)
    k = 2.0 ** rng.integers(0, 30, count(machine)) + rng.integers(0, 2, count(machine))
    r = k * 2.0 ** rng.uniform(-60, 10, count(machine))
    r[::5] = 0.0
    with np.errstate(all="ignore"):
        got = vmath.log_sum(value(machine, k), value(machine, r), elem).value.ravel()
    want = np.log1p((k.astype(WORK) - 1) + r)
    assert np.all(abs(got - want) <= off * want)


def test_split_exponent(machine):
    y = 2.0 ** spread(machine, -300.0, 300.0)
    with np.errstate(all="ignore"):
        n, inverse = (v.value.ravel() for v in device.split_exponent(value(machine, y)))
    np.testing.assert_array_equal(inverse, 2.0**-n)
    assert np.all((y * inverse > 0.7071) & (y * inverse < 1.4143))


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_count_lanes(machine, lanes):
    mask = cases.generator(11).random(count(machine)) < 0.4
    held = value(machine, mask.astype(np.int32)) > 0
    got = device.count_lanes(held, lanes).value.reshape(-1, lanes)[:, 0]
    np.testing.assert_array_equal(got, mask.reshape(-1, lanes).sum(axis=1))


def test_within(machine):
    t = np.resize(np.array([-(2**63), -1, 0, 1, 9, 10, 2**32, 2**63 - 1]), count(machine))
    full = value(machine, np.full(count(machine), 10))
    got = device.within(value(machine, t), full).value.ravel()
    np.testing.assert_array_equal(got, (t >= 0) & (t < 10))
    wide = value(machine, np.full(count(machine), -7, np.int32))
    product = device.distance(wide, value(machine, np.full(count(machine), 2**31 - 1)))
    assert np.all(product.value == -7 * (2**31 - 1))


@pytest.mark.parametrize("kind, dtype", [("f2", np.float16), ("bf", ml_dtypes.bfloat16)])
def test_every_half(machine, kind, dtype):
    """Each of the 65536 halves is unpacked and packed again."""
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(dtype)
    for part in np.array_split(bits, 65536 // count(machine)):
        word = value(machine, part.astype(np.int32) | part.astype(np.int32) << 16)
        low, high = (device.unpack_half(word, h, kind) for h in (False, True))
        want = halves[part].astype(np.float32)
        np.testing.assert_array_equal(low.value.ravel(), want)
        np.testing.assert_array_equal(high.value.ravel(), want)
        back = device.pack_halves(low, high, kind).value.ravel() & 0xFFFF
        number = ~np.isnan(want)
        np.testing.assert_array_equal(back[number], part[number])


def test_a_float64_becomes_a_half_in_one_rounding(machine):
    from numbakern.cuda.memory import Format

    rng = cases.generator(5)
    x = (
        rng.integers(1024, 4096, count(machine)) / 2048.0
        + rng.choice([0, 1, -1], count(machine)) * 2.0**-45
    )
    words = Format("f2", "f8").words([value(machine, x), value(machine, x)])
    got = (words[0].value.ravel() & 0xFFFF).astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(got, x.astype(np.float16))


# --- what the machine refuses --------------------------------------------------------------------


def test_no_branch_on_a_value(machine):
    with pytest.raises(TypeError, match="do not branch"):
        bool(value(machine, np.zeros(count(machine))) > 0)


def test_loops_and_barriers_do_not_diverge(machine):
    many = value(machine, np.arange(count(machine)))
    with pytest.raises(Fault, match="count differs"):
        device.repeat(many, lambda i: ())
    some = many > 5
    with pytest.raises(Fault, match="barrier in a branch"):
        device.when(some, lambda: device.barrier(many) or [], [])
    with pytest.raises(Fault, match="shuffle in a branch"):
        device.when(some, lambda: [device.shuffle_xor(many, 1)], [many])


def test_shared_memory_needs_barriers(machine):
    thread = Value(machine, machine.thread(), "i4")
    area = device.shared(thread, 8 * THREADS)
    own, next_one = area + (thread << 3), area + (((thread + 1) & (THREADS - 1)) << 3)
    v = device.convert(thread, "f8")
    with pytest.raises(Fault, match="before it is written"):
        device.shared_load(own)
    device.shared_store(own, v, thread >= 0)
    with pytest.raises(Fault, match="without a barrier"):
        device.shared_load(next_one)
    device.barrier(thread)
    got = device.shared_load(next_one).value
    np.testing.assert_array_equal(got[0], (np.arange(THREADS) + 1) % THREADS)
    with pytest.raises(Fault, match="without a barrier"):
        device.shared_store(own, v, thread >= 0)
    with pytest.raises(Fault, match="out of bounds"):
        device.shared_load(own + 8)

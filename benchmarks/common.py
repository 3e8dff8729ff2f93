"""The cases, their bounds, and the peers that only the benchmarks compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from numbakern._roofline import (
    SCIPY,
    TOLERANCE,
    TORCH,
    Arrays,
    Builder,
    Call,
    Case,
    Peer,
    as_tensor,
    torch_value_and_grad,
)

WIDE, SHORT, TEN, IMAGE = (1024, 32000), (4096, 1000), (32768, 10), (4, 21, 512, 512)
SMALL = (8, 10)


@dataclass(frozen=True)
class Bound:
    """A case with the figure it must reach and the one it aims at.

    `unit` is "x copy" (multiples of a copy of the array) or "us" (microseconds a call).
    """

    case: Case
    must: float
    goal: float
    unit: str = "x copy"


CASES = (
    Bound(Case("log_softmax", WIDE), 1.25, 1.05),
    Bound(Case("log_softmax_fresh", WIDE), 2.6, 1.3),
    Bound(Case("log_softmax_backward", WIDE), 1.9, 1.5),
    Bound(Case("cross_entropy_backward", WIDE), 1.3, 1.05),
    Bound(Case("value_and_grad", WIDE), 1.4, 1.1),
    Bound(Case("cross_entropy", WIDE), 0.8, 0.55),
    Bound(Case("nll_loss", WIDE), 0.03, 0.01),
    Bound(Case("nll_loss_backward", WIDE), 0.7, 0.5),
    Bound(Case("log_softmax", WIDE, "bfloat16"), 2.0, 1.2),
    Bound(Case("value_and_grad", WIDE, "bfloat16"), 2.2, 1.4),
    Bound(Case("log_softmax", WIDE, "float16"), 2.0, 1.2),
    Bound(Case("value_and_grad", WIDE, "float16"), 2.2, 1.4),
    Bound(Case("log_softmax", WIDE, "float64"), 1.5, 1.1),
    Bound(Case("log_softmax", SHORT), 1.6, 1.1),
    Bound(Case("value_and_grad", SHORT), 1.8, 1.2),
    Bound(Case("log_softmax", TEN), 5.0, 2.0),
    Bound(Case("value_and_grad", TEN), 8.0, 3.0),
    Bound(Case("log_softmax", IMAGE, axis=1), 1.5, 1.1),
    Bound(Case("value_and_grad", IMAGE, axis=1), 1.8, 1.2),
    Bound(Case("log_softmax", SMALL), 8.0, 3.0, "us"),
    Bound(Case("log_softmax_fresh", SMALL), 8.0, 3.0, "us"),
    Bound(Case("value_and_grad", SMALL), 8.0, 3.0, "us"),
)


# ---------------------------------------------------------------------------------------------
# NumPy, as one writes it by hand


def _wide_enough(array: np.ndarray) -> np.ndarray:
    """Half types in float32; the others as they are."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _numpy_log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = _wide_enough(x)
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _numpy_forward(a: Arrays) -> Call:
    return lambda: _numpy_log_softmax(a.logits, a.axis).astype(a.dtype, copy=False)


def _numpy_backward(a: Arrays) -> Call:
    grad, log_probs, axis = a.grad_output, a.log_probs, a.axis
    return lambda: grad - np.exp(log_probs) * grad.sum(axis=axis, keepdims=True)


def _numpy_loss(a: Arrays, log_probs: np.ndarray) -> Any:
    at_label = np.take_along_axis(log_probs, np.expand_dims(a.labels, a.axis), axis=a.axis)
    return -at_label.mean()


def _numpy_value_and_grad(a: Arrays) -> Call:
    labels = np.expand_dims(a.labels, a.axis)
    dtype = _wide_enough(a.logits[:0]).dtype

    def call() -> Any:
        log_probs = _numpy_log_softmax(a.logits, a.axis)
        grad = np.exp(log_probs)
        at_label = np.take_along_axis(grad, labels, axis=a.axis) - dtype.type(1)
        np.put_along_axis(grad, labels, at_label, axis=a.axis)
        grad /= dtype.type(labels.size)
        return _numpy_loss(a, log_probs), grad.astype(a.dtype, copy=False)

    return call


def _numpy_nll_backward(a: Arrays) -> Call:
    labels = np.expand_dims(a.labels, a.axis)

    def call() -> Any:
        a.out.fill(0)
        np.put_along_axis(a.out, labels, -1 / labels.size, axis=a.axis)
        return a.out

    return call


def _second(builder: Builder) -> Builder:
    """The gradient of a call that gives (loss, gradient)."""

    def build(a: Arrays) -> Call:
        call = builder(a)
        return lambda: call()[1]

    return build


NUMPY = Peer(
    "numpy",
    "numpy",
    {
        "log_softmax": _numpy_forward,
        "log_softmax_fresh": _numpy_forward,
        "log_softmax_backward": _numpy_backward,
        "cross_entropy": lambda a: lambda: _numpy_loss(a, _numpy_log_softmax(a.logits, a.axis)),
        "cross_entropy_backward": _second(_numpy_value_and_grad),
        "value_and_grad": _numpy_value_and_grad,
        "nll_loss": lambda a: partial(_numpy_loss, a, a.log_probs),
        "nll_loss_backward": _numpy_nll_backward,
    },
    frozenset(TOLERANCE),
)


# ---------------------------------------------------------------------------------------------
# torch.compile: always a fresh output


def _compiled(function: Any) -> Any:
    import torch

    torch._dynamo.reset()  # one compilation a case, whatever was compiled before
    return torch.compile(function, dynamic=False)


def _compiled_log_softmax(a: Arrays) -> Call:
    import torch

    return partial(_compiled(partial(torch.log_softmax, dim=a.axis)), as_tensor(a.logits))


def _compiled_log_softmax_backward(a: Arrays) -> Call:
    def backward(grad: Any, log_probs: Any) -> Any:
        return grad - log_probs.exp() * grad.sum(a.axis, keepdim=True)

    return partial(_compiled(backward), as_tensor(a.grad_output), as_tensor(a.log_probs))


def _compiled_cross_entropy(a: Arrays) -> Call:
    import torch.nn.functional

    return partial(
        _compiled(torch.nn.functional.cross_entropy),
        as_tensor(a.logits).movedim(a.axis, 1),
        torch.from_numpy(a.labels),
    )


def _compiled_value_and_grad(a: Arrays) -> Call:
    import torch.nn.functional

    return torch_value_and_grad(a, _compiled(torch.nn.functional.cross_entropy))


TORCH_COMPILE = Peer(
    "torch.compile",
    "torch",
    {
        "log_softmax_fresh": _compiled_log_softmax,
        "log_softmax": _compiled_log_softmax,
        "log_softmax_backward": _compiled_log_softmax_backward,
        "cross_entropy": _compiled_cross_entropy,
        "value_and_grad": _compiled_value_and_grad,
    },
    frozenset(TOLERANCE),
)


# ---------------------------------------------------------------------------------------------
# JAX: always a fresh output, and always waited for


def _jitted(function: Any, *arrays: np.ndarray) -> Call:
    import jax

    jax.config.update("jax_enable_x64", True)  # float64 and int64 stay what they are
    on_device = [jax.numpy.asarray(array) for array in arrays]
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*on_device))


def _jax_cross_entropy(axis: int) -> Any:
    import jax
    import jax.numpy as jnp

    def cross_entropy(x: Any, labels: Any) -> Any:
        at_label = jnp.take_along_axis(x, jnp.expand_dims(labels, axis), axis=axis)
        return jnp.mean(jax.nn.logsumexp(x, axis=axis, keepdims=True) - at_label)

    return cross_entropy


def _jax_log_softmax(a: Arrays) -> Call:
    import jax

    return _jitted(partial(jax.nn.log_softmax, axis=a.axis), a.logits)


def _jax_log_softmax_backward(a: Arrays) -> Call:
    import jax.numpy as jnp

    def backward(grad: Any, log_probs: Any) -> Any:
        return grad - jnp.exp(log_probs) * grad.sum(a.axis, keepdims=True)

    return _jitted(backward, a.grad_output, a.log_probs)


def _jax_value_and_grad(a: Arrays) -> Call:
    import jax

    return _jitted(jax.value_and_grad(_jax_cross_entropy(a.axis)), a.logits, a.labels)


JAX = Peer(
    "jax",
    "jax",
    {
        "log_softmax": _jax_log_softmax,
        "log_softmax_fresh": _jax_log_softmax,
        "log_softmax_backward": _jax_log_softmax_backward,
        "cross_entropy": lambda a: _jitted(_jax_cross_entropy(a.axis), a.logits, a.labels),
        "value_and_grad": _jax_value_and_grad,
    },
    frozenset(TOLERANCE),
)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (NUMPY, SCIPY, TORCH, TORCH_COMPILE, JAX)}

"""The libraries of the CPU section that only the benchmarks compare with: torch.compile and JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from numbakern._roofline import (
    SCIPY,
    TOLERANCE,
    TORCH,
    Arrays,
    Call,
    Peer,
    as_tensor,
    torch_value_and_grad,
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
        as_tensor(a.labels),
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

CPU_PEERS = {peer.name: peer for peer in (SCIPY, TORCH, TORCH_COMPILE, JAX)}

"""Worst errors in units in the last place, against long double (`tests/accuracy.py`)."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import suite
from numbakern._roofline import DOES_NOT_APPLY, NOT_INSTALLED, as_tensor

WRONG = 1e9  # stands for every error beyond it, infinity included
CLASSES = (2, 10) if suite.SMALL else (2, 3, 10, 1000)
FUNCTIONS = ["log_softmax", "softmax", "logsumexp", "loss", "gradient"]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
# The names of `tests.accuracy.FAMILIES`, which needs pytest to be imported; a test compares them.
FAMILIES = [
    "scale 1",
    "scale 4",
    "scale 500",
    "offset 1e3",
    "offset 1e5",
    "confident 20",
    "confident 80",
    "confident 300",
    "confident 20 of random",
    "confident 80 of random",
    "confident 300 of random",
    "[0, -30]",
    "constant",
    "-inf mask",
]
IMPLEMENTATIONS = ["numbakern", "scipy", "torch", "jax", "numbakern on CUDA", "torch on CUDA"]


def _numbakern(function: str, x: np.ndarray, labels: np.ndarray) -> Any:
    import numbakern

    if function == "loss":
        return numbakern.cross_entropy(x, labels, reduction="none")
    if function == "gradient":
        return numbakern.cross_entropy_value_and_grad(x, labels, reduction="none")[1]
    return getattr(numbakern, function)(x)


def _scipy(function: str, x: np.ndarray, labels: np.ndarray) -> Any:
    import scipy.special

    if function in ("loss", "gradient"):
        raise NotImplementedError(DOES_NOT_APPLY)
    return getattr(scipy.special, function)(x, axis=-1)


def _jax(function: str, x: np.ndarray, labels: np.ndarray) -> Any:
    import jax

    jax.config.update("jax_enable_x64", True)

    def losses(x: Any) -> Any:
        at_label = jax.numpy.take_along_axis(x, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(x, axis=-1) - at_label

    if function == "loss":
        return losses(x)
    if function == "gradient":
        return jax.grad(lambda x: losses(x).sum())(x)
    return getattr(jax.nn, function)(x, axis=-1)


def _torch(function: str, x: Any, labels: Any) -> Any:
    import torch

    if function == "loss":
        return torch.nn.functional.cross_entropy(x, labels, reduction="none")
    if function == "gradient":
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]
    return getattr(torch, function)(x, -1)


def _with_tensors(call: Callable[..., Any], device: str) -> Callable[..., Any]:
    def on_tensors(function: str, x: np.ndarray, labels: np.ndarray) -> Any:
        import torch

        result = call(function, as_tensor(x).to(device), as_tensor(labels).to(device))
        result = result.detach().cpu()
        if result.dtype == torch.bfloat16:
            return result.view(torch.int16).numpy().view(x.dtype)
        return result.numpy()

    return on_tensors


CALLS = {
    "numbakern": ("numbakern", _numbakern),
    "scipy": ("scipy", _scipy),
    "torch": ("torch", _with_tensors(_torch, "cpu")),
    "jax": ("jax", _jax),
    "numbakern on CUDA": ("torch", _with_tensors(_numbakern, "cuda")),
    "torch on CUDA": ("torch", _with_tensors(_torch, "cuda")),
}


def _want(function: str, rows: Any, labels: np.ndarray) -> tuple[Any, Any]:
    """The true values, and at which of them an ulp is taken (None: themselves)."""
    from tests import accuracy

    if function == "log_softmax":
        return rows.logp, None
    if function == "softmax":
        return rows.p, None
    if function == "logsumexp":
        largest = np.abs(rows.x.astype(np.float64).max(axis=1))
        return rows.lse, np.maximum(np.maximum(np.abs(rows.lse), largest), 1)
    if function == "loss":
        return -rows.logp[np.arange(len(labels)), labels], None
    return accuracy.label_gradient(rows, labels)[0], None


def _measure(implementation: str, dtype: str) -> dict[str, dict[str, Any]]:
    """Worst error by function and family, or what kept it from being computed."""
    from tests import accuracy

    call = CALLS[implementation][1]
    worst: dict[str, dict[str, Any]] = {function: {} for function in FUNCTIONS}
    for family, classes in itertools.product(accuracy.FAMILIES, CLASSES):
        if classes not in accuracy.classes_of(family):
            continue
        rows = accuracy.rows_of(family, classes, dtype)
        labels = np.argmax(rows.x.astype(np.float64), axis=1)
        for function, found in worst.items():
            if isinstance(found.get(family), str):  # failed at another number of classes
                continue
            try:
                with np.errstate(all="ignore"):
                    got = np.asarray(call(function, rows.x, labels))
            except Exception as error:
                found[family] = f"{type(error).__name__}: {error}"
                continue
            want, at = _want(function, rows, labels)
            if got.shape != want.shape:  # broadcasting would hide it
                found[family] = f"wrong result: shape {got.shape}, expected {want.shape}"
                continue
            ulps = float(accuracy.errors(got, want, got.dtype, at, flushed=True).max())
            found[family] = max(min(ulps, WRONG), found.get(family, 0.0))
    return worst


class _Measured:
    version = "1"
    timeout = 900

    def setup_cache(self) -> None:
        """Ask asv for a folder that the parameters share."""

    def setup(self, implementation: str, function: str, *key: str) -> None:
        if implementation.endswith("on CUDA"):
            from benchmarks.device import require_cuda

            require_cuda()
        if importlib.util.find_spec(CALLS[implementation][0]) is None:
            raise NotImplementedError(NOT_INSTALLED)
        dtype = self.dtype(*key)
        found = suite.remembered(
            ("ulp", implementation, dtype), lambda: _measure(implementation, dtype)
        )
        self.found = found[function]
        if any("NotImplementedError" in str(value) for value in self.found.values()):
            raise NotImplementedError(DOES_NOT_APPLY)
        if failed := [value for value in self.found.values() if isinstance(value, str)]:
            raise RuntimeError(failed[0])

    def dtype(self, *key: str) -> str:
        """The dtype of the parameters that follow the function."""
        raise NotImplementedError


class Ulp(_Measured):
    """The worst over all families of rows; of halves, the losses and logsumexp are float32."""

    params = [IMPLEMENTATIONS, FUNCTIONS, DTYPES]
    param_names = ["implementation", "function", "dtype"]

    def dtype(self, dtype: str) -> str:  # type: ignore[override]
        return dtype

    def track_ulp(self, *key: str) -> float:
        return max(self.found.values())

    track_ulp.unit = "ulp"  # type: ignore[attr-defined]


class UlpOfFamily(_Measured):
    """The worst over one family of rows, float32."""

    params = [IMPLEMENTATIONS, FUNCTIONS, FAMILIES]
    param_names = ["implementation", "function", "family"]

    def dtype(self, family: str) -> str:  # type: ignore[override]
        self.family = family
        return "float32"

    def track_ulp(self, *key: str) -> float:
        return self.found[self.family]

    track_ulp.unit = "ulp"  # type: ignore[attr-defined]

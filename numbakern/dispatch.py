"""Which target serves a call: decided here, from the arrays, and nowhere else.

A target has the functions that `functional` calls. Its module is imported at its first use, so
importing numbakern costs nothing but NumPy. That of the CPU is a target itself; that of CUDA gives
one for the library and the device of the arrays.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

_CUDA_DEVICES = (2, 13)  # DLPack: CUDA's device and managed memory
_NUMBERS = (int, float, np.generic)  # as grad_output they go with arrays of any target
_loaded: dict[str, ModuleType] = {}


def target_of(**arrays: Any) -> Any:
    """The target on which all these arguments live (None is left out); TypeError if they differ."""
    owner = name_of_owner = None
    for name, array in arrays.items():
        if array is None:
            continue
        # NumPy arrays first: nothing but a type comparison on the path of a small call.
        target = "cpu" if type(array) is np.ndarray else _target(name, array)
        if owner is None:
            owner, name_of_owner = target, name
        elif target != owner and target is not None:
            raise TypeError(
                f"{name}: expected an array on the same device as {name_of_owner} ({owner}), "
                f"got one on {target}"
            )
    if owner == "cuda":
        return (_loaded.get("cuda") or _load("cuda")).target_of(name_of_owner, arrays)
    return _loaded.get("cpu") or _load("cpu")


def _target(name: str, array: Any) -> str | None:
    """The target of an array, "cpu" for what NumPy can make one of; None for a number."""
    kind: Any = type(array)
    way = _way(kind)
    if way == "is_cuda":
        return "cuda" if array.is_cuda else "cpu"
    if way == "__dlpack_device__":
        try:
            return "cuda" if kind.__dlpack_device__(array)[0] in _CUDA_DEVICES else "cpu"
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            if not hasattr(kind, "__cuda_array_interface__"):
                return "cpu"  # what NumPy makes of it decides
            raise TypeError(f"{name}: expected an array on one device: {error}") from None
    if way == "ask":
        return "cuda" if hasattr(array, "__cuda_array_interface__") else "cpu"
    return way


@functools.lru_cache(maxsize=1024)
def _way(kind: Any) -> str | None:
    """The target of arrays of this type, or how to learn it of one of them; None for numbers."""
    if issubclass(kind, _NUMBERS):
        return None
    if issubclass(kind, (np.ndarray, list, tuple)):
        return "cpu"
    if hasattr(kind, "is_cuda"):  # PyTorch's tensors: ten times faster than DLPack
        return "is_cuda"
    if hasattr(kind, "__dlpack_device__"):
        return "__dlpack_device__"
    # Asked of the type: of an array, it may take its time or raise.
    return "cuda" if hasattr(kind, "__cuda_array_interface__") else "ask"


def _load(target: str) -> ModuleType:
    _loaded[target] = importlib.import_module(f"numbakern.{target}")
    return _loaded[target]

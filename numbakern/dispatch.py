"""Which target serves a call: decided here, from the arrays, and nowhere else.

A target is a module with the functions that `functional` calls. It is imported at its first use,
so importing numbakern costs nothing but NumPy.
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

_MODULES = {"cpu": "numbakern.cpu"}
_CUDA_DEVICES = (2, 3, 13)  # DLPack: CUDA, pinned and managed memory
_loaded: dict[str, ModuleType] = {}


def target_of(**arrays: Any) -> ModuleType:
    """The target on which all these arguments live (None is left out); TypeError if they differ."""
    owner = name_of_owner = None
    for name, array in arrays.items():
        if array is None:
            continue
        # NumPy arrays first: nothing but a type comparison on the path of a small call.
        target = "cpu" if type(array) is np.ndarray else _target(array)
        if owner is None:
            owner, name_of_owner = target, name
        elif target != owner:
            raise TypeError(
                f"{name}: expected an array on the same device as {name_of_owner} ({owner}), "
                f"got one on {target}"
            )
    return _loaded.get(owner or "cpu") or _load(owner or "cpu", name_of_owner)


def _target(array: Any) -> str:
    kind = type(array)
    if hasattr(kind, "__cuda_array_interface__") and not _on_cpu(array):
        return "cuda"
    device = getattr(kind, "__dlpack_device__", None)
    if device is not None and not isinstance(array, np.ndarray):
        try:
            return "cuda" if device(array)[0] in _CUDA_DEVICES else "cpu"
        except (TypeError, ValueError, RuntimeError, BufferError):
            return "cpu"  # what NumPy makes of it decides
    return "cpu"


def _on_cpu(array: Any) -> bool:
    """PyTorch's tensors have a CUDA array interface in their type wherever they live."""
    return not hasattr(array, "__cuda_array_interface__")


def _load(target: str, name: str | None) -> ModuleType:
    module = _MODULES.get(target)
    if module is None:
        raise RuntimeError(
            f"{name}: expected an array in host memory, got one on {target}: this version of "
            f"numbakern has no {target} target; copy the array to the host first"
        )
    _loaded[target] = importlib.import_module(module)
    return _loaded[target]

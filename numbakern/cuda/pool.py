"""Device memory of our own, for array libraries whose allocator cannot be asked: JAX and unknown.

It comes from the driver's stream-ordered pool, and leaves as an object that speaks DLPack and the
CUDA array interface. DLPack is written out here, for cuda.core exports no bfloat16.
"""

import atexit
import ctypes
import functools
import math

_CUDA = 2  # DLDeviceType
_CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "b": 6}  # DLDataTypeCode; V is bfloat16
_WORDS, _DELETER_AT = 8, 7  # a DLManagedTensor in words of eight bytes
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new = _api.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, _Destructor]
_is_valid = _api.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_pointer = _api.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]
_NAME = b"dltensor"
_exported: dict[int, tuple] = {}  # address of a managed tensor → it and what it keeps alive


@_Deleter
def _delete(address, pop=_exported.pop):
    pop(address, None)


@_Destructor
def _drop(capsule, is_valid=_is_valid, pointer=_pointer, pop=_exported.pop, name=_NAME):
    """A capsule that nobody consumed: a consumer renames it."""
    if is_valid(capsule, name):
        pop(pointer(capsule, name), None)


def _address(function):
    return ctypes.cast(function, ctypes.c_void_p).value


_DELETER = _address(_delete)


@atexit.register
def _let_go():
    """Leave to others what they hold at the end of Python, which cannot be called back then."""
    for tensor, _ in _exported.values():
        tensor[_DELETER_AT] = _address(_api.Py_IsInitialized)  # does nothing
    for lasting in (_exported, _delete, _drop):
        _api.Py_IncRef(ctypes.py_object(lasting))


def capsule(owner, pointer, shape, dtype, device):
    """A DLPack capsule of a contiguous array; `owner` lives until its consumer lets go."""
    kind = _CODES[dtype.kind] | 8 * dtype.itemsize << 8 | 1 << 16  # code, bits, lanes
    # A DLManagedTensor as eight-byte words, the shape behind it: a tenth of ctypes' structures.
    tensor = (ctypes.c_int64 * (_WORDS + len(shape)))()
    address = ctypes.addressof(tensor)
    place = device[0] | device[1] << 32
    tensor[:] = (
        pointer,
        place,
        len(shape) | kind << 32,
        address + 8 * _WORDS,
        0,  # strides: contiguous
        0,  # offset of the first byte
        0,  # the producer's own word
        _DELETER,
        *shape,
    )
    _exported[address] = tensor, owner
    return _new(address, _NAME, _drop)


@functools.lru_cache(maxsize=1024)
def contiguous_strides(shape, itemsize):
    """Strides in bytes of a C-contiguous array."""
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


class Array:
    """A contiguous array in device memory, on the stream it was made on.

    What the functions return for arrays whose library offers no way to make one. Any library that
    reads DLPack or the CUDA array interface takes it without a copy.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    nbytes : int
    pointer : int
        Address of the first element.
    """

    __slots__ = ("__weakref__", "_buffer", "dtype", "nbytes", "pointer", "shape", "stream")

    def __init__(self, shape, dtype, stream):
        self.shape, self.dtype, self.stream = shape, dtype, stream
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._buffer, self.pointer = stream.allocate(self.nbytes or 1)

    @property
    def device(self):
        """Number of the device."""
        return self.stream.device.ordinal

    @property
    def strides(self):
        """In bytes."""
        return contiguous_strides(self.shape, self.dtype.itemsize)

    @property
    def ndim(self):
        """Number of dimensions."""
        return len(self.shape)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,  # of bfloat16 <V2
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream.number,
            "version": 3,
        }

    def __dlpack_device__(self):
        return _CUDA, self.device

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("only shared as it is, on its own device")
        if stream != -1:
            self.stream.release_to(1 if stream is None else stream)
        return capsule(self, self.pointer, self.shape, self.dtype, self.__dlpack_device__())

    def __repr__(self):
        return f"<numbakern device array, shape {self.shape}, {self.dtype}, device {self.device}>"

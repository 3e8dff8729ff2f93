"""The libraries whose GPU arrays are taken: how each tells where an array lies and makes new ones.

Of an array a family tells, at every call, its key (all that a call's plan follows from) and its
address; and what the key says, once for each kind of call. It makes arrays for results with the
library's own allocator, knows the stream that the library's work is on, and hands results back.
Which family an array is of follows from the name of the package that its type comes from, so no
library is imported that the caller has not.
"""

import functools
import importlib
import math
import sys
from typing import NamedTuple

import ml_dtypes
import numpy as np

from numbakern import arrays
from numbakern.cuda import launch, pool
from numbakern.cuda.pool import contiguous_strides

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BYTE = np.dtype(np.uint8)
DEVICE = 1
"""Where in a key the number of the device is; the family comes first."""


class Described(NamedTuple):
    """What a key says of an array."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    dtype: np.dtype
    writeable: bool = True


class Family:
    """What every family does in the same way."""

    mutable = True  # whether `out=` can be one of its arrays
    counts_elements = False  # in strides, so that no element lies across two places
    holds = False  # whether an array must be kept until the work on it is done
    each_its_stream = False  # whether two arrays on a device can be on two streams

    def look(self, name, array, queue):
        """Key, address and what keeps alive of an array that is the argument `name`.

        `queue` is the Stream that the work will be on; None if this array decides it. The key is
        a tuple of the family, the device, the address modulo 16, and whatever `describe` needs.
        TypeError if there is no such array on a GPU.
        """
        raise NotImplementedError

    def describe(self, name, key):
        """What a key says; TypeError if it is nothing to compute with."""
        raise NotImplementedError

    def check_address(self, name, address):
        """TypeError for what is no address on a device, if `look` has not seen to that."""

    def handle(self, kept, device):
        """Address of the stream that work on this array is on; None if `look` has seen to that."""
        raise NotImplementedError

    def queue(self, kept, device):
        """The Stream for work that this array decides the stream of."""
        return launch.device(device).stream(self.handle(kept, device))

    def empty(self, shape, dtype, queue, like):
        """A new contiguous array for work on this Stream, and its address; the device is current.

        It comes from the family's own allocator; `like` is what is kept of one of its arrays.
        """
        raise NotImplementedError

    def scratch(self, size, queue, like):
        """Bytes for the time of a call: what keeps them, and their address."""
        return self.empty((size,), _BYTE, queue, like)

    export = None
    """Function that makes of a result what the caller gets; None if it is that itself."""

    def written(self, array):
        """Called once a caller's own array has been written to."""


class Torch(Family):
    """PyTorch's CUDA tensors. Gradients do not flow through: a tensor is taken as if detached."""

    counts_elements = True

    def __init__(self):
        torch = sys.modules["torch"]
        names = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
        self._dtypes = {getattr(torch, n): np.dtype(n) for n in names if hasattr(torch, n)}
        self._dtypes[torch.bool] = np.dtype(bool)
        self._dtypes[torch.bfloat16] = _BFLOAT16
        self._own = {dtype: own for own, dtype in self._dtypes.items()}
        self._strided, self._byte = torch.strided, torch.uint8
        self._empty, self._bytes = torch.empty_strided, torch.empty
        self._devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        # Compiled code asks in this way, which costs a tenth of making a Stream object.
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._current = raw or (lambda device: torch.cuda.current_stream(device).cuda_stream)
        self._bump = getattr(torch.autograd.graph, "increment_version", None)

    def look(self, name, tensor, queue):
        if tensor.is_neg():  # a view that negates as it is read
            if name == "out":
                raise TypeError("out: expected a tensor, got a negated view of one")
            tensor = tensor.resolve_neg()
        try:
            pointer, strides = tensor.data_ptr(), tensor.stride()
        except RuntimeError:
            if tensor.layout is self._strided:
                raise
            layout = tensor.layout
            raise TypeError(f"{name}: expected a dense tensor, got layout {layout}") from None
        device = tensor.get_device()
        return (self, device, pointer & 15, tensor.dtype, tensor.shape, strides), pointer, tensor

    def queue(self, tensor, device):
        return launch.device(device).stream(self._current(device))

    def describe(self, name, key):
        dtype = self._dtypes.get(key[3])
        if dtype is None:
            raise arrays.unsupported(name, key[3])
        strides = tuple([dtype.itemsize * n for n in key[5]])
        return Described(tuple(key[4]), strides, dtype)

    def handle(self, tensor, device):
        return self._current(device)

    def empty(self, shape, dtype, queue, like):
        # Of the ways to get a tensor the one with the least to decide: 0.8 µs to torch.empty's 1.2.
        strides = contiguous_strides(shape, 1)
        tensor = self._empty(
            shape, strides, dtype=self._own[dtype], device=self._devices[queue.device.ordinal]
        )
        return tensor, tensor.data_ptr()

    def scratch(self, size, queue, like):
        tensor = self._bytes(size, dtype=self._byte, device=self._devices[queue.device.ordinal])
        return tensor, tensor.data_ptr()

    def written(self, tensor):
        # So that a backward that has saved it notices.
        if self._bump is not None and not tensor.is_inference():
            self._bump(tensor)


class CuPy(Family):
    """CuPy's arrays."""

    def __init__(self):
        cupy = sys.modules["cupy"]
        self._ndarray, self._current = cupy.ndarray, cupy.cuda.get_current_stream

    def look(self, name, array, queue):
        memory = array.data
        pointer = memory.ptr
        key = (self, memory.device_id, pointer & 15, array.dtype, array.shape, array.strides)
        return key, pointer, array

    def describe(self, name, key):
        return Described(key[4], key[5], key[3])

    def handle(self, array, device):
        return self._current(device).ptr

    def empty(self, shape, dtype, queue, like):
        # The constructor allocates on the current device, without filling, as cupy.empty does.
        array = self._ndarray(shape, dtype)
        return array, array.data.ptr


class Numba(Family):
    """Device arrays of Numba, its built-in CUDA target's and numba-cuda's alike."""

    each_its_stream = True

    def __init__(self):
        self._cuda = sys.modules["numba.cuda"]
        self._array = self._cuda.cudadrv.devicearray.DeviceNDArray
        self._one_gpu = launch.one_gpu()

    def look(self, name, array, queue):
        memory = array.gpu_data
        pointer = memory.device_ctypes_pointer.value or 0
        device = 0 if self._one_gpu else memory.context.device.id  # four proxies on the way
        key = (self, device, pointer & 15, array.dtype, array.shape, array.strides)
        return key, pointer, array

    def describe(self, name, key):
        return Described(tuple(key[4]), tuple(key[5]), key[3])

    def handle(self, array, device):
        stream = array.stream
        return _number(stream.handle) if stream else 0

    def empty(self, shape, dtype, queue, like):
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return self._cuda.device_array(shape, dtype), 0
        # What device_array does, in the context that is current, without asking which that is.
        memory = like.gpu_data.context.memalloc(size)
        strides = contiguous_strides(shape, dtype.itemsize)
        array = self._array(shape, strides, dtype, stream=like.stream, gpu_data=memory)
        return array, memory.device_ctypes_pointer.value

    def scratch(self, size, queue, like):
        return queue.allocate(size)  # a Numba array costs its maker 20 µs of the host


class _FromPool(Family):
    """A family whose allocator cannot be asked."""

    def empty(self, shape, dtype, queue, like):
        array = pool.Array(shape, dtype, queue)
        return array, array.pointer

    def scratch(self, size, queue, like):
        return queue.allocate(size)


class DLPack(_FromPool):
    """Any library whose arrays speak DLPack.

    Results are its own arrays if it has the array API's namespace, else `pool.Array`.
    """

    holds = True

    def __init__(self, kind):
        self._namespace = hasattr(kind, "__array_namespace__")
        self._from_dlpack = None
        launch.core()  # or the error says what is missing
        self._view = importlib.import_module("cuda.core.utils").StridedMemoryView.from_dlpack

    def look(self, name, array, queue):
        if self._namespace and self._from_dlpack is None:
            self._from_dlpack = getattr(array.__array_namespace__(), "from_dlpack", None)
        try:
            memory = self._view(array, self._waiting(array) if queue is None else queue.number)
            pointer, shape, strides = memory.ptr, memory.shape, memory.strides
        except (BufferError, NotImplementedError, ValueError) as error:
            raise TypeError(f"{name}: {type(array).__name__} gives no DLPack: {error}") from None
        try:
            dtype = memory.dtype
        except (NotImplementedError, TypeError):  # an older cuda.core knows no bfloat16
            own = str(getattr(array, "dtype", "unknown to NumPy"))
            dtype = _BFLOAT16 if own.endswith("bfloat16") else own
        key = (self, memory.device_id, pointer & 15, dtype, shape, strides, not memory.readonly)
        return key, pointer, (array, memory)

    def _waiting(self, array):
        """Number of the stream that waits for the array which decides where the work goes."""
        return launch.LEGACY

    def describe(self, name, key):
        *_, dtype, shape, strides, writeable = key
        if not isinstance(dtype, np.dtype):
            raise arrays.unsupported(name, dtype)
        if strides is None:
            strides = contiguous_strides(shape, dtype.itemsize)
        else:
            strides = tuple([dtype.itemsize * n for n in strides])
        return Described(shape, strides, dtype, writeable)

    def handle(self, kept, device):
        return None

    def queue(self, kept, device):
        return launch.device(device).stream(launch.LEGACY)

    def export(self, owner):
        return owner if self._from_dlpack is None else self._from_dlpack(owner)


class Jax(DLPack):
    """JAX's arrays on a GPU.

    JAX does not tell which stream its work is on. So ours is used: DLPack lets it wait for an
    array to be ready, and JAX wait for a result. Arguments are held until the work is done, for JAX
    would give their memory to other work, in the order of its own stream.
    """

    mutable = False

    def __init__(self):
        super().__init__(None)  # its namespace need not be asked
        self._from_dlpack = importlib.import_module("jax.dlpack").from_dlpack

    def _waiting(self, array):
        return self.queue(array, array.__dlpack_device__()[1]).number

    def queue(self, kept, device):
        return launch.device(device).own_stream


class Interface(_FromPool):
    """Any other library whose arrays have the CUDA array interface. Results are `pool.Array`."""

    holds = True
    each_its_stream = True

    def __init__(self):
        self._one_gpu = launch.one_gpu()

    def look(self, name, array, queue):
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(f"{name}: expected an array on the GPU, got {type(array).__name__}")
        if interface.get("mask") is not None:
            raise TypeError(f"{name}: expected an array without a mask")
        stream = interface.get("stream")  # None: the default stream will do
        if stream == 0:
            raise ValueError(f"{name}: expected the number of a stream in its interface, got 0")
        dtype = _dtype(interface["typestr"])
        if dtype.kind == "V" and str(getattr(array, "dtype", "")).endswith("bfloat16"):
            dtype = _BFLOAT16  # it has no type string of its own
        pointer, read_only = interface["data"]
        pointer, strides = pointer or 0, interface.get("strides")
        if strides is not None:
            strides = tuple(strides)
        device = 0 if self._one_gpu else _device_of(name, pointer)
        key = (self, device, pointer & 15, dtype, tuple(interface["shape"]), strides, not read_only)
        return key, pointer, (array, stream or launch.LEGACY)

    def describe(self, name, key):
        *_, dtype, shape, strides, writeable = key
        if strides is None:
            strides = contiguous_strides(shape, dtype.itemsize)
        return Described(shape, strides, dtype, writeable)

    def check_address(self, name, address):
        if self._one_gpu:
            _device_of(name, address)

    def handle(self, kept, device):
        return kept[1]


class Own(_FromPool):
    """The arrays of `pool`."""

    each_its_stream = True

    def look(self, name, array, queue):
        key = (self, array.device, array.pointer & 15, array.dtype, array.shape, array.strides)
        return key, array.pointer, array

    def describe(self, name, key):
        return Described(key[4], key[5], key[3])

    def handle(self, array, device):
        return array.stream.handle

    def queue(self, array, device):
        return array.stream


class Numbers(Family):
    """Numbers of the host, as `grad_output`: they need no array and no copy."""

    counts_elements = True  # there is no address

    def look(self, name, number, queue):
        if name != "grad_output":
            kind = type(number).__name__
            raise TypeError(f"{name}: expected an array on the GPU, got {kind}")
        dtype = np.asarray(number).dtype
        value = float(number) if arrays.kind_of(dtype) else 0.0
        return (self, queue.device.ordinal, 0, dtype), value, None

    def describe(self, name, key):
        return Described((), (), key[3])

    def handle(self, kept, device):
        return None


NUMBERS = Numbers()
_BY_PACKAGE = {"torch": Torch, "cupy": CuPy, "numba": Numba, "jax": Jax, "jaxlib": Jax}


@functools.cache
def _named(package):
    return _BY_PACKAGE[package]()


@functools.cache
def of(kind):
    """The Family of arrays of this type."""
    if kind is pool.Array:
        return Own()
    if issubclass(kind, (int, float, np.generic)):
        return NUMBERS
    for base in kind.__mro__:  # a subclass of a tensor may be defined anywhere
        package = base.__module__.partition(".")[0]
        if package in _BY_PACKAGE:
            return _named(package)
    return DLPack(kind) if hasattr(kind, "__dlpack__") else Interface()


_dtype = functools.lru_cache(maxsize=256)(np.dtype)


def _number(handle):
    """A handle as a number, whether it is one or a ctypes or driver object."""
    return int(getattr(handle, "value", handle) or 0)


@functools.cache
def _pointer_attribute():
    launch.core()  # or the error says what is missing
    driver = launch.driver()
    attributes = driver.CUpointer_attribute
    return driver.cuPointerGetAttribute, attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL


def _device_of(name, pointer):
    """The device whose memory this address is in; the current one for an empty array."""
    if not pointer:
        launch.core()
        return int(launch.driver().cuCtxGetDevice()[1])
    ask, ordinal_of = _pointer_attribute()
    error, ordinal = ask(ordinal_of, pointer)
    if error != 0:
        raise TypeError(f"{name}: its data is not in device memory ({error.name})")
    return int(ordinal)

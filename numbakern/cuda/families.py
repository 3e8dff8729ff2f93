"""The libraries whose GPU arrays are taken: how each tells where an array lies and makes new ones.

A family is asked for four things: a `DeviceArray` of one of its arrays, without a copy; an array
for results, from its own allocator; the stream that its work is on; and to hand back a result.
Which family an array is of follows from the name of the package that its type comes from, so no
library is imported that the caller has not.
"""

import functools
import importlib
import sys

import ml_dtypes
import numpy as np

from numbakern.cuda import launch, pool
from numbakern.cuda.pool import contiguous_strides

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BYTE = np.dtype(np.uint8)


class DeviceArray:
    """Where an array lies in device memory; the owner is the array itself, as its library has it.

    It has what the checks in `arrays` ask of an array.
    """

    __slots__ = (
        "device",
        "dtype",
        "family",
        "ndim",
        "owner",
        "pointer",
        "shape",
        "strides",
        "target",
        "writeable",
    )

    def __init__(self, family, owner, pointer, shape, strides, dtype, device, writeable=True):
        self.family, self.owner, self.pointer = family, owner, pointer
        self.shape, self.strides, self.dtype = shape, strides, dtype  # strides in bytes
        self.device, self.writeable, self.ndim = device, writeable, len(shape)

    @property
    def flags(self):
        """NumPy's ``array.flags.writeable``."""
        return self

    def like(self, pointer, shape, strides=None):
        """Elements of the same memory and type; contiguous if no strides are given."""
        if strides is None:
            strides = contiguous_strides(shape, self.dtype.itemsize)
        return DeviceArray(
            self.family, self.owner, pointer, shape, strides, self.dtype, self.device
        )

    def __setitem__(self, everything, values):
        """``out[...] = values`` of an argument `out`."""
        self.target.assign(self, values)

    def unwrap(self):
        """The array as its library has it."""
        return self.family.export(self.owner)

    def reshape(self, shape):
        """The same elements, which are contiguous, in another shape."""
        if shape == self.shape:
            return self
        strides = contiguous_strides(shape, self.dtype.itemsize)
        owner = self.family.reshape(self.owner, shape)
        args = self.family, owner, self.pointer, shape, strides, self.dtype, self.device
        return DeviceArray(*args, self.writeable)


class Family:
    """What every family does in the same way."""

    mutable = True  # whether `out=` can be one of its arrays
    counts_elements = False  # in strides, so that no element lies across two places
    holds = False  # whether an array must be kept until the work on it is done

    def view(self, name, array):
        """The DeviceArray of an array that is the argument `name`; TypeError if none can be."""
        raise NotImplementedError

    def empty(self, shape, dtype, queue):
        """A contiguous DeviceArray for work on this Stream, from the family's own allocator."""
        raise NotImplementedError

    def handle(self, array, device):
        """Address of the stream that the family's work on this device is on."""
        raise NotImplementedError

    def export(self, owner):
        """A result as the caller gets it."""
        return owner

    def reshape(self, owner, shape):
        """A view of a contiguous result in another shape."""
        return owner.reshape(shape)

    def scratch(self, size, queue):
        """Bytes for the time of a call: what keeps them, and their address."""
        array = self.empty((size,), _BYTE, queue)
        return array.owner, array.pointer

    def written(self, owner):
        """Called once a caller's own array has been written to."""

    def queue(self, array, device):
        """The Stream that the family's work on this device is on, given one of its arrays."""
        return launch.device(device).stream(self.handle(array, device))


class Torch(Family):
    """PyTorch's CUDA tensors. Gradients do not flow through: a tensor is taken as if detached."""

    counts_elements = True

    def __init__(self):
        self.torch = torch = sys.modules["torch"]
        names = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()
        self._dtypes = {getattr(torch, n): np.dtype(n) for n in names if hasattr(torch, n)}
        self._dtypes[torch.bool] = np.dtype(bool)
        self._dtypes[torch.bfloat16] = _BFLOAT16
        self._own = {dtype: own for own, dtype in self._dtypes.items()}
        self._devices = {}
        # Compiled code asks in this way, which costs a tenth of making a Stream object.
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._current = raw or (lambda device: torch.cuda.current_stream(device).cuda_stream)
        self._bump = getattr(torch.autograd.graph, "increment_version", None)

    def view(self, name, tensor):
        dtype = self._dtypes.get(tensor.dtype)
        if dtype is None or tensor.layout is not self.torch.strided:
            raise TypeError(
                f"{name}: expected a dense tensor of float16, bfloat16, float32, float64, integers "
                f"or bool, got dtype {tensor.dtype}, layout {tensor.layout}"
            )
        if tensor.is_neg():  # a view that negates as it is read
            if name == "out":
                raise TypeError("out: expected a tensor, got a negated view of one")
            tensor = tensor.resolve_neg()
        size = dtype.itemsize
        strides = tuple([size * n for n in tensor.stride()])
        pointer, device = tensor.data_ptr(), tensor.get_device()
        return DeviceArray(self, tensor, pointer, tuple(tensor.shape), strides, dtype, device)

    def empty(self, shape, dtype, queue):
        ordinal = queue.device.ordinal
        device = self._devices.get(ordinal)
        if device is None:
            device = self._devices[ordinal] = self.torch.device("cuda", ordinal)
        tensor = self.torch.empty(shape, dtype=self._own[dtype], device=device)
        strides = contiguous_strides(shape, dtype.itemsize)
        return DeviceArray(self, tensor, tensor.data_ptr(), shape, strides, dtype, ordinal)

    def handle(self, tensor, device):
        return self._current(device)

    def written(self, tensor):
        # So that a backward that has saved it notices.
        if self._bump is not None and not tensor.is_inference():
            self._bump(tensor)


class CuPy(Family):
    """CuPy's arrays."""

    def __init__(self):
        self._cuda = sys.modules["cupy"].cuda
        self._ndarray = sys.modules["cupy"].ndarray
        self._current = self._cuda.get_current_stream

    def view(self, name, array):
        return DeviceArray(
            self,
            array,
            array.data.ptr,
            array.shape,
            array.strides,
            array.dtype,
            array.device.id,
        )

    def empty(self, shape, dtype, queue):
        ordinal = queue.device.ordinal
        # The constructor allocates without filling, as cupy.empty does.
        with self._cuda.Device(ordinal):
            array = self._ndarray(shape, dtype)
        strides = contiguous_strides(shape, dtype.itemsize)
        return DeviceArray(self, array, array.data.ptr, shape, strides, dtype, ordinal)

    def handle(self, array, device):
        with self._cuda.Device(device):
            return self._current().ptr


class Numba(Family):
    """Device arrays of Numba, its built-in CUDA target's and numba-cuda's alike."""

    def __init__(self):
        self._cuda = sys.modules["numba.cuda"]

    def view(self, name, array):
        return DeviceArray(
            self,
            array,
            array.device_ctypes_pointer.value or 0,
            tuple(array.shape),
            tuple(array.strides),
            array.dtype,
            array.gpu_data.context.device.id,
        )

    def empty(self, shape, dtype, queue):
        ordinal = queue.device.ordinal
        if ordinal == self._cuda.get_current_device().id:
            array = self._cuda.device_array(shape, dtype)
        else:
            with self._cuda.gpus[ordinal]:
                array = self._cuda.device_array(shape, dtype)
        return self.view("result", array)

    def reshape(self, owner, shape):
        return owner.reshape(*shape)

    def scratch(self, size, queue):
        # A Numba array costs its maker 20 µs of the host.
        buffer = queue.allocate(size)
        return buffer, int(buffer.handle)

    def handle(self, array, device):
        stream = array.stream
        return _number(stream.handle) if stream else 0


class Jax(Family):
    """JAX's arrays on a GPU.

    JAX does not tell which stream its work is on. So ours is used: DLPack lets it wait for an
    array to be ready, and JAX wait for a result.
    """

    mutable = False
    holds = True  # JAX would give its memory to other work, in the order of its own stream

    def __init__(self):
        self._from_dlpack = importlib.import_module("jax.dlpack").from_dlpack

    def view(self, name, array):
        device = array.__dlpack_device__()[1]
        queue = launch.device(device).own_stream
        memory = _memory_view(name, array, queue.handle)
        size = array.dtype.itemsize
        strides = _byte_strides(memory, size)
        return DeviceArray(
            self, (array, memory), memory.ptr, array.shape, strides, array.dtype, device, False
        )

    def empty(self, shape, dtype, queue):
        return _from_pool(self, shape, dtype, queue)

    def queue(self, array, device):
        return launch.device(device).own_stream

    def export(self, owner):
        return self._from_dlpack(owner)


class Unknown(Family):
    """Any other library whose arrays speak DLPack or the CUDA array interface.

    Results are its own arrays if it has the array API's namespace, else `pool.Array`.
    """

    holds = True

    def __init__(self, kind):
        self._dlpack = hasattr(kind, "__dlpack__")
        self._namespace = hasattr(kind, "__array_namespace__")
        self._from_dlpack = None

    def view(self, name, array):
        return self._by_dlpack(name, array) if self._dlpack else self._by_interface(name, array)

    def _by_dlpack(self, name, array):
        memory = _memory_view(name, array, 1)  # ready for the default stream
        dtype = memory.dtype
        if dtype is None:
            raise TypeError(f"{name}: expected an array of numbers, got {array!r}")
        if self._namespace and self._from_dlpack is None:
            self._from_dlpack = getattr(array.__array_namespace__(), "from_dlpack", None)
        return DeviceArray(
            self,
            (array, memory),
            memory.ptr,
            tuple(memory.shape),
            _byte_strides(memory, dtype.itemsize),
            dtype,
            memory.device_id,
            not memory.readonly,
        )

    def _by_interface(self, name, array):
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(f"{name}: expected an array on the GPU, got {type(array).__name__}")
        if interface.get("mask") is not None:
            raise TypeError(f"{name}: expected an array without a mask")
        dtype = np.dtype(interface["typestr"])
        own = getattr(array, "dtype", None)  # bfloat16 has no type string of its own
        if dtype.kind == "V" and str(own).endswith("bfloat16"):
            dtype = _BFLOAT16
        shape = tuple(interface["shape"])
        strides = interface.get("strides")
        strides = contiguous_strides(shape, dtype.itemsize) if strides is None else tuple(strides)
        pointer, read_only = interface["data"]
        device = _device_of(name, pointer)
        return DeviceArray(self, array, pointer, shape, strides, dtype, device, not read_only)

    def empty(self, shape, dtype, queue):
        return _from_pool(self, shape, dtype, queue)

    def handle(self, array, device):
        interface = getattr(array, "__cuda_array_interface__", None)
        stream = interface.get("stream") if interface else None
        return stream or 0

    def export(self, owner):
        return owner if self._from_dlpack is None else self._from_dlpack(owner)


class Own(Family):
    """The arrays of `pool`."""

    def view(self, name, array):
        return DeviceArray(
            self, array, array.pointer, array.shape, array.strides, array.dtype, array.device
        )

    def empty(self, shape, dtype, queue):
        return _from_pool(self, shape, dtype, queue)

    def queue(self, array, device):
        return array.stream


_BY_PACKAGE = {"torch": Torch, "cupy": CuPy, "numba": Numba, "jax": Jax, "jaxlib": Jax}


@functools.cache
def _named(package):
    return _BY_PACKAGE[package]()


@functools.cache
def of(kind):
    """The Family of arrays of this type."""
    if kind is pool.Array:
        return Own()
    for base in kind.__mro__:  # a subclass of a tensor may be defined anywhere
        package = base.__module__.partition(".")[0]
        if package in _BY_PACKAGE:
            return _named(package)
    return Unknown(kind)


def _from_pool(family, shape, dtype, queue):
    array = pool.Array(shape, dtype, queue.device.ordinal, queue)
    return DeviceArray(
        family, array, array.pointer, array.shape, array.strides, array.dtype, array.device
    )


def _number(handle):
    """A handle as a number, whether it is one or a ctypes or driver object."""
    return int(getattr(handle, "value", handle) or 0)


@functools.cache
def _strided_memory_view():
    return importlib.import_module("cuda.core.utils").StridedMemoryView


def _memory_view(name, array, stream):
    launch.core()
    try:
        return _strided_memory_view().from_dlpack(array, stream)
    except (BufferError, NotImplementedError) as error:
        raise TypeError(f"{name}: {type(array).__name__} gives no DLPack: {error}") from None


def _byte_strides(memory, size):
    strides = memory.strides
    if strides is None:
        return contiguous_strides(memory.shape, size)
    return tuple([size * n for n in strides])


def _device_of(name, pointer):
    """The device whose memory this address is in; the current one for an empty array."""
    launch.core()
    driver = launch.driver()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    if not pointer:
        return int(driver.cuCtxGetDevice()[1])
    error, ordinal = driver.cuPointerGetAttribute(attribute, pointer)
    if int(error):
        raise TypeError(f"{name}: its data is not in device memory ({error.name})")
    return int(ordinal)

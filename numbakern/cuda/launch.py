"""Devices, streams and the start of a kernel, over cuda.core. Nothing here waits for the GPU."""

import functools
import importlib
import threading
from collections import deque

import numpy as np

from numbakern.cuda import bad_labels
from numbakern.cuda import compile as compiler
from numbakern.cuda.ways import machine_of

_SHARED_WITHOUT_ASKING = 32 << 10  # bytes of a block's 48 KB, but for what stores may take of it
_PORTABLE_CLUSTER = 8  # blocks
_KEPT = 4096  # entries of a cache before it is emptied
LEGACY = 1
"""The legacy default stream, as the driver, DLPack and the array interface number it; 2 is that of
each thread. The driver calls it 0 too, which the other two do not allow."""


@functools.cache
def core():
    """The module cuda.core with a working driver; RuntimeError saying what is missing."""
    try:
        module = importlib.import_module("cuda.core")
        driver()
    except ImportError as error:
        why = " ".join(str(error).split())
        raise RuntimeError(f"cuda-core cannot be imported ({why}): {compiler.INSTALL}") from error
    if not hasattr(module, "launch"):  # it was experimental before 0.5
        raise RuntimeError(f"this cuda-core is too old: {compiler.INSTALL}")
    wanted = driver().CUDA_VERSION // 1000  # a cubin of one major version needs a driver of it
    remedy = f"install one for CUDA {wanted}, https://www.nvidia.com/drivers"
    try:
        _checked(driver().cuInit(0))
        version = _checked(driver().cuDriverGetVersion())
        count = _checked(driver().cuDeviceGetCount())
    except RuntimeError as error:  # also where there is no libcuda
        why = " ".join(str(error).split())
        raise RuntimeError(f"no NVIDIA driver that works ({why}): {remedy}") from error
    if version // 1000 < wanted:
        found = f"{version // 1000}.{version % 1000 // 10}"
        raise RuntimeError(f"this NVIDIA driver, for CUDA {found}, is too old: {remedy}")
    if not count:
        raise RuntimeError("no NVIDIA GPU that CUDA can see")
    return module


@functools.cache
def one_gpu():
    """Whether there is but one: then no array need be asked which it is on."""
    core()  # or the error says what is missing
    return _checked(driver().cuDeviceGetCount()) == 1


@functools.cache
def driver():
    """The driver's own functions."""
    return importlib.import_module("cuda.bindings.driver")


def _checked(result):
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None


class Device:
    """A GPU: what plans need to know of it, its kernels and its streams."""

    def __init__(self, ordinal):
        self.ordinal = ordinal
        self.core = core().Device(ordinal)
        capability = self.core.compute_capability
        self.arch = compiler.arch_of(capability.major, capability.minor)
        self.capability = capability.major, capability.minor
        properties = self.core.properties
        self.shared = properties.max_shared_memory_per_block_optin
        self.multiprocessors = properties.multiprocessor_count
        self.machine = machine_of(self.multiprocessors, self.shared, self.capability)
        self.calls = {}
        """What is remembered of calls, by what it follows from; kept by the target."""
        self._current = driver().cuCtxGetDevice
        self._steps = {}
        self._asked = {}  # bytes of dynamic shared memory that a Cubin may have, beyond the default
        self._streams = {}
        self._made = {}
        self._lock = threading.RLock()
        # cuda.core makes nothing on a device that only another library has made current.
        restore(self._take())

    def make_current(self):
        """Make this device the calling thread's; what `restore` needs, None for nothing."""
        error, current = self._current()
        if not error and int(current) == self.ordinal:
            return None
        return self._take()

    def _take(self):
        error, _ = self._current()
        before = None if error else driver().cuCtxGetCurrent()[1]
        self.core.set_current()
        return before

    def stream(self, handle):
        """The Stream of this handle, an address; 0 or LEGACY for the default stream."""
        stream = self._streams.get(handle)
        if stream is None:
            if len(self._streams) >= _KEPT:
                self._streams.clear()
            if handle == LEGACY:
                stream = self.stream(0)
            else:
                stream = Stream(self, handle, core().Stream.from_handle(handle))
            stream = self._streams.setdefault(handle, stream)
        return stream

    @functools.cached_property
    def own_stream(self):
        """A stream of our own, for arrays that come with none."""
        return self._once("own_stream", self._create_stream)

    def _create_stream(self):
        before = self.make_current()
        try:
            stream = self.core.create_stream()
        finally:
            restore(before)
        return Stream(self, int(stream.handle), stream)

    @functools.cached_property
    def report(self):
        """The record of bad labels; there is none before the first call with labels."""
        return self._once("report", lambda: bad_labels.Report(_Words(self)))

    def _once(self, name, make):
        """What is made the first time that it is asked for, whichever thread asks first."""
        made = self._made.get(name)
        if made is None:
            with self._lock:
                made = self._made.get(name)
                if made is None:
                    made = self._made[name] = make()
        return made

    def take_bad_label(self):
        """The first bad label since the last time, as `bad_labels.Report.take`; this waits."""
        report = self._made.get("report")
        return report and report.take()

    def read(self, address, size):
        """Bytes of the device's memory, after all that has been started is done."""
        content = np.empty(size, np.uint8)
        before = self.make_current()
        try:
            _checked(driver().cuCtxSynchronize())
            _checked(driver().cuMemcpyDtoH(content.ctypes.data, address, size))
        finally:
            restore(before)
        return content.tobytes()

    def prepared(self, step):
        """What `Stream.start` needs for a step of a plan: its configuration and its kernel."""
        prepared = self._steps.get(step)
        if prepared is None:
            with self._lock:
                prepared = self._steps.get(step)
                if prepared is None:
                    if len(self._steps) >= _KEPT:
                        self._steps.clear()
                    prepared = self._steps[step] = self._configuration(step), self._kernel(step)
        return prepared

    def _configuration(self, step):
        config = core().LaunchConfig
        if step.cluster > 1:
            clusters = step.grid // step.cluster
            return config(
                grid=clusters, cluster=step.cluster, block=step.block, shmem_size=step.shared
            )
        return config(grid=step.grid, block=step.block, shmem_size=step.shared)

    def _kernel(self, step):
        cubin = compiler.cubin(step.spec, self.arch, step.block, step.blocks)
        module = _loaded(self.ordinal, cubin)
        kernel = module.get_kernel(cubin.entry)
        attributes = driver().CUfunction_attribute
        wanted = []
        if step.shared > _SHARED_WITHOUT_ASKING:
            # No more than is needed: with the kernel's own it may not exceed what a block can have.
            most = self._asked[cubin] = max(step.shared, self._asked.get(cubin, 0))
            wanted.append((attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most))
        percent = self._share(step, cubin)
        if percent < 100:
            wanted.append((attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent))
        if step.cluster > _PORTABLE_CLUSTER:
            wanted.append((attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
        for attribute, value in wanted:
            device = _checked(driver().cuDeviceGet(self.ordinal))
            _checked(driver().cuKernelSetAttribute(attribute, value, kernel.handle, device))
        return kernel

    def _share(self, step, cubin):
        """Per cent of its shared memory that a multiprocessor had better have for a step's blocks.

        The driver rounds up to the next step that there is.
        """
        if not step.shared:
            return 100
        most, used = self.shared + compiler.OWN, compiler.resources(cubin)
        shared = compiler.shared_of(used, step.shared, self.arch)
        return 100 * compiler.share_of(step.block, used.registers, shared, most) // most


class _Words:
    """Memory for `bad_labels.Report`; reading and writing wait for the device."""

    def __init__(self, device):
        self._device = device
        self._buffer = self.address = None

    def write(self, array):
        before = self._device.make_current()
        try:
            if self._buffer is None:
                self._buffer, self.address = self._device.own_stream.allocate(array.nbytes)
                self._device.own_stream.core.sync()
            _checked(driver().cuMemcpyHtoD(self.address, array.ctypes.data, array.nbytes))
        finally:
            restore(before)

    def read(self):
        return np.frombuffer(self._device.read(self.address, self._buffer.size), np.int64)


@functools.lru_cache(maxsize=_KEPT)
def _loaded(ordinal, cubin):
    return core().ObjectCode.from_cubin(cubin.code)


class Stream:
    """A stream of a device.

    Attributes
    ----------
    device : Device
    handle : int
        Its address; 0 is the legacy default stream.
    number : int
        As DLPack and the array interface have it, where that stream is LEGACY.
    core : cuda.core.Stream
    start : function
        Of what `Device.prepared` gives for a step and then of numbers, each of 8 bytes, an int or a
        float, one for each of ``step.args``: starts the step and returns at once. The device must
        be current.
    """

    __slots__ = ("core", "device", "handle", "number", "start", "_held")

    def __init__(self, device, handle, stream):
        self.device, self.handle, self.core = device, handle, stream
        self.number = handle or LEGACY
        self.start = functools.partial(core().launch, stream)
        self._held = deque()

    def hold(self, objects):
        """Keep these alive until what has been started on this stream so far is done."""
        held, event = self._held, None
        while held:
            try:
                entry = held.popleft()  # so that no other thread looks at it too
            except IndexError:
                break
            if not entry[0].is_done:
                held.appendleft(entry)
                break
            event = entry[0]  # to be used again: a new one costs as much as a launch
        held.append((self.core.record(event), objects))

    def allocate(self, size):
        """Bytes from the driver's pool in the order of this stream, whose device is current.

        What keeps them, and their address.
        """
        buffer = self.device.core.memory_resource.allocate(size, stream=self.core)
        return buffer, int(buffer.handle)

    def wait_for(self, handle):
        """Let what is started on this stream from now on wait for the stream of this handle."""
        other = self.device.stream(handle)
        if other is not self:
            self.core.wait(other.core)

    def release_to(self, handle):
        """Let the stream of this handle wait for what has been started on this one so far."""
        other = self.device.stream(handle)
        if other.handle != self.handle:
            before = self.device.make_current()
            try:
                other.core.wait(self.core)
            finally:
                restore(before)


devices: list[Device] = []
"""The devices used so far."""
_first = threading.Lock()


@functools.cache
def device(ordinal):
    """The Device of this number."""
    with _first:
        for known in devices:  # made by another thread meanwhile
            if known.ordinal == ordinal:
                return known
        devices.append(Device(ordinal))
        return devices[-1]


def restore(before):
    """Undo `Device.make_current`."""
    if before is not None:
        _checked(driver().cuCtxSetCurrent(before))

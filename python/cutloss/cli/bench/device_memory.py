"""Peak memory of one loss on CUDA, in the process that measures everything else. No sampling:

* PyTorch's allocator counts its own peak: bytes that tensors hold, whoever asked for them.
* Memory outside of it (cudaMalloc by a library, code that was loaded) is what the device says is
  in use, less what PyTorch has reserved. It is read before and after the call, so it counts what
  the call leaves behind, and not what it returned before its end;
* except in the device's pool for cudaMallocAsync, which counts a peak of its own.

Other processes on the device would be in the second one.
"""

import ctypes
import dataclasses
import gc

import torch

_RESERVED_NOW, _RESERVED_PEAK = 5, 6  # CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, _HIGH


@dataclasses.dataclass
class Added:
    torch_peak: int  # bytes over what PyTorch's allocator held before
    torch_kept: int  # of these still held
    outside: int  # outside of PyTorch's allocator

    @property
    def peak(self):
        return self.torch_peak + self.outside

    @property
    def kept(self):
        return self.torch_kept + self.outside


class Meter:
    """start() before a call, added() after it, while its results are still there or not."""

    def __init__(self):
        self._pool = _Pool.of_current_device()

    def start(self):
        _settle()
        self._held = torch.cuda.memory_allocated()
        self._outside = self._outside_now()
        if self._pool:
            self._pool.reset_peak()
        torch.cuda.reset_peak_memory_stats()

    def added(self):
        torch.cuda.synchronize()
        outside = self._outside_now() - self._outside
        if self._pool:
            outside += self._pool.peak() - self._pool.now()
        return Added(
            torch.cuda.max_memory_allocated() - self._held,
            torch.cuda.memory_allocated() - self._held,
            max(0, outside),
        )

    @staticmethod
    def _outside_now():
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()


def _settle():
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


class _Pool:
    """The device's default pool for cudaMallocAsync, through the driver."""

    def __init__(self, driver, pool):
        self._driver, self._handle = driver, pool

    @classmethod
    def of_current_device(cls):
        """None where the driver has no such pools."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            get = driver.cuDeviceGetDefaultMemPool
        except (OSError, AttributeError):
            return None
        pool = ctypes.c_void_p()
        if get(ctypes.byref(pool), ctypes.c_int(torch.cuda.current_device())) != 0:
            return None
        return cls(driver, pool)

    def _read(self, attribute):
        value = ctypes.c_uint64()
        status = self._driver.cuMemPoolGetAttribute(
            self._handle, ctypes.c_int(attribute), ctypes.byref(value)
        )
        return value.value if status == 0 else 0

    def now(self):
        return self._read(_RESERVED_NOW)

    def peak(self):
        return self._read(_RESERVED_PEAK)

    def reset_peak(self):
        zero = ctypes.c_uint64(0)
        self._driver.cuMemPoolSetAttribute(
            self._handle, ctypes.c_int(_RESERVED_PEAK), ctypes.byref(zero)
        )

"""A CUDA driver on a machine without a GPU, for tests only.

The C++ here is compiled to a `libcuda.so.1` that cuda-core and pycuda take for the driver. It
runs everything on the CPU, kernels too, once host code was registered for them, keeps account of
what is alive, and can be told to refuse any call. What it shows is that our calls are right, in
order and undone; of a GPU's speed, of races between streams and of a real driver it says nothing.
"""

from tests.cuda_without_gpu.driver import SUPPORTED, Emulated, NotEmulatedError, load

__all__ = ["SUPPORTED", "Emulated", "NotEmulatedError", "load"]

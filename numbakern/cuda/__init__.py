"""The CUDA target: arrays on an NVIDIA GPU, kernels by numba-cuda, launched through cuda.core."""

"""Triton kernels of the GPU path. What each promises is written as plain torch in ``reference.py``."""

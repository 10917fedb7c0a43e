"""Kernels of our own for CPUs: compiled when they are first used, run by the very threads that torch computes with."""

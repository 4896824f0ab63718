"""Fused kernels, one module for each kind of device. Without them all works, slower."""

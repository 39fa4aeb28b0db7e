"""Triton kernels and their launchers; installed as `bkdfast.triton_kernels`, never as a top-level package."""

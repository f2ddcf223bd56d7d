"""The console script `efft-kernels` of installs that name it here; it lies in efft_kernels.cli."""

from efft_kernels.cli import main

__all__ = ["main"]

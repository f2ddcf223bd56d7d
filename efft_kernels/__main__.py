"""`python -m efft_kernels`, and so `torchrun -m efft_kernels`: the command line."""

from .cli import main

if __name__ == "__main__":
    main()

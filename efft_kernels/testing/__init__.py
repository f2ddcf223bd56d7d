"""What tests, benchmarks and `doctor` share.

operands.py      sizes, values and layouts of one call
results.py       y, P and the gradients of one call
error_budget.py  at most twice plain torch's error
cpu_chain.py     what runs a chain of blocks on the CPU
poison.py        allocations that start as NaN
fake_gpu.py      a GPU that is not there
gpu_cases.py     calls that take every kernel of the CUDA backend, and which they take
cuda_kernels.py  the names of those that were built, and of those that ran

Nothing here needs pytest.
"""

"""What tests, benchmarks and `doctor` share.

operands.py      sizes, values and layouts of one call
results.py       y, P and the gradients of one call
error_budget.py  at most twice plain torch's error
poison.py        allocations that start as NaN
fake_gpu.py      a GPU that is not there

Nothing here needs pytest.
"""

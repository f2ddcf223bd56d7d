"""What tests, benchmarks and self-checks share: operands, the error budget,
poisoned memory, and a GPU that is not there.

Nothing here needs pytest, and nothing in the rest of the package needs this.
"""

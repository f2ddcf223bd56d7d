"""What tests, benchmarks and self-checks share: operands, the error budget, poisoned memory.

Nothing here needs pytest, and nothing in the rest of the package needs this.
"""

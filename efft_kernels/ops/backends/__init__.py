"""What computes the operator: plain torch, the compiled libraries of csrc, and Triton.

Each backend is a module with the names that ops/dispatch.py lists.
"""

"""What the Triton kernels take."""

from __future__ import annotations

# The highest rank; above it plain torch runs (forward.py).
TRITON_MAX_RANK = 128
# The highest padded rank at which they read the factors in place.
TRITON_IN_PLACE_RANK = 32

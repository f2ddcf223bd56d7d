"""The operator: y = x·W^T + bias + x·down·core·up^T, its backends and strategies."""

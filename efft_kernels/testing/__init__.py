"""What tests, benchmarks and tools share. Nothing that runs a model imports it."""

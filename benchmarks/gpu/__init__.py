"""What only a GPU can tell, as stages of benchmarks/gpu_check.sh; each also runs by itself."""

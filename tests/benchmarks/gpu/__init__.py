"""The stages of tests/benchmarks/gpu.sh: what a GPU computes, how fast, and in how much memory."""

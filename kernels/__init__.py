"""The operations, one folder each: the definition (naive.py), PyTorch code (cpu.py) and Triton kernels (triton.py)."""

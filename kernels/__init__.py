"""The operations: for each a reference in plain PyTorch, beside Triton kernels with the same signature."""

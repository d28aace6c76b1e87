"""The operations: a reference in plain PyTorch for each, to stand beside the Triton kernels with the same signature."""

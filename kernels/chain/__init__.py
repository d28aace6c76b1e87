"""Chains of small block products: described once, run as one Triton kernel."""

"""A parameterization for orthotrain: palindromes of Givens rotations."""

from orthotrain_givens.givens import Givens

__all__ = ["Givens"]

"""Orthogonal parameterizations: maps from skew-symmetric generators to rotations, and their registry."""

from orthotrain.plugins.base import Parameterization
from orthotrain.plugins.cayley import Cayley
from orthotrain.plugins.cayley_neumann import CayleyNeumann
from orthotrain.plugins.exponential import Exponential
from orthotrain.plugins.registry import create, find_registered, get, known, register

__all__ = [
    "Cayley",
    "CayleyNeumann",
    "Exponential",
    "Parameterization",
    "create",
    "find_registered",
    "get",
    "known",
    "register",
]

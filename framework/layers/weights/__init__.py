"""How a frozen weight is stored, multiplied and rounded."""

"""Block rotations, their generators, and the batch of all displacements of a network."""

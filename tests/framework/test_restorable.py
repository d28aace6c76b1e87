"""A checkpoint with something else in the place of what a run restores ends in one line, in a real Trainer."""

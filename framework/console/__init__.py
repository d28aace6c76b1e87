"""Terminal output of a command, and how its process starts, fails and ends."""

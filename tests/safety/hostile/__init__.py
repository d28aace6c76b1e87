"""Hostile and damaged inputs, and the harness that runs the command line on each in a process of its own."""

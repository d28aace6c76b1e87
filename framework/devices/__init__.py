"""The device of a run: its abilities, its memory, and reads that wait for the device."""

"""Which device a run computes on, how much memory the device has, and reads that wait for the device."""

"""OFT layers: a learned rotation in front of a frozen layer."""

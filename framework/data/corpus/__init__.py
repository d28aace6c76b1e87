"""Text from files and datasets: tokenized once, packed into caches, read in a reproducible order."""

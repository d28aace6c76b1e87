"""Labeled text: rows with a class, a class for each word, or a number, for networks that compute their own loss."""

"""Reading files without running code, and writing files that are whole or absent."""

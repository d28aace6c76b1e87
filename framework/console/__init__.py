"""What a command shows on the terminal, and how its process begins, fails and ends."""

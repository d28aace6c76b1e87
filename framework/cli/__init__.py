"""The command ``orthotrain``: LightningCLI's commands, and commands that need no trainer."""

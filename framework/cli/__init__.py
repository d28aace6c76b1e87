"""The command line: LightningCLI's commands, and those that need no trainer."""

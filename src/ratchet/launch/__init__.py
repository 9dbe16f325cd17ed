"""Layer 5: from a command to an exit code."""

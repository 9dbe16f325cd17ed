"""What a run reads and did not write, by content: `tree` names it, `files` and `code` find it, `check` compares it."""

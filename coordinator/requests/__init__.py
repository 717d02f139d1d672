"""One client's request: checked, running, told."""

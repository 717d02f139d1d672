"""What one model process takes: steps, their operations, and whole prompts."""

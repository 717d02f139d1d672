"""What is recorded of requests and rounds, and who is told."""

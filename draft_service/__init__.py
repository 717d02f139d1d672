"""The service that hosts the draft model and proposes tokens."""

"""The service that hosts the base model and verifies proposals."""

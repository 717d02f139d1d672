"""The connections to the model services."""

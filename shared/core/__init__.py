"""Errors, the values that travel and their messages; imports protos alone."""

"""Chooses how many tokens the draft proposes."""

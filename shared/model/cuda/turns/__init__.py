"""Turns that devices take by themselves, and the stream they are queued on."""

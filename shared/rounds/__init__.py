"""The service side of speculation.proto: streams, sessions, messages."""

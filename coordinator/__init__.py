"""The service that clients talk to; it drives the draft and the verifier."""

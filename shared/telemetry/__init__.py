"""OpenTelemetry, set up for one process."""

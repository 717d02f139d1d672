"""What every server process is made of: logs, signals, addresses, gRPC."""

"""The public gRPC server."""

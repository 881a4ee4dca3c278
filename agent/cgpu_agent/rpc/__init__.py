"""gRPC services behind the front door."""

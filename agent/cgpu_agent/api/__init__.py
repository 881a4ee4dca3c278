"""Generated gRPC stubs, all that client and rpc share (regenerate: make generate)."""

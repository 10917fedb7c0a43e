"""The gRPC interfaces of others that the gateway speaks, and what `make protos` generates from them."""

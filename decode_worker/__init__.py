"""The rest of the relay: continuous batching over landed KV."""

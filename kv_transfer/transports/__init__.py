"""How the bytes of KV blocks get from one worker to another."""

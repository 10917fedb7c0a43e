"""The engine's decisions: blocks, sequences, the token scheduler."""

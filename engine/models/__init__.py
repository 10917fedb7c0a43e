"""The model families that run natively."""

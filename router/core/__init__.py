"""The router's decisions."""

"""The decode worker's decisions."""

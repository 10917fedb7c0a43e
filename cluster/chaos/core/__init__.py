"""What is decided and judged: which fault comes next, what a stream lost, whether memory grows."""

"""The vocabulary of Baton and the typed messages between its processes."""

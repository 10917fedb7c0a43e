"""The composition root: topology, launch, command line."""

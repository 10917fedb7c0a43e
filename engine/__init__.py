"""One model on one tensor-parallel group; knows no Ray, router or peer."""

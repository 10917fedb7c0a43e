"""`baton chaos`: load, faults on real processes, and a comparison of every stream with its failure-free one."""

"""ResIST and local SGD: residual blocks are partitioned over the workers, or nothing is."""

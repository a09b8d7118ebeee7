"""AuxNet: stages of a residual network that train at the same time, with late gradients or guessed inputs."""

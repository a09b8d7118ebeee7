"""AuxNet: stages of a residual network that train at the same time, each fed by a small auxiliary network."""

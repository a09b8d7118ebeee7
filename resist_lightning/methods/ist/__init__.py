"""IST: each worker trains all layers, with its own part of the hidden neurons of each."""

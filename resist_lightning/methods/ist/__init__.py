"""IST: each worker trains every layer, but only its own part of the hidden neurons."""

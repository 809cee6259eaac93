"""Flow matching as pure functions: path, loss and sampler."""

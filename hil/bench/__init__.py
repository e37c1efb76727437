"""Performance figures, each measured beside its peers in one process order: `penumbra bench`."""

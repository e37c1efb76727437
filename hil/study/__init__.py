"""Studies: many simulated orbits, without a model and without a broker."""

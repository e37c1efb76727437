"""The simulated spacecraft: orbit, electrical power and heat, independent of the flight models."""

"""The flight runtime of the payload computer."""

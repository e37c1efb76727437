"""Board drivers: what the payload computer draws, and how warm it is."""

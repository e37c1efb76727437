"""Eclipse forecast and power governor."""

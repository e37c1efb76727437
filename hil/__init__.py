"""The bench: plant, injectors, ground station, scenarios, reports and the command line."""

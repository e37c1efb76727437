"""The packets by subject; `telemetry.packets` is all of them."""

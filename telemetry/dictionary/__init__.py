"""The telecommands by subject; `telemetry.commands` is all of them."""

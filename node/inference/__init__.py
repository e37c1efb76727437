"""The model image, verified decoding, and the worker process that runs it."""

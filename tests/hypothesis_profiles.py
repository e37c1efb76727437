"""What Hypothesis draws: the same examples everywhere, or, in `make explore`, those of a seed.

Profile `same` is loaded for every run of the tests. Each property draws from a seed that is a hash of its own
source, nothing is kept from one run to the next, and no clock decides about a health check.
Profile `explore` draws from `--hypothesis-seed`.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import engine, providers

# Hypothesis also draws the constants it finds in the local modules that are loaded at the moment. That set
# depends on what ran before in the process, on how the project was installed, and on the name of its folder.
providers.is_local_module_file = lambda path: False
# By default a failing example is shrunk for 300 s. pytest ends a test after 120 s, and the example was lost.
engine.MAX_SHRINKING_SECONDS = 30

settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")

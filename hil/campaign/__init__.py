"""Fault campaigns: many seeded faults against live flight software, one record each, with intervals."""

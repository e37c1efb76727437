"""Fault campaigns: many seeded faults against the live flight software, one record each, figures with intervals."""

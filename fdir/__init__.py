"""Fault detection, isolation and recovery: decisions and memory integrity."""

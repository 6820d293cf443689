"""Decisions: pure functions of state, event and time. No clock, no I/O, no logging."""

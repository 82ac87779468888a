"""Schedules decide the stages of a run. One idea per file."""

"""Importance: one score per layer, higher = keep. One idea per file."""

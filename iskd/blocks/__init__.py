"""Compact blocks: smaller modules that take the place of a transformer block. One idea per file."""

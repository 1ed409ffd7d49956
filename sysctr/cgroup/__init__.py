"""Control groups: one driver for the unified hierarchy, one for hosts whose controllers are still v1."""

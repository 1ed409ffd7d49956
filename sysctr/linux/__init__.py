"""Thin, checked wrappers named as the system calls they make; no policy, no knowledge of containers."""

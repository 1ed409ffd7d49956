"""Configuration as text and as values; pure: imports nothing of sysctr but errors, opens no file."""

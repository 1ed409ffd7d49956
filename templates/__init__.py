"""Recipes of the templates that come with sysctr (data only)."""

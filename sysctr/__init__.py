"""sysctr runs long-lived, full-distribution Linux containers in user namespaces."""

__version__ = "0.1.0"

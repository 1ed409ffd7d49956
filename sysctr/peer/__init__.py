"""The connection between two hosts that trust each other: TLS, frames and messages, and no policy."""

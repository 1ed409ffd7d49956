"""What each action means: synchronous policy that runs in the daemon's worker threads."""

"""Where root file systems live; drivers declare traits and the engine branches on those, never on names."""

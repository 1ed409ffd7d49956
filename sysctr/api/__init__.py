"""The HTTP face of the engine; the only asynchronous code beside the terminal UI."""

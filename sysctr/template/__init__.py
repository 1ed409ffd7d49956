"""Where templates come from and how they are kept."""

"""What runs in keeper, supervisor and their children: standard library and sysctr.linux only, no policy."""

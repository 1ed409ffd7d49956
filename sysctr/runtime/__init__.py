"""What runs in the keeper, the supervisor and their children: standard library and sysctr.linux only, no policy."""

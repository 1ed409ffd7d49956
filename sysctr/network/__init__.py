"""Bridges, veth pairs, addresses, NAT and names of containers."""

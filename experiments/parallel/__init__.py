"""Meshes of devices, sharding rules and hosts."""

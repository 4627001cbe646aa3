"""Meshes, sharding rules and host-to-device placement."""

"""The handshake: peers exchange authenticated agent metadata over the bus."""

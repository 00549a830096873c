"""KV blocks in registered memory."""

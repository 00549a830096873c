"""The control plane: messages over NATS. The only importer of `nats`."""

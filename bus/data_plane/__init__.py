"""The data plane: registered memory and transfers over NIXL. The only importer of `nixl`."""

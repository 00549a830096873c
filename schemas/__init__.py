"""The wire of nixlbus: typed messages, subjects, codec and version. Imports msgspec and the standard library only."""

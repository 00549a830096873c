"""The `nixlbus` command: one module per subcommand."""

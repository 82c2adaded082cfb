"""The `randlora` command: one file per subcommand."""

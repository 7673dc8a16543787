"""The command line: one file per group of commands. Everything may be imported here; nothing imports it."""

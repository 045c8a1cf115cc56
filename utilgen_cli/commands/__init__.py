"""One thin file a subcommand: options, one library call, messages."""

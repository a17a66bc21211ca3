"""From a configuration to a new checkpoint, its measurement and its record: what the command line runs."""

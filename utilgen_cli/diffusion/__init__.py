"""The generator: loading, DDIM sampling, class tokens, and what tunes them for utility."""

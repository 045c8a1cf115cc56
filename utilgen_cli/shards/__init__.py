"""WebDataset tar shards: samples, reader, writer, operands. No torch here."""

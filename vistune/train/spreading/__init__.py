"""How a step is spread over devices and what it holds: shards, recomputation, compiling, types."""

"""Whether this machine can train, and what to change: found out on the standard library alone, so that it works on the
broken machine that it is for. Whatever may crash or hang is tried in a process of its own (`probes/`)."""

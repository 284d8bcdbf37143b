"""Who gets in, and when it closes: keys, hosts, caps and times around everything, the socket, the signals, the log."""

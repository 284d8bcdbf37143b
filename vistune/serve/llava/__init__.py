"""LLaVA's controller and worker protocol, for its existing clients: the same addresses, a thin layer over our own.

A prompt comes templated, an answer goes out as JSON objects with NUL between them, each with the whole text so far.
"""

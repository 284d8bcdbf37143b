"""Several whole servers on one machine behind one address: each is a process of its own, on a Unix socket.

The process in front passes requests on and imports nothing of models.
"""

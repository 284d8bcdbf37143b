"""Code that trains here and is written into model folders as it stands, so that they open where vistune is not.

Imports nothing of vistune but its neighbours.
"""

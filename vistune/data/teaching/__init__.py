"""Rows written by a text model, the teacher, from captions and boxes."""

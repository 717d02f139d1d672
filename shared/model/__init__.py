"""A loaded model with its arena, behind one interface: ``Runner``."""

"""The studies of ``outrider bench``."""

"""``outrider bench serve``: requests at a rate or a concurrency, and how they were served."""

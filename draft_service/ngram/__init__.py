"""A draft without a model: it proposes what followed in the text the last time it went so."""

"""Any decoder-only model of transformers."""

"""The KV arena: who owns which slots, and the tensors behind them."""

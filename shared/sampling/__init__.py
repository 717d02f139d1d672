"""From logits to tokens, the same for draft and base."""

"""Models that take set times and agree as often as they are told: to study what is around them."""

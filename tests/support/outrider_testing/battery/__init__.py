"""Random cases of everything a user may combine, judged by transformers.

``python -m outrider_testing.battery`` runs them; see its help.
"""

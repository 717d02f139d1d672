"""How proposals are judged: a file for each ``judge`` in the table of rules."""

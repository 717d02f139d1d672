"""What more than one of Outrider's services uses."""

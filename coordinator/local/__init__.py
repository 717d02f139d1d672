"""The three processes on this host: started, watched, stopped."""

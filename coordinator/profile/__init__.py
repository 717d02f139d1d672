"""The profile of one request as a file, a trace and a page."""

"""Configuration: declared once, read from TOML, environment and flags."""

"""SVG plots of measured figures."""

"""Tasks turn data into conversations."""

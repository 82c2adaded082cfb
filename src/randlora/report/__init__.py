"""Views of runs for people: tables and pictures."""

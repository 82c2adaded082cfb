"""What runs look like to people: tables and pictures."""

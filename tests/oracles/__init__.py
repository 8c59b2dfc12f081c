"""Independent implementations that the project's own are tested against."""

"""What several test files share: they import it from here, and nothing from each other."""

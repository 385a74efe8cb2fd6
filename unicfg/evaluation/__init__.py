"""Reading attributes back from images, and comparing families."""

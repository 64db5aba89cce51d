"""Knowledge graphs: facts as integers, and what leads from a question's entities to its answers."""

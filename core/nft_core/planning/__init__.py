"""What a run will need, known before anything is loaded."""

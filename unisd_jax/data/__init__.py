"""Items, chat templates, padding and the order of batches."""

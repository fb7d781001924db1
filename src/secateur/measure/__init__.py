"""Quality, size, memory and speed of a model, each measured by one protocol that is told with the number."""

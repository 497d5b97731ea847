"""What is said about a result: manifest, model card, figures."""
